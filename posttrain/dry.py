"""A whole training step at full size without its memory or its time: tensors that have a shape and nothing else.

What is run is the real thing, `psft_loss` on the real transformer with its adapter, forward and backward. Counted are
the bytes that are alive at once and the floating point operations, recomputation among them. Attention counts as its
flash form does, captions with all of their 512 tokens.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from posttrain.files import UserError
from posttrain.methods import psft
from posttrain.models import lora
from posttrain.models.base import ModelConfig
from posttrain.models.decode import decode
from posttrain.models.folders import read_configs
from posttrain.models.wan import DTYPES, TEXT_TOKENS, Wan
from posttrain.run import TrainConfig
from posttrain.types import Batch, Random

ATEN: Any = torch.ops.aten
# PyTorch's own table has all but the CPU's attention
FLOPS: dict[Any, Any] = dict(flop_registry) | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Step(NamedTuple):
    """What one optimiser step of one micro-batch on one device takes. Bytes are GiB."""

    parameters: int  # of the transformer, without the adapter
    trained: int
    tokens: int  # of one clip
    teraflop: float  # of one micro-batch
    weights: float  # the transformer and the adapter, as they are kept
    optimizer: float  # AdamW's two moments, and the average where there is one
    activations: float  # gradients and what lives meanwhile, at the worst moment

    @property
    def memory(self) -> float:
        """GiB in all. The allocator, cuBLAS and the driver come on top: 1 to 3 GiB."""
        return self.weights + self.optimizer + self.activations


class Meter(TorchDispatchMode):
    """Counts the storages that are alive, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flop = 0
        self.known: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


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
) -> Step:
    """One training step of `config`'s model.

    Args:
        transformer, vae: the configs of these parts; what they do not say is as in diffusers.
        frames, height, width: of the clips, in pixels.
        batch: clips in one micro-batch on one device.

    Raises:
        UserError: the clips do not fit the model.
    """
    with torch.device("meta"):
        body = WanTransformer3DModel.from_config(dict(transformer))
        eyes = AutoencoderKLWan.from_config(dict(vae))
        for name, parameter in body.named_parameters():
            if not set(name.split(".")) & set(body._keep_in_fp32_modules):
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        parameters = sum(p.numel() for p in body.parameters())
        if config.adapter is not None:
            lora.attach(body, config.adapter.rank, config.adapter.alpha, config.adapter.targets, config.seed)
    if block_checkpointing:
        body.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        body.to_empty(device="cpu")
        for tensor in (*body.parameters(), *body.buffers()):
            meter.see(tensor)
        model = Wan(body, eyes.config, {}, None, None, conditioning=config.conditioning)
        shape, condition = model.latent_shape(frames, height, width), {}
        if model.concatenates:
            channels = body.config.in_channels - shape[0]
            condition["channels"] = torch.empty(batch, channels, *shape[1:])
        if body.config.image_dim is not None:
            condition["image"] = torch.empty(batch, 257, body.config.image_dim)  # CLIP's patches and its class token
        text_BLD = torch.empty(batch, TEXT_TOKENS, body.config.text_dim)
        clips = Batch(("",) * batch, torch.empty(batch, *shape), text_BLD, condition=condition)
        weights = meter.live
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = psft.psft_loss(model, clips, psft.Config(), Random(0, 0, range(batch)))
        loss.backward()
        gradients = [p.grad for p in body.parameters() if p.grad is not None]
        trained = [p for p in body.parameters() if p.requires_grad]
        if len(gradients) != len(trained):
            raise RuntimeError(f"{len(trained) - len(gradients)} trained tensors get no gradient")
    kept = sum(p.numel() * 4 for p in trained)
    patch = body.config.patch_size
    return Step(
        parameters=parameters,
        trained=sum(p.numel() for p in trained),
        tokens=(shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2]),
        teraflop=meter.flop / 1e12,
        weights=weights / 2**30,
        optimizer=(3 if ema else 2) * kept / 2**30,
        activations=(meter.peak - weights) / 2**30,
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

    `offload` (models/decode.py) takes all caches (`cache_bytes`) off the GiB but the two that are at hand.

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
            brightness = decode(eyes, z_BCFHW, recompute).sum()
        brightness.backward()
    return meter.peak / 2**30, meter.flop / 1e12


def needs(
    config: ModelConfig, train: TrainConfig, clip: tuple[int, int, int], processes: int = 1
) -> tuple[str, float, float]:
    """What training on clips of (frames, height, width) takes in each of so many processes.

    Returns:
        It in a line, its GiB on the device, and its TFLOP a step.

    Raises:
        UserError: the model is not there, the clips do not fit it, or the batch does not divide.
    """
    if config.family != "wan":
        raise UserError(f"model.family: what training takes is only known for wan, not for {config.family}")
    parts = train.accumulate * processes
    if train.batch % parts:
        raise UserError(
            f"train.batch: {train.batch} does not divide into {train.accumulate} (train.accumulate) x {processes} "
            "(processes) parts; lower train.accumulate, or name other --processes"
        )
    batch = train.batch // parts
    step = dry_step(
        config,
        *read_configs(config.path, config.revision),
        *clip,
        batch=batch,
        precision=train.precision,
        block_checkpointing=train.block_checkpointing,
        ema=bool(train.ema),
    )
    what, each = " x ".join(map(str, clip)), "" if processes == 1 else f"in each of {processes} processes "
    teraflop = step.teraflop * train.accumulate
    line = (
        f"{step.parameters:,} parameters, {step.trained:,} trained; {each}{batch} clips at once of {what} "
        f"({step.tokens:,} tokens each): {step.memory:.1f} GiB (weights {step.weights:.1f}, "
        f"optimizer {step.optimizer:.1f}, activations {step.activations:.1f}) and {teraflop:.3g} TFLOP a step"
    )
    return line, step.memory, teraflop
