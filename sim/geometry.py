"""The camera, rigid motion and outlines of bodies in float64, for worlds, engines and renderers.

Pixels are (x right, y down) with centres at half-integers. Camera coordinates are (right, down, forward) in metres.
Quaternions have w first; `xyzw` reorders one for libraries that have it last.

Shape letters: T frames, V hull vertices, H W pixels.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from sim.assets import library
from sim.scene import Body, Camera, Quaternion, Scene, Trajectory


def xyzw(quaternion: Quaternion) -> Quaternion:
    """A quaternion with w last."""
    w, x, y, z = quaternion
    return x, y, z, w


def rotation(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4), w first."""
    w, x, y, z = np.moveaxis(np.asarray(quaternions, dtype=np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def focal_pixels(camera: Camera) -> float:
    """The focal length in pixels, which are square."""
    return camera.focal / camera.sensor * camera.width


def intrinsics(camera: Camera) -> np.ndarray:
    """K (3, 3), float64: pixels = K @ camera coordinates / depth."""
    f = focal_pixels(camera)
    return np.array([[f, 0, camera.width / 2], [0, f, camera.height / 2], [0, 0, 1]])


def to_camera(camera: Camera, points: np.ndarray) -> np.ndarray:
    """World points (..., 3) in camera coordinates (right, down, forward)."""
    x, y, z = np.moveaxis(np.asarray(points, dtype=np.float64) - np.array(camera.position), -1, 0)
    return np.stack([x, -z, y], axis=-1)


def project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (..., 2) and depths (...) of world points (..., 3). Points behind the camera have a depth <= 0."""
    seen = to_camera(camera, points)
    depth = seen[..., 2]
    centre = np.array([camera.width, camera.height]) / 2
    return seen[..., :2] * focal_pixels(camera) / depth[..., None] + centre, depth


def rays(camera: Camera) -> np.ndarray:
    """World directions (H, W, 3) through the pixel centres, of length 1 along the optical axis."""
    f = focal_pixels(camera)
    x = (np.arange(camera.width) + 0.5 - camera.width / 2) / f
    down = (np.arange(camera.height) + 0.5 - camera.height / 2) / f
    x, down = np.meshgrid(x, down)
    return np.stack([x, np.ones_like(x), -down], axis=-1)


def flow(camera: Camera, instances: np.ndarray, depth: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """Forward flow float32 (T, H, W, 2) in pixels, from instances and depth (T, H, W) and the poses.

    A visible point moves with its body to the pose of the next frame. Background and last frame have zeros.
    """
    turn = rotation(trajectory.quaternions_TN4)
    result = np.zeros((*instances.shape, 2), dtype=np.float32)
    directions = rays(camera)
    for k in range(len(instances) - 1):
        for i in np.unique(instances[k][instances[k] > 0]).tolist():
            here = instances[k] == i
            point = np.array(camera.position) + directions[here] * depth[k][here][:, None].astype(np.float64)
            local = (point - trajectory.positions_TN3[k, i - 1]) @ turn[k, i - 1]
            moved = local @ turn[k + 1, i - 1].T + trajectory.positions_TN3[k + 1, i - 1]
            result[k][here] = project(camera, moved)[0] - project(camera, point)[0]
    return result


def outline(body: Body) -> np.ndarray:
    """Hull vertices (V, 3) in metres around the body's centre of mass, in the axes of the world."""
    hull_V3 = library.hull(body.asset) * body.size
    # not rotated: a ball is the same in every orientation, but its hull's extreme points are along the axes
    return hull_V3 if library.is_round(body.asset) else Rotation.from_quat(xyzw(body.orientation)).apply(hull_V3)


def lowest(body: Body) -> np.ndarray:
    """The point (3,) of a body that is nearest to the floor, metres in the world."""
    points_V3 = outline(body) + body.position
    return np.asarray(points_V3[points_V3[:, 2].argmin()])


def paths(scene: Scene, trajectory: Trajectory, index: int) -> np.ndarray:
    """Hull vertices (T, V, 3) of one body along its trajectory, metres in the world."""
    body = scene.bodies[index]
    turns_T33 = Rotation.from_quat(np.roll(trajectory.quaternions_TN4[:, index], -1, axis=-1)).as_matrix()
    hull_V3 = library.hull(body.asset) * body.size
    return np.einsum("tij,vj->tvi", turns_T33, hull_V3) + trajectory.positions_TN3[:, index, None]
