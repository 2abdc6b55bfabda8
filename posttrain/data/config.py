"""`data:` in a recipe: which clips, how they are seen, and what they are compared with."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from posttrain.core.recipe import Strict
from posttrain.flow import SamplerConfig

Crop = Literal["center", "top", "bottom", "left", "right", "none"]


@dataclass(frozen=True)
class Wanted:
    """What every clip shall be: so many frames, at frames per second, of (height, width) pixels.

    `crop` says which part of a picture of another shape is seen; none: such videos are left out.
    """

    frames: int
    fps: float
    size: tuple[int, int]
    crop: Crop = "center"


class GroupsConfig(Strict):
    """What each true clip is compared with, for methods of preference: counterfactuals, samples of a model, or both.

    A clip with more losers than `losers` makes several groups of that many, and one with fewer makes none.
    """

    losers: PositiveInt = 3  # m, of each group
    counterfactuals: bool = False  # clips of the same folder that break a law in the true clip's scene
    samples: tuple[str, ...] = ()  # folders of <clip>-s<seed>.mp4, with scores.jsonl
    winner: Literal["true", "sample"] = "true"  # sample: the one with the best scores wins against the others
    samples_each: NonNegativeInt = 0  # seeds that count in a folder of samples, made by the base first; 0: all there
    sampler: SamplerConfig = SamplerConfig()  # how the base makes them
    negative: str = ""  # what it is told not to show; counts where there is guidance
    batch: PositiveInt = 1  # samples made at once, by each process
    judge: Literal["simulator"] | None = None  # scores the samples; others do by `posttrain score`

    @model_validator(mode="after")
    def _any(self) -> "GroupsConfig":
        if (self.samples_each or self.judge) and not self.samples:
            raise PydanticCustomError("part", "samples_each and judge are for samples; name their folder in samples")
        if self.winner == "sample" and (self.counterfactuals or not self.samples):
            raise PydanticCustomError("part", "samples win against samples; name samples, without counterfactuals")
        if not self.counterfactuals and not self.samples:
            raise PydanticCustomError("part", "there are no losers; set counterfactuals: true, or name samples")
        return self


class DataConfig(Strict):
    """Which clips. `make` names the recipes of `sim make` that film them where they are missing.

    With frames, fps and size (height, width), clips are retimed and cropped to them, and those of any videos are read.
    `crop` says what is seen of a picture of another shape: its middle, a side of it, or nothing (none: left out).
    """

    clips: str | list[str]
    split: str = "train"
    limit: int | None = Field(None, ge=1)  # the first clips of each folder
    make: str | list[str] | None = None
    frames: PositiveInt | None = None
    fps: PositiveFloat | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None
    crop: Crop = "center"
    uncaptioned: Literal["leave_out", "empty"] = "leave_out"  # what becomes of a video without a caption
    groups: GroupsConfig | None = None

    @model_validator(mode="after")
    def _together(self) -> "DataConfig":
        if None in (self.frames, self.fps, self.size) and (self.frames, self.fps, self.size) != (None, None, None):
            raise PydanticCustomError("part", "frames, fps and size say together what clips shall be; give all three")
        if self.crop != "center" and self.size is None:
            raise PydanticCustomError(
                "part", "crop is for clips of another size; give frames, fps and size, or leave it out"
            )
        return self

    @property
    def wanted(self) -> Wanted | None:
        if self.frames is None or self.fps is None or self.size is None:
            return None
        return Wanted(self.frames, self.fps, self.size, self.crop)

    @property
    def folders(self) -> list[str]:
        return [self.clips] if isinstance(self.clips, str) else self.clips
