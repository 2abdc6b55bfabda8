"""Scenes, trajectories and clips: immutable data, SI units, no behaviour.

World: z up, the floor at z = 0. The camera is level and looks along +y of the world with x to the right; its
own frame is x right, y down, z forward. Poses are metres and unit quaternions, w first, of a body's centre of
mass. Time 0 is frame 0; frame k is at time k / fps.

Shape letters: T frames, N bodies, H W pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
FLOOR = -1  # stands for the floor wherever a body's index is expected


@dataclass(frozen=True)
class Material:
    """A procedural surface: `pattern` is a shader branch, `seed` fixes its noise, colours are linear RGB in [0, 1]."""

    pattern: Literal["plain", "noise", "checker", "stripes", "spots", "bricks", "marble", "wood"]
    color: Vector
    second: Vector
    scale: float  # metres per period
    seed: int


@dataclass(frozen=True)
class Body:
    """One rigid object. Roles: `dropped` falls, `pile` rests below, `moved` is a fixed obstacle or has a given path."""

    asset: str
    name: str  # the noun a caption uses
    size: float  # metres, longest side of the bounding box
    mass: float  # kilograms
    friction: float
    restitution: float
    position: Vector
    orientation: Quaternion
    role: Literal["dropped", "pile", "moved"]
    material: Material | None  # None: the asset's own texture
    velocity: Vector = (0.0, 0.0, 0.0)  # metres per second at time 0, of a `dropped` body


@dataclass(frozen=True)
class Camera:
    """A level pinhole. Pixel centres are at half-integers; the principal point is the picture's centre."""

    position: Vector
    focal: float = 0.035  # metres
    sensor: float = 0.032  # metres, width of the sensor
    width: int = 64
    height: int = 64


@dataclass(frozen=True)
class Light:
    """A sun and the sky's ambient light (hemisphere), in linear RGB; `direction` points from the scene to the sun.

    Without `shadows`, bodies cast no shadows, not even on themselves.
    """

    direction: Vector
    color: Vector
    ambient: Vector
    shadows: bool = True


@dataclass(frozen=True)
class Background:
    """Floor, an optional wall facing the camera at depth `wall_y`, and a sky from horizon to zenith."""

    id: str
    floor: Material
    wall: Material | None
    wall_y: float
    sky_horizon: Vector
    sky_zenith: Vector


@dataclass(frozen=True)
class Pivot:
    """The body `body` turns about the fixed `point` (metres in the world), as if on a stiff rod without mass."""

    body: int
    point: Vector


@dataclass(frozen=True)
class Scene:
    """The input of engines and renderers. `target` is the index of the body that metrics score."""

    bodies: tuple[Body, ...]
    camera: Camera
    light: Light
    background: Background
    floor_friction: float
    floor_restitution: float
    gravity: Vector
    frames: int
    fps: float
    target: int
    caption: str
    seed: int
    pivots: tuple[Pivot, ...] = ()


@dataclass(frozen=True)
class Contact:
    """One touch: time in seconds, the indices of the two bodies (FLOOR = -1), normal impulse in newton seconds."""

    time: float
    a: int
    b: int
    impulse: float


@dataclass(frozen=True)
class Trajectory:
    """Poses at the frames.

    Attributes:
        energy: mechanical energy of all bodies in joules, at times that the engine chooses; empty if not simulated.
        scales_TN: factors of the sizes with which bodies are drawn, 0 draws nothing; None: all are 1.
    """

    positions_TN3: np.ndarray
    quaternions_TN4: np.ndarray
    contacts: tuple[Contact, ...]
    energy: np.ndarray
    scales_TN: np.ndarray | None = None


@dataclass(frozen=True)
class Hold:
    """A body stops for good once its centre is at `height` metres or below."""

    body: int
    height: float


@dataclass(frozen=True)
class Tunnel:
    """A body passes through the bodies `through` (or FLOOR), and lands on fixed copies of them `depth` metres lower."""

    body: int
    through: tuple[int, ...]
    depth: float


@dataclass(frozen=True)
class AddEnergy:
    """At its first contact a body gains the energy of `height` metres, as upward speed."""

    body: int
    height: float


@dataclass(frozen=True)
class Teleport:
    """After `time` seconds a body continues `offset` metres away, with the same velocity."""

    body: int
    time: float
    offset: Vector


Intervention = Hold | Tunnel | AddEnergy | Teleport  # changes during a simulation, which break a law


@dataclass(frozen=True)
class Clip:
    """A rendered clip.

    rgb uint8 (T, H, W, 3); instances uint8 (T, H, W), 0 background, i + 1 body i; depth float32 (T, H, W) metres
    along the optical axis, inf in the sky; flow float32 (T, H, W, 2) pixels (x right, y down) to frame k + 1,
    zeros in the last frame.
    """

    rgb: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    flow: np.ndarray
