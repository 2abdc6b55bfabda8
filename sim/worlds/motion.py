"""The pretraining corpus: the scenes of drop.py, but nothing falls.

Instead, the dropped bodies hover, drift, spin or circle in the air; the target may also slide or roll on the floor.
Piles rest. Paths are kinematic. Scene i of a split has motion i mod 6 of MOTIONS, so all are equally frequent.

Shape letters: T frames, N bodies, V hull vertices.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from posttrain.core.errors import UserError
from sim.assets import library
from sim.geometry import outline, paths, xyzw
from sim.physics import bullet
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Scene, Trajectory
from sim.worlds import drop
from sim.worlds.base import Amounts, Draw, Positives, Take

AIR = ("hover", "drift", "spin", "orbit")
MOTIONS = (*AIR, "slide", "roll")
# directions by quarter turns, for captions, since a model cannot know them from the first frame
UPRIGHT = ("to the right", "up", "to the left", "down")
LEVEL = ("to the right", "away", "to the left", "towards us")


class Config(drop.Config):
    """Lengths in metres, speeds in metres or radians per second."""

    bob: Amounts = (0.0, 0.04)  # amplitude while hovering
    drift: Amounts = (0.05, 0.45)
    spin: Amounts = (0.5, 3.0)
    radius: Amounts = (0.05, 0.2)
    period: Positives = (2.0, 5.0)  # seconds per circle
    push: Positives = (0.3, 1.2)  # initial speed of a body that slides or rolls
    slide: Positives = (0.15, 0.8)  # metres until such a body stops


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """One clip. The engine `simulate` is not used.

    Raises:
        UserError: as `make`.
    """
    scene, trajectory = make(draw, config)
    yield Take(scene, trajectory, render(scene, trajectory), motion=label(scene))


def make(draw: Draw, config: Config) -> tuple[Scene, Trajectory]:
    """A scene and its motion, without contacts or energy. Numbers and heights are drawn as in a drop scene.

    Raises:
        UserError: no such scene fits the ranges.
    """
    rng = draw.rng
    heights, piles = drop.numbers(draw, config)
    motions = [MOTIONS[draw.index % len(MOTIONS)], *rng.choice(AIR, size=len(heights) - 1).tolist()]
    for _ in range(drop.ATTEMPTS):
        scene = drop.stage(draw, config, heights, piles)
        if scene is None:
            continue
        bodies = [replace(body, role="moved") if body.role == "dropped" else body for body in scene.bodies]
        if motions[0] not in AIR:
            bodies[0] = _grounded(rng, config, replace(scene, bodies=(bodies[0],)), motions[0])
        times_T = np.arange(config.frames) / config.fps
        moves = [_move(rng, config, body, motion, times_T) for body, motion in zip(bodies, motions, strict=False)]
        still = [_rest(body, config.frames) for body in bodies[len(motions) :]]
        trajectory = Trajectory(
            positions_TN3=np.stack([position for position, _, _ in moves] + [p for p, _ in still], axis=1),
            quaternions_TN4=np.stack([turn for _, turn, _ in moves] + [q for _, q in still], axis=1),
            contacts=(),
            energy=np.zeros(0),
        )
        verbs = [f"{drop.article(body.name)} {verb}" for body, (_, _, verb) in zip(bodies, moves, strict=False)]
        scene = replace(scene, bodies=tuple(bodies), caption=drop.listed(verbs) + ".")
        framed = drop.place_camera(draw, config, scene, trajectory) if _apart(scene, trajectory) else None
        if framed is not None:
            return framed, trajectory
    remedy = "widen target_pixels, size or region"
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; {remedy}", "value", "world")


def label(scene: Scene) -> str:
    """The motion of the target, for the metadata."""
    return MOTIONS[scene.seed % len(MOTIONS)]


def _grounded(rng: np.random.Generator, config: Config, alone: Scene, motion: str) -> Body:
    """The only body of a scene, at a random position on the floor; a sliding body lies as it comes to rest."""
    (body,) = alone.bodies
    if motion == "slide":
        rest = bullet.settle(replace(alone, bodies=(replace(body, role="pile"),)))
        body = replace(body, orientation=rest[0][1]) if rest else body
    x, y = rng.uniform(-config.region[0] / 2, config.region[0] / 2), rng.uniform(0, config.region[1])
    return replace(body, position=(float(x), float(y), float(-outline(body)[:, 2].min())))


def _rest(body: Body, frames: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(body.position, (frames, 1)), np.tile(body.orientation, (frames, 1))


def _move(
    rng: np.random.Generator, config: Config, body: Body, motion: str, times_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """Positions (T, 3), quaternions (T, 4) and the caption's verb. At time 0 the body is where the scene has it."""
    way_T3 = np.zeros((len(times_T), 3))
    axis, rate = rng.normal(size=3), rng.uniform(-1, 1) * (rng.random() < 0.3)
    angle_T = rate * times_T
    verb = "hovers"
    if motion == "hover":
        way_T3[:, 2] = rng.uniform(*config.bob) * np.sin(2 * np.pi * times_T / rng.uniform(*config.period))
    elif motion == "drift":
        heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*config.drift)
        way_T3 += speed * times_T[:, None] * np.array([np.cos(heading), 0.0, np.sin(heading)])
        pace = "slowly" if speed < np.mean(config.drift) else "fast"
        verb = f"drifts {pace} {_toward(heading, UPRIGHT)}"
    elif motion == "spin":
        axis, verb = axis * (0.3, 0.3, 1.0), "spins in place"
        angle_T = rng.choice([-1, 1]) * rng.uniform(*config.spin) * times_T
    elif motion == "orbit":
        start, sense = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
        phase_T = start + sense * 2 * np.pi * times_T / rng.uniform(*config.period)
        circle_T2 = rng.uniform(*config.radius) * np.stack([np.cos(phase_T), np.sin(phase_T)], axis=1)
        upright = bool(rng.integers(2))  # in the plane of the picture, or level
        way_T3[:, [0, 2 if upright else 1]] = circle_T2 - circle_T2[0]
        verb = f"circles in the air starting {_toward(start + sense * np.pi / 2, UPRIGHT if upright else LEVEL)}"
    else:  # slide, roll: slow down evenly from the first speed to a stop
        speed, length, heading = rng.uniform(*config.push), rng.uniform(*config.slide), rng.uniform(0, 2 * np.pi)
        since_T = np.minimum(times_T, 2 * length / speed)
        gone_T = speed * since_T - speed**2 / (4 * length) * since_T**2
        ahead = np.array([np.cos(heading), np.sin(heading), 0.0])
        way_T3 += gone_T[:, None] * ahead
        verb = f"{motion}s {_toward(heading, LEVEL)}"
        angle_T = np.zeros_like(times_T)
        if motion == "roll":
            axis, angle_T = np.cross([0.0, 0.0, 1.0], ahead), gone_T / np.abs(outline(body)).max(0).mean()
    turns = Rotation.from_rotvec(angle_T[:, None] * axis / np.linalg.norm(axis))
    turns = turns * Rotation.from_quat(xyzw(body.orientation))
    positions_T3 = way_T3 + body.position
    if motion == "roll" and not library.is_round(body.asset):  # its lowest point stays on the floor
        hull_V3 = library.hull(body.asset) * body.size
        positions_T3[:, 2] = -np.einsum("tj,vj->tv", turns.as_matrix()[:, 2], hull_V3).min(1)
    return positions_T3, np.roll(turns.as_quat(), 1, axis=-1), verb


def _toward(heading: float, quarters: tuple[str, ...]) -> str:
    return quarters[round(heading / (np.pi / 2)) % 4]


def _apart(scene: Scene, trajectory: Trajectory) -> bool:
    """Whether moving bodies stay above the floor, and their bounding spheres touch no other body's."""
    radius_N = np.array([np.linalg.norm(library.hull(body.asset), axis=1).max() * body.size for body in scene.bodies])
    for i, body in enumerate(scene.bodies):
        if body.role != "moved":
            continue
        if paths(scene, trajectory, i)[..., 2].min() < -2e-3:
            return False
        distance_TN = np.linalg.norm(trajectory.positions_TN3 - trajectory.positions_TN3[:, i, None], axis=-1)
        if (np.delete(distance_TN - radius_N - radius_N[i], i, axis=1) < 0).any():
            return False
    return True
