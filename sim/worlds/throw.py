"""An object is thrown, horizontally or at an angle, in a plane that faces the camera.

With the launch velocity (v_x, v_z) at time 0 and until the first contact, its centre of mass is at

    x(t) = x(0) + v_x t,   z(t) = z(0) + v_z t - g t^2 / 2

The row's `law`: g (m/s^2), vx and vz (m/s, to the right and up) at the launch.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np

from sim.physics.base import Simulate
from sim.physics.laws import flight_time
from sim.render.base import Render
from sim.scene import Trajectory
from sim.worlds import counterfactual, drop, setups
from sim.worlds.base import Amounts, Draw, Positives, Share, Take
from sim.worlds.counterfactual import Table, Violation

KICK = ("m/s sideways gained at half the flight", (0.0, 10.0), (0.25, 0.5, 1.0, 2.0))
SHARED = ("weak_gravity", "strong_gravity", "upward_gravity", "hover", "energy", "teleport", "vanish", "slow_motion")
VIOLATIONS: Table = {kind: counterfactual.VIOLATIONS[kind] for kind in SHARED} | {"kick": KICK}


class Config(setups.Config):
    """Lengths in metres, speeds in metres per second, angles in degrees above the horizontal. `drop`: start heights."""

    table: ClassVar[Table] = VIOLATIONS
    drop: Positives = (0.5, 0.9)
    speed: Positives = (0.8, 1.8)
    angle: Amounts = (30.0, 70.0)
    horizontal: Share = 0.5  # of the throws; the others are at an angle


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a throw.

    Raises:
        UserError: no scene fits the ranges.
    """
    return setups.films(draw, config, simulate, render, make, violate)


def make(draw: Draw, config: Config, simulate: Simulate) -> setups.Made:
    """A throw.

    Raises:
        UserError: no scene fits the ranges.
    """
    rng = draw.rng
    level = bool(rng.random() < config.horizontal)
    height, speed, angle = (float(rng.uniform(*ends)) for ends in (config.drop, config.speed, config.angle))
    angle, heading = 0.0 if level else math.radians(angle), float(rng.choice([-1, 1]))
    vx, vz = heading * speed * math.cos(angle), speed * math.sin(angle)
    away = vx * min(flight_time(height, vz, config.gravity), (config.frames - 1) / config.fps)

    def one() -> setups.Made | None:
        scene = drop.stage(draw, config, np.array([height]), np.zeros(1, int))
        if scene is None:
            return None
        body = scene.bodies[0]
        start = (body.position[0] - away / 2, *body.position[1:])
        pace = "fast" if speed > np.mean(config.speed) else "slowly"
        way = f"{'' if level else 'up and '}to the {'right' if heading > 0 else 'left'}"
        scene = replace(
            scene,
            bodies=(replace(body, position=start, velocity=(vx, 0.0, vz)),),
            caption=f"{drop.article(body.name)} is thrown {pace} {way}.",
        )
        trajectory = simulate(scene)
        framed = drop.place_camera(draw, config, scene, trajectory) if drop.sound(scene, trajectory) else None
        law = {"g": config.gravity, "vx": vx, "vz": vz}
        return setups.Made(framed, trajectory, "throw", law) if framed else None

    return setups.attempt(one)


def violate(made: setups.Made, violation: Violation, simulate: Simulate) -> Trajectory:
    """The throw with one law broken.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    scene, true = made.scene, made.trajectory
    if violation.kind != "kick":
        return counterfactual.violate(scene, true, violation, simulate)
    end = counterfactual.contact_time(scene, true) or (scene.frames - 1) / scene.fps
    half = round(end / 2 * scene.fps)
    x, z = (float(true.positions_TN3[half, 0, i]) for i in (0, 2))
    (body,) = scene.bodies
    vx, vz = made.law["vx"], made.law["vz"] - made.law["g"] * half / scene.fps
    vx += math.copysign(violation.value, vx)
    onwards = replace(body, position=(x, body.position[1], z), velocity=(vx, 0.0, vz))
    rest = simulate(replace(scene, bodies=(onwards,), frames=scene.frames - half))
    late = tuple(replace(contact, time=contact.time + half / scene.fps) for contact in rest.contacts)
    return replace(
        true,
        positions_TN3=np.concatenate([true.positions_TN3[:half], rest.positions_TN3]),
        quaternions_TN4=np.concatenate([true.quaternions_TN4[:half], rest.quaternions_TN4]),
        contacts=late,
    )
