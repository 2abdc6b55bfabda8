"""The camera and rigid motion in numbers, float64: shared by the renderers and by those who check them.

Pixels are (x right, y down) with centres at half-integers. Camera coordinates are (right, down, forward) in metres.
"""

import numpy as np

from posttrain.core.errors import UserError
from sim.scene import Camera, Scene, Trajectory


def check(scene: Scene) -> None:
    """Refuse what a Clip cannot hold: more bodies than a uint8 mask can number."""
    if len(scene.bodies) > 255:
        raise UserError(f"scene {scene.seed}: {len(scene.bodies)} bodies, but a mask numbers at most 255; take fewer")


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
    """The focal length in pixels; they are square."""
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
    """Pixels (..., 2) and depths (...) of world points (..., 3). What lies behind the camera has a depth <= 0."""
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
    """Forward flow float32 (T, H, W, 2) in pixels, from the pictures' instances and depth (T, H, W) and the poses.

    A visible point rides on its body to the next frame's pose. Background and last frame: zeros.
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
