"""Scenes by hand, and the objects, backgrounds and settings from which tests draw scenes."""

from dataclasses import replace

import numpy as np

from sim import geometry
from sim.assets import library, surfaces
from sim.scene import Background, Body, Camera, Light, Material, Scene

# The shapes that take longest to divide into convex parts are left out.
SLOW = ("bear", "bowl", "bunny", "duck", "dumbbell", "mug", "plastic brick", "ring")
OBJECTS, BACKGROUNDS = (library.split(ids)[0] for ids in (library.object_ids(), surfaces.background_ids()))
OBJECTS = [asset for asset in OBJECTS if library.category(asset) not in SLOW]
POCKET = {"width": 64, "height": 64, "frames": 33, "studio": True, "texture": 0.0, "size": (0.25, 0.35)}


def world(*bodies: Body, fps: float = 16.0, frames: int = 33) -> Scene:
    grey = Material("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, 0)
    return Scene(
        bodies=bodies,
        camera=Camera((0.0, -3.0, 0.5)),
        light=Light((0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.3, 0.3, 0.3)),
        background=Background("plain", grey, None, 5.0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        floor_friction=0.8,
        floor_restitution=1.0,
        gravity=(0.0, 0.0, -9.81),
        frames=frames,
        fps=fps,
        target=0,
        caption="",
        seed=0,
    )


def body(asset: str, height: float, restitution: float = 0.0, turn: int = 0) -> Body:
    """A body of one kilogram in a random orientation of seed `turn`, its lowest point at `height`."""
    q = np.random.default_rng(turn).normal(size=4)
    w, x, y, z = (q / np.linalg.norm(q)).tolist()
    plain = Body(asset, "thing", 0.3, 1.0, 0.6, restitution, (0.0, 0.0, 0.0), (w, x, y, z), "dropped", None)
    return replace(plain, position=(0.0, 0.0, height - float(geometry.outline(plain)[:, 2].min())))
