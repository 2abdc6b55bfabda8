"""`data:` in a recipe: which clips, how they are retimed and cropped, and what they are compared with."""

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
    """What preference methods compare each true clip with: counterfactuals, samples of a model, or both.

    A clip with more losers than `losers` gives several groups of that many; a clip with fewer gives none.
    """

    losers: PositiveInt = 3  # m, in each group
    counterfactuals: bool = False  # clips of the same folder that break a law in the true clip's scene
    samples: tuple[str, ...] = ()  # folders with files <clip>-s<seed>.mp4 and scores.jsonl
    winner: Literal["true", "sample"] = "true"  # sample: the one with the best scores wins
    samples_each: NonNegativeInt = 0  # the base model first samples seeds 0 to this; 0: use what is there
    sampler: SamplerConfig = SamplerConfig()  # of the base model
    negative: str = ""  # the negative prompt; used only if guidance is above 1
    batch: PositiveInt = 1  # samples that each process makes at once
    judge: Literal["simulator"] | None = None  # scores the samples; for other judges run `posttrain score`

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
    """Which clips. `make` names the recipes with which `sim make` films them if they are missing.

    With frames, fps and size (height, width), clips are retimed and cropped to that format, and any videos can be read.
    `crop`: which part of a picture of another shape is kept, its middle or a side; "none" leaves such videos out.
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
