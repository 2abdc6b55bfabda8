"""A whole training step at full size without its memory or its time: tensors that have a shape and nothing else.

What is run is the real thing, the method's own loss on the real transformer with its adapter, and for ORO the sampler
and the decoder, forward and backward. Counted are the bytes that are alive at once and the floating point operations,
recomputation among them. Attention counts as its flash form does, captions with all of their 512 tokens. Rewards are
not asked: ORO's is the mean of the pixels. Losers are not drawn or scored, and cached references are asked for.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from posttrain.core.errors import UserError
from posttrain.core.meter import Meter
from posttrain.core.recipe import Strict
from posttrain.methods import gdpo, oro, psft
from posttrain.models import lora
from posttrain.models.base import ModelConfig
from posttrain.models.folders import read_configs
from posttrain.models.wan.decode import decode
from posttrain.models.wan.model import DTYPES, TEXT_TOKENS, Wan
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

PSFT = psft.Config()
SHORT = 2, 3  # steps of a sampler, by which longer ones are told


class Step(NamedTuple):
    """What one optimiser step of one micro-batch on one device takes. Bytes are GiB."""

    parameters: int  # of the transformer, without the adapter
    trained: int
    tokens: int  # of one clip
    teraflop: float  # of one micro-batch
    weights: float  # transformer and adapter as they are kept, and what is frozen beside them: a copy, ORO's decoder
    optimizer: float  # AdamW's two moments, and the average where there is one
    activations: float  # the batch, gradients and what lives meanwhile, at the worst moment
    offloaded: float  # in main memory at its worst moment, not counted in the others

    @property
    def memory(self) -> float:
        """GiB in all. The allocator, cuBLAS and the driver come on top: 1 to 3 GiB."""
        return self.weights + self.optimizer + self.activations


class Timetable(UniPCMultistepScheduler):
    """The scheduler of Wan's folders, whose times can be read where tensors have no values."""

    timesteps: Any

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            super().set_timesteps(*args, **kwargs)
            times = self.timesteps.tolist()
        self.timesteps = [torch.tensor(time) for time in times]
        self.set_begin_index(0)


class DryWan(Wan):
    """Wan on a meter. It has no VAE but in ORO, where it decodes."""

    meter: Meter

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        with self.meter.offloading() if offload else nullcontext():
            return super().decode(z_BCFHW, recompute)


def outline(config: ModelConfig, transformer: Mapping[str, Any]) -> WanTransformer3DModel:
    """The transformer that `config` trains, with its adapter, as shapes alone (on torch's meta device)."""
    with torch.device("meta"):
        body = WanTransformer3DModel.from_config(dict(transformer))
        for name, parameter in body.named_parameters():
            if not set(name.split(".")) & set(body._keep_in_fp32_modules):
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        if config.adapter is not None:
            lora.attach(body, config.adapter.rank, config.adapter.alpha, config.adapter.targets, config.seed)
    return body


def clips_of(model: Wan, method: Strict, batch: int, losers: int, frames: int, height: int, width: int) -> Batch:
    """A micro-batch as the data of `method` are, without values."""
    shape, text_dim, condition = model.latent_shape(frames, height, width), model.config.text_dim, {}
    if model.concatenates:
        channels = model.config.in_channels - shape[0]
        condition["channels"] = torch.empty(batch, channels, *shape[1:])
    if model.config.image_dim is not None:
        condition["image"] = torch.empty(batch, 257, model.config.image_dim)  # CLIP's patches and its class token
    more: dict[str, Any] = {}
    if isinstance(method, gdpo.Config):
        more["losers_BMCFHW"] = torch.empty(batch, losers, *shape)
    if isinstance(method, oro.Config):
        told = oro.truths(method)
        more["video_BCFHW"] = torch.empty(batch, 3, frames, height, width)
        more["instances_BFHW"] = torch.empty(batch, frames, height, width, dtype=torch.uint8)
        if "flow" in told:
            more["flow_BFCHW"] = torch.empty(batch, frames, 2, height, width)
        if "depth" in told:
            more["depth_BFHW"] = torch.empty(batch, frames, height, width)
    text_BLD = torch.empty(batch, TEXT_TOKENS, text_dim)
    return Batch(("",) * batch, torch.empty(batch, *shape), text_BLD, condition=condition, **more)


def frozen_copy(model: Wan, method: Strict) -> nn.Module | None:
    """What gdpo's reference is beside the model; `start` is not asked where it would look into the weights."""
    if not isinstance(method, gdpo.Config) or (method.reference == "lora" and lora.attached(model.transformer)):
        return None
    return gdpo.start(model, method)


class Turns:
    """What `gdpo.in_turn` asks of a run."""

    def add(self, part: Callable[[], Tensor]) -> None:
        loss = part()
        with torch.autocast("cpu", enabled=False):
            loss.backward()


def preference_loss(
    model: Wan, clips: Batch, config: gdpo.Config, random: Random, base: nn.Module | None, precision: str
) -> Tensor:
    """A step of `gdpo.train` that has to ask its reference."""
    assert clips.z0_BCFHW is not None
    assert clips.losers_BMCFHW is not None
    assert clips.text_BLD is not None
    losers_BMCFHW = clips.losers_BMCFHW[:, : compared(config, clips.losers_BMCFHW.shape[1])]
    placed = gdpo.place(model, clips.z0_BCFHW, losers_BMCFHW, random, config)
    ones_BM = torch.ones(losers_BMCFHW.shape[:2])  # physics rewarding has no values to look at
    drawn = gdpo.Draw(*placed, clips.text_BLD, clips.condition, alpha_BM=ones_BM, gamma_BM=ones_BM, names=())
    with torch.no_grad(), gdpo.reference(model, base, precision):
        ref_BN = gdpo.all_errors(model, drawn, config)
    if config.backward == "in_turn":
        return gdpo.in_turn(cast(Run, Turns()), model, drawn, ref_BN, config)[0]
    return gdpo.compare(gdpo.all_errors(model, drawn, config), ref_BN, drawn, config)[0]


def compared(config: gdpo.Config, losers: int) -> int:
    """How many losers of a group go through the model."""
    return 1 if config.mode == "pair" else losers


def brightness(video_BCFHW: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Stands in for rewards (rewards/base.py), whose networks are not counted."""
    return video_BCFHW.flatten(1).mean(1), {}


def loss_of(model: Wan, clips: Batch, method: Strict, base: nn.Module | None, precision: str) -> Tensor:
    """The loss that `method` takes the gradient of."""
    random = Random(0, 0, range(len(clips.ids)))
    match method:
        case gdpo.Config():
            return preference_loss(model, clips, method, random, base, precision)
        case oro.Config():
            negative_1LD = torch.empty(1, TEXT_TOKENS, model.config.text_dim) if method.sampler.guided else None
            return oro.oro_loss(model, clips, brightness, method, random, negative_1LD)[0]
        case psft.Config():
            return psft.psft_loss(model, clips, method, random)[0]
    name = type(method).__module__.rpartition(".")[2]
    raise UserError(f"method.name: what training takes is only known for psft, gdpo and oro, not for {name}")


def dry_step(
    config: ModelConfig,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    precision: str = "bf16",
    block_checkpointing: bool = True,
    ema: bool = False,
    accumulates: bool = False,
    method: Strict = PSFT,
    losers: int = 1,
) -> Step:
    """One training step of `config`'s model.

    Args:
        transformer, vae: the configs of these parts; what they do not say is as in diffusers.
        frames, height, width: of the clips, in pixels.
        batch: clips, or groups of them, in one micro-batch on one device.
        accumulates: whether the gradients of a micro-batch before this one are there.
        method: the Config of psft, gdpo or oro.
        losers: in a group.

    Raises:
        UserError: the clips do not fit the model, or another method is asked for.
    """
    body = outline(config, transformer)
    with torch.device("meta"):
        eyes = AutoencoderKLWan.from_config(dict(vae)).requires_grad_(False)
    scheduler = Timetable(use_flow_sigmas=True, prediction_type="flow_prediction")
    parts = {"vae": lambda: eyes}
    model = DryWan(body, eyes.config, parts, None, scheduler, conditioning=config.conditioning)
    base = frozen_copy(model, method)
    if block_checkpointing:
        body.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        model.meter = meter
        for part in (body, base, eyes if isinstance(method, oro.Config) else None):
            if part is not None:
                part.to_empty(device="cpu")
                for tensor in (*part.parameters(), *part.buffers()):
                    meter.see(tensor)
        weights = meter.live
        trained = [p for p in body.parameters() if p.requires_grad]
        for parameter in trained if accumulates else ():
            parameter.grad = torch.empty_like(parameter)
        clips = clips_of(model, method, batch, losers, frames, height, width)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(model, clips, method, base, precision)
            with torch.autocast("cpu", enabled=False):  # as in Run, which keeps what was cast until the step's end
                loss.backward()
        if lacking := [p for p in trained if p.grad is None]:
            raise RuntimeError(f"{len(lacking)} trained tensors get no gradient")
    kept = sum(p.numel() * 4 for p in trained)
    patch, shape = body.config.patch_size, model.latent_shape(frames, height, width)
    return Step(
        parameters=sum(p.numel() for name, p in body.named_parameters() if ".lora_" not in name),
        trained=sum(p.numel() for p in trained),
        tokens=(shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2]),
        teraflop=meter.flop / 1e12,
        weights=weights / 2**30,
        optimizer=(3 if ema else 2) * kept / 2**30,
        activations=(meter.peak - weights) / 2**30,
        offloaded=meter.main.peak / 2**30,
    )


def whole_step(take: Callable[..., Step], method: Strict) -> Step:
    """`take(method=method)`; what a long sampler takes that is differentiated at all steps is told by two short ones.

    Exact for the arithmetic. The memory grows by what each step keeps; where all weights are trained and the worst
    moment is in the sampler's backward pass, it is told too large, by two latents a step.
    """
    if not isinstance(method, oro.Config) or method.grad != "all" or method.sampler.steps <= SHORT[1]:
        return take(method=method)
    samplers = (method.sampler.model_copy(update={"steps": steps}) for steps in SHORT)
    less, step = (take(method=method.model_copy(update={"sampler": sampler})) for sampler in samplers)
    more = method.sampler.steps - SHORT[1]
    return step._replace(
        teraflop=step.teraflop + more * (step.teraflop - less.teraflop),
        activations=step.activations + more * (step.activations - less.activations),
    )


def dry_decode(
    vae: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    precision: str = "bf16",
    recompute: bool = True,
) -> tuple[float, float]:
    """GiB alive at the worst moment of a decode and its gradient, the VAE's weights among them, and their TFLOP.

    `offload` (models/wan/decode.py) takes all caches (`cache_bytes`) off the GiB but the two that are at hand.

    Args:
        vae: the config of the VAE; what it does not say is as in diffusers.
        frames, height, width: of the clips, in pixels.
    """
    with torch.device("meta"):
        eyes = AutoencoderKLWan.from_config(dict(vae)).requires_grad_(False)
    config = eyes.config
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        eyes.to_empty(device="cpu")
        cells = height // config.scale_factor_spatial, width // config.scale_factor_spatial
        latents = 1 + (frames - 1) // config.scale_factor_temporal
        z_BCFHW = torch.empty(batch, config.z_dim, latents, *cells, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = decode(eyes, z_BCFHW, recompute).sum()
        loss.backward()
    return meter.peak / 2**30, meter.flop / 1e12


def needs(
    config: ModelConfig,
    train: TrainConfig,
    clip: tuple[int, int, int],
    processes: int = 1,
    method: Strict = PSFT,
    losers: int = 1,
) -> tuple[str, float, float]:
    """What training by `method` on clips of (frames, height, width) takes in each of so many processes.

    Args:
        method: its Config.
        losers: in each group, for gdpo.

    Returns:
        It in a line, its GiB on the device, and its TFLOP a step.

    Raises:
        UserError: the model is not there, the clips do not fit it, the batch does not divide, or it is not known.
    """
    if config.family != "wan":
        raise UserError(f"model.family: what training takes is only known for wan, not for {config.family}")
    if isinstance(method, oro.Config) and config.expert is not None:
        raise UserError("model.expert: what ORO takes is only known for models of one expert")
    parts = train.accumulate * processes
    if train.batch % parts:
        raise UserError(
            f"train.batch: {train.batch} does not divide into {train.accumulate} (train.accumulate) x {processes} "
            "(processes) parts; lower train.accumulate, or name other --processes"
        )
    batch = train.batch // parts
    take = partial(
        dry_step,
        config,
        *read_configs(config.path, config.revision),
        *clip,
        batch=batch,
        precision=train.precision,
        block_checkpointing=train.block_checkpointing,
        ema=bool(train.ema),
        accumulates=train.accumulate > 1,
        losers=losers,
    )
    step = whole_step(take, method)
    what, each = " x ".join(map(str, clip)), "" if processes == 1 else f"in each of {processes} processes "
    clips, apart = f"{batch} clips", ""
    if isinstance(method, gdpo.Config):
        clips = f"{batch} groups of {1 + compared(method, losers)} clips"
        apart = ", where the reference is asked" if method.cached_draws else ""
    if isinstance(method, oro.Config):
        apart = ", without the rewards' networks"
        if method.offload:
            apart = f", {step.offloaded:.1f} GiB of main memory{apart}"
    teraflop = step.teraflop * train.accumulate
    line = (
        f"{step.parameters:,} parameters, {step.trained:,} trained; {each}{clips} at once of {what} "
        f"({step.tokens:,} tokens each): {step.memory:.1f} GiB (weights {step.weights:.1f}, "
        f"optimizer {step.optimizer:.1f}, activations {step.activations:.1f}) and {teraflop:.3g} TFLOP a step{apart}"
    )
    return line, step.memory, teraflop
