"""Shapes made by turning a profile, extruding an outline or taking a convex hull.

Each function of `SHAPES` takes a generator and returns (vertices (V, 3), faces (F, 3)), faces counter-clockwise from
outside.
"""

import numpy as np
from scipy.spatial import ConvexHull

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
    """Rotate a profile of (radius, height) points, bottom to top, around z; a `ring` profile is a closed curve."""
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
    """Extrude an outline (P, 2), counter-clockwise and star-shaped around the origin; its top is scaled by `top`."""
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
    """Rotate a profile around z, closed at both ends by points on the axis."""
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


def ramp(degrees: int) -> Shape:
    """A wedge whose upper face falls by this angle towards +x."""
    top = float(np.tan(np.radians(degrees)))
    return convex(np.array([(x, y, z) for y in (-0.25, 0.25) for x, z in ((0.0, 0.0), (1.0, 0.0), (0.0, top))]))


def rod(number: int) -> Shape:
    """A thin cylinder along z."""
    return solid([(0.015, 0.0), (0.015, 1.0)], segments=12)


FIXTURES = {"ramp": ramp, "rod": rod}  # parts of worlds, drawn by no split
