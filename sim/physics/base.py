"""The protocol of physics engines, the modules of this package that a recipe names in `physics:`.

An engine has a `Config` and `simulate(scene, interventions, config)`, see `Simulate`. The laws that every engine must
obey are in tests/helpers/sim_laws.py. An engine raises `unsupported` for scenes that it cannot simulate.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from posttrain.core.errors import UserError
from sim.scene import Intervention, Scene, Trajectory

PROTOCOL = ("Config", "simulate")


class Simulate(Protocol):
    """An engine with its config."""

    def __call__(self, scene: Scene, interventions: Sequence[Intervention] = ()) -> Trajectory:
        """The motion from time 0 on: `dropped` bodies start with their velocity, `pile` rests, `moved` are
        fixed obstacles. Bodies of `scene.pivots` turn about a fixed point.

        Raises:
            UserError: the engine cannot simulate this scene, or one of the interventions.
        """


def unsupported(engine: str, scene: Scene, reason: str, remedy: str = "write `physics: {name: bullet}`") -> UserError:
    """The error for a scene that an engine cannot simulate, for a reason such as "bodies 0 and 1 touch"."""
    return UserError(f"physics {engine}: scene {scene.seed}: {reason}; {remedy}", "unsupported", "physics.name")


def energy_gain(trajectory: Trajectory) -> float:
    """The largest rise of the energy over any earlier value, as a share of the energy at time 0."""
    energy = trajectory.energy
    return float((energy - np.minimum.accumulate(energy)).max() / energy[0])
