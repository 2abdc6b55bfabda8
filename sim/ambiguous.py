"""PISA's ambiguous set (Li et al. 2025, section 5.2 and appendix F): one first picture, several falls.

An object alone hangs before a level camera, without shadows. It is moved along the camera's rays and grows as it goes
away, so that the first picture stays as it is; what it weighs grows with its volume. The clips of a group share their
first picture byte for byte and differ in the depth Z of the object's lowest point, and so in its height and fall time:

    Z ~ U(depth),   Y = h + beta Z,   t = sqrt(2 Y / g)

Where the object is below the camera (beta < 0), Z ends where its ray meets the floor.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from posttrain.core.errors import UserError
from sim import drop
from sim.drop import Range
from sim.physics import bullet
from sim.scene import Clip, Scene, Shoot, Trajectory


class Config(drop.Config):
    """`drop` and `size` are those at the nearest depth; the camera does not retreat, `camera_gap` is not used."""

    dropped: tuple[Literal[1], Literal[1]] = (1, 1)
    pile: tuple[Literal[0], Literal[0]] = (0, 0)
    region: Range = (1.0, 0.0)
    depth: Range = (2.0, 18.0)
    members: int = Field(5, ge=1)  # of a group


def group(
    rng: np.random.Generator, config: Config, objects: list[str], backgrounds: list[str], seed: int
) -> list[Scene]:
    """The scenes of a group; which depths they have says nothing about whether they can be filmed.

    Raises:
        UserError: the ranges leave no room for such a scene.
    """
    near, far = config.depth
    for _ in range(drop.ATTEMPTS):
        first = drop.alone(rng, config, objects, backgrounds, seed, near, float(rng.uniform(*config.drop)))
        if first is None:
            continue
        scene, _ = first
        height = scene.camera.position[2]
        floor = -height / slope(scene) if slope(scene) < 0 else np.inf
        if floor <= near:
            continue
        wall = scene.camera.position[1] + 1.5 * far  # behind the farthest of them
        scene = replace(
            scene,
            light=replace(scene.light, shadows=False),
            background=replace(scene.background, wall_y=wall),
        )
        return [at(scene, float(z)) for z in rng.uniform(near, min(far, floor), config.members)]
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; widen target_pixels, size, drop or region")


def takes(
    rng: np.random.Generator, config: Config, objects: list[str], backgrounds: list[str], seed: int, shoot: Shoot
) -> Iterator[tuple[Scene, Trajectory, Clip, dict[str, Any]]]:
    """The clips of a group and what their rows tell.

    Depth Z and height Y of the lowest point and between which `depths` Z was drawn, metres, and beta.
    """
    picture: np.ndarray | None = None
    for scene in group(rng, config, objects, backgrounds, seed):
        trajectory = bullet.simulate(scene)
        clip = shoot(scene, trajectory)
        picture = clip.rgb[0] if picture is None else picture
        clip.rgb[0] = picture  # rounding makes a grey level here and there, which would tell
        _, y, z = drop.lowest(scene.bodies[0])
        told = {"depth": float(y) - scene.camera.position[1], "height": float(z), "beta": slope(scene)}
        yield scene, trajectory, clip, {"group": seed, "depths": list(config.depth), **told}


def label(scene: Scene) -> str:
    """The kind of motion, for the metadata."""
    return drop.label(scene)


def slope(scene: Scene) -> float:
    """beta: how fast the ray from the camera through the object's lowest point rises."""
    _, y, z = drop.lowest(scene.bodies[0]) - np.array(scene.camera.position)
    return float(z / y)


def at(scene: Scene, depth: float) -> Scene:
    """The same picture with the object's lowest point at another depth: all lengths from the camera on are scaled."""
    (body,) = scene.bodies
    eye = np.array(scene.camera.position)
    factor = depth / float(drop.lowest(body)[1] - eye[1])
    x, y, z = (eye + factor * (body.position - eye)).tolist()
    material = body.material and replace(body.material, scale=factor * body.material.scale)
    grown = replace(body, size=factor * body.size, mass=factor**3 * body.mass, position=(x, y, z), material=material)
    return replace(scene, bodies=(grown,))
