"""Triangle meshes: read a file, move the centre of mass to the origin, compute moments of inertia and smooth normals.

Shape letters: V vertices, F triangles, U texture coordinates.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

CREASE = np.cos(np.radians(40.0))  # edges sharper than this stay sharp


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
    """Vertices around the centre of mass, scaled to a longest bounding-box side of 1, and the scaled volume.

    Volume and centre are sums over signed tetrahedra from the origin. Overlapping parts count twice; pybullet_data's
    toys have such parts.
    """
    vertices = (vertices - vertices.mean(axis=0)) / np.ptp(vertices, axis=0).max()
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    sixfold = np.einsum("fi,fi->f", a, np.cross(b, c))
    centre = (sixfold[:, None] * (a + b + c)).sum(axis=0) / (4 * sixfold.sum())
    return vertices - centre, float(sixfold.sum() / 6)


def second_moments(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The inertia tensor (3, 3) around the origin of a mesh of uniform density and one kilogram.

    Over a tetrahedron from the origin to a, b, c the mean of x x^T is (a a^T + b b^T + c c^T + s s^T) / 20 with
    s = a + b + c (the fourth corner is 0). The tensor is trace(C) I - C, where C is the mean over all tetrahedra,
    weighted by volume.
    """
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    sixfold = np.einsum("fi,fi->f", a, np.cross(b, c))
    corners = np.stack([a, b, c, a + b + c])
    covariance = np.einsum("f,kfi,kfj->ij", sixfold, corners, corners) / (20 * sixfold.sum())
    return np.eye(3) * np.trace(covariance) - covariance


def smooth(
    vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(vertices, normals, faces, uv) in which each vertex has one normal and one uv; `uv` comes per corner (F, 3, 2).

    A corner's normal is the area-weighted mean over the faces at this point whose normals differ from the corner's face
    by less than the crease angle.
    """
    points, index = np.unique(np.round(vertices, 6), axis=0, return_inverse=True)
    faces = index.reshape(-1)[faces]
    cross = np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])
    area = np.linalg.norm(cross, axis=1)
    solid = area > 1e-12
    faces, cross, area = faces[solid], cross[solid], area[solid]
    uv = None if uv is None else uv[solid]
    unit = cross / area[:, None]
    corner_spot = faces.reshape(-1)
    corner_face = np.repeat(np.arange(len(faces)), 3)
    order = np.argsort(corner_spot, kind="stable")
    count = np.bincount(corner_spot, minlength=len(points))
    start = np.cumsum(count) - count
    repeats = count[corner_spot]  # every corner is paired with all corners at the same point
    mine = np.repeat(np.arange(len(corner_spot)), repeats)
    offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    other = corner_face[order[start[corner_spot[mine]] + offset]]
    weight = (unit[corner_face[mine]] * unit[other]).sum(axis=1) > CREASE
    normals = np.zeros((len(corner_spot), 3))
    np.add.at(normals, mine[weight], cross[other[weight]])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    keys = [points[corner_spot], np.round(normals, 4)]
    if uv is not None:
        keys.append(uv.reshape(-1, 2))
    table, inverse = np.unique(np.concatenate(keys, axis=1), axis=0, return_inverse=True)
    normals = table[:, 3:6] / np.linalg.norm(table[:, 3:6], axis=1, keepdims=True)
    triangles = inverse.reshape(-1, 3).astype(np.int32)
    return table[:, :3], normals, triangles, None if uv is None else table[:, 6:8]
