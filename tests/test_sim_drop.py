"""Drop scenes keep what the paper promises, and the motion corpus holds nothing that falls."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from helpers.worlds import BACKGROUNDS, OBJECTS
from pydantic import ValidationError

from posttrain.core.errors import UserError
from sim import geometry
from sim.assets import library
from sim.physics import analytic, bullet
from sim.physics.base import energy_gain
from sim.render import gl
from sim.scene import Scene, Trajectory
from sim.worlds import drop, motion
from sim.worlds.base import Draw

POCKET = {
    "width": 64,
    "height": 64,
    "frames": 33,
    "dropped": (1, 2),
    "pile": (0, 1),
    "size": (0.2, 0.4),
    "region": (1.0, 1.0),
    "camera_step": (0.0, 0.1),
    "target_pixels": (6, 20),
}


def draw(index: int, objects: list[str] = OBJECTS) -> Draw:
    return Draw(np.random.default_rng([7, index]), objects, BACKGROUNDS, index)


def made(module, config, index: int) -> tuple[Scene, Trajectory]:
    return motion.make(draw(index), config) if module is motion else drop.make(draw(index), config, bullet.simulate)


@cache
def drops() -> list[tuple[Scene, Trajectory]]:
    return [made(drop, drop.Config(**POCKET), i) for i in range(16)]


@cache
def motions() -> list[tuple[Scene, Trajectory]]:
    return [made(motion, motion.Config(**POCKET), i) for i in range(2 * len(motion.MOTIONS))]


@pytest.mark.slow
def test_shapes_choose_among_objects():
    config = drop.Config(**POCKET, shapes=("egg", "cone"))
    for module in (drop, motion):
        for i in range(4):
            scene, _ = made(module, motion.Config(**config.model_dump()) if module is motion else config, i)
            assert {body.asset.partition("/")[0] for body in scene.bodies} <= {"egg", "cone"}
    with pytest.raises(ValidationError, match="no object is a eg; choose from ball, barrel"):
        drop.Config(shapes=("egg", "eg"))
    alone = drop.Config(**POCKET, shapes=("ball",))  # there is one, and it is for training
    with pytest.raises(UserError, match="ball") as error:
        drop.make(draw(0, library.split(library.object_ids())[1]), alone, bullet.simulate)
    assert (error.value.code, error.value.field) == ("value", "world.shapes")


@pytest.mark.slow
def test_a_studio_has_no_horizon():
    for i in range(4):
        scene, trajectory = made(drop, drop.Config(**POCKET, studio=True, texture=0.0), i)
        left = gl.render(scene, trajectory).rgb[0, :, 0].astype(int)  # from sky to floor
        assert np.ptp(left, axis=0).max() <= 1


@pytest.mark.slow
def test_at_time_0_nothing_interpenetrates():
    for scene, _ in drops():
        assert bullet.clearance(scene) >= drop.TOUCH


def test_drop_heights_are_the_air_below_the_lowest_point():
    seen = 0
    for scene, trajectory in drops():
        if any(body.role == "pile" for body in scene.bodies):
            continue
        for i, body in enumerate(scene.bodies):
            low = float((geometry.outline(body) + body.position)[:, 2].min())
            assert 0.5 <= low <= 1.5
            touch = next(c for c in trajectory.contacts if i in (c.a, c.b))
            if touch.b == -1:  # the floor, not the other one in the air
                assert touch.time == pytest.approx(analytic.fall_time(low), abs=2e-4)
                seen += 1
    assert seen >= 3


def test_what_is_dropped_hangs_above_its_pile():
    scenes = [scene for scene, _ in drops() if any(body.role == "pile" for body in scene.bodies)]
    assert len(scenes) >= 3
    for scene in scenes:
        tops = [
            float((geometry.outline(body) + body.position)[:, 2].max()) for body in scene.bodies if body.role == "pile"
        ]
        lows = [
            float((geometry.outline(body) + body.position)[:, 2].min()) for body in scene.bodies if body.role != "pile"
        ]
        assert max(lows) >= 0.5 + min(tops)


def test_piles_rest_until_something_lands_on_them():
    for scene, trajectory in drops():
        dropped = {i for i, body in enumerate(scene.bodies) if body.role == "dropped"}
        landing = min(c.time for c in trajectory.contacts if {c.a, c.b} & dropped)
        waiting_TN3 = trajectory.positions_TN3[: int(landing * scene.fps) + 1, len(dropped) :]
        assert np.linalg.norm(waiting_TN3 - waiting_TN3[:1], axis=-1).max(initial=0.0) <= 2e-3


@pytest.mark.slow
def test_energy_of_whole_scenes_never_rises():
    assert max(energy_gain(trajectory) for _, trajectory in drops()) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("corpus", [drops, motions])
def test_everything_is_in_the_picture_and_the_target_stays_there(corpus):
    for scene, trajectory in corpus():
        start = [geometry.outline(body) + body.position for body in scene.bodies]
        path = geometry.paths(scene, trajectory, scene.target)
        pixels = geometry.project(scene.camera, np.concatenate([*start, path.reshape(-1, 3)]))[0]
        assert (pixels > 0).all()
        assert (pixels < 64).all()
        box = np.ptp(geometry.project(scene.camera, start[scene.target])[0], axis=0)
        assert 6 <= np.sqrt(box.prod()) <= 20
        assert 0.4 <= scene.camera.position[2] <= 0.6
        assert scene.background.wall_y > trajectory.positions_TN3[..., 1].max()


def test_numbers_of_objects_reach_both_ends():
    dropped = Counter(sum(body.role == "dropped" for body in scene.bodies) for scene, _ in drops())
    piled = Counter(sum(body.role == "pile" for body in scene.bodies) for scene, _ in drops())
    assert set(dropped) == {1, 2}
    assert {0, 1} <= set(piled) <= {0, 1, 2}


@pytest.mark.slow
def test_the_paper_s_own_scene_can_be_made():
    scene, trajectory = made(drop, drop.Config(), 2)
    assert 1 <= sum(body.role == "dropped" for body in scene.bodies) <= 6
    assert trajectory.positions_TN3.shape == (32, len(scene.bodies), 3)
    assert bullet.clearance(scene) >= drop.TOUCH
    assert (scene.camera.width, scene.camera.height) == (256, 256)


def test_ranges_that_leave_no_room_are_refused():
    config = drop.Config(**POCKET | {"dropped": (1, 1), "pile": (0, 0), "target_pixels": (60, 64)})
    with pytest.raises(UserError) as error:
        drop.make(draw(0, OBJECTS[:2]), config, bullet.simulate)
    assert (error.value.code, error.value.field) == ("value", "world")


def test_minus_nothing_is_nothing():
    """numpy refuses to draw from 0.0 to -0.0."""
    assert str(drop.Config(region=(0.7, -0.0)).region) == "(0.7, 0.0)"
    assert str(drop.Config(hidden=-0.0).hidden) == "0.0"


def test_a_scene_is_a_function_of_its_generator():
    (first, path), (second, again) = made(drop, drop.Config(**POCKET), 5), drops()[5]
    assert first == second
    np.testing.assert_array_equal(path.positions_TN3, again.positions_TN3)


def test_captions_name_what_falls():
    assert drop.sentence(["red ball"]) == "a red ball falls."
    assert drop.sentence(["duck", "orange box"]) == "a duck and an orange box fall."
    assert drop.sentence(["duck", "mug", "egg"]) == "a duck, a mug and an egg fall."


def test_motions_are_balanced_and_told():
    assert Counter(motion.label(scene) for scene, _ in motions()) == dict.fromkeys(motion.MOTIONS, 2)
    verbs = ("hovers", "drifts", "spins", "circles", "slides", "rolls")
    words = dict(zip(motion.MOTIONS, verbs, strict=True))
    for scene, trajectory in motions():
        assert words[motion.label(scene)] in scene.caption
        assert "fall" not in scene.caption
        assert trajectory.contacts == ()


def test_nothing_falls_in_the_motion_corpus():
    for scene, trajectory in motions():
        for i in range(len(scene.bodies)):
            height = trajectory.positions_TN3[:, i, 2]
            assert geometry.paths(scene, trajectory, i)[..., 2].min() > -2e-3
            if motion.label(scene) in motion.AIR or i != scene.target:
                acceleration = np.diff(height, 2) * scene.fps**2
                assert np.abs(acceleration).max() < 3.0


def test_motions_start_where_the_scene_says_and_move_smoothly():
    moved = []
    for scene, trajectory in motions():
        for i, body in enumerate(scene.bodies):
            np.testing.assert_allclose(trajectory.positions_TN3[0, i], body.position, atol=1e-6)
            same = abs(np.dot(trajectory.quaternions_TN4[0, i], body.orientation))
            assert same == pytest.approx(1, abs=1e-6)
            if body.role == "pile":
                assert (trajectory.positions_TN3[:, i] == trajectory.positions_TN3[0, i]).all()
        np.testing.assert_allclose(np.linalg.norm(trajectory.quaternions_TN4, axis=-1), 1, atol=1e-9)
        moved.append(np.linalg.norm(np.ptp(trajectory.positions_TN3[:, 0], axis=0)))
    assert 0.1 < np.mean(moved) < 0.6
