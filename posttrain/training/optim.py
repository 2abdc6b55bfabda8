"""The optimiser: AdamW, learning rate schedule, gradient clipping, moving average of the weights (EMA).

At step s, with the gradient g of the batch:

    g' = g min(1, clip / |g|),   theta <- AdamW(theta, g', lr(s)),   ema <- d ema + (1 - d) theta
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
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
    """Settings of the optimiser. `batch` is global: over all ranks and micro-batches of one optimiser step."""

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
                "part", "lr_end needs schedule: cosine, and must be at most lr; change them, or leave it out"
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
    """AdamW over the parameters of `plain` that require gradients, with its schedule and the EMA of the weights.

    Attributes:
        module: `plain` wrapped by accelerate, for several processes and mixed precision.

    Raises:
        UserError: nothing in `plain` requires gradients.
    """

    def __init__(self, plain: nn.Module, train: TrainConfig, accelerator: Any) -> None:
        from diffusers.training_utils import EMAModel

        self._plain, self._clip, self._accelerator = plain, train.clip, accelerator
        if not self.parameters:
            raise UserError(
                "model: none of its weights can be trained; set model.adapter, or model.dtype=fp32 to train all "
                "weights; for a model with two experts also set model.expert",
                "conflict",
                "model",
            )
        adamw = torch.optim.AdamW(
            self.parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        self._schedule = schedule(adamw, train)  # unprepared: accelerate's would step once per rank
        self.module, self._adamw = accelerator.prepare(plain, adamw)
        self._ema = EMAModel(self.parameters, decay=train.ema) if train.ema else None

    @cached_property  # a walk over all modules takes milliseconds
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self._plain.parameters() if p.requires_grad]

    def named(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, without the prefix of accelerate's wrapper."""
        return {name: p for name, p in self._plain.named_parameters() if p.requires_grad}

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def clip(self) -> float:
        """Scale the gradient down to the largest allowed norm; returns its norm before."""
        return float(self._accelerator.clip_grad_norm_(self.parameters, self._clip))

    def step(self) -> None:
        """Update the weights and their average, and free the gradients."""
        self._adamw.step()
        self._adamw.zero_grad()
        self._schedule.step()
        if self._ema:
            self._ema.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the module has the averaged weights (its own if there is no average)."""
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
        """Put the averaged weights into the module permanently and return it without accelerate's wrapper."""
        if self._ema:
            self._ema.copy_to(self.parameters)
        self.module = self._accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        return self.module

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, as a checkpoint stores them."""
        return {name: p.detach().contiguous() for name, p in self.named().items()}

    def state(self) -> dict[str, Any]:
        """All other state of the optimiser. Every process must call this."""
        return {
            "optimizer": distributed.optimizer_state(self._adamw, self.parameters),
            "scheduler": self._schedule.state_dict(),
            "ema": self._ema.state_dict() if self._ema else None,
        }

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore the results of `weights` and `state`."""
        for name, parameter in self.named().items():
            parameter.data.copy_(weights[name])
        distributed.load_optimizer_state(self._adamw, self.parameters, state["optimizer"])
        self._schedule.load_state_dict(state["scheduler"])
        if self._ema:
            self._ema.load_state_dict(state["ema"])
            self._ema.to(self._accelerator.device)
