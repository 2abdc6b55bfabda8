"""What a method, the sampler and the metrics may ask of a video model, and how a recipe names one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from posttrain.core.recipe import Strict
from posttrain.models.lora import TARGETS

PROTOCOL = ("load", "bare", "save_merged")  # of a family's module


class AdapterConfig(Strict):
    """A low-rank adapter (see lora.py)."""

    rank: PositiveInt = 16
    alpha: PositiveInt | None = None  # None: alpha = rank, scale 1
    targets: tuple[str, ...] = TARGETS


class Merged(Strict):
    """An adapter that is folded into the weights, `scale` times as strong as it was trained to be."""

    path: str  # a run, its adapter folder, or a file
    scale: float = 1.0


class ModelConfig(Strict):
    """`model:` in a recipe. What training starts from is `path`, with `merge` folded in, continued from `start`.

    `start` is a run (its name in runs/ or its folder), an adapter or a transformer folder. An adapter is trained on, so
    that `adapter` must be of its rank, alpha and targets; a transformer takes the place of the one in `path`.
    """

    family: str = "wan"  # posttrain/models/<family>/
    path: str  # "pocket" (embedded), a local diffusers folder, or a hub id "owner/name"
    revision: str | None = None  # of a hub id: a branch, a tag or, to pin it, a commit
    init: Literal["pretrained", "random"] = "pretrained"  # random: the same architecture, drawn anew from `seed`
    dtype: Literal["fp32", "bf16"] = "fp32"  # of frozen weights and the text encoder; an adapter is always fp32
    adapter: AdapterConfig | None = None  # None: all weights are trained
    seed: int = 0  # of the adapter's and of random weights
    conditioning: Literal["image", "text"] = "image"  # image: the first picture of a clip is given
    expert: Literal["high", "low"] | None = None  # which of two (Wan2.2-A14B) is trained: that of much or little noise
    other_adapter: str | None = None  # folder of the adapter of the expert that is not trained, for sampling
    start: str | None = None
    merge: tuple[Merged, ...] = ()  # the run's own adapter file does not hold them

    @model_validator(mode="after")
    def _nothing_on_random_weights(self) -> Self:
        if self.init == "random" and (self.start or self.merge):
            raise PydanticCustomError("start", "init: random excludes start and merge; drop them or init")
        return self


class VideoModel(Protocol):
    """A latent video model under rectified flow. Pixels are in [-1, 1]; latents are normalised per channel.

    Its parts lie in main memory. Each comes to `device` when it is first used; `release` lets some leave it again, and
    `unload` main memory too.
    """

    transformer: nn.Module  # what is trained; may be replaced by its wrapped self
    device: torch.device  # where the work is done, and where what it returns lies
    n_cond_frames: int  # latent frames at the start that stay clean (time 0, no loss): 1 or 0
    times: tuple[float, float]  # t from low to below high, which `transformer` answers for
    boundary: float  # at t >= boundary the expert for much noise answers; 0 where there is one for all times
    text_tokens: int  # the length L of text_BLD

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip. Raises UserError for sizes that the model cannot take."""

    def latent_frames(self, frames: int) -> int:
        """How many latent frames the first so many pictures of a clip need."""

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Latents z_BCFHW: the posterior's mode, normalised."""

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        """Pixels video_BCFHW in [-1, 1]; differentiable.

        The gradient is for a loss that is minimised: a pixel beyond the range gets what leads it back.

        Args:
            recompute: the backward pass computes again what it needs, latent frame by latent frame, or all is kept.
            offload: what is kept for the backward pass waits in main memory.
        """

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """text_BLD, zero after each caption's last token."""

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        """What `velocity` wants to know of the first picture besides clean latents, for clips of `frames` pictures."""

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """v_BCFHW at per-frame times t_BF in [0, 1]; without clean frames, a clip has one time for all its frames."""

    def weights(self) -> Sequence[nn.Module]:
        """Every module that `velocity` may ask, the trained one among them."""

    def release(self) -> None:
        """Let all that `transformer` does not need for training leave the device, until it is used again."""

    def unload(self) -> None:
        """Let the same leave main memory too; it is read again when it is used again."""

    def scheduler(self) -> Any:
        """A fresh diffusers scheduler, as the model folder configures it."""

    def cache_key(self) -> str:
        """Changes whenever encode, encode_text or condition could give other numbers."""

    def save(self, path: Path) -> list[Path]:
        """Write what was trained (adapter file or transformer folder) below `path`; return the paths."""

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote."""
