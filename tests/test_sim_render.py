"""Pictures are true: labels agree with rays cast in float64, flow carries points to where they go, light is linear."""

import hashlib
import os
import subprocess
import sys
from types import ModuleType

import moderngl
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from posttrain.core.errors import UserError
from sim import geometry
from sim.assets import library, surfaces
from sim.render import gl, tiny
from sim.scene import Background, Body, Camera, Clip, Light, Material, Scene, Trajectory

GREY = Material("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, 0)
STUDIO = Background("studio", GREY, None, 0.0, (0.2, 0.3, 0.4), (0.1, 0.1, 0.3))
OVERHEAD = Light((0.0, 0.0, 1.0), (0.8, 0.8, 0.8), (0.4, 0.4, 0.4))
RENDERERS = pytest.mark.parametrize("renderer", [gl, tiny], ids=["gl", "tiny"])


def body(asset: str, size: float, position: tuple[float, float, float], material: Material | None = GREY) -> Body:
    return Body(asset, "thing", size, 1.0, 0.5, 0.1, position, (1.0, 0.0, 0.0, 0.0), "moved", material)


def world(*bodies: Body, background: Background = STUDIO, light: Light = OVERHEAD, size: int = 64) -> Scene:
    camera = Camera((0.1, -1.5, 0.5), width=size, height=size)
    return Scene(bodies, camera, light, background, 0.5, 0.1, (0.0, 0.0, -9.81), 1, 16.0, 0, "", 0)


def still(scene: Scene, frames: int = 1) -> Trajectory:
    positions = np.array([[b.position for b in scene.bodies]] * frames, dtype=float).reshape(frames, -1, 3)
    quaternions = np.array([[b.orientation for b in scene.bodies]] * frames, dtype=float).reshape(frames, -1, 4)
    return Trajectory(positions, quaternions, (), np.zeros(1))


def tumble(seed: int, frames: int, size: int = 64) -> tuple[Scene, Trajectory]:
    """Three objects that fly and turn before a textured background, one before the other now and then."""
    rng = np.random.default_rng(seed)
    picked = [f"toy/{rng.integers(100):03d}", "mug/00", library.choose(rng, library.object_ids())]
    bodies = [body(asset, rng.uniform(0.2, 0.4), (0.0, 0.0, 0.0), surfaces.material(rng)) for asset in picked]
    start, velocity = rng.uniform([-0.5, -0.4, 0.3], [0.5, 0.6, 0.9], (3, 3)), rng.uniform(-0.8, 0.8, (3, 3))
    turn, spin = Rotation.random(3, rng=rng), rng.uniform(-4, 4, (3, 3))
    time = np.arange(frames) / 16
    positions = start + time[:, None, None] * velocity
    quaternions = [(Rotation.from_rotvec(spin * t) * turn).as_quat(scalar_first=True) for t in time]
    background = surfaces.background(f"background/{rng.integers(500):03d}")
    light = Light((0.2, -0.3, 1.0), (0.8, 0.8, 0.7), (0.4, 0.4, 0.45))
    return world(*bodies, background=background, light=light, size=size), Trajectory(
        positions, np.stack(quaternions), (), np.zeros(1)
    )


def cast(scene: Scene, trajectory: Trajectory, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instances (H, W), depth (H, W) and hit points (H, W, 3): rays against all triangles that they may hit."""
    camera, (ex, ey, ez) = scene.camera, scene.camera.position
    focal = camera.focal / camera.sensor * camera.width
    column, row = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    x, down = (column + 0.5 - camera.width / 2) / focal, (row + 0.5 - camera.height / 2) / focal
    rays = np.stack([x, np.ones_like(x), -down], axis=-1).reshape(-1, 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(rays[:, 2] < 0, -ez / rays[:, 2], np.inf)
        if scene.background.wall:
            depth = np.minimum(depth, scene.background.wall_y - ey)
        instances = np.zeros(len(rays), dtype=int)
        for i, thing in enumerate(scene.bodies):
            mesh = library.mesh(thing.asset)
            turn = Rotation.from_quat(trajectory.quaternions_TN4[frame, i], scalar_first=True)
            world = turn.apply(mesh.vertices * thing.size) + trajectory.positions_TN3[frame, i] - [ex, ey, ez]
            centre = trajectory.positions_TN3[frame, i] - [ex, ey, ez]
            aside = np.linalg.norm(np.cross(rays, centre), axis=1) / np.linalg.norm(rays, axis=1)
            near = np.flatnonzero(aside <= thing.size * np.linalg.norm(mesh.vertices, axis=1).max() + 0.01)
            a, b, c = (world[mesh.faces[:, j]] for j in range(3))
            u, v, w = (rays[near] @ np.cross(p, q).T for p, q in ((b, c), (c, a), (a, b)))
            normal = np.cross(b - a, c - a)
            t = (normal * a).sum(axis=1) / (rays[near] @ normal.T)
            hit = (((u >= 0) & (v >= 0) & (w >= 0)) | ((u <= 0) & (v <= 0) & (w <= 0))) & (t > 0)
            nearest = np.where(hit, t, np.inf).min(axis=1)
            instances[near[nearest < depth[near]]] = i + 1
            depth[near] = np.minimum(depth[near], nearest)
    points = np.array([ex, ey, ez]) + rays * np.where(np.isfinite(depth), depth, 0)[:, None]
    shape = (camera.height, camera.width)
    return instances.reshape(shape), depth.reshape(shape), points.reshape(*shape, 3)


def digest(clip: Clip) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in (clip.rgb, clip.instances, clip.depth, clip.flow))).hexdigest()


def test_projection_by_hand():
    """Focal length 35/32 * 64 = 70 px; 0.2 m right and 0.1 m up at 2 m are 7 px right and 3.5 px up of the centre."""
    camera = Camera((0.1, -1.5, 0.5))
    pixels, depth = geometry.project(camera, np.array([0.3, 0.5, 0.6]))
    assert pixels.tolist() == pytest.approx([39.0, 28.5])
    assert depth == pytest.approx(2.0)
    assert geometry.intrinsics(camera).tolist() == [[70, 0, 32], [0, 70, 32], [0, 0, 1]]


def test_rays_meet_their_pixels():
    camera = Camera((0.1, -1.5, 0.5), width=8, height=6)
    pixels, depth = geometry.project(camera, np.array(camera.position) + 3 * geometry.rays(camera))
    assert depth == pytest.approx(3)
    assert pixels[2, 5].tolist() == pytest.approx([5.5, 2.5])


def test_rotation_agrees_with_scipy():
    quaternions = Rotation.random(5, rng=np.random.default_rng(0)).as_quat(scalar_first=True)
    expected = Rotation.from_quat(quaternions, scalar_first=True).as_matrix()
    assert geometry.rotation(quaternions) == pytest.approx(expected)


@RENDERERS
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_depth_and_mask_agree_with_a_ray_cast(renderer: ModuleType, seed: int):
    scene, trajectory = tumble(seed, 3)
    clip = renderer.render(scene, trajectory)
    for frame in (0, 2):
        instances, depth, _ = cast(scene, trajectory, frame)
        same = instances == clip.instances[frame]
        assert (instances > 0).sum() > 50
        assert (~same).sum() <= 2  # rasterisers round corners to 1/256 pixel
        finite = np.isfinite(depth)
        assert (finite == np.isfinite(clip.depth[frame]))[same].all()
        error = np.abs(clip.depth[frame] / np.where(finite, depth, 1) - 1)[same & finite]
        assert np.median(error) < 1e-6
        assert np.quantile(error, 0.99) < 1e-4


@RENDERERS
@pytest.mark.parametrize("seed", [4, 5])
def test_flow_carries_visible_pixels_onto_the_next_frame(renderer: ModuleType, seed: int):
    scene, trajectory = tumble(seed, 3)
    clip = renderer.render(scene, trajectory)
    for frame in (0, 1):
        instances, _, points = cast(scene, trajectory, frame)
        after, depth_after, _ = cast(scene, trajectory, frame + 1)
        row, column = np.nonzero((instances > 0) & (instances == clip.instances[frame]))
        index = instances[row, column] - 1
        turns = [Rotation.from_quat(trajectory.quaternions_TN4[k], scalar_first=True) for k in (frame, frame + 1)]
        local = turns[0][index].inv().apply(points[row, column] - trajectory.positions_TN3[frame, index])
        moved = turns[1][index].apply(local) + trajectory.positions_TN3[frame + 1, index] - scene.camera.position
        landing = 70 * np.stack([moved[:, 0], -moved[:, 2]], axis=1) / moved[:, 1:2] + 32
        arrived = np.stack([column, row], axis=1) + 0.5 + clip.flow[frame, row, column]
        inside = ((landing > 1) & (landing < 63)).all(axis=1)
        x, y = np.where(inside[:, None], landing, 0).astype(int).T
        visible = inside & (after[y, x] == index + 1) & (np.abs(depth_after[y, x] - moved[:, 1]) < 0.02)
        error = np.linalg.norm(arrived - landing, axis=1)[visible]
        assert len(error) > 50
        assert np.median(error) < 1e-3
        assert error.max() < 0.05
        assert np.abs(clip.flow[frame, row, column]).max() > 1
    assert not clip.flow[-1].any()
    assert not clip.flow[clip.instances == 0].any()


@RENDERERS
def test_floor_wall_and_sky_depth_by_hand(renderer: ModuleType):
    """Row 50 is 18.5 px below the horizon: depth 0.5 m * 70 / 18.5. The wall ends the floor, the sky is at infinity."""
    clip = renderer.render(world(), still(world()))
    assert clip.depth[0, 50] == pytest.approx(0.5 * 70 / 18.5)
    assert np.isinf(clip.depth[0, :32]).all()
    walled = world(background=Background("room", GREY, GREY, 2.0, (0, 0, 0), (0, 0, 0)))
    clip = renderer.render(walled, still(walled))
    assert clip.depth[0, :32] == pytest.approx(3.5)
    assert clip.depth[0, 50] == pytest.approx(0.5 * 70 / 18.5)


@RENDERERS
def test_same_scene_same_bytes(renderer: ModuleType):
    first = digest(renderer.render(*tumble(1, 3)))
    renderer.render(*tumble(2, 2))
    assert digest(renderer.render(*tumble(1, 3))) == first


@pytest.mark.slow
def test_same_scene_same_bytes_in_another_process():
    code = "from test_sim_render import *; print(digest(gl.render(*tumble(1, 3))))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(gl.render(*tumble(1, 3)))


@pytest.mark.slow
def test_long_clips_are_drawn_in_batches_without_a_seam():
    """At 256 pixels twelve frames fit one target; frames drawn alone have the same labels."""
    scene, trajectory = tumble(6, 14, size=256)
    clip = gl.render(scene, trajectory)
    for k in (11, 12, 13):
        alone = Trajectory(trajectory.positions_TN3[k:], trajectory.quaternions_TN4[k:], (), np.zeros(1))
        part = gl.render(scene, alone)
        np.testing.assert_array_equal(clip.instances[k], part.instances[0])
        np.testing.assert_allclose(clip.depth[k], part.depth[0], rtol=1e-4)  # rounding grows down the stack
        np.testing.assert_allclose(clip.flow[k], part.flow[0], atol=5e-3)


@RENDERERS
def test_a_body_in_mid_air_throws_a_clear_shadow(renderer: ModuleType):
    """A ball of 0.3 m at 0.8 m under an overhead sun: the floor below it loses a third of its light, the rest none."""
    scene = world(body("ball/00", 0.3, (0.1, 0.3, 0.8)))
    with_ball = renderer.render(scene, still(scene)).rgb[0].astype(int)
    without = renderer.render(world(), still(world())).rgb[0].astype(int)
    pixel = geometry.project(scene.camera, np.array([0.1, 0.3, 0.0]))[0].astype(int)
    lit, shaded = (surfaces.linear(picture[pixel[1], pixel[0]] / 255) for picture in (without, with_ball))
    assert (shaded < 0.67 * lit).all()
    away = geometry.project(scene.camera, np.array([0.9, 0.3, 0.0]))[0].astype(int)
    assert np.abs(with_ball - without)[away[1], away[0]].max() <= 2
    assert np.abs(with_ball - without)[:, :8].max() <= 2  # nothing leaks in from the shadow map's border


def test_patterns_finer_than_a_pixel_average_in_linear_light():
    """Black and white stripes of 2 mm seen from afar are half the light: 188 of 255 in sRGB."""
    stripes = Material("stripes", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.002, 3)
    scene = world(
        background=Background("fine", stripes, None, 0.0, (0, 0, 0), (0, 0, 0)),
        light=Light((0, 0, 1), (0, 0, 0), (1, 1, 1)),
    )
    assert np.abs(gl.render(scene, still(scene)).rgb[0, 36:48].astype(int) - 188).max() <= 2


def test_supersampling_averages_in_linear_light():
    """White floor against a black sky, the horizon in the middle of a row: 188, not 128."""
    white = Material("plain", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 1.0, 0)
    scene = world(
        background=Background("half", white, None, 0.0, (0, 0, 0), (0, 0, 0)),
        light=Light((0, 0, 1), (0, 0, 0), (1, 1, 1)),
        size=65,
    )
    column = gl.render(scene, still(scene), gl.Config(supersample=2)).rgb[0, :, 10, 0]
    assert column[31:34].tolist() == [0, 188, 255]


@pytest.mark.parametrize("supersample", [1, 3])
def test_labels_do_not_depend_on_supersampling(supersample: int):
    scene, trajectory = tumble(1, 2)
    usual, other = gl.render(scene, trajectory), gl.render(scene, trajectory, gl.Config(supersample=supersample))
    for name in ("instances", "depth", "flow"):
        np.testing.assert_array_equal(getattr(usual, name), getattr(other, name))
    assert np.abs(usual.rgb.astype(int) - other.rgb).mean() < 6


def test_textures_sit_the_right_way_up():
    """The duck faces along its own x axis: the beak is orange, the body yellow, whatever way the picture is stored."""
    scene = world(body("duck/00", 0.6, (0.1, 0.0, 0.3), None))
    clip = gl.render(scene, still(scene))
    duck = clip.rgb[0][clip.instances[0] == 1].astype(float).mean(axis=0)
    assert duck[0] > 1.1 * duck[1] > 2 * duck[2]


@RENDERERS
def test_more_bodies_than_a_mask_can_number_are_refused(renderer: ModuleType):
    scene = world(*[body("box/00", 0.1, (0, 0, 0))] * 256)
    with pytest.raises(UserError, match="256 bodies") as error:
        renderer.render(scene, still(scene))
    assert error.value.code == "unsupported"


@pytest.mark.parametrize("close", [True, False])
def test_another_context_in_the_same_process_changes_nothing(close: bool):
    before = digest(gl.render(*tumble(1, 3)))
    other = moderngl.create_context(standalone=True, backend="egl", libgl="libEGL.so.1", libegl="libEGL.so.1")
    if close:
        other.release()
    assert digest(gl.render(*tumble(1, 3))) == before
    if not close:
        with other:
            other.clear()
        assert digest(gl.render(*tumble(1, 3))) == before
        other.release()


@pytest.mark.slow
def test_without_egl_the_error_names_packages_command_and_fallback():
    """The vendor library of EGL hides Mesa from this process: the way a bare machine looks."""
    code = "from sim.render import gl\ntry: gl.Stage()\nexcept gl.UserError as error: print(error)"
    environment = {**os.environ, "__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere.json"}
    message = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "sudo apt-get install -y libegl1 libgl1-mesa-dri" in message
    assert "renderer: {name: tiny}" in message
    assert message.count("\n") == 1
