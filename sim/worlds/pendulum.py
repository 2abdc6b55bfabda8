"""A ball on a stiff rod without mass swings about a fixed pivot, released at rest. It swings in a plane that faces the
camera.

With the arm L from the pivot to the ball's centre and the ball's radius r, it swings as a point on a rod of length
l = L + 2 r^2 / (5 L). At the angle a from straight down, for a release at the angle A and k = sin(|A| / 2),

    a'' = -g / l sin a,   period T = 4 sqrt(l / g) K(k),   K the complete elliptic integral of the first kind

The row's `law`: g, arm (L) and length (l) in metres, amplitude (A, degrees, above 0 to the right), period (s), and the
pivot's position pivot_x and pivot_z (m). The scene's second body is the rod; it is drawn, but not simulated.

Shape letters: T frames.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from scipy.spatial.transform import Rotation

from sim.geometry import xyzw
from sim.physics import laws
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Pivot, Scene, Trajectory
from sim.worlds import counterfactual, drop, setups
from sim.worlds.base import Draw, Positives, Take, ascending
from sim.worlds.counterfactual import Table, Violation

HIGHEST = 170.0  # degrees; near 180 degrees rounding decides about the motion
SHARED = ("weak_gravity", "strong_gravity", "vanish")
VIOLATIONS: Table = {kind: counterfactual.VIOLATIONS[kind] for kind in SHARED} | {
    "period": ("times the period", (0.1, 10.0), (1.1, 1.25, 1.6, 2.5)),
    "gain": ("1/s, at which the swings grow", (0.0, 10.0), (0.1, 0.2, 0.4, 0.8)),
    "stop": ("s until it stops in the air", (0.0, 60.0), (1.5, 1.0, 0.5, 0.25)),
    "stretch": ("of the arm gained at the end", (0.0, 5.0), (0.1, 0.2, 0.4, 0.8)),
}


def _swings(degrees: tuple[float, float]) -> tuple[float, float]:
    if degrees[1] > HIGHEST:
        raise PydanticCustomError("range", f"should end at {HIGHEST:g} degrees")
    return ascending(degrees)


class Config(setups.Config):
    """Lengths in metres, angles in degrees. `drop`: heights of the ball above the floor at its lowest."""

    table: ClassVar[Table] = VIOLATIONS
    drop: Positives = (0.05, 0.3)
    size: Positives = (0.2, 0.3)
    arm: Positives = (0.4, 0.7)  # from the pivot to the ball's centre
    amplitude: Annotated[tuple[float, float], AfterValidator(_swings)] = (20.0, 80.0)


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a pendulum.

    Raises:
        UserError: no scene fits the ranges.
    """
    return setups.films(draw, config, simulate, render, make, violate)


def make(draw: Draw, config: Config, simulate: Simulate) -> setups.Made:
    """A pendulum.

    Raises:
        UserError: no scene fits the ranges.
    """
    rng, balls = draw.rng, config.model_copy(update={"shapes": ()})
    side = int(rng.choice([-1, 1]))

    def one() -> setups.Made | None:
        low, arm, degrees = (float(rng.uniform(*ends)) for ends in (config.drop, config.arm, config.amplitude))
        angle = side * math.radians(degrees)
        staged = drop.stage(setups.ball(draw), balls, np.array([low]), np.zeros(1, int))
        if staged is None:
            return None
        (ball,) = staged.bodies
        _, y, z = ball.position
        rod = setups.part(draw, config, "rod/00", arm, (0.0, y, z + arm / 2))
        if not setups.stands_out(config, staged, rod):
            return None
        pivot = (0.0, y, z + arm)
        ball = replace(ball, position=(arm * math.sin(angle), y, pivot[2] - arm * math.cos(angle)))
        hung = replace(staged, bodies=(ball,), pivots=(Pivot(0, pivot),))
        swing = simulate(hung)
        trajectory = with_rod(swing, rod, np.array(pivot))
        x, _, z = ((ball.position[i] + pivot[i]) / 2 for i in range(3))
        w, i, j, k = trajectory.quaternions_TN4[0, 1].tolist()
        rod = replace(rod, position=(x, y, z), orientation=(w, i, j, k))
        name = drop.article(ball.name)
        caption = f"{name} on a rod swings down from the {'right' if side > 0 else 'left'}."
        scene = replace(hung, bodies=(ball, rod), caption=caption)
        framed = drop.place_camera(draw, config, scene, trajectory) if drop.sound(hung, swing) else None
        length = laws.pendulum_length(arm, ball.size / 2)
        law = {
            "g": config.gravity,
            "arm": arm,
            "length": length,
            "amplitude": side * degrees,
            "period": laws.pendulum_period(length, abs(angle), config.gravity),
            "pivot_x": 0.0,
            "pivot_z": pivot[2],
        }
        return setups.Made(framed, trajectory, "swing", law) if framed else None

    return setups.attempt(one)


def with_rod(trajectory: Trajectory, rod: Body, pivot_3: np.ndarray) -> Trajectory:
    """The motion of the ball with that of its rod, from the pivot to the ball's centre, as the second body."""
    arms_T3 = trajectory.positions_TN3[:, 0] - pivot_3
    lengths_T = np.linalg.norm(arms_T3, axis=1)
    turns_T4 = np.roll(_turns(np.arctan2(arms_T3[:, 0], -arms_T3[:, 2])).as_quat(), 1, axis=1)
    scales_TN = np.stack([np.ones_like(lengths_T), lengths_T / rod.size], axis=1)
    return replace(
        trajectory,
        positions_TN3=np.stack([trajectory.positions_TN3[:, 0], pivot_3 + arms_T3 / 2], axis=1),
        quaternions_TN4=np.stack([trajectory.quaternions_TN4[:, 0], turns_T4], axis=1),
        scales_TN=scales_TN if np.abs(scales_TN - 1).max() > 1e-2 else None,
    )


def _turns(angles_T: np.ndarray) -> Rotation:
    """The rotations (T) that turn what hangs straight down to these angles."""
    return Rotation.from_rotvec(np.outer(-angles_T, [0.0, 1.0, 0.0]))


def violate(made: setups.Made, violation: Violation, simulate: Simulate) -> Trajectory:
    """The swing with one law broken.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    scene, true, value = made.scene, made.trajectory, violation.value
    ball, rod = scene.bodies
    pivot_3 = np.array(scene.pivots[0].point)
    times_T = np.arange(scene.frames) / scene.fps
    arms_T3 = true.positions_TN3[:, 0] - pivot_3
    angles_T = np.arctan2(arms_T3[:, 0], -arms_T3[:, 2])
    match violation.kind:
        case "weak_gravity" | "strong_gravity":
            heavier = replace(scene, bodies=(ball,), gravity=(0.0, 0.0, value * scene.gravity[2]))
            return with_rod(simulate(heavier), rod, pivot_3)
        case "period":
            return with_rod(simulate(replace(scene, bodies=(ball,), fps=scene.fps * value)), rod, pivot_3)
        case "gain":
            most = math.radians(HIGHEST)
            return _posed(scene, true, np.clip(np.exp(value * times_T) * angles_T, -most, most))
        case "stop":
            return _posed(scene, true, angles_T[np.minimum(np.arange(scene.frames), round(value * scene.fps))])
        case "stretch":
            return _posed(scene, true, angles_T, 1 + value * times_T / times_T[-1])
        case _:
            return counterfactual.violate(scene, true, violation, simulate)


def _posed(scene: Scene, true: Trajectory, angles_T: np.ndarray, longer_T: np.ndarray | float = 1.0) -> Trajectory:
    """The pendulum at these angles, its arm `longer_T` times as long."""
    ball, rod = scene.bodies
    pivot_3 = np.array(scene.pivots[0].point)
    ways_T3 = np.stack([np.sin(angles_T), np.zeros_like(angles_T), -np.cos(angles_T)], axis=1)
    first = np.linalg.norm(np.subtract(ball.position, pivot_3))
    turns = _turns(angles_T - angles_T[0]) * Rotation.from_quat(xyzw(ball.orientation))
    posed = replace(
        true,
        positions_TN3=(pivot_3 + (first * longer_T * ways_T3.T).T)[:, None],
        quaternions_TN4=np.roll(turns.as_quat(), 1, axis=1)[:, None],
    )
    return with_rod(posed, rod, pivot_3)
