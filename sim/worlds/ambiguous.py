"""PISA's ambiguous set (Li et al. 2025, section 5.2 and appendix F): one first frame, several falls.

A single object hangs in front of a level camera, without shadows. It is moved along the camera's rays and scaled with
its distance, so the first frame stays the same; its mass grows with its volume. The clips of a group share their
first frame byte for byte and differ in the depth Z of the object's lowest point, and so in its height Y and fall time t
(h is the camera's height, beta the slope of the ray through the lowest point):

    Z ~ U(depth),   Y = h + beta Z,   t = sqrt(2 Y / g)

If the object is below the camera (beta < 0), Z ends where its ray meets the floor.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from posttrain.core.errors import UserError
from sim.geometry import lowest
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import Scene
from sim.worlds import drop
from sim.worlds.base import Amount, Draw, Positives, Take


class Config(drop.Config):
    """`drop` and `size` are those at the nearest depth. The camera does not move back; `camera_gap` is not used."""

    dropped: tuple[Literal[1], Literal[1]] = (1, 1)
    pile: tuple[Literal[0], Literal[0]] = (0, 0)
    region: tuple[Amount, Amount] = (1.0, 0.0)
    depth: Positives = (2.0, 18.0)
    members: int = Field(5, ge=1)  # clips of a group

    def nearest(self) -> float:
        return self.depth[0]


def group(draw: Draw, config: Config, simulate: Simulate) -> list[Scene]:
    """The scenes of a group. If one of them fits the picture, all of them do.

    Raises:
        UserError: no such scene fits the ranges.
    """
    near, far = config.depth
    for _ in range(drop.ATTEMPTS):
        first = drop.alone(draw, config, simulate, near, float(draw.rng.uniform(*config.drop)))
        if first is None:
            continue
        scene, _ = first
        height = scene.camera.position[2]
        floor = -height / slope(scene) if slope(scene) < 0 else np.inf
        if floor <= near:
            continue
        wall = scene.camera.position[1] + 1.5 * far  # behind the farthest object
        scene = replace(
            scene,
            light=replace(scene.light, shadows=False),
            background=replace(scene.background, wall_y=wall),
        )
        return [at(scene, float(z)) for z in draw.rng.uniform(near, min(far, floor), config.members)]
    remedy = "widen target_pixels, size, drop or region"
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; {remedy}", "value", "world")


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a group.

    Their rows have `depth` Z and `height` Y of the lowest point and the range `depths` of Z, in metres, and `beta`.
    """
    picture: np.ndarray | None = None
    for scene in group(draw, config, simulate):
        trajectory = simulate(scene)
        clip = render(scene, trajectory)
        picture = clip.rgb[0] if picture is None else picture
        clip.rgb[0] = picture  # else rounding changes single pixels by a grey level, which would reveal the depth
        _, y, z = lowest(scene.bodies[0])
        labels = {"depth": float(y) - scene.camera.position[1], "height": float(z), "beta": slope(scene)}
        yield Take(scene, trajectory, clip, {"group": draw.index, "depths": list(config.depth), **labels})


def slope(scene: Scene) -> float:
    """beta, the slope (rise over depth) of the ray from the camera through the object's lowest point."""
    _, y, z = lowest(scene.bodies[0]) - np.array(scene.camera.position)
    return float(z / y)


def at(scene: Scene, depth: float) -> Scene:
    """The scene with the object's lowest point at another depth; lengths are scaled so that the picture is the same."""
    (body,) = scene.bodies
    eye = np.array(scene.camera.position)
    factor = depth / float(lowest(body)[1] - eye[1])
    x, y, z = (eye + factor * (body.position - eye)).tolist()
    material = body.material and replace(body.material, scale=factor * body.material.scale)
    grown = replace(body, size=factor * body.size, mass=factor**3 * body.mass, position=(x, y, z), material=material)
    return replace(scene, bodies=(grown,))
