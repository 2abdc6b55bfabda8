"""The library of objects: their ids, the split into train and test assets, and their meshes.

Objects come from installed packages: the 999 usable nameless shapes of pybullet_data ("toy"), its named models (duck,
mug, ...), and the shapes of shapes.py. An asset's id is `category/number`. The same id gives the same arrays in every
process.

Shape letters: V vertices, F triangles, P points.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pybullet_data
from PIL import Image
from scipy.spatial import ConvexHull

from posttrain.core.errors import UserError
from sim.assets import convex
from sim.assets.meshes import centred, read_obj, second_moments, smooth
from sim.assets.shapes import FIXTURES, SHAPES, sphere_points

CONVEX = 1.001  # if hull and mesh have a smaller ratio of volumes, the mesh collides as its hull
NEAR = 0.02  # largest distance of a collision shape from the mesh, as a share of the longest side
DIAGONAL = 1e-6  # products of inertia below this share of the tensor's trace count as 0
VARIANTS = 16  # proportions per category of shapes.py
VALIDATION = 4  # further proportions per category, for validation only

# pybullet_data: category -> (model, texture or None, the model's axis that points up)
MODELS: dict[str, tuple[str, str | None, str]] = {
    "bear": ("teddy2_VHACD_CHs.obj", None, "y"),
    "bunny": ("bunny.obj", None, "y"),
    "domino": ("domino/domino.obj", "domino/domino.jpg", "z"),
    "duck": ("duck.obj", "duckCM.png", "y"),
    "lettered cube": ("jenga/jenga.obj", "jenga/jenga.png", "z"),
    "mug": ("objects/mug.obj", None, "z"),
    "plastic brick": ("lego/lego.obj", None, "y"),
    "soccer ball": ("soccerball.obj", "colors16.png", "z"),
    "wheel": ("racecar/meshes/left_front_wheel.obj", "racecar/meshes/wheel.jpg", "y"),
    "wooden box": ("table/table.obj", "table/table.png", "z"),
}
ROUND = ("ball", "soccer ball")  # a hull would not roll, so engines use a sphere of diameter `size`


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles around the centre of mass (assuming uniform density), scaled to a longest bounding-box side of 1."""

    vertices: np.ndarray  # (V, 3) float64
    normals: np.ndarray  # (V, 3) float64, unit
    faces: np.ndarray  # (F, 3) int32, counter-clockwise from outside
    uv: np.ndarray | None  # (V, 2), v upwards
    texture: np.ndarray | None  # (H, W, 3) uint8 sRGB, first row on top
    volume: float  # of the scaled mesh, so a body of size s has volume * s**3 cubic metres
    name: str  # the noun a caption uses


def object_ids() -> list[str]:
    """The ids of all objects for training and testing, sorted."""
    toys = [f"toy/{i:03d}" for i in range(1000) if i != 168]  # all coordinates of 168 are NaN
    made = [f"{name}/{i:02d}" for name in SHAPES for i in range(1 if name == "ball" else VARIANTS)]
    return sorted(toys + made + [f"{name}/00" for name in MODELS])


def validation_ids() -> list[str]:
    """The ids of objects that only validation uses, sorted: shapes, as training and testing use all toys and models."""
    numbers = range(VARIANTS, VARIANTS + VALIDATION)
    return sorted(f"{name}/{i:02d}" for name in SHAPES if name != "ball" for i in numbers)


def is_fixture(asset: str) -> bool:
    """Whether the asset is a part that worlds use in every split: "ramp/25" (a wedge of 25 degrees), or "rod/00"."""
    return category(asset) in FIXTURES


def category(asset: str) -> str:
    """An asset's category: "ball" for "ball/00"."""
    return asset.partition("/")[0]


def is_round(asset: str) -> bool:
    """Whether engines use a sphere of diameter `size` for the asset."""
    return category(asset) in ROUND


def split(ids: list[str], fraction: float = 0.1) -> tuple[list[str], list[str]]:
    """(train, test): the rule of Kubric's `get_test_split`, a draw without replacement from the sorted ids, seed 42."""
    ids = sorted(ids)
    test = set(np.random.default_rng(42).choice(ids, size=round(len(ids) * fraction), replace=False).tolist())
    return [i for i in ids if i not in test], sorted(test)


def choose(rng: np.random.Generator, ids: list[str]) -> str:
    """One of `ids`: half of the time a nameless toy, else a random object of a random category.

    A uniform draw over ids would give toys four times in five, and captions could not name them.
    """
    by_category: dict[str, list[str]] = {}
    for asset in ids:
        by_category.setdefault(category(asset), []).append(asset)
    toys = by_category.pop("toy", [])
    if toys and (not by_category or rng.random() < 0.5):
        return toys[rng.integers(len(toys))]
    names = sorted(by_category)
    others = by_category[names[rng.integers(len(names))]]
    return others[rng.integers(len(others))]


@cache
def mesh(asset: str) -> Mesh:
    """The asset's triangles; see Mesh for frame and scale.

    Raises:
        UserError: there is no such asset.
    """
    name, _, number = asset.partition("/")
    folder = Path(pybullet_data.getDataPath())
    uv, texture = None, None
    if name in FIXTURES:
        vertices, faces = FIXTURES[name](int(number))
    elif asset not in object_ids() and asset not in validation_ids():
        raise UserError(f"{asset}: there is no such asset; library.object_ids() lists them", "unknown_name")
    elif name == "toy":
        vertices, faces, _, _ = read_obj(folder / "random_urdfs" / number / f"{number}.obj")
    elif name in MODELS:
        file, picture, up = MODELS[name]
        vertices, faces, uv, corners = read_obj(folder / file)
        if up == "y":
            vertices = vertices[:, [0, 2, 1]] * [1, -1, 1]
        if picture is None or uv is None:
            uv = None
        else:
            uv = uv[corners]
            texture = np.asarray(Image.open(folder / picture).convert("RGB"))
    else:
        vertices, faces = SHAPES[name](np.random.default_rng([*name.encode(), int(number)]))
    vertices, volume = centred(vertices, faces)
    vertices, normals, faces, uv = smooth(vertices, faces, uv)
    return Mesh(vertices, normals, faces, uv, texture, volume, name)


@cache
def hull(asset: str) -> np.ndarray:
    """The points (P, 3) of the asset's convex hull, in the frame of `mesh`; of a sphere for balls."""
    if is_round(asset):
        return np.concatenate([np.eye(3), -np.eye(3), sphere_points(394)]) / 2
    vertices = mesh(asset).vertices
    return vertices[ConvexHull(vertices).vertices]


@cache
def parts(asset: str) -> tuple[np.ndarray, ...]:
    """Convex parts for collisions: the hull points (P, 3) of each, in the frame of `mesh`.

    If the mesh is almost convex, its hull is the only part. Parts extend beyond the mesh by NEAR or a little more.
    """
    made = mesh(asset)
    if is_round(asset) or ConvexHull(made.vertices).volume <= CONVEX * made.volume:
        return (hull(asset),)
    return tuple(convex.parts(made.vertices, made.faces, NEAR))


@cache
def inertia(asset: str) -> tuple[np.ndarray, np.ndarray]:
    """(moments (3,), axes (3, 3)): principal moments per kilogram, in m^2 at size 1, and a column per axis.

    The axes are right-handed. If the mesh's own axes are principal axes, these are used, so that rounding errors do not
    rotate round bodies.
    """
    if is_round(asset):
        return np.full(3, 0.1), np.eye(3)  # 2/5 m r^2 of a sphere of diameter 1
    made = mesh(asset)
    tensor = second_moments(made.vertices, made.faces)
    if np.abs(tensor - np.diag(np.diag(tensor))).max() < DIAGONAL * np.trace(tensor):
        return np.diag(tensor), np.eye(3)
    moments, axes = np.linalg.eigh(tensor)
    axes[:, 2] *= np.linalg.det(axes)
    return moments, axes
