"""The pretraining corpus: the scenes of sim/drop.py, in which nothing falls.

What would be dropped hovers, drifts, spins or circles in the air instead, or slides or rolls on the floor; piles rest.
Paths are kinematic. The target's kind is that of `seed` in KINDS, so that a split holds as many of each.

Shape letters: T frames, N bodies, V hull vertices.
"""

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from posttrain.core.errors import UserError
from sim import assets, drop
from sim.drop import Range
from sim.physics import bullet
from sim.scene import Body, Scene, Trajectory

AIR = ("hover", "drift", "spin", "orbit")
KINDS = (*AIR, "slide", "roll")
# where a heading goes, by quarters: what the first picture cannot show and a model could only guess, the caption says
UPRIGHT = ("to the right", "up", "to the left", "down")
LEVEL = ("to the right", "away", "to the left", "towards us")


class Config(drop.Config):
    """Lengths in metres, speeds in metres or radians per second."""

    bob: Range = (0.0, 0.04)  # amplitude while hovering
    drift: Range = (0.05, 0.45)
    spin: Range = (0.5, 3.0)
    radius: Range = (0.05, 0.2)
    period: Range = (2.0, 5.0)  # seconds per circle
    push: Range = (0.3, 1.2)  # first speed of what slides or rolls
    slide: Range = (0.15, 0.8)  # the way it takes to stop


def make(
    rng: np.random.Generator, config: Config, objects: list[str], backgrounds: list[str], seed: int
) -> tuple[Scene, Trajectory]:
    """A scene and its motion, without contacts or energy. Numbers and heights are drawn as in a drop scene.

    Raises:
        UserError: the ranges leave no room for such a scene.
    """
    heights = rng.uniform(*config.drop, size=rng.integers(*config.dropped, endpoint=True))
    piles = rng.integers(*config.pile, size=len(heights), endpoint=True)
    kinds = [KINDS[seed % len(KINDS)], *rng.choice(AIR, size=len(heights) - 1).tolist()]
    for _ in range(drop.ATTEMPTS):
        scene = drop.stage(rng, config, objects, backgrounds, seed, heights, piles)
        if scene is None:
            continue
        bodies = [replace(body, role="moved") if body.role == "dropped" else body for body in scene.bodies]
        if kinds[0] not in AIR:
            bodies[0] = _grounded(rng, config, replace(scene, bodies=(bodies[0],)), kinds[0])
        times_T = np.arange(config.frames) / config.fps
        moves = [_move(rng, config, body, kind, times_T) for body, kind in zip(bodies, kinds, strict=False)]
        still = [_rest(body, config.frames) for body in bodies[len(kinds) :]]
        trajectory = Trajectory(
            positions_TN3=np.stack([position for position, _, _ in moves] + [p for p, _ in still], axis=1),
            quaternions_TN4=np.stack([turn for _, turn, _ in moves] + [q for _, q in still], axis=1),
            contacts=(),
            energy=np.zeros(0),
        )
        verbs = [f"{drop.article(body.name)} {verb}" for body, (_, _, verb) in zip(bodies, moves, strict=False)]
        scene = replace(scene, bodies=tuple(bodies), caption=drop.listed(verbs) + ".")
        filmed = drop.film(rng, config, scene, trajectory) if _apart(scene, trajectory) else None
        if filmed is not None:
            return filmed, trajectory
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; widen target_pixels, size or region")


def label(scene: Scene) -> str:
    """The kind of motion of the target, for the metadata."""
    return KINDS[scene.seed % len(KINDS)]


def _grounded(rng: np.random.Generator, config: Config, alone: Scene, kind: str) -> Body:
    """The one body of a scene put on the floor anywhere in the region; what slides lies as it comes to rest."""
    (body,) = alone.bodies
    if kind == "slide":
        rest = bullet.settle(replace(alone, bodies=(replace(body, role="pile"),)))
        body = replace(body, orientation=rest[0][1]) if rest else body
    x, y = rng.uniform(-config.region[0] / 2, config.region[0] / 2), rng.uniform(0, config.region[1])
    return replace(body, position=(float(x), float(y), float(-drop.outline(body)[:, 2].min())))


def _rest(body: Body, frames: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(body.position, (frames, 1)), np.tile(body.orientation, (frames, 1))


def _move(
    rng: np.random.Generator, config: Config, body: Body, kind: str, times_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """Positions (T, 3), quaternions (T, 4) and the words that say it. At time 0 the body is where the scene has it."""
    way_T3 = np.zeros((len(times_T), 3))
    axis, rate = rng.normal(size=3), rng.uniform(-1, 1) * (rng.random() < 0.3)
    angle_T = rate * times_T
    words = "hovers"
    if kind == "hover":
        way_T3[:, 2] = rng.uniform(*config.bob) * np.sin(2 * np.pi * times_T / rng.uniform(*config.period))
    elif kind == "drift":
        heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*config.drift)
        way_T3 += speed * times_T[:, None] * np.array([np.cos(heading), 0.0, np.sin(heading)])
        pace = "slowly" if speed < np.mean(config.drift) else "fast"
        words = f"drifts {pace} {_toward(heading, UPRIGHT)}"
    elif kind == "spin":
        axis, words = axis * (0.3, 0.3, 1.0), "spins in place"
        angle_T = rng.choice([-1, 1]) * rng.uniform(*config.spin) * times_T
    elif kind == "orbit":
        start, sense = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
        phase_T = start + sense * 2 * np.pi * times_T / rng.uniform(*config.period)
        circle_T2 = rng.uniform(*config.radius) * np.stack([np.cos(phase_T), np.sin(phase_T)], axis=1)
        upright = bool(rng.integers(2))  # in the plane of the picture, or level
        way_T3[:, [0, 2 if upright else 1]] = circle_T2 - circle_T2[0]
        words = f"circles in the air starting {_toward(start + sense * np.pi / 2, UPRIGHT if upright else LEVEL)}"
    else:  # slide, roll: slow down evenly from the first speed to a stop
        speed, length, heading = rng.uniform(*config.push), rng.uniform(*config.slide), rng.uniform(0, 2 * np.pi)
        since_T = np.minimum(times_T, 2 * length / speed)
        gone_T = speed * since_T - speed**2 / (4 * length) * since_T**2
        ahead = np.array([np.cos(heading), np.sin(heading), 0.0])
        way_T3 += gone_T[:, None] * ahead
        words = f"{kind}s {_toward(heading, LEVEL)}"
        angle_T = np.zeros_like(times_T)
        if kind == "roll":
            axis, angle_T = np.cross([0.0, 0.0, 1.0], ahead), gone_T / np.abs(drop.outline(body)).max(0).mean()
    turns = Rotation.from_rotvec(angle_T[:, None] * axis / np.linalg.norm(axis))
    turns = turns * Rotation.from_quat(bullet.xyzw(body.orientation))
    positions_T3 = way_T3 + body.position
    if kind == "roll" and not bullet.is_round(body):  # whatever its shape, its lowest point stays on the floor
        hull_V3 = assets.hull(body.asset) * body.size
        positions_T3[:, 2] = -np.einsum("tj,vj->tv", turns.as_matrix()[:, 2], hull_V3).min(1)
    return positions_T3, np.roll(turns.as_quat(), 1, axis=-1), words


def _toward(heading: float, quarters: tuple[str, ...]) -> str:
    return quarters[round(heading / (np.pi / 2)) % 4]


def _apart(scene: Scene, trajectory: Trajectory) -> bool:
    """Whether what moves stays above the floor and clear of the rest, as bounding spheres."""
    radius_N = np.array([np.linalg.norm(assets.hull(body.asset), axis=1).max() * body.size for body in scene.bodies])
    for i, body in enumerate(scene.bodies):
        if body.role != "moved":
            continue
        if drop.paths(scene, trajectory, i)[..., 2].min() < -2e-3:
            return False
        distance_TN = np.linalg.norm(trajectory.positions_TN3 - trajectory.positions_TN3[:, i, None], axis=-1)
        if (np.delete(distance_TN - radius_N - radius_N[i], i, axis=1) < 0).any():
            return False
    return True
