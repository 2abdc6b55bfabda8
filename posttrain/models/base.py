"""What the house asks of a family of video models, and how a recipe names a model.

A family is a package or a module, `posttrain/models/<name>`. It implements `Family`, and what its `load` returns
implements `VideoModel`. Nothing outside it names it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import torch
from pydantic import PositiveInt, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.recipe import Seed, Strict, resolve
from posttrain.flow import Scheduler
from posttrain.pocket import FAMILY

# of a family's module, see `Family`; a recipe may name what has all of these
PROTOCOL = (
    *("SIDE", "FRAMES", "TARGETS", "load", "bare", "save_merged", "outline"),
    *("defaults", "needs_picture", "original_name", "load_stock_adapter", "pipeline_code"),
)


class AdapterConfig(Strict):
    """A low-rank adapter (see lora.py)."""

    rank: PositiveInt = 16
    alpha: PositiveInt | None = None  # None: alpha = rank, scale 1
    targets: tuple[str, ...] | None = None  # name endings of linear layers; None: those of the family


class Merged(Strict):
    """An adapter that is folded into the weights, `scale` times as strong as it was trained to be."""

    path: str  # a run, its adapter folder, or a file
    scale: float = 1.0


class ModelConfig(Strict):
    """`model:` in a recipe. What training starts from is `path`, with `merge` folded in, continued from `start`.

    `start` is a run (its name in runs/ or its folder), an adapter or a transformer folder. An adapter is trained on, so
    that `adapter` must be of its rank, alpha and targets; a transformer takes the place of the one in `path`.
    """

    family: str = FAMILY  # posttrain/models/<family>; for pretraining a network, posttrain/nets/<family>.py
    path: str  # "pocket" (embedded), a local diffusers folder, or a hub id "owner/name"
    revision: str | None = None  # of a hub id: a branch, a tag or, to pin it, a commit
    init: Literal["pretrained", "random"] = "pretrained"  # random: the same architecture, drawn anew from `seed`
    dtype: Literal["fp32", "bf16"] = "fp32"  # of frozen weights and the text encoder; an adapter is always fp32
    adapter: AdapterConfig | None = None  # None: all weights are trained
    seed: Seed = 0  # of the adapter's and of random weights
    conditioning: Literal["image", "text"] = "image"  # image: the first frame of a clip is given
    expert: Literal["high", "low"] | None = None  # which of two (Wan2.2-A14B) is trained: that of much or little noise
    other_adapter: str | None = None  # folder of the adapter of the expert that is not trained, for sampling
    start: str | None = None
    merge: tuple[Merged, ...] = ()  # the run's own adapter file does not hold them

    @field_validator("family")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            resolve(("models", "nets"), name)
        except UserError as error:
            raise PydanticCustomError("name", "{reason}", {"reason": str(error)}) from error
        return name

    @field_validator("adapter")
    @classmethod
    def _targets_of_the_family(cls, adapter: AdapterConfig | None, info: ValidationInfo) -> AdapterConfig | None:
        name = info.data.get("family")
        if adapter is None or adapter.targets is not None or name is None or not is_video(name):
            return adapter
        return adapter.model_copy(update={"targets": family(name).TARGETS})

    @model_validator(mode="after")
    def _of_a_video_model(self) -> Self:
        given = [name for name in ("start", "merge", "adapter") if getattr(self, name)]
        if given and not is_video(self.family):
            raise PydanticCustomError(
                "part",
                "{given} is for video models, and {family} is a network, which starts from path; leave it out",
                {"given": given[0], "family": self.family},
            )
        return self

    @model_validator(mode="after")
    def _nothing_on_random_weights(self) -> Self:
        if self.init == "random" and (self.start or self.merge):
            raise PydanticCustomError("start", "init: random excludes start and merge; drop them or init")
        return self


class VideoModel(Protocol):
    """A latent video model under rectified flow. Pixels are in [-1, 1]; latents are normalised per channel.

    Inside, latents, times and the sign of velocities may be a family's own; what goes in and out is as in types.py.

    Its parts lie in main memory. Each comes to `device` when it is first used; `release` lets some leave it again, and
    `unload` main memory too.
    """

    transformer: (
        nn.Module
    )  # what is trained: diffusers' ModelMixin with PeftAdapterMixin, or what was wrapped around it
    device: torch.device  # where the work is done, and where what it returns lies
    n_cond_frames: int  # latent frames at the start that stay clean (time 0, no loss): 1 or 0
    times: tuple[float, float]  # t from low to below high, which `transformer` answers for
    boundary: float  # at t >= boundary the expert for much noise answers; 0 where there is one for all times
    text_tokens: int  # the length L of text_BLD

    @property
    def module(self) -> nn.Module:
        """`transformer`, by the name that what is trained has in networks (posttrain/nets), too."""

    @module.setter
    def module(self, module: nn.Module) -> None: ...

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
        """text_BLD float32, zero after each caption's last token.

        These zeros are the text's mask: a transformer that takes one gets it of `text_lengths`.
        """

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        """What `velocity` wants to know of the first frame besides clean latents, for clips of `frames` pictures."""

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """v_BCFHW at per-frame times t_BF in [0, 1]; without clean frames, a clip has one time for all its frames."""

    def weights(self) -> Sequence[nn.Module]:
        """Every module that `velocity` may ask, the trained one among them."""

    def release(self) -> None:
        """Let all that `transformer` does not need for training leave the device, until it is used again."""

    def unload(self) -> None:
        """Free the main memory of the same parts too; each is read from its file again when it is next used."""

    def scheduler(self) -> Scheduler:
        """A fresh scheduler, as the model folder configures it."""

    def cache_key(self) -> str:
        """Changes whenever encode, encode_text or condition could give other numbers."""

    def save(self, path: Path) -> list[Path]:
        """Write what was trained (adapter file or transformer folder) below `path`; return the paths."""

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote. Raises UserError when it is absent or of another shape."""


def text_lengths(text_BLD: Tensor) -> Tensor:
    """How many tokens each caption has before the zero padding: (B,) int64."""
    place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
    return ((text_BLD != 0).any(-1) * (place_L + 1)).amax(1)


class Defaults(NamedTuple):
    """What a model is used with where nobody says otherwise."""

    frames: int
    size: tuple[int, int]  # (height, width)
    fps: float
    steps: int
    guidance: float
    guidance_low: float | None = None  # of the expert for little noise; None: the same


SAMPLER = ("steps", "guidance", "guidance_low")  # those of them that say how it is sampled


class Outline(NamedTuple):
    """A model as shapes alone, for clips of one size; its weights lie on torch's meta device."""

    model: VideoModel  # with its adapter; the times of its scheduler can be read where tensors have no values
    decoder: nn.Module  # what `model.decode` asks
    tokens: int  # of one clip, in the transformer
    text_width: int  # the D of text_BLD
    condition: dict[str, tuple[int, ...]]  # the shape, without B, of each tensor that `model.condition` gives


class Family(Protocol):
    """The package or module posttrain.models.<name>. PROTOCOL lists what is here."""

    SIDE: int  # height and width of clips in multiples of this fit every model of the family
    FRAMES: int  # so does this number of frames, a small one
    TARGETS: tuple[str, ...]  # name endings of the layers that get an adapter where the recipe does not say

    def load(self, config: ModelConfig, device: str | torch.device = "cpu") -> VideoModel:
        """The model that a recipe names, in main memory; only what will be trained has requires_grad.

        Raises:
            UserError: there is no such model, or a part is missing, broken or does not fit the others.
        """

    def bare(self, config: ModelConfig) -> nn.Module:
        """The transformer as training starts from it (with `start` and `merge`), before there is an adapter."""

    def save_merged(self, config: ModelConfig, adapter: Path, path: Path) -> None:
        """Write the diffusers folder `path`: that transformer with `adapter` folded in."""

    def outline(self, config: ModelConfig, frames: int, height: int, width: int) -> Outline:
        """What `load` would give, without weights. Raises UserError: no such model, or the clips do not fit it."""

    def defaults(self, path: str) -> Defaults:
        """Of the model that `path` names."""

    def needs_picture(self, path: str, revision: str | None = None) -> bool:
        """Whether the model that `path` names is made to continue a first frame, and is of no use without."""

    def original_name(self, layer: str) -> str | None:
        """What the original code, and with it ComfyUI, calls a layer of the transformer; None: it has no such name."""

    def load_stock_adapter(self, transformer: nn.Module, file: Path) -> None:
        """Put the adapter in `file` onto `transformer` (as from `bare`) as users of the stock pipeline do."""

    def pipeline_code(
        self, config: ModelConfig, adapter: bool, clip: Mapping[str, Any], sampler: Mapping[str, Any]
    ) -> str | None:
        """Python that makes a clip with the stock pipeline, run in a run's folder; None where no pipeline does.

        Args:
            adapter: adapter/ holds an adapter, else the whole transformer.
            clip: caption, frames, size and fps, as far as they are known.
            sampler: the values of SAMPLER.
        """


def family(name: str) -> Family:
    """The family of video models of this name. Raises UserError: there is none; the message lists those there are."""
    return cast(Family, resolve("models", name))


def is_video(name: str) -> bool:
    """Whether `model.family` of this name is a family of video models, and not a network for pretraining."""
    return resolve(("models", "nets"), name).__name__.startswith("posttrain.models.")


def sampler(defaults: Defaults, *asked: Mapping[str, Any]) -> dict[str, Any]:
    """The values of SAMPLER, each where the last of `asked` that has it says so, else as in `defaults`.

    A guidance without its own guidance_low is that of both experts.
    """
    chosen = defaults._asdict()
    for changes in asked:
        both = {"guidance_low": None} if "guidance" in changes else {}
        chosen |= both | {key: changes[key] for key in SAMPLER if key in changes}
    return {key: chosen[key] for key in SAMPLER}
