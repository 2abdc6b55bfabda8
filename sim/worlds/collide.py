"""Two balls of the same size slide towards each other on ice, without friction, and collide head on.

With the masses m, m' and the velocities v, v' before and u, u' after the collision, along the line of their centres,

    m u + m' u' = m v + m' v'        momentum is kept
    u' - u = e (v - v')              e: restitution

Between the collision and time 0, and after it, velocities do not change. In some scenes the second ball is at rest. A
caption says which of the balls is heavier, as a picture cannot. The row's `law`: mass and mass_2 (kg), v and v_2 (m/s,
before, to the right), u and u_2 (after), restitution (e).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from sim.physics import laws
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Body, Scene, Trajectory
from sim.worlds import counterfactual, drop, setups
from sim.worlds.base import Amount, Draw, Positives, Share, Shares, Take
from sim.worlds.counterfactual import Table, Violation

HEAVIER = 1.25  # ratio of the masses above which a caption says which ball is heavier
SHARED = ("vanish", "slow_motion")
VIOLATIONS: Table = {kind: counterfactual.VIOLATIONS[kind] for kind in SHARED} | {
    "momentum": ("of the momenta's magnitudes gained at the collision", (0.0, 10.0), (0.1, 0.2, 0.4, 0.8)),
    "more_bounce": ("of the closing speed kept", (0.0, 10.0), (1.2, 1.5, 2.0, 3.0)),
    "less_bounce": ("of the restitution", (0.0, 1.0), (0.75, 0.5, 0.25, 0.0)),
    "overlap": ("m into each other before they part", (0.0, 10.0), (0.05, 0.1, 0.2, 0.3)),
    "repel": ("m of air between them when they part", (0.0, 10.0), (0.05, 0.1, 0.2, 0.3)),
}


class Config(setups.Config):
    """Lengths in metres, speeds in metres per second."""

    table: ClassVar[Table] = VIOLATIONS
    region: tuple[Amount, Amount] = (0.0, 0.0)
    size: Positives = (0.25, 0.35)
    speed: Positives = (0.5, 1.0)
    gap: Positives = (0.5, 0.8)  # between the balls at time 0
    resting: Share = 0.3  # of the scenes in which the second ball is at rest
    density: Positives = (200.0, 800.0)  # kg / m^3, of each ball
    restitution: Shares = (0.3, 0.95)


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a collision.

    Raises:
        UserError: no scene fits the ranges.
    """
    return setups.films(draw, config, simulate, render, make, violate)


def make(draw: Draw, config: Config, simulate: Simulate) -> setups.Made:
    """A collision.

    Raises:
        UserError: no scene fits the ranges.
    """
    rng, balls = draw.rng, config.model_copy(update={"shapes": ()})
    side, rests = int(rng.choice([-1, 1])), bool(rng.random() < config.resting)

    def one() -> setups.Made | None:
        gap, v, v_2 = (float(rng.uniform(*ends)) for ends in (config.gap, config.speed, config.speed))
        v, v_2 = side * v, 0.0 if rests else -side * v_2
        staged, other = (drop.stage(setups.ball(draw), balls, np.array([1e-9]), np.zeros(1, int)) for _ in range(2))
        if staged is None or other is None or not setups.tells_apart(config, staged.bodies[0], other.bodies[0]):
            return None
        first, second = _pair(staged.bodies[0], other.bodies[0], side * gap, v, v_2)
        names = [_weighed(first, second), _weighed(second, first)]
        scene = replace(
            staged,
            bodies=(first, second),
            floor_friction=0.0,
            floor_restitution=0.0,
            caption=f"{drop.listed(names)} collide on ice.",
        )
        trajectory = simulate(scene)
        met = any({contact.a, contact.b} == {0, 1} for contact in trajectory.contacts)
        sound = met and drop.sound(scene, trajectory)
        framed = drop.place_camera(draw, config, scene, trajectory, (1,)) if sound else None
        u, u_2 = laws.collision((first.mass, second.mass), (v, v_2), first.restitution)
        law = {"mass": first.mass, "mass_2": second.mass, "v": v, "v_2": v_2, "u": u, "u_2": u_2}
        return setups.Made(framed, trajectory, "collide", law | {"restitution": first.restitution}) if framed else None

    return setups.attempt(one)


def _pair(one: Body, other: Body, gap: float, v: float, v_2: float) -> tuple[Body, Body]:
    """Two balls of the first one's size on the floor, with a gap in between; the picture's middle is between them.

    The restitution of their collision is that of the first.
    """
    mass = other.mass * (one.size / other.size) ** 3
    x, radius = (gap + np.copysign(one.size, gap)) / 2, one.size / 2
    first = replace(one, position=(-x, one.position[1], radius), velocity=(v, 0.0, 0.0), friction=0.0)
    second = replace(other, size=one.size, mass=mass, restitution=1.0, friction=0.0)
    return first, replace(second, position=(x, one.position[1], radius), velocity=(v_2, 0.0, 0.0))


def _weighed(body: Body, other: Body) -> str:
    """The ball's name with its article, and whether it is heavier or lighter than the other one."""
    ratio = body.mass / other.mass
    word = "heavy " if ratio > HEAVIER else "light " if ratio < 1 / HEAVIER else ""
    return drop.article(word + body.name)


def meeting(scene: Scene, trajectory: Trajectory) -> float:
    """Seconds until the balls collide."""
    return next(contact.time for contact in trajectory.contacts if {contact.a, contact.b} == {0, 1})


def violate(made: setups.Made, violation: Violation, simulate: Simulate) -> Trajectory:
    """The collision with one law broken.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    scene, true, value, law = made.scene, made.trajectory, violation.value, made.law
    masses, before, e = (law["mass"], law["mass_2"]), (law["v"], law["v_2"]), law["restitution"]
    time, closing = meeting(scene, true), abs(law["v"] - law["v_2"])
    match violation.kind:
        case "momentum":
            gained = value * (masses[0] * abs(before[0]) + masses[1] * abs(before[1])) / sum(masses)
            u, u_2 = laws.collision(masses, before, e)
            gained = np.copysign(gained, law["v"])
            return _moved(scene, true, before, (u + gained, u_2 + gained), time)
        case "more_bounce":
            return _moved(scene, true, before, laws.collision(masses, before, max(value, e)), time)
        case "less_bounce":
            return _moved(scene, true, before, laws.collision(masses, before, value * e), time)
        case "overlap" | "repel":
            later = value / closing if violation.kind == "overlap" else -value / closing
            return _moved(scene, true, before, laws.collision(masses, before, e), max(time + later, 0.0))
        case _:
            return counterfactual.violate(scene, true, violation, simulate)


def _moved(
    scene: Scene, true: Trajectory, before: tuple[float, float], after: tuple[float, float], time: float
) -> Trajectory:
    """The balls move at these velocities before and after `time`; heights and orientations are the true ones."""
    times_T1 = np.arange(scene.frames)[:, None] / scene.fps
    path_TN = np.minimum(times_T1, time) * np.array(before) + np.maximum(times_T1 - time, 0) * np.array(after)
    positions_TN3 = true.positions_TN3.copy()
    positions_TN3[..., 0] = true.positions_TN3[0, :, 0] + path_TN
    met = tuple(replace(c, time=time) if {c.a, c.b} == {0, 1} else c for c in true.contacts)
    return replace(true, positions_TN3=positions_TN3, contacts=met)
