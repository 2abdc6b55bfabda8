"""`data:` in a recipe: which clips to use, how they are retimed and cropped, and their preference groups."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from posttrain.core.recipe import Strict
from posttrain.flow import SamplerConfig

Crop = Literal["center", "top", "bottom", "left", "right", "none"]


@dataclass(frozen=True)
class Wanted:
    """The format that all clips are brought to: number of frames, frames per second, size (height, width) in pixels.

    `crop`: which part of a picture of another shape is kept; "none" leaves such videos out.
    """

    frames: int
    fps: float
    size: tuple[int, int]
    crop: Crop = "center"


class GroupsConfig(Strict):
    """The rejected clips of preference methods: counterfactuals, samples of a model, or both.

    If a true clip has more rejected clips than `losers`, it gives several groups of that size; with fewer, it gives
    none.
    """

    losers: PositiveInt = 3  # m, in each group
    counterfactuals: bool = False  # clips of the same folder that break a law in the true clip's scene
    samples: tuple[str, ...] = ()  # folders with files <clip>-s<seed>.mp4 and scores.jsonl
    winner: Literal["true", "sample"] = "true"  # sample: the one with the best scores wins
    samples_each: NonNegativeInt = (
        0  # samples that the base first makes of each clip, seeds 0, 1, ...; 0: use what is there
    )
    sampler: SamplerConfig = SamplerConfig()  # of the base model
    negative: str = ""  # the negative prompt; used only if guidance is above 1
    batch: PositiveInt = 1  # samples that each process makes at once
    judge: Literal["simulator"] | None = None  # scores the samples; for other judges run `posttrain score`

    @model_validator(mode="after")
    def _any(self) -> "GroupsConfig":
        if (self.samples_each or self.judge) and not self.samples:
            raise PydanticCustomError(
                "part", "samples_each and judge are only used with samples; set samples to their folder"
            )
        if self.winner == "sample" and (self.counterfactuals or not self.samples):
            raise PydanticCustomError(
                "part", "winner: sample compares samples with samples; set samples, and leave out counterfactuals"
            )
        if not self.counterfactuals and not self.samples:
            raise PydanticCustomError("part", "there are no rejected clips; set counterfactuals: true, or samples")
        return self


class DataConfig(Strict):
    """The clips. `make` lists the recipes with which `sim make` films them if they are missing.

    With frames, fps and size (height, width), clips are retimed and cropped to that format, and any videos can be read.
    `crop`: which part of a picture of another shape is kept: the centre or a side; "none" leaves out such videos.
    """

    clips: str | list[str]
    split: str = "train"
    limit: int | None = Field(None, ge=1)  # the first clips of each folder
    make: str | list[str] | None = None
    frames: PositiveInt | None = None
    fps: PositiveFloat | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None
    crop: Crop = "center"
    uncaptioned: Literal["leave_out", "empty"] = "leave_out"  # what to do with a video without a caption
    groups: GroupsConfig | None = None

    @model_validator(mode="after")
    def _together(self) -> "DataConfig":
        if None in (self.frames, self.fps, self.size) and (self.frames, self.fps, self.size) != (None, None, None):
            raise PydanticCustomError("part", "frames, fps and size set the clips' format together; give all three")
        if self.crop != "center" and self.size is None:
            raise PydanticCustomError("part", "crop is only used with frames, fps and size; give them, or leave it out")
        return self

    @property
    def wanted(self) -> Wanted | None:
        if self.frames is None or self.fps is None or self.size is None:
            return None
        return Wanted(self.frames, self.fps, self.size, self.crop)

    @property
    def folders(self) -> list[str]:
        return [self.clips] if isinstance(self.clips, str) else self.clips
