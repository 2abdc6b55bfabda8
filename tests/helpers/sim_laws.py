"""The laws that all of sim's plug-ins must obey. test_sim_plugins.py checks every renderer, physics engine and world,
and the examples of CONTRIBUTING.md. A plug-in may refuse what it cannot do, with the error code "unsupported".
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import worlds

from posttrain.core.errors import UserError
from sim import dataset
from sim.assets import library, surfaces
from sim.geometry import lowest, xyzw
from sim.physics.analytic import Fall, fall_time
from sim.physics.base import Simulate, energy_gain
from sim.render.base import Render
from sim.scene import (
    FLOOR,
    AddEnergy,
    Background,
    Body,
    Camera,
    Clip,
    Hold,
    Light,
    Material,
    Scene,
    Teleport,
    Trajectory,
    Tunnel,
)
from sim.worlds.setups import BALL

STEP = 5e-4  # largest error of a contact's time, seconds
RED, GREY = (Material("plain", color, color, 1.0, 0) for color in ((0.6, 0.1, 0.1), (0.5, 0.5, 0.5)))
FOCAL = 70.0  # focal length in pixels of a camera of 64 x 64 pixels


def body(position: tuple[float, float, float], asset: str = "ball/00", **changes) -> Body:
    """A red ball of one kilogram and 0.3 m, with the given changes."""
    usual = Body(asset, "thing", 0.3, 1.0, 0.6, 0.5, position, (1.0, 0.0, 0.0, 0.0), "dropped", RED)
    return replace(usual, **changes)


def world(*bodies: Body, frames: int = 33) -> Scene:
    """Bodies over a grey floor of restitution 1, and a camera at a distance of 3 m and a height of 0.5 m."""
    return replace(
        worlds.world(*bodies, frames=frames),
        light=Light((0.0, 0.0, 1.0), (0.8, 0.8, 0.8), (0.4, 0.4, 0.4)),
        background=Background("plain", GREY, None, 5.0, (0.2, 0.3, 0.4), (0.1, 0.1, 0.3)),
    )


def moving(scene: Scene, velocity: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Trajectory:
    """All bodies move at this velocity (metres per second) and do not rotate."""
    times_T11 = np.arange(scene.frames).reshape(-1, 1, 1) / scene.fps
    positions = np.array([thing.position for thing in scene.bodies]) + times_T11 * np.array(velocity)
    quaternions = np.tile(np.array([thing.orientation for thing in scene.bodies]), (scene.frames, 1, 1))
    return Trajectory(positions, quaternions, (), np.zeros(scene.frames))


def done(work: Callable[[], object]) -> bool:
    """True if `work` was done, False if it was refused as unsupported; other errors are raised."""
    try:
        work()
    except UserError as error:
        if error.code != "unsupported":
            raise
        return False
    return True


# Renderers


def pictures_have_the_size_and_the_types_of_a_clip(render: Render) -> None:
    scene = replace(world(body((0.0, 0.0, 0.5)), frames=2), camera=Camera((0.0, -3.0, 0.5), width=48, height=32))
    clip = render(scene, moving(scene))
    for array, dtype, shape in (
        (clip.rgb, np.uint8, (2, 32, 48, 3)),
        (clip.instances, np.uint8, (2, 32, 48)),
        (clip.depth, np.float32, (2, 32, 48)),
        (clip.flow, np.float32, (2, 32, 48, 2)),
    ):
        assert (array.dtype, array.shape) == (dtype, shape)


def a_ball_is_where_a_pinhole_sees_it(render: Render) -> None:
    """A ball 3 m away, 0.3 m right and 0.2 m up: 7 px right of and 4.67 px above the centre, its front at 2.85 m."""
    scene = world(body((0.3, 0.0, 0.7)), frames=1)
    clip = render(scene, moving(scene))
    rows, columns = np.nonzero(clip.instances[0] == 1)
    assert columns.mean() + 0.5 == pytest.approx(32 + FOCAL * 0.3 / 3, abs=0.3)
    assert rows.mean() + 0.5 == pytest.approx(32 - FOCAL * 0.2 / 3, abs=0.3)
    assert len(rows) == pytest.approx(np.pi * (FOCAL * 0.15 / 3) ** 2, rel=0.15)
    assert clip.depth[0][clip.instances[0] == 1].min() == pytest.approx(2.85, abs=0.01)
    below = clip.instances[0] == 0
    below[:33] = False
    down = (np.nonzero(below)[0] + 0.5 - 32) / FOCAL
    np.testing.assert_allclose(clip.depth[0][below], 0.5 / down, rtol=1e-4)  # the floor
    assert np.isinf(clip.depth[0][:10]).all()  # the sky
    assert np.abs(clip.rgb[0][rows, columns].astype(int).mean(0) - clip.rgb[0][60, 2]).max() > 20


def flow_says_where_a_body_goes(render: Render) -> None:
    """The body moves 0.1 m right and 0.05 m up per frame; the flow in pixels depends on each pixel's depth."""
    scene = world(body((-0.2, 0.0, 0.5)), frames=3)
    clip = render(scene, moving(scene, (1.6, 0.0, 0.8)))
    for k in (0, 1):
        seen = clip.instances[k] == 1
        expected = FOCAL / clip.depth[k][seen][:, None] * np.array([0.1, -0.05])
        np.testing.assert_allclose(clip.flow[k][seen], expected, atol=2e-3)
    assert not clip.flow[2].any()
    assert not clip.flow[clip.instances == 0].any()


def the_nearer_body_hides_the_farther(render: Render) -> None:
    scene = world(body((0.0, 1.0, 0.5), size=1.0), body((0.0, -1.0, 0.5)), frames=1)
    instances = render(scene, moving(scene)).instances[0]
    assert instances[32, 32] == 2
    assert set(np.unique(instances)) == {0, 1, 2}


def a_picture_is_a_function_of_its_scene(render: Render) -> None:
    scene, other = world(body((0.0, 0.0, 0.5)), frames=2), world(body((0.2, 0.0, 0.9), "duck/00"), frames=1)
    first = render(scene, moving(scene, (1.0, 0.0, 0.0)))
    render(other, moving(other))
    again = render(scene, moving(scene, (1.0, 0.0, 0.0)))
    assert all((a == b).all() for a, b in zip(vars(first).values(), vars(again).values(), strict=True))


def what_vanishes_is_gone_or_refused(render: Render) -> None:
    scene = world(body((0.0, 0.0, 0.5)), frames=2)
    clips: list[Clip] = []
    if done(lambda: clips.append(render(scene, replace(moving(scene), scales_TN=np.array([[1.0], [0.0]]))))):
        assert (clips[0].instances == 1).any((1, 2)).tolist() == [True, False]


def more_bodies_than_a_mask_can_number_are_refused(render: Render) -> None:
    scene = world(*[body((0.0, 0.0, 0.5))] * 256, frames=1)
    assert not done(lambda: render(scene, moving(scene)))


RENDERER_LAWS: list[Callable[[Render], None]] = [
    pictures_have_the_size_and_the_types_of_a_clip,
    a_ball_is_where_a_pinhole_sees_it,
    flow_says_where_a_body_goes,
    the_nearer_body_hides_the_farther,
    a_picture_is_a_function_of_its_scene,
    what_vanishes_is_gone_or_refused,
    more_bodies_than_a_mask_can_number_are_refused,
]

# Physics engines


def frame_0_is_the_scene(simulate: Simulate) -> None:
    scene = world(body((0.0, 0.0, 1.0)), body((1.0, 0.5, 0.8), orientation=(0.6, 0.0, 0.8, 0.0)))
    trajectory = simulate(scene)
    assert trajectory.positions_TN3.shape == (33, 2, 3)
    for i, thing in enumerate(scene.bodies):
        np.testing.assert_array_equal(trajectory.positions_TN3[0, i], thing.position)
        np.testing.assert_allclose(trajectory.quaternions_TN4[0, i], thing.orientation, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(trajectory.quaternions_TN4, axis=-1), 1, atol=1e-9)
    assert trajectory.scales_TN is None


def it_falls_as_the_closed_form_until_it_lands(simulate: Simulate) -> None:
    """Positions are exact to a millimetre, the time of landing to STEP."""
    for asset in ("ball/00", "cone/00"):
        thing = body((0.2, 0.0, 1.3), asset, orientation=(0.5, 0.5, 0.5, 0.5))
        height = float(lowest(thing)[2])
        landing = fall_time(height)
        frames = 33 if asset == "ball/00" else int(landing * 16) + 1  # a cone's landing has no closed form
        trajectory = simulate(world(thing, frames=frames))
        times = np.arange(frames) / 16
        before = times < landing
        fallen = trajectory.positions_TN3[before, 0, 2] - 1.3
        np.testing.assert_allclose(fallen, Fall(height).at(times)[0][before] - height, atol=1e-3)
        np.testing.assert_allclose(trajectory.positions_TN3[before, 0, :2], [[0.2, 0.0]] * before.sum(), atol=1e-3)
        if asset == "ball/00":
            first = trajectory.contacts[0]
            assert (first.a, first.b) == (0, FLOOR)
            assert first.time == pytest.approx(landing, abs=STEP)


def gravity_is_the_scene_s(simulate: Simulate) -> None:
    times = np.arange(6) / 16
    for down in (0.0, -4.0, 3.0):
        trajectory = simulate(replace(world(body((0.0, 0.0, 2.0)), frames=6), gravity=(0.0, 0.0, down)))
        np.testing.assert_allclose(trajectory.positions_TN3[:, 0, 2], 2 + down * times**2 / 2, atol=1e-3)


def a_ball_bounces_and_rests_on_the_floor(simulate: Simulate) -> None:
    """With restitution e, the second contact is 2 e times the fall's duration after the first."""
    for restitution in (0.0, 0.3, 0.5):
        trajectory = simulate(world(body((0.0, 0.0, 1.15), restitution=restitution)))
        assert trajectory.positions_TN3[:, 0, 2].min() > 0.145
        first, landing = trajectory.contacts[0].time, fall_time(1.0)
        if restitution:
            flight = trajectory.contacts[1].time - first
            assert flight == pytest.approx(2 * restitution * landing, rel=0.02)
            assert trajectory.contacts[0].impulse == pytest.approx((1 + restitution) * 9.81 * landing, rel=0.01)
    still = simulate(world(body((0.0, 0.0, 0.65), restitution=0.0)))
    assert still.positions_TN3[-1, 0, 2] == pytest.approx(0.15, abs=3e-3)


def energy_never_rises(simulate: Simulate) -> None:
    for restitution in (0.0, 0.6, 0.99):
        trajectory = simulate(world(body((0.0, 0.0, 1.15), restitution=restitution)))
        assert trajectory.energy[0] == pytest.approx(9.81 * 1.15, rel=1e-6)
        assert energy_gain(trajectory) <= 0.01


def obstacles_stay(simulate: Simulate) -> None:
    trajectory = simulate(world(body((0.0, 0.0, 1.0)), body((1.0, 0.0, 0.7), "box/00", role="moved")))
    assert np.ptp(trajectory.positions_TN3[:, 1], axis=0).max() == 0


def bodies_meet_or_are_refused(simulate: Simulate) -> None:
    shelf = body((0.0, 0.0, 0.3), role="moved", mass=1.0)
    trajectories: list[Trajectory] = []
    if done(lambda: trajectories.append(simulate(world(body((0.0, 0.0, 1.1)), shelf)))):
        contact = trajectories[0].contacts[0]
        assert (contact.a, contact.b) == (0, 1)
        assert contact.time == pytest.approx(fall_time(0.5), abs=STEP)


def interventions_are_done_or_refused(simulate: Simulate) -> None:
    scene = world(body((0.0, 0.0, 0.75), restitution=0.0))
    lands = 0.15
    for intervention, end in (
        (Hold(0, height=0.45), (0.0, 0.45)),
        (Tunnel(0, (FLOOR,), depth=0.2), (0.0, lands - 0.2)),
        (Teleport(0, time=0.1, offset=(0.3, 0.0, 0.0)), (0.3, lands)),
    ):
        trajectories: list[Trajectory] = []
        if done(lambda: trajectories.append(simulate(scene, [intervention]))):  # noqa: B023 (called at once)
            np.testing.assert_allclose(trajectories[0].positions_TN3[-1, 0, [0, 2]], end, atol=6e-3)
    if done(lambda: trajectories.append(simulate(scene, [AddEnergy(0, height=0.4)]))):
        assert trajectories[-1].positions_TN3[8:, 0, 2].max() == pytest.approx(lands + 0.4, abs=0.01)


def a_motion_is_a_function_of_its_scene(simulate: Simulate) -> None:
    scene = world(body((0.0, 0.0, 1.0)), body((0.8, 0.0, 0.6)))
    first, second = simulate(scene), simulate(scene)
    np.testing.assert_array_equal(first.positions_TN3, second.positions_TN3)
    np.testing.assert_array_equal(first.energy, second.energy)
    assert first.contacts == second.contacts


ENGINE_LAWS: list[Callable[[Simulate], None]] = [
    frame_0_is_the_scene,
    it_falls_as_the_closed_form_until_it_lands,
    gravity_is_the_scene_s,
    a_ball_bounces_and_rests_on_the_floor,
    energy_never_rises,
    obstacles_stay,
    bodies_meet_or_are_refused,
    interventions_are_done_or_refused,
    a_motion_is_a_function_of_its_scene,
]

# Worlds


def takes_are_as_the_config_says(job: dataset.Job) -> None:
    config = job.world.config
    for take in dataset.takes(job, "train", 0):
        scene, camera = take.scene, take.scene.camera
        assert (scene.frames, scene.fps, camera.width, camera.height) == (
            config.frames, config.fps, config.width, config.height,
        )  # fmt: skip
        assert take.clip.rgb.shape == (config.frames, config.height, config.width, 3)
        assert take.trajectory.positions_TN3.shape == (config.frames, len(scene.bodies), 3)
        assert take.clip.instances.max() <= len(scene.bodies)
        assert (take.clip.instances[0] == scene.target + 1).any()
        assert scene.caption.endswith(".")
        assert take.motion
        json.dumps(take.labels, allow_nan=False)


def motion_starts_at_the_scene(job: dataset.Job) -> None:
    for take in dataset.takes(job, "train", 1):
        for i, thing in enumerate(take.scene.bodies):
            np.testing.assert_allclose(take.trajectory.positions_TN3[0, i], thing.position, atol=1e-6)
            along = np.dot(np.roll(xyzw(thing.orientation), 1), take.trajectory.quaternions_TN4[0, i])
            assert abs(along) == pytest.approx(1, abs=1e-6)


def a_scene_is_a_function_of_seed_split_and_number(job: dataset.Job) -> None:
    first, again = (list(dataset.takes(job, "train", 2)) for _ in range(2))
    assert len(first) == len(again) >= 1
    for a, b in zip(first, again, strict=True):
        assert (a.scene, a.labels) == (b.scene, b.labels)
        np.testing.assert_array_equal(a.clip.rgb, b.clip.rgb)
        np.testing.assert_array_equal(a.trajectory.positions_TN3, b.trajectory.positions_TN3)
    others = [next(dataset.takes(job, split, i)).scene.bodies for split, i in (("train", 3), ("test_seen", 2))]
    assert first[0].scene.bodies not in others


def a_group_shares_its_first_picture(job: dataset.Job) -> None:
    takes = list(dataset.takes(job, "train", 0))
    assert len(takes) == 1 or {take.labels["group"] for take in takes} == {0}
    for take in takes[1:]:
        np.testing.assert_array_equal(take.clip.rgb[0], takes[0].clip.rgb[0])
        assert take.scene.caption == takes[0].scene.caption
        assert (take.clip.rgb != takes[0].clip.rgb).any()


def splits_share_no_assets(job: dataset.Job) -> None:
    train, unseen = library.split(library.object_ids())
    seen_backgrounds, unseen_backgrounds = library.split(surfaces.background_ids())
    for split, objects, backgrounds in (
        ("train", train, seen_backgrounds),
        ("test_unseen", unseen, unseen_backgrounds),
        ("validation", library.validation_ids(), surfaces.validation_ids()),
    ):
        scene = next(dataset.takes(job, split, 0)).scene
        shared = {thing.asset for thing in scene.bodies if library.is_fixture(thing.asset) or thing.asset == BALL}
        assert {thing.asset for thing in scene.bodies} - shared <= set(objects)
        assert scene.background.id in backgrounds


def its_clips_can_be_written(job: dataset.Job, folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    dataset.make_and_write(folder, job, "train", 0)
    assert dataset.finished(folder, "train", 0)


WORLD_LAWS: list[Callable[[dataset.Job], None]] = [
    takes_are_as_the_config_says,
    motion_starts_at_the_scene,
    a_scene_is_a_function_of_seed_split_and_number,
    a_group_shares_its_first_picture,
    splits_share_no_assets,
]
