"""What steps the weights: AdamW, its schedule, the gradient's norm, the weights' average.

At step s, with the gradient g of its batch:

    g' = g min(1, clip / |g|),   theta <- AdamW(theta, g', lr(s)),   ema <- d ema + (1 - d) theta
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from posttrain.core import distributed
from posttrain.core.errors import UserError
from posttrain.core.recipe import Seed, Strict
from posttrain.core.trackers import TrackerName


class TrainConfig(Strict):
    """How a run optimises. `batch` is global: over all ranks and micro-batches of one optimiser step."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    seed: Seed = 0
    accumulate: int = Field(1, ge=1)  # micro-batches per step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic; weights keep their own
    schedule: Literal["constant", "cosine"] = "constant"
    lr_end: float | None = Field(None, gt=0)  # where cosine ends; None: at 0
    warmup: int = Field(0, ge=0)  # so many first steps have lr 1 / warmup, 2 / warmup, ... 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)  # the largest norm of the gradient
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the weights' average, at step s at most (1 + s) / (10 + s); 0: none
    checkpoint_every: int = Field(100, ge=1)
    block_checkpointing: bool = False  # recompute each block in the backward pass, for memory
    trackers: tuple[TrackerName, ...] = ()  # what also shows the log and the validation videos

    @model_validator(mode="after")
    def _ends_below(self) -> "TrainConfig":
        if self.lr_end is not None and (self.schedule != "cosine" or self.lr_end > self.lr):
            raise PydanticCustomError(
                "part", "lr_end is where a cosine ends, at most at lr; fix both, or leave it out"
            )
        return self


def schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> Any:
    """The learning rate by step s = 0, 1, ..., as a torch scheduler:

    lr (s + 1) / warmup for s < warmup, and then lr, or lr_end + (lr - lr_end) (1 + cos(pi p)) / 2 where p goes from 0
    to 1 over the rest of the steps.
    """
    end = (train.lr_end or 0.0) / train.lr

    def factor(step: int) -> float:
        if step < train.warmup:
            return (step + 1) / train.warmup
        if train.schedule == "constant":
            return 1.0
        part = (step - train.warmup) / max(1, train.steps - train.warmup)
        return 0.5 * (1 + math.cos(math.pi * part)) * (1 - end) + end

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Optimizer:
    """AdamW over the parameters of `plain` that require gradients, with its schedule and the weights' average.

    Attributes:
        module: `plain` as accelerate wraps it, for several processes and another precision.

    Raises:
        UserError: nothing in `plain` requires gradients.
    """

    def __init__(self, plain: nn.Module, train: TrainConfig, accelerator: Any) -> None:
        from diffusers.training_utils import EMAModel

        self._plain, self._clip, self._accelerator = plain, train.clip, accelerator
        if not self.parameters:
            raise UserError(
                "model: nothing in it is trainable; give it an adapter, load it in fp32 to train all of it, and where "
                "there are two experts name model.expert",
                "conflict",
                "model",
            )
        adamw = torch.optim.AdamW(
            self.parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        self._schedule = schedule(adamw, train)  # unprepared: accelerate's would step once per rank
        self.module, self._adamw = accelerator.prepare(plain, adamw)
        self._ema = EMAModel(self.parameters, decay=train.ema) if train.ema else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self._plain.parameters() if p.requires_grad]

    def named(self) -> dict[str, nn.Parameter]:
        """The same by name, without what accelerate puts before it."""
        return {name: p for name, p in self._plain.named_parameters() if p.requires_grad}

    @property
    def lr(self) -> float:
        """Of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def clip(self) -> float:
        """Scale the gradient down to the largest norm; the norm that it had."""
        return float(self._accelerator.clip_grad_norm_(self.parameters, self._clip))

    def step(self) -> None:
        """Move the weights and their average, let the gradients go."""
        self._adamw.step()
        self._adamw.zero_grad()
        self._schedule.step()
        if self._ema:
            self._ema.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are in the module inside this context (its own where there is no average)."""
        if self._ema is None:
            yield
            return
        self._ema.store(self.parameters)
        self._ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self._ema.restore(self.parameters)

    def finish(self) -> nn.Module:
        """Put the averaged weights in for good, take off what accelerate wrapped around the module, return it."""
        if self._ema:
            self._ema.copy_to(self.parameters)
        self.module = self._accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        return self.module

    def weights(self) -> dict[str, Tensor]:
        """What is trained, as a checkpoint stores it."""
        return {name: p.detach().contiguous() for name, p in self.named().items()}

    def state(self) -> dict[str, Any]:
        """The rest of what the next step depends on. Every process has to call."""
        return {
            "optimizer": distributed.optimizer_state(self._adamw, self.parameters),
            "scheduler": self._schedule.state_dict(),
            "ema": self._ema.state_dict() if self._ema else None,
        }

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Put back what `weights` and `state` gave."""
        for name, parameter in self.named().items():
            parameter.data.copy_(weights[name])
        distributed.load_optimizer_state(self._adamw, self.parameters, state["optimizer"])
        self._schedule.load_state_dict(state["scheduler"])
        if self._ema:
            self._ema.load_state_dict(state["ema"])
            self._ema.to(self._accelerator.device)
