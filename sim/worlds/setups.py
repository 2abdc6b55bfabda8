"""What the worlds with one law share (throw, ramp, pendulum, collide, topple): their Config, and the clips of a scene.

A row of these worlds has `law`: the true values of the scorecard's quantities (posttrain/metrics/motions.py), and what
the scorecard must know of the scene. With `members` above 1 (or None), a scene gives a group, as in counterfactual.py:
the true clip, and clips that each break one law by a known amount.

Shape letters: T frames, N bodies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator

from posttrain.core.errors import UserError
from sim.assets import library
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Scene, Trajectory, Vector
from sim.worlds import counterfactual, drop
from sim.worlds.base import Draw, Take
from sim.worlds.counterfactual import Table, Violation

BALL = "ball/00"  # the only sphere; worlds that need one use it in every split


class Config(drop.Config):
    """`members` is the number of clips of a scene: 1, only the true one; None, also all violations."""

    table: ClassVar[Table] = {}  # the world's kinds of violation
    dropped: tuple[Literal[1], Literal[1]] = (1, 1)
    pile: tuple[Literal[0], Literal[0]] = (0, 0)
    region: tuple[float, float] = (0.5, 0.0)
    members: int | None = Field(1, ge=1)  # clips of a scene, with the true one; others are drawn; None: all
    violations: dict[str, Annotated[tuple[float, ...], Field(min_length=1)]] | None = None  # None: the sweeps of all

    @field_validator("violations")
    @classmethod
    def _possible(cls, violations: dict[str, tuple[float, ...]] | None) -> dict[str, tuple[float, ...]] | None:
        return violations and counterfactual.possible(violations, cls.table)


Of = TypeVar("Of", bound=Config)  # the Config of one of these worlds


@dataclass(frozen=True)
class Made:
    """A scene with its true motion. `law` is a label of its clips, `motion` what the target does."""

    scene: Scene
    trajectory: Trajectory
    motion: str
    law: dict[str, float]


def attempt(make: Callable[[], Made | None]) -> Made:
    """The first scene that fits.

    Raises:
        UserError: no scene fits after drop.ATTEMPTS tries.
    """
    for _ in range(drop.ATTEMPTS):
        if (made := make()) is not None:
            return made
    remedy = "widen target_pixels, size or the ranges of the motion"
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; {remedy}", "value", "world")


def films(
    draw: Draw,
    config: Of,
    simulate: Simulate,
    render: Render,
    make: Callable[[Draw, Of, Simulate], Made],
    violate: Callable[[Made, Violation, Simulate], Trajectory],
) -> Iterator[Take]:
    """The clips of a scene.

    Args:
        make: a world's scene with its true motion.
        violate: the motion of that scene with one law broken.

    Raises:
        UserError: as `make` and `violate`.
    """
    made = make(draw, config, simulate)
    scene, true, labels = made.scene, made.trajectory, {"law": made.law}
    if config.members == 1:
        yield Take(scene, true, render(scene, true), labels, made.motion)
        return

    def broken(violation: Violation) -> Trajectory:
        return violate(made, violation, simulate)

    sweeps = config.violations or {kind: sweep for kind, (_, _, sweep) in config.table.items()}
    violations = counterfactual.chosen(draw, sweeps, config.members)
    yield from counterfactual.films(scene, true, violations, broken, config.table, render, made.motion, labels)


def shifted(true: Trajectory, offset_TN3: np.ndarray) -> Trajectory:
    """The motion with other positions: offsets in metres, or zeros."""
    return replace(true, positions_TN3=true.positions_TN3 + offset_TN3)


def ball(draw: Draw) -> Draw:
    """The draw with a ball as its only object."""
    return replace(draw, objects=[BALL])


def part(draw: Draw, config: Config, asset: str, size: float, position: Vector = (0.0, 0.0, 0.0)) -> Body:
    """A fixture in a random colour, as a fixed obstacle without friction or bounce of its own."""
    name, material = drop.look(draw.rng, config, asset, size)
    return Body(asset, name, size, 1.0, 1.0, 0.0, position, (1.0, 0.0, 0.0, 0.0), "moved", material)


def tells_apart(config: Config, one: Body, other: Body) -> bool:
    """Whether the colours of two bodies differ by config.contrast; true if one of them has a texture."""
    if one.material is None or other.material is None:
        return True
    return drop.distance(one.material.color, other.material.color) >= config.contrast


def stands_out(config: Config, scene: Scene, part: Body) -> bool:
    """Whether the part's colour differs from the floor's by half of config.contrast."""
    return (
        part.material is None or drop.distance(part.material.color, scene.background.floor.color) >= config.contrast / 2
    )


def extent(asset: str, size: float) -> np.ndarray:
    """Sides (3,) in metres of the asset's bounding box, in the frame of its mesh."""
    return np.asarray(np.ptp(library.hull(asset), axis=0) * size)
