"""A tower of equal boxes, each shifted against the one below, is let go: it stands, or its upper part topples.

The boxes above a joint stand on the overlap of the two boxes that meet there. With their common centre of mass c, and
the overlap from l to r, the joint holds if

    m = min(c - l, r - c) > 0

At most one joint has m < 0. What is above it tips over the edge of the box below, at first as one rigid body: with the
centre of mass at (x, z) from the edge and the moment of inertia I about it, by the angle a from rest,

    a'' = M g (x cos a + z sin a) / I

The row's `law`: g, margin (m of the weakest joint, metres), side (1: it topples to the right, -1: to the left, 0: it
stands), front (m, from a box's centre to its front), and, if it topples, edge_x and edge_z (metres), centre_x and
centre_z (metres from the edge, x away from the tower) and inertia (I / M, m^2).
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator, Field
from scipy.spatial.transform import Rotation

from sim.assets import library
from sim.physics import laws
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Trajectory
from sim.worlds import counterfactual, drop, setups
from sim.worlds.base import Draw, Positives, Share, Take, ascending
from sim.worlds.counterfactual import Table, Violation

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
SHARED = ("weak_gravity", "strong_gravity", "delay", "vanish", "slow_motion")
VIOLATIONS: Table = {kind: counterfactual.VIOLATIONS[kind] for kind in SHARED} | {
    "push": ("m/s sideways of the top box, from nothing", (0.0, 10.0), (0.25, 0.5, 1.0, 2.0)),
}


class Config(setups.Config):
    """`margin`: |m| of every joint, as a share of the boxes' width."""

    table: ClassVar[Table] = VIOLATIONS
    shapes: tuple[str, ...] = ("box",)
    size: Positives = (0.25, 0.35)
    boxes: Annotated[tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(le=5)]], AfterValidator(ascending)] = (
        2,
        4,
    )
    margin: Share = 0.06  # the least |m|; closer to 0, small errors decide
    stands: Share = 0.4  # of the towers; the others topple
    restitution: tuple[float, float] = (0.0, 0.0)


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a tower.

    Raises:
        UserError: no scene fits the ranges, or the split has none of `shapes`.
    """
    return setups.films(draw, config, simulate, render, make, violate)


def make(draw: Draw, config: Config, simulate: Simulate) -> setups.Made:
    """A tower; the target is its top box, the first body.

    Raises:
        UserError: no scene fits the ranges, or the split has none of `shapes`.
    """
    rng = draw.rng
    stands = bool(rng.random() < config.stands)

    def one() -> setups.Made | None:
        centres_N = _offsets(rng, config, stands)
        if centres_N is None:
            return None
        count = len(centres_N)
        staged = drop.stage(draw, config, np.array([1.0]), np.zeros(1, int))
        if staged is None:
            return None
        top = staged.bodies[0]
        order = np.argsort(-setups.extent(top.asset, top.size))  # along x the longest side, along z the shortest
        width, depth, height = setups.extent(top.asset, top.size)[order].tolist()
        centres_N = width * centres_N
        margins = laws.margins(centres_N.tolist(), [1.0] * count, width)
        tower = _built(draw, config, top, order, centres_N, height)
        if not all(setups.tells_apart(config, a, b) for a, b in itertools.pairwise(tower)):
            return None
        caption = f"a tower of {NUMBERS[count]} boxes is let go."
        scene = replace(staged, bodies=tuple(tower), caption=caption)
        trajectory = simulate(scene)
        framed = drop.place_camera(draw, config, scene, trajectory) if drop.sound(scene, trajectory) else None
        law = {"g": config.gravity, "margin": min(margins), "side": 0.0, "front": depth / 2}
        if not stands:
            law |= _tipping(centres_N, width, height, int(np.argmin(margins)) + 1)
        return setups.Made(framed, trajectory, "stand" if stands else "topple", law) if framed else None

    return setups.attempt(one)


def _offsets(rng: np.random.Generator, config: Config, stands: bool) -> np.ndarray | None:
    """Centres (N,) of a tower's boxes along x, as shares of their width; None: the margins are not as `config` says."""
    count = int(rng.integers(*config.boxes, endpoint=True))
    steps = rng.uniform(-1, 1, count - 1) * rng.uniform(0.1, 0.7)
    centres_N = np.cumsum(np.append(0.0, steps))
    margins = laws.margins(centres_N.tolist(), [1.0] * count, 1.0)
    clear = all(abs(m) >= config.margin for m in margins) and np.abs(steps).max() < 1 - config.margin
    return centres_N - centres_N.mean() if clear and sum(m < 0 for m in margins) == (not stands) else None


def _built(
    draw: Draw, config: Config, top: Body, order: np.ndarray, centres_N: np.ndarray, height: float
) -> list[Body]:
    """The boxes from the top down, each on the one below, with its sides along the axes."""
    turn_33 = np.eye(3)[:, np.argsort(order)]  # the mesh's longest side along x, its shortest along z
    turn_33[:, order[1]] *= np.linalg.det(turn_33)
    i, j, k, w = Rotation.from_matrix(turn_33).as_quat().tolist()
    boxes: list[Body] = []
    for n, x in reversed(list(enumerate(centres_N.tolist()))):
        box = replace(top, position=(x, top.position[1], (n + 0.5) * height), orientation=(w, i, j, k))
        if boxes and library.mesh(top.asset).texture is None:
            name, material = drop.look(draw.rng, config, top.asset, top.size)
            box = replace(box, name=name, material=material)
        boxes.append(box)
    return boxes


def _tipping(centres_N: np.ndarray, width: float, height: float, joint: int) -> dict[str, float]:
    """What `law` says of a tower whose upper part, from box `joint` on, topples. Boxes are solid and equally heavy."""
    upper = centres_N[joint:]
    side = float(np.sign(upper.mean() - centres_N[joint - 1]))
    edge = float(centres_N[joint - 1] + side * width / 2)
    beside_N, above_N = side * (upper - edge), (np.arange(len(upper)) + 0.5) * height
    own = (width**2 + height**2) / 12
    return {
        "side": side,
        "edge_x": edge,
        "edge_z": joint * height,
        "centre_x": float(beside_N.mean()),
        "centre_z": float(above_N.mean()),
        "inertia": float((beside_N**2 + above_N**2).mean() + own),
    }


def violate(made: setups.Made, violation: Violation, simulate: Simulate) -> Trajectory:
    """The motion with one law broken.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    scene = made.scene
    if violation.kind != "push":
        return counterfactual.violate(scene, made.trajectory, violation, simulate)
    side = made.law["side"] or 1.0
    pushed = replace(scene.bodies[0], velocity=(-side * violation.value, 0.0, 0.0))
    return simulate(replace(scene, bodies=(pushed, *scene.bodies[1:])))
