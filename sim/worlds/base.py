"""The protocol of worlds, the modules of this package that a recipe names in `world:`.

A world has a `Config` (of WorldConfig) and `takes(draw, config, simulate, render)`, which films the clips of one scene
with the given engine and renderer. All random numbers come from `draw.rng`, so a scene is a function of its draw. The
laws that every world must obey are in tests/helpers/sim_laws.py.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from posttrain.core.recipe import Strict
from sim.scene import Clip, Scene, Trajectory

PROTOCOL = ("Config", "takes")


def ascending(ends: tuple[float, float]) -> tuple[float, float]:
    """Refuse a range whose end is below its start."""
    if ends[0] > ends[1]:
        raise PydanticCustomError("range", "should have its lower end first")
    return ends


Amount = Annotated[float, Field(ge=0, le=1e9), AfterValidator(abs)]  # abs: numpy refuses a range from 0.0 to -0.0
Positive = Annotated[float, Field(gt=0, le=1e4)]
Share = Annotated[float, Field(ge=0, le=1), AfterValidator(abs)]
# Both ends of a range belong to it.
Amounts = Annotated[tuple[Amount, Amount], AfterValidator(ascending)]
Positives = Annotated[tuple[Positive, Positive], AfterValidator(ascending)]
Shares = Annotated[tuple[Share, Share], AfterValidator(ascending)]


class WorldConfig(Strict):
    """The fields of every world's Config; width and height in pixels."""

    width: int = Field(256, ge=8, le=8192)
    height: int = Field(256, ge=8, le=8192)
    frames: int = Field(32, ge=2)
    fps: float = Field(16.0, ge=1, le=1000)


@dataclass(frozen=True)
class Draw:
    """The inputs of a scene: random numbers, the split's assets, and the scene's number in its split."""

    rng: np.random.Generator
    objects: list[str]
    backgrounds: list[str]
    index: int


@dataclass(frozen=True)
class Take:
    """A clip with its scene and trajectory.

    Attributes:
        labels: further fields of the clip's row; clips with the same "group" share a first frame.
        motion: what the target does.
    """

    scene: Scene
    trajectory: Trajectory
    clip: Clip
    labels: dict[str, Any] = field(default_factory=dict)
    motion: str = "drop"
