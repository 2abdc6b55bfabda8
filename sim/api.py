"""The functions of `import sim`: build a scene by hand, simulate it, film it, write a video; film a whole dataset.

Lengths are metres, times seconds, masses kilograms. World: z up, the floor at z = 0. The camera is level and looks
along +y with x to the right. Errors that a user can fix are raised as posttrain.UserError.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from posttrain.core import recipe
from posttrain.core.codec import playable
from posttrain.core.errors import UserError, printable
from posttrain.core.files import write_bytes
from sim.assets import library, surfaces
from sim.cli import make as _make
from sim.geometry import outline
from sim.scene import (
    Background,
    Body,
    Camera,
    Clip,
    Contact,
    Intervention,
    Light,
    Material,
    Quaternion,
    Scene,
    Trajectory,
)

__all__ = [
    "Background",
    "Body",
    "Camera",
    "Clip",
    "Contact",
    "Light",
    "Material",
    "Scene",
    "Trajectory",
    "film",
    "make_body",
    "make_dataset",
    "make_scene",
    "simulate",
    "write_video",
]

Role = Literal["dropped", "pile", "moved"]
Color = Literal["red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "grey", "black"]
GREYS = {"white": 0.95, "grey": 0.5, "black": 0.12}
VIEW = (0.0, -2.0, 0.5)  # metres; with the default lens the picture is 1.8 m wide at y = 0


def make_body(
    shape: str = "ball",
    at: tuple[float, float] = (0.0, 0.0),
    height: float = 0.0,
    *,
    size: float = 0.3,
    color: Color = "red",
    role: Role = "dropped",
    density: float = 500.0,
    friction: float = 0.7,
    restitution: float = 0.3,
    orientation: Quaternion = (1.0, 0.0, 0.0, 0.0),
) -> Body:
    """A rigid body of one colour; an asset that has a texture keeps the texture.

    Args:
        shape: a category such as "ball", "box", "cone", "duck" or "toy", or an asset of it, as in "box/03".
        at: x and y of its centre of mass.
        height: distance from its lowest point to the floor.
        size: the longest side of its bounding box.
        role: `dropped` falls from rest at time 0, `pile` rests at time 0, `moved` is a fixed obstacle.
        density: kilograms per cubic metre; determines its mass.
        friction: coefficient.
        restitution: the share of the speed that a bounce keeps is the product of both bodies' restitutions.
        orientation: unit quaternion, w first.

    Raises:
        UserError: unknown_name: there is no such shape or colour; value: the role is wrong or a number out of range.
    """
    asset = next((name for name in library.object_ids() if name in (shape, f"{shape}/00", f"{shape}/000")), shape)
    if asset not in library.object_ids():
        known = ", ".join(sorted({library.category(name) for name in library.object_ids()}))
        raise UserError(
            f"shape: {printable(repr(shape))} does not exist; choose from: {known}", "unknown_name", "shape"
        )
    if role not in get_args(Role):
        raise UserError(
            f"role: {printable(repr(role))} is not a role; choose from: {', '.join(get_args(Role))}", "value", "role"
        )
    for name, value, most in (("size", size, 100), ("density", density, 1e5)):
        if not 0 < value <= most:
            raise UserError(f"{name}: {value:g} should be above 0 and at most {most:g}", "value", name)
    for name, value, most in (("height", height, 100), ("friction", friction, 100), ("restitution", restitution, 1)):
        if not 0 <= value <= most:
            raise UserError(f"{name}: {value:g} should be from 0 to {most:g}", "value", name)
    if not np.isclose(np.linalg.norm(orientation), 1, atol=1e-6):
        raise UserError("orientation: should be a unit quaternion, w first", "value", "orientation")
    mesh, plain = library.mesh(asset), _plain(color)
    name = mesh.name if mesh.texture is not None else f"{color} {mesh.name}"
    mass, surface = density * mesh.volume * size**3, None if mesh.texture is not None else plain
    body = Body(asset, name, size, mass, friction, restitution, (0.0, 0.0, 0.0), orientation, role, surface)
    z = height - float(outline(body)[:, 2].min())
    return replace(body, position=(float(at[0]), float(at[1]), z))


def make_scene(
    bodies: Sequence[Body],
    caption: str = "",
    *,
    camera: Camera | None = None,
    background: Background | None = None,
    light: Light | None = None,
    gravity: float = 9.81,
    frames: int = 33,
    fps: float = 16.0,
    target: int = 0,
) -> Scene:
    """A scene with these bodies on a floor. Defaults are the studio of the pocket model's training clips.

    Args:
        bodies: from `make_body`; they must not overlap.
        caption: "" makes one from the dropped bodies' names, such as "a red ball falls."
        camera: default: 64 x 64 pixels, 2 m in front of y = 0 at a height of 0.5 m.
        background: default: a grey floor, and a backdrop of the same colour.
        light: default: a sun 85 degrees above the horizon.
        gravity: metres per second squared, downwards.
        frames: number of frames.
        fps: frames per second; frame k is at time k / fps.
        target: index of the body that metrics score.

    Raises:
        UserError: value: there is no body, `target` is not an index, or a number is out of range.
    """
    from sim.worlds.drop import seamless, sentence

    if not bodies or not 0 <= target < len(bodies):
        raise UserError(
            f"target: {target} is not an index of the {len(bodies)} bodies; give 0 to {len(bodies) - 1}",
            "value",
            "target",
        )
    if frames < 2 or not 1 <= fps <= 1000 or not 0 < gravity <= 1e4:
        reason = f"{frames}, {fps:g}, {gravity:g}; give frames of 2 or more, fps from 1 to 1000, gravity above 0"
        raise UserError(f"frames, fps, gravity: are {reason}", "value", "frames")
    light = light or Light((0.0, -0.0872, 0.9962), (0.9, 0.9, 0.9), (0.3, 0.3, 0.3))
    if background is None:
        floor = _plain("grey")
        background = seamless(Background("studio", floor, None, 3.0, floor.color, floor.color), light)
    return Scene(
        bodies=tuple(bodies),
        camera=camera or Camera(VIEW),
        light=light,
        background=background,
        floor_friction=0.8,
        floor_restitution=0.6,
        gravity=(0.0, 0.0, -gravity),
        frames=frames,
        fps=fps,
        target=target,
        caption=caption or sentence([body.name for body in bodies if body.role == "dropped"] or [bodies[target].name]),
        seed=0,
    )


def simulate(scene: Scene, interventions: Sequence[Intervention] = (), engine: str = "bullet") -> Trajectory:
    """The scene's motion from rest at time 0.

    Args:
        interventions: records of sim/scene.py that break a law: Hold, Tunnel, AddEnergy, Teleport.
        engine: a module of sim/physics: "bullet", or "analytic" for falls and bounces of balls in closed form.

    Returns:
        Positions (T, N, 3) in metres, unit quaternions (T, N, 4), w first, contacts, and the energy in joules.

    Raises:
        UserError: unknown_name: there is no such engine; unsupported: the engine cannot simulate this scene.
    """
    module = recipe.resolve("sim.physics", engine)
    trajectory: Trajectory = module.simulate(scene, interventions, module.Config())
    return trajectory


def film(scene: Scene, trajectory: Trajectory, renderer: str = "gl") -> Clip:
    """Render the clip that the scene's camera sees.

    Args:
        renderer: a module of sim/render: "gl" (OpenGL without a display), or "tiny", simpler pictures on any machine.

    Returns:
        rgb uint8 (T, H, W, 3); instances uint8 (T, H, W), 0 background, i + 1 body i; depth float32 (T, H, W) in metres
        along the optical axis; flow float32 (T, H, W, 2) in pixels to the next frame, x right and y down.

    Raises:
        UserError: unknown_name: there is no such renderer; not_installed: this machine has no OpenGL; unsupported: too
            many bodies, or sizes that change with "tiny".
    """
    module = recipe.resolve("sim.render", renderer)
    clip: Clip = module.render(scene, trajectory, module.Config())
    return clip


def write_video(path: Path | str, rgb: np.ndarray, fps: float) -> Path:
    """Write uint8 (T, H, W, 3) as an H.264 mp4 that every browser plays; odd sides lose their last pixel.

    Raises:
        UserError: value: `rgb` or `fps` is wrong; disk_full; not_writable.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 4 or rgb.shape[3] != 3 or min(rgb.shape) < 1 or min(rgb.shape[1:3]) < 2:
        raise UserError(f"rgb: is {rgb.dtype} {rgb.shape}; give uint8 (frames, height, width, 3)", "value", "rgb")
    if not 1e-3 <= fps <= 1e6:
        raise UserError(f"fps: {fps:g} is not a frame rate; give frames per second", "value", "fps")
    write_bytes(Path(path), playable(rgb, fps, crf=10))
    return Path(path)


def make_dataset(path: Path | str, *overrides: str, workers: int | None = None) -> Path:
    """Film the dataset of a recipe, as `sim make`; existing clips are kept.

    Args:
        path: a recipe file; recipes/pocket/drop.yaml and others come with the package.
        overrides: such as "out=my_clips", "splits={train: 10}", "world.gravity=1.62".
        workers: processes (default: one per core). A script that calls this function needs
            `if __name__ == "__main__":`.

    Returns:
        The dataset's folder.

    Raises:
        UserError: the recipe is wrong, or the folder holds clips of another recipe.
    """
    return _make(path, overrides, workers)


def _plain(color: str) -> Material:
    """A surface of one colour."""
    if color in GREYS:
        rgb = surfaces.color(0.0, 0.0, GREYS[color])
    elif color in surfaces.HUES:
        rgb = surfaces.color(surfaces.HUES[color], 0.8, 0.9)
    else:
        known = ", ".join([*surfaces.HUES, *GREYS])
        raise UserError(
            f"color: {printable(repr(color))} is not a colour; choose from: {known}", "unknown_name", "color"
        )
    return Material("plain", rgb, rgb, 1.0, 0)
