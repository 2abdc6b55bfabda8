"""The interface of a family of video models, and `model:` of a recipe.

A family is a package or a module, `posttrain/models/<name>`. It implements `Family`, and the result of its `load`
implements `VideoModel`. No other code names a family.
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
    """An adapter that is merged into the weights, `scale` times as strong as it was trained."""

    path: str  # a run, its adapter folder, or a file
    scale: float = 1.0


class ModelConfig(Strict):
    """`model:` in a recipe. Training starts from `path`, with `merge` merged into the weights, and continues `start`.

    `start` is a run (its name in runs/ or its folder), an adapter or a transformer folder. If it is an adapter,
    training continues with it, so `adapter` must have its rank, alpha and targets; a transformer replaces the one in
    `path`.
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
                "{given} is for video models; a network such as {family} starts from model.path; leave it out",
                {"given": given[0], "family": self.family},
            )
        return self

    @model_validator(mode="after")
    def _nothing_on_random_weights(self) -> Self:
        if self.init == "random" and (self.start or self.merge):
            raise PydanticCustomError("start", "init: random cannot be used with start or merge; leave one of them out")
        return self


class VideoModel(Protocol):
    """A latent video model under rectified flow. Pixels are in [-1, 1]; latents are normalised per channel.

    Internally, a family may use its own latents, times and sign of velocities; inputs and outputs are as in types.py.

    Its parts are in main memory. Each moves to `device` when it is first used; `release` moves some back, and `unload`
    frees their main memory too.
    """

    transformer: (
        nn.Module
    )  # what is trained: diffusers' ModelMixin with PeftAdapterMixin, or what was wrapped around it
    device: torch.device  # where the work is done, and where what it returns lies
    n_cond_frames: int  # latent frames at the start that stay clean (time 0, no loss): 1 or 0
    times: tuple[float, float]  # low <= t < high: the times at which `transformer` is used
    boundary: float  # at t >= boundary the expert for high noise is used; 0 if one is used at all times
    text_tokens: int  # the length L of text_BLD

    @property
    def module(self) -> nn.Module:
        """`transformer`, under the name of the trained module that networks (posttrain/nets) also use."""

    @module.setter
    def module(self, module: nn.Module) -> None: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip. Raises UserError for sizes that the model cannot take."""

    def latent_frames(self, frames: int) -> int:
        """The number of latent frames for this many frames from the start of a clip."""

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Latents z_BCFHW: the posterior's mode, normalised."""

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        """Pixels video_BCFHW in [-1, 1]; differentiable.

        Assumes that the loss is minimised: a pixel outside the range has only the gradient that moves it back.

        Args:
            recompute: whether the backward pass recomputes activations, latent frame by latent frame; else all are
                kept.
            offload: whether activations kept for the backward pass are moved to main memory.
        """

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """text_BLD float32, zero after each caption's last token.

        The zeros mark the padding: a transformer that takes a mask gets it from `text_lengths`.
        """

    def without_caption(self, text_BLD: Tensor, empty_1LD: Tensor) -> Tensor:
        """What replaces text_BLD (same shape) in training without a caption: the unconditional text of guidance.

        Args:
            empty_1LD: of `encode_text([""])`.
        """

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        """Inputs of `velocity` from the first frame besides clean latents, for clips of `frames` frames."""

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """v_BCFHW at per-frame times t_BF in [0, 1]; without clean frames, a clip has one time for all its frames."""

    def weights(self) -> Sequence[nn.Module]:
        """Every module that `velocity` may use, including the trained one."""

    def release(self) -> None:
        """Move all parts that training does not need off the device, until they are used again."""

    def unload(self) -> None:
        """Free the main memory of the same parts too; each is read from its file again when it is next used."""

    def scheduler(self) -> Scheduler:
        """A fresh scheduler, as the model folder configures it."""

    def cache_key(self) -> str:
        """A hash of everything that encode, encode_text and condition depend on."""

    def save(self, path: Path) -> list[Path]:
        """Write what was trained (adapter file or transformer folder) below `path`; return the paths."""

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote. Raises UserError when it is absent or of another shape."""


def text_lengths(text_BLD: Tensor) -> Tensor:
    """How many tokens each caption has before the zero padding: (B,) int64."""
    place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
    return ((text_BLD != 0).any(-1) * (place_L + 1)).amax(1)


class Defaults(NamedTuple):
    """Default frames, size, fps and sampler settings of a model."""

    frames: int
    size: tuple[int, int]  # (height, width)
    fps: float
    steps: int
    guidance: float
    guidance_low: float | None = None  # of the expert for little noise; None: the same


SAMPLER = ("steps", "guidance", "guidance_low")  # those of them that say how it is sampled


class Outline(NamedTuple):
    """A model without weights, for clips of one size; its parameters are on torch's meta device."""

    model: VideoModel  # with its adapter; the times of its scheduler can be read where tensors have no values
    decoder: nn.Module  # what `model.decode` asks
    tokens: int  # of one clip, in the transformer
    text_width: int  # the D of text_BLD
    condition: dict[str, tuple[int, ...]]  # the shape, without B, of each tensor that `model.condition` gives


class Family(Protocol):
    """The interface of the package or module posttrain.models.<name>. PROTOCOL lists its names."""

    SIDE: int  # height and width of clips in multiples of this fit every model of the family
    FRAMES: int  # so does this number of frames, a small one
    TARGETS: tuple[str, ...]  # name endings of the layers that get an adapter where the recipe does not say

    def load(self, config: ModelConfig, device: str | torch.device = "cpu") -> VideoModel:
        """Load the model that a recipe names, into main memory; only the weights to train have requires_grad.

        Raises:
            UserError: there is no such model, or a part is missing, broken or does not fit the others.
        """

    def bare(self, config: ModelConfig) -> nn.Module:
        """The transformer as training starts from it (with `start` and `merge`), before there is an adapter."""

    def save_merged(self, config: ModelConfig, adapter: Path, path: Path) -> None:
        """Write the diffusers folder `path`: that transformer with `adapter` folded in."""

    def outline(self, config: ModelConfig, frames: int, height: int, width: int) -> Outline:
        """The model of `load` without weights. Raises UserError: no such model, or the clips do not fit it."""

    def defaults(self, path: str) -> Defaults:
        """The defaults of the model that `path` names."""

    def needs_picture(self, path: str, revision: str | None = None) -> bool:
        """Whether the model that `path` names always needs a first frame (image-to-video)."""

    def original_name(self, layer: str) -> str | None:
        """The name of a transformer layer in the original code and ComfyUI; None if it has none."""

    def load_stock_adapter(self, transformer: nn.Module, file: Path) -> None:
        """Put the adapter in `file` onto `transformer` (as from `bare`) as users of the stock pipeline do."""

    def pipeline_code(
        self, config: ModelConfig, adapter: bool, clip: Mapping[str, Any], sampler: Mapping[str, Any]
    ) -> str | None:
        """Python code that samples a clip with the stock pipeline, from a run's folder; None if no pipeline can.

        Args:
            adapter: whether adapter/ has an adapter; else the whole transformer.
            clip: those of caption, frames, size and fps that are known.
            sampler: the values of SAMPLER.
        """


def family(name: str) -> Family:
    """The family of video models of this name. Raises UserError: there is none; the message lists those there are."""
    return cast(Family, resolve("models", name))


def is_video(name: str) -> bool:
    """Whether `model.family` of this name is a family of video models, and not a network for pretraining."""
    return resolve(("models", "nets"), name).__name__.startswith("posttrain.models.")


def sampler(defaults: Defaults, *asked: Mapping[str, Any]) -> dict[str, Any]:
    """The sampler settings SAMPLER: each from the last of `asked` that has it, else from `defaults`.

    If guidance is given without guidance_low, both experts use it.
    """
    chosen = defaults._asdict()
    for changes in asked:
        both = {"guidance_low": None} if "guidance" in changes else {}
        chosen |= both | {key: changes[key] for key in SAMPLER if key in changes}
    return {key: chosen[key] for key in SAMPLER}
