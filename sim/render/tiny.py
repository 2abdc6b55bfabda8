"""The fallback renderer: PyBullet's TinyRenderer, on any machine, without OpenGL.

Instances, depth and flow are as exact as those of `gl`. The pictures are simpler: a body has one colour, the mean of
its material or texture; floor and wall have one colour each; shadows are those of spheres of the bodies' volumes.
"""

from functools import cache
from types import ModuleType

import numpy as np
from pydantic import Field

from posttrain.core.errors import UserError
from posttrain.core.recipe import Strict
from sim.assets import library
from sim.assets.surfaces import encoded, linear
from sim.geometry import flow, focal_pixels, rays, xyzw
from sim.physics.bullet import engine
from sim.render.base import check
from sim.scene import Body, Camera, Clip, Material, Scene, Trajectory

NEAR, FAR = 0.2, 50.0  # metres, of TinyRenderer's depth buffer


class Config(Strict):
    """`supersample`^2 colour samples per pixel."""

    supersample: int = Field(2, ge=1, le=8)


DEFAULT = Config()


@cache
def world() -> tuple[ModuleType, int]:
    """PyBullet, and the number of the renderer's world, which is separate from the engine's."""
    bullet = engine()
    return bullet, bullet.connect(bullet.DIRECT)


def render(scene: Scene, trajectory: Trajectory, config: Config = DEFAULT) -> Clip:
    """Render the clip of the trajectory; see `Clip`.

    Raises:
        UserError: more bodies than a uint8 mask can number, or bodies that change their size.
    """
    check(scene)
    if trajectory.scales_TN is not None:
        raise UserError(
            "renderer tiny: cannot show bodies that vanish or melt; write `renderer: {name: gl}` in the recipe",
            "unsupported",
            "renderer.name",
        )
    bullet, client = world()
    bullet.resetSimulation(physicsClientId=client)
    handles = [_add(bullet, client, body) for body in scene.bodies]
    sun = np.array(scene.light.direction) / np.linalg.norm(scene.light.direction)
    radii = [b.size * np.cbrt(3 * library.mesh(b.asset).volume / (4 * np.pi)) for b in scene.bodies]
    rgb, instances, depths = [], [], []
    camera, supersample = scene.camera, config.supersample
    for positions, quaternions in zip(trajectory.positions_TN3, trajectory.quaternions_TN4, strict=True):
        for handle, position, quaternion in zip(handles, positions, quaternions, strict=True):
            pose = position.tolist(), xyzw(quaternion.tolist())
            bullet.resetBasePositionAndOrientation(handle, *pose, physicsClientId=client)
        colors, instance, _ = _picture(scene, sun, supersample)
        still = _backdrop(scene, sun, supersample, positions, np.array(radii))
        light = np.where((instance > 0)[..., None], linear(colors / 255), still)
        fine = light.reshape(camera.height, supersample, camera.width, supersample, 3).clip(0, 1)
        rgb.append(np.round(255 * encoded(fine.mean(axis=(1, 3)))).astype(np.uint8))
        _, instance, depth = _picture(scene, sun, 1)
        instances.append(instance)
        depths.append(depth)
    masks, far = np.stack(instances), np.stack(depths)
    return Clip(np.stack(rgb), masks, far, flow(camera, masks, far, trajectory))


def _add(bullet: ModuleType, client: int, body: Body) -> int:
    mesh = library.mesh(body.asset)
    if body.material is not None:
        color = encoded(_mean(body.material))
    elif mesh.texture is not None:
        color = mesh.texture.reshape(-1, 3).mean(axis=0) / 255
    else:
        color = np.array([0.5, 0.5, 0.5])
    shape = bullet.createVisualShape(
        bullet.GEOM_MESH,
        vertices=(mesh.vertices * body.size).tolist(),
        indices=mesh.faces.reshape(-1).tolist(),
        normals=mesh.normals.tolist(),
        rgbaColor=[*color.tolist(), 1.0],
        specularColor=[0, 0, 0],
        physicsClientId=client,
    )
    return int(bullet.createMultiBody(0, -1, shape, physicsClientId=client))


def _picture(scene: Scene, sun: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours (H, W, 3) of bodies in [0, 255], instances uint8, depth float32; `samples` per side of a pixel."""
    bullet, client = world()
    camera = _enlarged(scene.camera, samples)
    x, y, z = camera.position
    f = 2 * focal_pixels(camera)
    # TinyRenderer samples half a pixel away from a pixel's centre; the third column moves the samples to the centres.
    projection = [
        [f / camera.width, 0, 1 / camera.width, 0],
        [0, f / camera.height, 1 / camera.height, 0],
        [0, 0, -(FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)],
        [0, 0, -1, 0],
    ]
    _, _, colors, buffer, segments = bullet.getCameraImage(
        camera.width,
        camera.height,
        bullet.computeViewMatrix([x, y, z], [x, y + 1, z], [0, 0, 1]),
        np.array(projection).T.reshape(-1).tolist(),
        lightDirection=sun.tolist(),
        lightColor=[1, 1, 1],
        shadow=0,
        lightAmbientCoeff=0.5,
        lightDiffuseCoeff=0.5,
        lightSpecularCoeff=0.0,
        renderer=bullet.ER_TINY_RENDERER,
        physicsClientId=client,
    )
    shape = (camera.height, camera.width)
    body = np.reshape(segments, shape) + 1  # handles count from 0
    depth = FAR * NEAR / (FAR - (FAR - NEAR) * np.reshape(buffer, shape).astype(np.float64))
    still, _ = _planes(scene, camera)
    seen = (body > 0) & (depth < still)
    instances = np.where(seen, body, 0).astype(np.uint8)
    return np.reshape(colors, (*shape, 4))[..., :3], instances, np.where(seen, depth, still).astype(np.float32)


def _planes(scene: Scene, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) of floor and wall, inf in the sky; and whether (H, W) a pixel shows the wall."""
    directions = rays(camera)
    with np.errstate(divide="ignore"):
        floor = np.where(directions[..., 2] < 0, -camera.position[2] / directions[..., 2], np.inf)
    wall = scene.background.wall_y - camera.position[1] if scene.background.wall else np.inf
    return np.minimum(floor, wall), floor > wall


def _backdrop(scene: Scene, sun: np.ndarray, samples: int, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Linear light (H, W, 3) of floor, wall and sky, with the shadows of spheres."""
    camera, background = _enlarged(scene.camera, samples), scene.background
    depth, is_wall = _planes(scene, camera)
    directions = rays(camera)
    up = directions[..., 2] / np.linalg.norm(directions, axis=-1)
    blend = np.sqrt(np.clip(up, 0, 1))[..., None]
    result = (1 - blend) * background.sky_horizon + blend * background.sky_zenith
    solid = np.isfinite(depth)
    point = np.array(camera.position) + directions[solid] * depth[solid][:, None]
    normal = np.where(is_wall[solid][:, None], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0])
    towards = centres - point[:, None]
    along = towards @ sun
    shaded = ((along > 0) & ((towards**2).sum(-1) - along**2 < radii**2)).any(axis=1) & scene.light.shadows
    wall = _mean(background.wall) if background.wall else np.zeros(3)
    albedo = np.where(is_wall[solid][:, None], wall, _mean(background.floor))
    direct = (np.clip(normal @ sun, 0, None) * ~shaded)[:, None] * scene.light.color
    result[solid] = albedo * (direct + scene.light.ambient)
    return result


def _mean(material: Material) -> np.ndarray:
    """The mean colour of a material; a plain one has only its first."""
    return np.mean([material.color] if material.pattern == "plain" else [material.color, material.second], axis=0)


def _enlarged(camera: Camera, samples: int) -> Camera:
    return Camera(camera.position, camera.focal, camera.sensor, camera.width * samples, camera.height * samples)
