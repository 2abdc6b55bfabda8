"""A box slides, or a ball rolls, down a ramp from rest. The ramp falls by the angle s to the left or right.

Until the lowest point touches the floor, `length` metres along the slope, the acceleration down the slope is

    a box that slides    a = g (sin s - mu cos s)
    a ball that rolls    a = 5/7 g sin s, without slipping, since mu >= 2/7 tan s

where mu is the product of the friction of the body and of the ramp. The row's `law`: g, slope (degrees, above 0 if
it falls to the right), length (m), friction (mu), acceleration (m/s^2), front (m, from a box's centre to its front).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from scipy.spatial.transform import Rotation

from sim.geometry import lowest, outline
from sim.physics import laws
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Scene, Trajectory
from sim.worlds import counterfactual, drop, setups
from sim.worlds.base import Draw, Positives, Share, Shares, Take
from sim.worlds.counterfactual import Table, Violation

SHARED = ("weak_gravity", "strong_gravity", "vanish", "slow_motion")
VIOLATIONS: Table = {kind: counterfactual.VIOLATIONS[kind] for kind in SHARED} | {
    "less_friction": ("of the friction", (0.0, 1.0), (0.75, 0.5, 0.25, 0.0)),
    "more_friction": ("times the friction", (1.0, 100.0), (1.25, 1.5, 2.0, 4.0)),
    "sink": ("m into the ramp at its foot", (0.0, 10.0), (0.03, 0.06, 0.12, 0.24)),
    "float": ("m above the ramp at its foot", (0.0, 10.0), (0.05, 0.1, 0.2, 0.4)),
}
GRIP = 1.15  # a ball has at least GRIP times the friction that it needs to roll


def _below_45(degrees: tuple[int, int]) -> tuple[int, int]:
    if not 1 <= degrees[0] <= degrees[1] <= 44:
        raise PydanticCustomError("range", "should be from 1 to 44 degrees, its lower end first")
    return degrees


Degrees = Annotated[tuple[int, int], AfterValidator(_below_45)]


class Config(setups.Config):
    """Lengths in metres, angles in whole degrees. The friction of boxes on the ramp is by `sliding`."""

    table: ClassVar[Table] = VIOLATIONS
    shapes: tuple[str, ...] = ("box",)  # of what slides
    size: Positives = (0.2, 0.35)
    rolls: Share = 0.5  # of the scenes; in the others a box slides
    slope: Degrees = (8, 18)
    ramp: Positives = (1.0, 1.3)  # its length along the floor
    sliding: Shares = (0.3, 0.85)  # a box's friction, as a share of the friction that would hold it
    restitution: tuple[float, float] = (0.0, 0.0)


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a ramp.

    Raises:
        UserError: no scene fits the ranges, or the split has none of `shapes`.
    """
    return setups.films(draw, config, simulate, render, make, violate)


def make(draw: Draw, config: Config, simulate: Simulate) -> setups.Made:
    """A ramp with a box or a ball at its top.

    Raises:
        UserError: no scene fits the ranges, or the split has none of `shapes`.
    """
    rng = draw.rng
    rolls = bool(rng.random() < config.rolls)
    heading = int(rng.choice([-1, 1]))

    def one() -> setups.Made | None:
        degrees = int(rng.integers(*config.slope, endpoint=True))
        slope = math.radians(degrees)
        staged = drop.stage(
            setups.ball(draw) if rolls else draw,
            config.model_copy(update={"shapes": ()}) if rolls else config,
            np.array([0.1]),
            np.zeros(1, int),
        )
        if staged is None:
            return None
        ramp = setups.part(draw, config, f"ramp/{degrees:02d}", float(rng.uniform(*config.ramp)))
        friction = staged.bodies[0].friction
        if not rolls:
            friction = math.tan(slope) * float(rng.uniform(*config.sliding))
            ramp = replace(ramp, friction=friction / staged.bodies[0].friction)
        elif friction < GRIP * 2 / 7 * math.tan(slope):
            return None
        scene = _placed(staged, ramp, slope, heading, rolls)
        body, length = scene.bodies[0], float(lowest(scene.bodies[0])[2]) / math.sin(slope)
        acceleration = laws.roll(slope, config.gravity) if rolls else laws.slide(slope, friction, config.gravity)
        scene = _centred(scene, heading, slope, length, acceleration, rolls)
        body, ramp = scene.bodies
        if not (setups.tells_apart(config, body, ramp) and setups.stands_out(config, scene, ramp)):
            return None
        verb = "rolls" if rolls else "slides"
        caption = f"{drop.article(body.name)} {verb} down {drop.article(ramp.name)} to the "
        scene = replace(scene, caption=f"{caption}{'right' if heading > 0 else 'left'}.")
        trajectory = simulate(scene)
        framed = drop.place_camera(draw, config, scene, trajectory) if drop.sound(scene, trajectory) else None
        law = {
            "g": config.gravity,
            "slope": float(heading * degrees),
            "length": length,
            "friction": friction,
            "acceleration": acceleration,
            "front": 0.0 if rolls else float(-outline(body)[:, 1].min()),
        }
        return setups.Made(framed, trajectory, "roll" if rolls else "slide", law) if framed else None

    return setups.attempt(one)


def _placed(scene: Scene, ramp: Body, slope: float, heading: int, rolls: bool) -> Scene:
    """The scene with the ramp on the floor, its middle at x = 0, and the body at rest at the ramp's top.

    A box lies on its largest side, with its longest side along the slope.
    """
    (body,) = scene.bodies
    down, normal = axes(slope, heading)
    _, y, _ = body.position
    if heading < 0:
        ramp = replace(ramp, orientation=(0.0, 0.0, 0.0, 1.0))
    corners_V3 = outline(ramp)
    x = float(-(corners_V3[:, 0].min() + corners_V3[:, 0].max()) / 2)
    ramp = replace(ramp, position=(x, y, float(-corners_V3[:, 2].min())))
    top = np.array([-heading * ramp.size / 2, y, ramp.size * math.tan(slope)])
    if not rolls:
        sides = np.argsort(-setups.extent(body.asset, body.size))  # longest first
        turn_33 = np.zeros((3, 3))
        turn_33[:, sides] = np.stack([down, [0.0, 1.0, 0.0], normal], axis=1)
        turn_33[:, sides[1]] *= np.linalg.det(turn_33)
        i, j, k, w = Rotation.from_matrix(turn_33).as_quat().tolist()
        body = replace(body, orientation=(w, i, j, k))
    corners_V3 = outline(body)
    start = top - down * ((corners_V3 @ down).min() - 0.02) - normal * (corners_V3 @ normal).min()
    body = replace(body, position=tuple(start.tolist()))
    return replace(scene, bodies=(body, ramp))


def _centred(scene: Scene, heading: int, slope: float, length: float, acceleration: float, rolls: bool) -> Scene:
    """The scene moved sideways, so that the middle of the body's way is about in the middle of the picture."""
    body, _ = scene.bodies
    foot = min(math.sqrt(2 * length / acceleration), (scene.frames - 1) / scene.fps)
    speed, left = acceleration * foot * math.cos(slope), (scene.frames - 1) / scene.fps - foot
    braked = abs(scene.gravity[2]) * scene.floor_friction * body.friction
    left = left if rolls else min(left, speed / braked / 2)
    x = -heading * speed * left / 2  # the ramp's middle is at 0, and beyond its foot the body goes so far
    moved = (replace(b, position=(b.position[0] + x, *b.position[1:])) for b in scene.bodies)
    return replace(scene, bodies=tuple(moved))


def axes(slope: float, heading: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors down the slope and away from it; `slope` in radians, `heading` 1 if it falls to the right, or -1."""
    down = np.array([heading * math.cos(slope), 0.0, -math.sin(slope)])
    return down, np.array([heading * math.sin(slope), 0.0, math.cos(slope)])


def violate(made: setups.Made, violation: Violation, simulate: Simulate) -> Trajectory:
    """The motion with one law broken.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    scene, true, value = made.scene, made.trajectory, violation.value
    match violation.kind:
        case "less_friction" | "more_friction":
            body, ramp = scene.bodies
            return simulate(replace(scene, bodies=(body, replace(ramp, friction=value * ramp.friction))))
        case "sink" | "float":
            down, normal = axes(math.radians(abs(made.law["slope"])), 1 if made.law["slope"] > 0 else -1)
            path_T3 = true.positions_TN3[:, 0] - true.positions_TN3[0, 0]
            offset_TN3 = np.zeros_like(true.positions_TN3)
            away = -value if violation.kind == "sink" else value
            offset_TN3[:, 0] = np.outer(np.clip(path_T3 @ down / made.law["length"], 0, 1), away * normal)
            return setups.shifted(true, offset_TN3)
        case _:
            return counterfactual.violate(scene, true, violation, simulate)
