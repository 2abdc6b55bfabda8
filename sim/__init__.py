"""Simulated clips of rigid bodies: build a scene, simulate it, film it.

    import sim
    scene = sim.make_scene([sim.make_body("ball", height=0.8, color="red")])
    clip = sim.film(scene, sim.simulate(scene))
    sim.write_video("fall.mp4", clip.rgb, scene.fps)

The functions are in sim/api.py, which is imported when a function is first used. sim has no code for training.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.api import (
        Background,
        Body,
        Camera,
        Clip,
        Contact,
        Light,
        Material,
        Scene,
        Trajectory,
        film,
        make_body,
        make_dataset,
        make_scene,
        simulate,
        write_video,
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


def __getattr__(name: str) -> Any:
    """Import sim/api.py when one of its functions or classes is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'sim' has no attribute {name!r}")
    from sim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
