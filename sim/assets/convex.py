"""Divide a mesh into convex parts for collisions, whose surface is close to the mesh.

A mesh is divided into its connected components. While the convex hull of a part extends beyond the mesh by more than a
bound, the part is cut by a plane. Cut surfaces stay open, because nothing collides inside the body.

Shape letters: V vertices, F triangles, P points.
"""

from itertools import product

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, KDTree, QhullError

MOST = 64  # largest number of parts
FLAT = 1e-9  # distances below this count as 0
THIN = 1e-8  # a hull with a smaller volume is flat; the mesh's longest side is 1
# The normals of cutting planes: the axes, and the diagonals between two axes.
DIAGONALS = [(1, 1, 0), (1, -1, 0), (1, 0, 1), (1, 0, -1), (0, 1, 1), (0, 1, -1)]
NORMALS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), *DIAGONALS], float)
SPOTS = 300  # points of a hull's surface that are checked, besides its corners
BATCH = 8  # so many points are checked at once, the highest first
SURFACE = 10_000  # points that represent a mesh's surface


def components(triangles: np.ndarray) -> list[np.ndarray]:
    """Triangles (F, 3, 3) of each connected component; corners at the same position are merged."""
    spots, index = np.unique(np.round(triangles.reshape(-1, 3), 5), axis=0, return_inverse=True)
    a, b, c = index.reshape(-1, 3).T
    ones = np.ones(2 * len(a))
    edges = coo_array((ones, (np.concatenate([a, b]), np.concatenate([b, c]))), shape=(len(spots), len(spots)))
    count, labels = connected_components(edges, directed=False)
    return [triangles[labels[a] == i] for i in range(count)]


def hull_of(triangles: np.ndarray) -> ConvexHull | None:
    """The convex hull of triangles (F, 3, 3), or None if they are flat."""
    try:
        hull = ConvexHull(triangles.reshape(-1, 3))
    except (QhullError, ValueError):
        return None
    return hull if hull.volume > THIN else None


def scattered(triangles: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (P, 3) on triangles (F, 3, 3), `count` random ones (uniform by area) and all corners; and unit normals."""
    a, b, c = triangles.swapaxes(0, 1)
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1)
    rng = np.random.default_rng(0)
    face = rng.choice(len(triangles), count, p=area / area.sum())
    u, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    inner = (1 - u) * a[face] + u * (1 - v) * b[face] + u * v * c[face]
    unit = normals / np.maximum(area, 1e-12)[:, None]
    return np.concatenate([inner, *(a, b, c)]), np.concatenate([unit[face], unit, unit, unit])


def windings(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Winding numbers of triangles (F, 3, 3) around points (P, 3): 0 outside a closed mesh, 1 inside, more in overlaps.

    The sum of the solid angles of the triangles by van Oosterom and Strackee, over 4 pi.
    """
    a, b, c = (triangles[:, k] - points[:, None] for k in range(3))  # points, triangles, 3
    la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
    det = (a * np.cross(b, c)).sum(axis=2)
    dots = [(x * y).sum(axis=2) * z for x, y, z in ((a, b, lc), (b, c, la), (c, a, lb))]
    return np.asarray(np.arctan2(det, la * lb * lc + sum(dots)).sum(axis=1) / (2 * np.pi))


def bulge(
    hull: ConvexHull, triangles: np.ndarray, surface: KDTree, normals: np.ndarray, within: float
) -> tuple[float, np.ndarray]:
    """The largest height of the hull's surface over a mesh, and the point (3,) of the hull at which it is.

    A height is the distance from the plane through the nearest point of `surface`. Heights up to `within`, and those of
    points inside the mesh, count as 0.

    Args:
        surface: points on `triangles` (F, 3, 3), the whole mesh; `normals` (P, 3) are the normals there.
    """
    points = scattered(hull.points[hull.simplices], SPOTS)[0]
    nearest = surface.query(points)[1]
    off = ((points - surface.data[nearest]) * normals[nearest]).sum(axis=1)
    order = np.argsort(-off, kind="stable")[: (off > within).sum()]
    for some in np.array_split(order, range(BATCH, len(order), BATCH)):
        outside = some[windings(points[some], triangles) < 0.5]
        if len(outside):
            return float(off[outside[0]]), points[outside[0]]
    return 0.0, points[0]


def below(triangles: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """The part of triangles (F, 3, 3) where `normal` @ x <= offset, as triangles; the cut stays open.

    A triangle in the plane itself is included if the solid lies below it; a triangle above that only touches the plane
    is not.
    """
    height = triangles @ normal - offset
    flat = (np.abs(height) < FLAT).all(axis=1)
    a, b, c = triangles.swapaxes(0, 1)
    taken = np.where(flat, np.cross(b - a, c - a) @ normal > 0, (height < -FLAT).any(axis=1))
    triangles, height = triangles[taken], height[taken]
    under = height < FLAT
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


def halves(triangles: np.ndarray, points: np.ndarray) -> list[np.ndarray]:
    """The two parts of triangles, cut by a plane through one of the points (P, 3); none if all parts would be flat.

    The chosen plane gives the smallest and most compact hulls: the least sum of volume times the sides of the box.
    """
    best, least = list[np.ndarray](), np.inf
    for normal, point in product(NORMALS, points):
        cut = [below(triangles, side * normal, side * float(normal @ point)) for side in (1.0, -1.0)]
        hulls = [hull_of(half) if len(half) > 1 else None for half in cut]
        cost = sum(h.volume * np.ptp(h.points, axis=0).sum() if h else np.inf for h in hulls)
        if cost < least:
            best, least = cut, cost
    return best


def parts(vertices: np.ndarray, faces: np.ndarray, within: float, most: int = MOST) -> list[np.ndarray]:
    """The hull points (P, 3) of each convex part.

    The part that extends most beyond the mesh is cut first, until all checked points are within `within` of the mesh,
    or there are `most` parts (or as many as the mesh has components, if these are more).
    """
    triangles = vertices[faces]
    points, normals = scattered(triangles, SURFACE)
    surface, corners = KDTree(points), KDTree(triangles.reshape(-1, 3))
    waiting: list[tuple[float, np.ndarray, np.ndarray, ConvexHull]] = []
    done: list[np.ndarray] = []

    def add(pieces: list[np.ndarray]) -> None:
        for piece in pieces:
            hull = hull_of(piece)
            if hull is not None:
                waiting.append((*bulge(hull, triangles, surface, normals, within), piece, hull))

    add(components(triangles))
    while waiting:
        size, point, piece, hull = waiting.pop(max(range(len(waiting)), key=lambda i: waiting[i][0]))
        through = np.stack([tree.data[tree.query(point)[1]] for tree in (surface, corners)])
        cut = halves(piece, through) if size > within and len(waiting) + len(done) + 2 <= most else []
        add(cut)
        if not cut:
            done.append(hull.points[hull.vertices])
    return done
