"""What a physics engine is: a module of this package that a recipe names in `physics:`.

It has a `Config`, and `simulate(scene, interventions, config)`, which returns what `Simulate` says; the laws that every
engine keeps are in tests/sim_laws.py. An engine that cannot do something refuses it by `unsupported`.
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
        """Let the scene go at time 0: `dropped` bodies fall from rest, `pile` rests, `moved` are fixed obstacles.

        Raises:
            UserError: the engine cannot do this scene, or one of the interventions.
        """


def unsupported(engine: str, scene: Scene, reason: str, remedy: str = "write `physics: {name: bullet}`") -> UserError:
    """The refusal of a scene in one line, e.g. reason "bodies 0 and 1 touch"."""
    return UserError(f"physics {engine}: scene {scene.seed}: {reason}; {remedy}", "unsupported", "physics.name")


def energy_gain(trajectory: Trajectory) -> float:
    """The largest rise of the energy above what it was before, as a share of the energy at time 0."""
    energy = trajectory.energy
    return float((energy - np.minimum.accumulate(energy)).max() / energy[0])
