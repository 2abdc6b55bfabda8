"""What a world is: a module of this package that a recipe names in `world:`.

It has a `Config` of WorldConfig, and `takes(draw, config, simulate, render)`, which films the clips of one scene with
the engine and the renderer that it is given. All that is random comes from `draw.rng`, so a scene is a function of its
draw. The laws that every world keeps are in tests/sim_laws.py.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.core.recipe import Strict
from sim.scene import Clip, Scene, Trajectory

PROTOCOL = ("Config", "takes")


class WorldConfig(Strict):
    """What every world's Config has."""

    width: int = 256
    height: int = 256
    frames: int = 32
    fps: float = 16.0


@dataclass(frozen=True)
class Draw:
    """What a scene is drawn from: random numbers, the split's assets, and the scene's number in its split."""

    rng: np.random.Generator
    objects: list[str]
    backgrounds: list[str]
    index: int


@dataclass(frozen=True)
class Take:
    """A clip, what it is of, and what its row tells beside the usual; clips of one "group" share a first picture.

    `motion` is what the target does.
    """

    scene: Scene
    trajectory: Trajectory
    clip: Clip
    labels: dict[str, Any] = field(default_factory=dict)
    motion: str = "drop"
