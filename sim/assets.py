"""The library of things: objects, materials, backgrounds, and which of them are kept for testing.

Objects come from what pip installs: the 999 sound nameless shapes of pybullet_data ("toy"), its named models (duck,
mug, ...), and shapes made here by turning a profile, raising an outline or taking a hull. An asset's id is
`kind/number`.
Everything follows from ids: the same id gives the same arrays in every process.

Shape letters: V vertices, F triangles.
"""

import colorsys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pybullet_data
from PIL import Image
from scipy.spatial import ConvexHull

from posttrain.core.errors import UserError
from sim.scene import Background, Material, Vector

HULL_POINTS = 64  # what PyBullet handles quickly; more would be no better at these sizes
CREASE = np.cos(np.radians(40.0))  # edges sharper than this stay sharp
VARIANTS = 16  # proportions per made kind
BACKGROUNDS = 512

# pybullet_data: kind -> (model, texture or None, which of its axes points up)
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
ROUND = ("ball", "soccer ball")  # a hull of 64 points would not roll: physics takes a true sphere of diameter `size`


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
    """All objects, sorted."""
    toys = [f"toy/{i:03d}" for i in range(1000) if i != 168]  # all coordinates of 168 are NaN
    made = [f"{kind}/{i:02d}" for kind in SHAPES for i in range(1 if kind == "ball" else VARIANTS)]
    return sorted(toys + made + [f"{kind}/00" for kind in MODELS])


def background_ids() -> list[str]:
    """All backgrounds, sorted."""
    return [f"background/{i:03d}" for i in range(BACKGROUNDS)]


def split(ids: list[str], fraction: float = 0.1) -> tuple[list[str], list[str]]:
    """(train, test): the rule of Kubric's `get_test_split`, a draw without replacement from the sorted ids, seed 42."""
    ids = sorted(ids)
    test = set(np.random.default_rng(42).choice(ids, size=round(len(ids) * fraction), replace=False).tolist())
    return [i for i in ids if i not in test], sorted(test)


def choose(rng: np.random.Generator, ids: list[str]) -> str:
    """One of `ids`: half of the time a nameless toy, else first a kind and then one of that kind.

    An even draw over ids would show toys four times in five, and captions would have little to say.
    """
    kinds: dict[str, list[str]] = {}
    for i in ids:
        kinds.setdefault(i.partition("/")[0], []).append(i)
    toys = kinds.pop("toy", [])
    if toys and (not kinds or rng.random() < 0.5):
        return toys[rng.integers(len(toys))]
    names = sorted(kinds)
    of_kind = kinds[names[rng.integers(len(names))]]
    return of_kind[rng.integers(len(of_kind))]


@cache
def mesh(asset: str) -> Mesh:
    """The asset's triangles; see Mesh for frame and scale.

    Raises:
        UserError: no such asset.
    """
    kind, _, number = asset.partition("/")
    folder = Path(pybullet_data.getDataPath())
    uv, texture = None, None
    if asset not in object_ids():
        raise UserError(f"{asset}: no such asset; sim.assets.object_ids() lists them all")
    if kind == "toy":
        vertices, faces, _, _ = read_obj(folder / "random_urdfs" / number / f"{number}.obj")
    elif kind in MODELS:
        file, picture, up = MODELS[kind]
        vertices, faces, uv, corners = read_obj(folder / file)
        if up == "y":
            vertices = vertices[:, [0, 2, 1]] * [1, -1, 1]
        if picture is None or uv is None:
            uv = None
        else:
            uv = uv[corners]
            texture = np.asarray(Image.open(folder / picture).convert("RGB"))
    else:
        vertices, faces = SHAPES[kind](np.random.default_rng([*kind.encode(), int(number)]))
    vertices, volume = centred(vertices, faces)
    vertices, normals, faces, uv = smooth(vertices, faces, uv)
    return Mesh(vertices, normals, faces, uv, texture, volume, kind)


@cache
def hull(asset: str) -> np.ndarray:
    """At most 64 points (P, 3) of the asset's convex hull, in the frame of `mesh`.

    They are the extreme points in evenly spread directions, the six of the bounding box first, so the hull lies
    inside the true one and touches the same box.
    """
    vertices = mesh(asset).vertices
    points = vertices[ConvexHull(vertices).vertices]
    if len(points) <= HULL_POINTS:
        return points
    directions = np.concatenate([np.eye(3), -np.eye(3), sphere_points(HULL_POINTS - 6)])
    return points[np.unique((points @ directions.T).argmax(axis=0))]


def read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Wavefront OBJ as (vertices (V, 3), faces (F, 3), uv (U, 2) or None, uv index per corner (F, 3)).

    Polygons become fans; normals, groups and materials are left out.
    """
    vertices: list[list[float]] = []
    uv: list[list[float]] = []
    corners: list[tuple[int, int]] = []
    for line in path.read_text(errors="replace").splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(x) for x in rest[:3]])
        elif word == "vt":
            uv.append([float(x) for x in rest[:2]])
        elif word == "f":
            fields = [corner.split("/") for corner in rest]
            polygon = [(int(f[0]) - 1, int(f[1]) - 1 if len(f) > 1 and f[1] else 0) for f in fields]
            for b, c in pairwise(polygon[1:]):
                corners += [polygon[0], b, c]
    index = np.array(corners, dtype=np.int64).reshape(-1, 3, 2)
    return np.array(vertices), index[..., 0], np.array(uv) if uv else None, index[..., 1]


def centred(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, float]:
    """Vertices around the centre of mass with a longest side of 1, and the volume after that.

    Signed tetrahedra from the origin; parts that overlap count twice, which is how pybullet_data's toys are built.
    """
    vertices = (vertices - vertices.mean(axis=0)) / np.ptp(vertices, axis=0).max()
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    sixfold = np.einsum("fi,fi->f", a, np.cross(b, c))
    centre = (sixfold[:, None] * (a + b + c)).sum(axis=0) / (4 * sixfold.sum())
    return vertices - centre, float(sixfold.sum() / 6)


def smooth(
    vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(vertices, normals, faces, uv) in which each vertex has one normal and one uv; `uv` comes per corner (F, 3, 2).

    A corner's normal is the area-weighted mean of the faces that meet there and turn by less than the crease angle.
    """
    spots, place = np.unique(np.round(vertices, 6), axis=0, return_inverse=True)
    faces = place.reshape(-1)[faces]
    cross = np.cross(spots[faces[:, 1]] - spots[faces[:, 0]], spots[faces[:, 2]] - spots[faces[:, 0]])
    area = np.linalg.norm(cross, axis=1)
    solid = area > 1e-12
    faces, cross, area = faces[solid], cross[solid], area[solid]
    uv = None if uv is None else uv[solid]
    unit = cross / area[:, None]
    corner_spot = faces.reshape(-1)
    corner_face = np.repeat(np.arange(len(faces)), 3)
    order = np.argsort(corner_spot, kind="stable")
    count = np.bincount(corner_spot, minlength=len(spots))
    start = np.cumsum(count) - count
    repeats = count[corner_spot]  # every corner is paired with all corners at the same spot
    mine = np.repeat(np.arange(len(corner_spot)), repeats)
    offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    other = corner_face[order[start[corner_spot[mine]] + offset]]
    weight = (unit[corner_face[mine]] * unit[other]).sum(axis=1) > CREASE
    normals = np.zeros((len(corner_spot), 3))
    np.add.at(normals, mine[weight], cross[other[weight]])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    keys = [spots[corner_spot], np.round(normals, 4)]
    if uv is not None:
        keys.append(uv.reshape(-1, 2))
    table, inverse = np.unique(np.concatenate(keys, axis=1), axis=0, return_inverse=True)
    normals = table[:, 3:6] / np.linalg.norm(table[:, 3:6], axis=1, keepdims=True)
    triangles = inverse.reshape(-1, 3).astype(np.int32)
    return table[:, :3], normals, triangles, None if uv is None else table[:, 6:8]


# Shapes made here. Each takes a generator and returns (vertices, faces), faces counter-clockwise from outside.
Shape = tuple[np.ndarray, np.ndarray]


def sphere_points(count: int) -> np.ndarray:
    """Evenly spread unit vectors (count, 3): a Fibonacci spiral."""
    i = np.arange(count) + 0.5
    z, turn = 1 - 2 * i / count, i * np.pi * (3 - np.sqrt(5))
    return np.stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z], axis=1)


def convex(points: np.ndarray) -> Shape:
    """The convex hull of points (P, 3)."""
    faces = ConvexHull(points).simplices
    a, b, c = (points[faces[:, i]] for i in range(3))
    outwards = np.einsum("fi,fi->f", np.cross(b - a, c - a), a - points.mean(axis=0)) > 0
    return points, np.where(outwards[:, None], faces, faces[:, ::-1])


def lathe(profile: np.ndarray, segments: int = 28, ring: bool = False) -> Shape:
    """Turn a profile of (radius, height) points, bottom to top, around z; a `ring` profile closes on itself."""
    radius, height = np.asarray(profile, dtype=float).T
    angle = 2 * np.pi * np.arange(segments) / segments
    rows, columns = len(radius), segments
    vertices = np.stack(
        [np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle)), np.repeat(height[:, None], columns, 1)], -1
    ).reshape(-1, 3)
    row, column = np.meshgrid(np.arange(rows if ring else rows - 1), np.arange(columns), indexing="ij")
    after = (row + 1) % rows
    a, b = row * columns + column, row * columns + (column + 1) % columns
    c, d = after * columns + (column + 1) % columns, after * columns + column
    return vertices, np.stack([a, b, c, a, c, d], -1).reshape(-1, 3)  # a pole's empty triangles are dropped by smooth


def extrude(outline: np.ndarray, height: float, top: float = 1.0) -> Shape:
    """Raise an outline (P, 2), counter-clockwise and star-shaped around the origin; its upper copy scaled by `top`."""
    count = len(outline)
    low = np.column_stack([outline, np.zeros(count)])
    high = np.column_stack([outline * top, np.full(count, height)])
    vertices = np.concatenate([low, high, [[0, 0, 0], [0, 0, height]]])
    i = np.arange(count)
    j = (i + 1) % count
    parts = [(i, j, j + count), (i, j + count, i + count), (j, i, np.full(count, 2 * count))]
    parts.append((i + count, j + count, np.full(count, 2 * count + 1)))
    return vertices, np.concatenate([np.stack(part, axis=1) for part in parts])


def polygon(corners: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """A regular outline (corners, 2) whose radius cycles through `radii`."""
    angle = 2 * np.pi * np.arange(corners) / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def solid(profile: list[tuple[float, float]], segments: int = 28) -> Shape:
    """Turn a profile that is closed at both ends by points on the axis."""
    return lathe(np.array([(0.0, profile[0][1]), *profile, (0.0, profile[-1][1])]), segments)


def arc(radius: float, start: float, stop: float, steps: int, centre: float = 0.0) -> list[tuple[float, float]]:
    """Profile points on a circle around (0, centre), from `start` to `stop` degrees of latitude."""
    angle = np.radians(np.linspace(start, stop, steps))
    return [(float(radius * np.cos(a)), float(centre + radius * np.sin(a))) for a in angle]


def ball(rng: np.random.Generator) -> Shape:
    return convex(sphere_points(400) * 0.5)


def barrel(rng: np.random.Generator) -> Shape:
    height, bulge = rng.uniform(1.0, 2.0), rng.uniform(0.15, 0.5)
    z = np.linspace(-1, 1, 9)
    return solid([(float(0.7 + bulge * (1 - t * t)), float(t * height)) for t in z])


def bottle(rng: np.random.Generator) -> Shape:
    body, neck, length = rng.uniform(0.35, 0.7), rng.uniform(0.1, 0.22), rng.uniform(0.3, 0.7)
    shoulder = [(float(neck + (body - neck) * np.cos(a)), float(1 + 0.4 * np.sin(a))) for a in np.linspace(0, 1.57, 6)]
    return solid([(body, 0.0), (body, 0.9), *shoulder, (neck, 1.4 + length), (neck * 1.3, 1.42 + length)])


def bowl(rng: np.random.Generator) -> Shape:
    depth, wall = rng.uniform(-50, -10), rng.uniform(0.08, 0.15)
    outer = [(0.0, -1.0), *arc(1.0, -80, depth + 40, 10)]
    inner = [(r * (1 - wall), z * (1 - wall)) for r, z in outer[1:]]
    return lathe(np.array([*outer, *inner[::-1], (0.0, -(1 - wall))]))


def box(rng: np.random.Generator) -> Shape:
    x, y, z = rng.uniform(0.25, 1.0, 3)
    return extrude(np.array([(-x, -y), (x, -y), (x, y), (-x, y)]) / 2, z)


def capsule(rng: np.random.Generator) -> Shape:
    half = rng.uniform(0.3, 2.0)
    return solid([*arc(1.0, -80, 0, 6, -half), *arc(1.0, 0, 80, 6, half)])


def cone(rng: np.random.Generator) -> Shape:
    height, tip = rng.uniform(0.8, 2.2), rng.choice([0.02, 0.02, 0.3, 0.5])
    return solid([(1.0, 0.0), (float(1 - (1 - tip) / 2), height / 2), (float(tip), height)])


def cross(rng: np.random.Generator) -> Shape:
    arm, height = rng.uniform(0.2, 0.4), rng.uniform(0.3, 0.9)
    outline = [np.array([(1.0, -arm), (1.0, arm), (arm, arm)])]
    for _ in range(3):
        outline.append(outline[-1] @ np.array([(0.0, 1.0), (-1.0, 0.0)]))  # a quarter turn
    return extrude(np.concatenate(outline), height)


def cylinder(rng: np.random.Generator) -> Shape:
    height = rng.uniform(1.0, 4.0)
    return solid([(1.0, 0.0), (1.0, height)])


def disc(rng: np.random.Generator) -> Shape:
    height = rng.uniform(0.25, 0.6)
    return solid([(0.95, 0.0), (1.0, 0.05), (1.0, height - 0.05), (0.95, height)])


def dumbbell(rng: np.random.Generator) -> Shape:
    gap, bar = rng.uniform(1.1, 2.0), rng.uniform(0.2, 0.4)
    edge = float(np.degrees(np.arccos(bar)))
    return solid([*arc(1.0, -80, edge, 10, -gap), *arc(1.0, -edge, 80, 10, gap)])


def egg(rng: np.random.Generator) -> Shape:
    points = sphere_points(300) * [1, rng.uniform(0.8, 1.0), rng.uniform(0.5, 1.0)]
    return convex(points * (1 + rng.uniform(0, 0.25) * points[:, :1]))


def pyramid(rng: np.random.Generator) -> Shape:
    return extrude(polygon(int(rng.integers(3, 6))), rng.uniform(0.8, 2.0), float(rng.choice([0.01, 0.01, 0.4])))


def prism(rng: np.random.Generator) -> Shape:
    return extrude(polygon(int(rng.choice([3, 5, 6, 8]))), rng.uniform(0.6, 2.5))


def ring(rng: np.random.Generator) -> Shape:
    tube, flat = rng.uniform(0.2, 0.45), rng.uniform(0.7, 1.3)
    angle = 2 * np.pi * np.arange(14) / 14
    return lathe(np.stack([1 + tube * np.cos(angle), flat * tube * np.sin(angle)], axis=1), ring=True)


def skittle(rng: np.random.Generator) -> Shape:
    belly, head = rng.uniform(0.38, 0.55), rng.uniform(0.22, 0.3)
    low = [(0.28, 0.0), (belly * 0.9, 0.4), (belly, 0.7), (belly * 0.85, 1.05), (0.18, 1.5)]
    return solid([*low, *arc(head, -35, 80, 8, 1.7)])


def spinning_top(rng: np.random.Generator) -> Shape:
    waist, stem = rng.uniform(0.8, 1.2), rng.uniform(0.1, 0.2)
    return solid([(0.04, 0.0), (waist * 0.6, 0.4), (waist, 0.8), (waist * 0.9, 1.0), (stem, 1.15), (stem, 1.7)])


def star(rng: np.random.Generator) -> Shape:
    return extrude(polygon(2 * int(rng.integers(4, 8)), (1.0, float(rng.uniform(0.4, 0.65)))), rng.uniform(0.3, 0.8))


def stone(rng: np.random.Generator) -> Shape:
    points = sphere_points(60) * rng.uniform(0.55, 1.0, 3)
    return convex(points * rng.uniform(0.8, 1.0, (60, 1)))


SHAPES = {
    "ball": ball,
    "barrel": barrel,
    "bottle": bottle,
    "bowl": bowl,
    "box": box,
    "capsule": capsule,
    "cone": cone,
    "cross": cross,
    "cylinder": cylinder,
    "disc": disc,
    "dumbbell": dumbbell,
    "egg": egg,
    "prism": prism,
    "pyramid": pyramid,
    "ring": ring,
    "skittle": skittle,
    "spinning top": spinning_top,
    "star": star,
    "stone": stone,
}


# Colours. Hue, saturation and value are of sRGB; everything that leaves is linear.
PATTERNS = get_args(get_type_hints(Material)["pattern"])
HUES = {
    "red": 0.0, "orange": 0.075, "yellow": 0.145, "green": 0.33,
    "teal": 0.49, "blue": 0.6, "purple": 0.77, "pink": 0.91,
}  # fmt: skip
# Ranges of hue, saturation and value at the horizon and at the zenith.
SKIES = {
    "day": (((0.56, 0.56), (0.05, 0.25), (0.97, 0.97)), ((0.56, 0.63), (0.45, 0.8), (0.6, 0.95))),
    "overcast": (((0.6, 0.6), (0.04, 0.04), (0.75, 0.95)), ((0.6, 0.6), (0.03, 0.15), (0.5, 0.8))),
    "dusk": (((0.02, 0.1), (0.3, 0.7), (0.95, 0.95)), ((0.6, 0.85), (0.3, 0.6), (0.3, 0.7))),
    "studio": (((0.1, 0.1), (0.03, 0.03), (0.2, 0.9)), ((0.6, 0.6), (0.03, 0.03), (0.1, 0.7))),
    "fancy": (((0.0, 1.0), (0.1, 0.5), (0.5, 1.0)), ((0.0, 1.0), (0.2, 0.7), (0.3, 0.9))),
}


def linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0.0) ** (1 / 2.4) - 0.055)


def color(hue: float, saturation: float, value: float) -> Vector:
    """Linear RGB of an sRGB hue, saturation and value; the last two are clipped to [0, 1]."""
    srgb = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    r, g, b = linear(np.array(srgb)).tolist()
    return (r, g, b)


def color_name(rgb: Vector) -> str:
    """The everyday name of a linear RGB: red, orange, yellow, green, teal, blue, purple, pink, brown, or a grey."""
    r, g, b = np.clip(encoded(np.array(rgb, dtype=float)), 0, 1).tolist()
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.2:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.8 else "grey"
    name = min(HUES, key=lambda n: abs((hue - HUES[n] + 0.5) % 1.0 - 0.5))
    return "brown" if name in ("red", "orange", "yellow") and value < 0.62 and hue > 0.02 else name


def material(rng: np.random.Generator, size: float = 0.25) -> Material:
    """A surface for an object of `size` metres: a clear main colour, so that `color_name(it.color)` can name it."""
    hue, saturation, value = rng.random(), rng.uniform(0.55, 1.0), rng.uniform(0.5, 1.0)
    if rng.random() < 0.15:
        saturation, value = 0.05, float(rng.choice([0.12, 0.5, 0.95]))
    if rng.random() < 0.5:  # a shade of the same, else another hue
        paler, darker = rng.uniform(0.5, 1.0), rng.uniform(0.4, 0.75)
        second = color(hue + rng.uniform(-0.05, 0.05), saturation * paler, value * darker)
    else:
        second = color(rng.random(), rng.uniform(0.0, 0.8), rng.uniform(0.3, 1.0))
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=[0.3, 0.14, 0.1, 0.12, 0.1, 0.04, 0.1, 0.1])]
    scale = size * rng.uniform(0.2, 0.6)
    return Material(pattern, color(hue, saturation, value), second, scale, int(rng.integers(2**31)))


def surface(rng: np.random.Generator, scale: float) -> Material:
    """A floor or a wall: calmer than objects, so that these stand out."""
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=[0.1, 0.18, 0.14, 0.1, 0.08, 0.12, 0.14, 0.14])]
    family = rng.choice(["grey", "earth", "pastel", "vivid"], p=[0.25, 0.3, 0.25, 0.2])
    hue, value = rng.random(), rng.uniform(0.35, 0.9)
    saturation = {"grey": 0.06, "earth": 0.4, "pastel": 0.25, "vivid": 0.6}[family] * rng.uniform(0.5, 1.3)
    if family == "earth" or pattern == "wood":
        hue = rng.uniform(0.03, 0.13)
    contrast = rng.uniform(0.55, 0.85) if rng.random() < 0.5 else rng.uniform(1.15, 1.5)
    other = rng.random() if rng.random() < 0.25 else hue + rng.uniform(-0.03, 0.03)
    second = color(other, saturation * rng.uniform(0.6, 1.2), value * contrast)
    return Material(pattern, color(hue, saturation, value), second, scale, int(rng.integers(2**31)))


@cache
def background(id: str) -> Background:
    """The floor, the optional wall and the sky that an id stands for. The wall lies at y = 1.5 to 4 metres.

    Raises:
        UserError: no such background.
    """
    if id not in background_ids():
        raise UserError(f"{id}: no such background; sim.assets.background_ids() lists them all")
    rng = np.random.default_rng([98, int(id.partition("/")[2])])
    floor = surface(rng, float(np.exp(rng.uniform(np.log(0.12), np.log(0.9)))))
    wall = surface(rng, float(np.exp(rng.uniform(np.log(0.15), np.log(1.2))))) if rng.random() < 0.5 else None
    wall_y = rng.uniform(1.5, 4.0)
    sky = SKIES[str(rng.choice(list(SKIES)))]
    horizon, zenith = (color(*(rng.uniform(*bounds) for bounds in ranges)) for ranges in sky)
    return Background(id, floor, wall, wall_y, horizon, zenith)
