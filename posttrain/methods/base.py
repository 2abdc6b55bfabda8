"""The protocol of methods: modules of this package, or of pretraining/, that a recipe names in `method:`.

A method has a docstring with the paper, its equation and every departure, a `Config`, a pure loss, and the loop

    train(run, model, config, **inputs)

Everything else is a field of `Method` below, with a default. A top-level name in the module overrides the default of
that field.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, Strict
from posttrain.data.config import GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Annotated, Latents
from posttrain.flow import SamplerConfig
from posttrain.models.base import VideoModel
from posttrain.training.checkpoints import start_fingerprint
from posttrain.training.run import Data
from posttrain.types import Batch

PROTOCOL = ("Config", "train")  # what a module must have


class Source(NamedTuple):
    """The inputs from which a method's data are built."""

    model: Any  # a VideoModel, or a network of nets/
    clips: Clips
    groups: GroupsConfig | None  # `data.groups` of the recipe, of methods with GROUPS
    image_conditioned: bool  # whether the base that makes samples is given first frames
    cache: Path  # where latents are kept


def latents(source: Source, config: Any) -> Data:
    """Latents, text and conditions of the clips; Batch.z0_BCFHW, text_BLD, condition, target_B."""
    return Latents(source.model, source.clips, source.cache)


def annotated_latents(source: Source, config: Any) -> Data:
    """As `latents`, and the clips' video_BCFHW, instances_BFHW and the annotations that `truths` names."""
    need_masks(source.clips)
    return Annotated(Latents(source.model, source.clips, source.cache), source.clips)


def pixels(source: Source, config: Any) -> Data:
    """The clips in pixels: video_BCFHW, instances_BFHW, target_B and the annotations that `truths` names."""
    need_masks(source.clips)
    return source.clips


@torch.no_grad()
def given_latents(model: VideoModel, batch: Batch) -> Tensor | None:
    """The clean latents from which a method samples clips, (B, C, 1, H, W); None for a model that takes none.

    They are those of sampling and evaluation: of the first picture alone. In a clip that is encoded as a whole, the
    first latent may know of later pictures. One by one and without autocast, as clips are encoded for training: then
    they are bit for bit the clip's first latent where the autoencoder is causal (on a CPU).
    """
    if not model.n_cond_frames:
        return None
    assert batch.video_BCFHW is not None
    with torch.autocast(model.device.type, enabled=False):
        return torch.cat([model.encode(video_1CFHW[:, :, :1]) for video_1CFHW in batch.video_BCFHW.split(1)])


def need_masks(clips: Clips) -> None:
    """Refuse clips without masks."""
    if not clips.annotated:
        bare = next(split.folder for split in clips.splits if not split.annotated)
        raise UserError(
            f"{bare}: has no masks, which the method needs; use clips that `sim make` filmed",
            "mismatch",
            "data.clips",
        )


@dataclass(frozen=True)
class Dry:
    """What a dry run (commands/dry.py), on tensors that have shapes and no values, must know about a method."""

    # the Config -> one that reads no values of tensors or files
    config: Callable[[Any], Any] = lambda config: config
    # (a batch of latents, config, losers in a group, (frames, height, width)) -> the batch that `data` gives
    batch: Callable[[Batch, Any, int, tuple[int, int, int]], Batch] = lambda batch, config, losers, clip: batch
    # (the Config, n) -> the Config with n sampler steps, if memory and operations grow linearly with them; else None
    shorter: Callable[[Any, int], Any] = lambda config, steps: None
    # (the Config, losers in a group) -> how many clips of a group go through the model
    members: Callable[[Any, int], int] = lambda config, losers: 1 + losers
    decodes: bool = False  # whether training decodes latents
    note: Callable[[Any], str] = lambda config: ""  # what the dry run counts differently from training, in a few words


@dataclass(frozen=True)
class Method:
    """The interface of a method, with the defaults for names that its module does not define."""

    Config: type[Strict]
    train: Callable[..., None]  # (run, model, config, **inputs)
    TRAINS: Literal["video"] | tuple[str, ...] = "video"  # or the names of the networks in nets/ that it trains
    GROUPS: bool = False  # whether it compares true clips with others, which `data.groups` names
    # what batches hold of the truth besides pictures and masks: "flow", "depth"
    truths: Callable[[Any], Sequence[str]] = lambda config: ()
    data: Callable[[Source, Any], Data] = latents
    # the rewards that it trains. Their truths are added to `truths`, their networks to `depends`; `train` gets them
    # loaded, as `rewards` (rewards/base.py: weight and function by name), and tripwires follow them
    rewards: Callable[[Any], tuple[Plugin, ...]] = lambda config: ()
    # what the trained weights depend on besides clips, settings and start: values that JSON can hold, by name
    depends: Callable[[Any], dict[str, Any]] = lambda config: {}
    # what else `train` gets, by name, as modules or plain values: made of the model as it is where training starts,
    # and before a run is continued. Asked too of a model that has shapes and no values (device "meta")
    inputs: Callable[[Any, Any], dict[str, Any]] = lambda model, config: {}
    DRY: Dry = Dry()


def method_of(part: Plugin) -> Method:
    """The method that a recipe names."""
    return Method(**{f.name: vars(part.module)[f.name] for f in fields(Method) if f.name in vars(part.module)})


def sampler(config: Strict) -> SamplerConfig | None:
    """The sampler settings of a method; None if it does not sample (its Config has no `sampler`)."""
    return dict(config).get("sampler")


def fingerprints(rewards: Sequence[Plugin]) -> dict[str, str]:
    """Hashes of the networks that these rewards use, by the recipe's key."""
    asked = {part.name: part for part in rewards if hasattr(part.module, "net")}
    return {f"method.rewards.{name}": start_fingerprint(part.module.net(part.config)) for name, part in asked.items()}
