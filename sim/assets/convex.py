"""A mesh as convex parts whose surface is near the drawn one: what collides.

A mesh falls into its connected components first. A part that bulges over the mesh is cut by the plane, through the
point over which it bulges most, that leaves the two halves' hulls the smallest, until no part bulges.

Shape letters: V vertices, F triangles, P points.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, KDTree, QhullError

MOST = 64  # parts
THIN = 1e-6  # a hull's volume below which it counts as flat, with a longest side of 1
# What cuts: planes along the axes and those between two of them.
NORMALS = np.array(
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (0, 1, 1), (0, 1, -1)], float
)
# Where a triangle is looked at: its middle, its corners and those of its edges, as shares of the corners.
SPOTS = np.array([(2, 2, 2), (6, 0, 0), (0, 6, 0), (0, 0, 6), (3, 3, 0), (3, 0, 3), (0, 3, 3)]) / 6
SMALL = 0.02  # a triangle's box: below that its middle stands for it


def components(vertices: np.ndarray, faces: np.ndarray) -> list[np.ndarray]:
    """The triangles (F, 3, 3) of each connected component; vertices at one spot count as one."""
    spots, index = np.unique(np.round(vertices, 5), axis=0, return_inverse=True)
    a, b, c = index.reshape(-1)[faces].T
    ones = np.ones(2 * len(faces))
    edges = coo_array((ones, (np.concatenate([a, b]), np.concatenate([b, c]))), shape=(len(spots), len(spots)))
    count, labels = connected_components(edges, directed=False)
    return [vertices[faces[labels[a] == i]] for i in range(count)]


def hull_of(triangles: np.ndarray) -> ConvexHull | None:
    """The convex hull of triangles (F, 3, 3), or None if they are flat."""
    try:
        hull = ConvexHull(np.unique(triangles.reshape(-1, 3), axis=0))
    except (QhullError, ValueError):
        return None
    return hull if hull.volume > THIN else None


def scattered(triangles: np.ndarray, count: int = 10_000) -> np.ndarray:
    """So many points (P, 3) on triangles (F, 3, 3), evenly by area, the same in every call, and all corners."""
    a, b, c = triangles.swapaxes(0, 1)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    rng = np.random.default_rng(0)
    face = rng.choice(len(triangles), count, p=area / area.sum())
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    inner = (1 - u) * a[face] + u * (1 - v) * b[face] + u * v * c[face]
    return np.concatenate([inner, triangles.reshape(-1, 3)])


def bulge(triangles: np.ndarray, hull: ConvexHull, surface: KDTree, within: float) -> tuple[float, np.ndarray]:
    """How far the hull stands off the mesh over these triangles (F, 3, 3) of it, and their deepest point (3,).

    From each point the way out of the hull is taken, along the triangle's normal; where it ends, the distance from all
    of the mesh's surface counts (ways of at most `within` count as 0). The deepest point has the longest way. A
    triangle is looked at in SPOTS, a small one in its middle.
    """
    a, b, c = triangles.swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1)
    spots = np.where(np.ptp(triangles, axis=1).max(axis=1) > SMALL, len(SPOTS), 1) * (area > 1e-12)
    face = np.repeat(np.arange(len(triangles)), spots)
    spot = np.arange(len(face)) - np.repeat(np.cumsum(spots) - spots, spots)
    points_P3 = np.einsum("pk,pkx->px", SPOTS[spot], triangles[face])
    normals_P3 = normals[face] / area[face, None]
    equations = np.unique(np.round(hull.equations, 9), axis=0)
    towards = normals_P3 @ equations[:, :3].T
    gap = (-(points_P3 @ equations[:, :3].T + equations[:, 3])).clip(min=0)
    gap /= np.maximum(towards, 1e-9, out=towards)  # what leads away from a plane never meets it
    out = gap.min(axis=1)
    far = out > within
    off = np.zeros(len(out))
    off[far] = surface.query(points_P3[far] + out[far, None] * normals_P3[far])[0]
    return float(off.max()), points_P3[out.argmax()]


def below(triangles: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """What of triangles (F, 3, 3) lies where `normal` @ x <= offset, as triangles; the cut stays open."""
    height = triangles @ normal - offset
    under = height <= 0
    count = under.sum(axis=1)
    kept = [triangles[count == 3]]
    for number in (1, 2):  # of corners below; turned so that the odd one comes first
        mixed, sides = triangles[count == number], under[count == number]
        turn = (sides == (number == 1)).argmax(axis=1)[:, None] + np.arange(3)
        a, b, c = np.take_along_axis(mixed, (turn % 3)[..., None], axis=1).swapaxes(0, 1)
        ha, hb, hc = np.take_along_axis(height[count == number], turn % 3, axis=1).T[..., None]
        ab, ac = a + (b - a) * ha / (ha - hb), a + (c - a) * ha / (ha - hc)
        kept += [np.stack([a, ab, ac], 1)] if number == 1 else [np.stack([ab, b, c], 1), np.stack([ab, c, ac], 1)]
    return np.concatenate(kept)


def halves(triangles: np.ndarray, point: np.ndarray) -> list[tuple[np.ndarray, ConvexHull]]:
    """The two halves with the smallest hulls that a plane through the point makes; none if both are flat."""
    best: list[tuple[np.ndarray, ConvexHull]] = []
    for normal in NORMALS:
        pair = [below(triangles, side * normal, side * float(normal @ point)) for side in (1.0, -1.0)]
        hulls = [hull_of(half) if len(half) > 1 else None for half in pair]
        cut = [(half, hull) for half, hull in zip(pair, hulls, strict=True) if hull is not None]
        if len(cut) == 2 and (not best or sum(h.volume for _, h in cut) < sum(h.volume for _, h in best)):
            best = cut
    return best


def parts(vertices: np.ndarray, faces: np.ndarray, within: float, most: int = MOST) -> list[np.ndarray]:
    """The hulls' points (P, 3) of convex parts that bulge over the mesh by at most `within`.

    There are at most `most`, if the mesh has not more components than that: what bulges most is cut first.
    """
    waiting: list[tuple[float, np.ndarray, np.ndarray, ConvexHull]] = []
    done: list[np.ndarray] = []
    surface = KDTree(scattered(vertices[faces]))
    for triangles in components(vertices, faces):
        hull = hull_of(triangles)
        if hull is not None:
            waiting.append((*bulge(triangles, hull, surface, within), triangles, hull))
    while waiting:
        size, point, triangles, hull = waiting.pop(max(range(len(waiting)), key=lambda i: waiting[i][0]))
        enough = size <= within or len(waiting) + len(done) + 2 > most
        cut = [] if enough else halves(triangles, point)
        if cut:
            waiting += [(*bulge(half, hull, surface, within), half, hull) for half, hull in cut]
        else:
            done.append(hull.points[hull.vertices])
    return done
