"""A dry run of a training step at full size: tensors have a shape and a type but no values, so it needs no memory.

The method's own loop runs on the real transformer with its adapter; if the method decodes, also the sampler and the
decoder, forward and backward. It counts the peak of the bytes in use and the floating point operations, including
recomputation. Attention is counted as flash attention, captions at their full length. The mean of the pixels replaces
the rewards. Losers have no scores, and references are computed even if a run would have cached them.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.core.errors import UserError
from posttrain.core.meter import Meter
from posttrain.core.recipe import Plugin
from posttrain.methods.base import method_of, sampler
from posttrain.models.base import ModelConfig, Outline, family, is_video
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run, share
from posttrain.types import Batch, Random

SHORT = 2, 3  # steps of the two short samplers that are run instead of a long one


class Step(NamedTuple):
    """Memory (GiB) and operations that one optimiser step of one micro-batch needs on one device."""

    parameters: int  # of the transformer, without the adapter
    trained: int
    tokens: int  # of one clip
    teraflop: float  # of one micro-batch
    weights: float  # transformer, adapter, and what is not trained: a reference copy, ORO's decoder
    optimizer: float  # AdamW's two moments, and the moving average if there is one
    activations: float  # the batch, gradients and activations, at their peak
    offloaded: float  # the peak in main memory; not part of the others

    @property
    def memory(self) -> float:
        """GiB in total, without the 1 to 3 GiB of the allocator, cuBLAS and the driver."""
        return self.weights + self.optimizer + self.activations


def metered(shapes: Outline, meter: Meter) -> None:
    """Change the model so that offloaded tensors count as main memory and captions are tensors without values."""
    model = cast(Any, shapes.model)
    decode = model.decode

    def counted(z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        with meter.offloading() if offload else nullcontext():
            return decode(z_BCFHW, recompute)

    model.decode = counted
    model.encode_text = lambda captions: torch.empty(len(captions), model.text_tokens, shapes.text_width)


def clips_of(outline: Outline, batch: int, frames: int, height: int, width: int) -> Batch:
    """A micro-batch of latents with their text and conditions, without values."""
    shape = outline.model.latent_shape(frames, height, width)
    condition = {name: torch.empty(batch, *size) for name, size in outline.condition.items()}
    text_BLD = torch.empty(batch, outline.model.text_tokens, outline.text_width)
    return Batch(("",) * batch, torch.empty(batch, *shape), text_BLD, condition=condition)


def brightness(video_BCFHW: Tensor, batch: Batch) -> Tensor:
    """Replaces the rewards (rewards/base.py), whose networks are not counted."""
    return video_BCFHW.flatten(1).mean(1)


class DryRun:
    """The part of a `Run` that a method's loop uses: one micro-batch, and its gradient."""

    def __init__(self, module: nn.Module, batch: Batch, train: TrainConfig) -> None:
        self.module, self.batch, self.train, self.steps = module, batch, train, 0
        self.random = Random(train.seed, 0, range(len(batch.ids)))

    def batches(self) -> Iterator[Batch]:
        return self.rollouts(lambda batch: batch, updates=1)

    def rollouts(self, make: Callable[[Batch], Any], updates: int) -> Iterator[Any]:
        """The rollout and the first of its updates."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.train.precision == "bf16"):
            yield make(self.batch)

    def step(self, loss: Tensor, **metrics: float | Tensor) -> None:
        with torch.autocast("cpu", enabled=False):  # as in Run, which keeps cast weights until the step ends
            loss.backward()

    def add(self, part: Callable[[], Tensor]) -> None:
        self.step(part())


def dry_step(
    outline: Callable[[int, int, int], Outline],
    frames: int,
    height: int,
    width: int,
    method: Plugin,
    batch: int = 1,
    precision: Literal["fp32", "bf16"] = "bf16",
    block_checkpointing: bool = True,
    ema: bool = False,
    accumulates: bool = False,
    losers: int = 1,
) -> Step:
    """One training step of a model.

    Args:
        outline: gives the model for clips of (frames, height, width), as `Family.outline` does.
        frames, height, width: of the clips, in pixels.
        method: one that trains video models.
        batch: clips, or groups of them, in one micro-batch on one device.
        accumulates: whether the gradients of an earlier micro-batch exist already.
        losers: in a group.

    Raises:
        UserError: the clips do not fit the model.
    """
    shapes = outline(frames, height, width)
    model, body = shapes.model, cast(Any, shapes.model.transformer)
    asked = method_of(method)
    config = asked.DRY.config(method.config)
    inputs = asked.inputs(model, config)
    copies = [part for part in inputs.values() if isinstance(part, nn.Module)]
    if asked.rewards(config):
        inputs["rewards"] = {"brightness": (1.0, brightness)}
    settings = TrainConfig(steps=1, batch=batch, lr=1.0, precision=precision)
    if block_checkpointing:
        body.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        metered(shapes, meter)
        for part in (body, *copies, *([shapes.decoder] if asked.DRY.decodes else [])):
            part.to_empty(device="cpu")
            for tensor in (*part.parameters(), *part.buffers()):
                meter.see(tensor)
        weights = meter.live
        trained = [p for p in body.parameters() if p.requires_grad]
        for parameter in trained if accumulates else ():
            parameter.grad = torch.empty_like(parameter)
        clips = clips_of(shapes, batch, frames, height, width)
        run = DryRun(body, asked.DRY.batch(clips, config, losers, (frames, height, width)), settings)
        del clips
        asked.train(cast(Run, run), model, config, **inputs)
        if lacking := [p for p in trained if p.grad is None]:
            raise RuntimeError(f"{len(lacking)} trained tensors get no gradient")
    kept = sum(p.numel() * 4 for p in trained)
    return Step(
        parameters=sum(p.numel() for name, p in body.named_parameters() if ".lora_" not in name),
        trained=sum(p.numel() for p in trained),
        tokens=shapes.tokens,
        teraflop=meter.flop / 1e12,
        weights=weights / 2**30,
        optimizer=(3 if ema else 2) * kept / 2**30,
        activations=(meter.peak - weights) / 2**30,
        offloaded=meter.main.peak / 2**30,
    )


def whole_step(take: Callable[..., Step], method: Plugin) -> Step:
    """`take(method=method)`; for a long sampler, extrapolated from two short ones, because every step costs the same.

    Exact for operations. Memory grows by what each step keeps; if all weights are trained and the peak is in the
    sampler's backward pass, the result is too large by two latents a step.
    """
    less, more = (method_of(method).DRY.shorter(method.config, steps) for steps in SHORT)
    long = sampler(method.config)
    if less is None or more is None or long is None:
        return take(method=method)
    two, three = (take(method=replace(method, config=config)) for config in (less, more))
    others = long.steps - SHORT[1]
    return three._replace(
        teraflop=three.teraflop + others * (three.teraflop - two.teraflop),
        activations=three.activations + others * (three.activations - two.activations),
    )


def needs(
    config: ModelConfig,
    train: TrainConfig,
    method: Plugin,
    clip: tuple[int, int, int],
    processes: int = 1,
    losers: int = 1,
) -> tuple[str, float, float]:
    """Memory and operations that training with `method` on clips of (frames, height, width) needs in each process.

    Args:
        losers: in each group, if the method compares clips.

    Returns:
        One line of text, GiB on the device, and TFLOP a step.

    Raises:
        UserError: the model does not exist, the clips do not fit it, the batch does not divide, or the dry run does not
            support the family or the method.
    """
    if not is_video(config.family):
        raise UserError(
            f"model.family: the dry run supports only video models, not {config.family}; run doctor without it",
            "unsupported",
            "model.family",
        )
    asked = method_of(method)
    if sampler(method.config) and config.expert is not None:
        raise UserError(
            f"model.expert: the dry run supports {method.name} only for models with one expert; run doctor without it",
            "unsupported",
            "model.expert",
        )
    batch = share(train, processes)
    take = partial(
        dry_step,
        partial(family(config.family).outline, config),
        *clip,
        batch=batch,
        precision=train.precision,
        block_checkpointing=train.block_checkpointing,
        ema=bool(train.ema),
        accumulates=train.accumulate > 1,
        losers=losers,
    )
    step = whole_step(take, method)
    clip_text, each = " x ".join(map(str, clip)), "" if processes == 1 else f"in each of {processes} processes "
    clips = f"{batch} clips"
    if asked.GROUPS:
        clips = f"{batch} groups of {asked.DRY.members(method.config, losers)} clips"
    notes = [
        f"{step.offloaded:.1f} GiB of main memory" if step.offloaded else "",
        "without the rewards' networks" if asked.rewards(method.config) else "",
        asked.DRY.note(method.config),
    ]
    apart = "".join(f", {note}" for note in notes if note)
    teraflop = step.teraflop * train.accumulate
    line = (
        f"{step.parameters:,} parameters, {step.trained:,} trained; {each}{clips} at once of {clip_text} "
        f"({step.tokens:,} tokens each): {step.memory:.1f} GiB (weights {step.weights:.1f}, "
        f"optimizer {step.optimizer:.1f}, activations {step.activations:.1f}) and {teraflop:.3g} TFLOP a step{apart}"
    )
    return line, step.memory, teraflop
