"""The physics engine against the closed form, and the laws it must keep."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.worlds import body, world

from sim.assets import library
from sim.physics import analytic, bullet
from sim.physics.base import energy_gain
from sim.scene import FLOOR

SHAPES = ["ball/00", "duck/00", "toy/017", "soccer ball/00", "cone/00"]


def test_closed_form_by_hand():
    assert analytic.fall_time(1.5) == pytest.approx(0.553001, abs=1e-6)
    assert analytic.impact_speed(1.5) == pytest.approx(5.424942, abs=1e-6)
    assert analytic.drop_height(analytic.fall_time(0.7)) == pytest.approx(0.7)
    fall = analytic.Fall(1.0, restitution=0.5)
    first, second, third = fall.contacts(1.2)[:3]
    assert second - first == pytest.approx(first)  # up and down at half the speed: 2 * v/2 / g = t
    assert third - second == pytest.approx(first / 2)
    top, speed = fall.at(np.array([(first + second) / 2]))
    assert top[0] == pytest.approx(0.25)  # e^2 h
    assert speed[0] == pytest.approx(0.0, abs=1e-12)
    heights, speeds = analytic.Fall(1.0).at(np.array([0.0, 0.2, 2.0]))
    np.testing.assert_allclose(heights, [1.0, 1 - 9.81 * 0.02, 0.0])
    np.testing.assert_allclose(speeds, [0.0, -1.962, 0.0])


@pytest.mark.parametrize("asset", SHAPES)
@pytest.mark.parametrize("fps", [16.0, 25.0])
def test_free_fall_within_a_millimetre_and_contact_within_a_tenth_of_a_millisecond(asset: str, fps: float):
    for turn, height in enumerate(np.linspace(0.5, 1.5, 5)):
        scene = world(body(asset, height, turn=turn), fps=fps)
        trajectory = bullet.simulate(scene)
        times = np.arange(scene.frames) / fps
        before = times < analytic.fall_time(height)
        fallen = trajectory.positions_TN3[:, 0, 2] - scene.bodies[0].position[2]
        expected = analytic.Fall(height).at(times)[0] - height
        assert np.abs(fallen - expected)[before].max() < 1e-3
        assert np.abs(trajectory.positions_TN3[before, 0, :2]).max() < 1e-3
        first = trajectory.contacts[0]
        assert (first.a, first.b) == (0, FLOOR)
        assert abs(first.time - analytic.fall_time(height)) <= 1e-4


def test_frame_0_is_the_scene_and_nothing_has_moved_yet():
    scene = world(body("duck/00", 1.0), replace(body("cone/00", 0.6), position=(1.0, 0.0, 0.9)))
    trajectory = bullet.simulate(scene)
    for i, thing in enumerate(scene.bodies):
        np.testing.assert_array_equal(trajectory.positions_TN3[0, i], thing.position)
        np.testing.assert_allclose(trajectory.quaternions_TN4[0, i], thing.orientation, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(trajectory.quaternions_TN4, axis=-1), 1, atol=1e-9)


def test_a_ball_gives_back_its_restitution():
    for height in np.linspace(0.5, 1.5, 6):
        trajectory = bullet.simulate(world(body("ball/00", height, restitution=0.5)))
        first, second = trajectory.contacts[:2]
        kept = first.impulse / analytic.impact_speed(height) - 1  # impulse = m v (1 + e), m = 1
        assert 0.5 <= kept <= 0.51
        assert second.time - first.time == pytest.approx(2 * 0.5 * analytic.impact_speed(height) / 9.81, rel=0.015)


@pytest.mark.parametrize("asset", SHAPES)
def test_energy_never_rises(asset: str):
    for turn, restitution in enumerate((0.0, 0.3, 0.6)):
        thing = body(asset, 1.2, restitution, turn)
        trajectory = bullet.simulate(world(thing))
        assert trajectory.energy[0] == pytest.approx(9.81 * thing.position[2], rel=1e-9)  # 1 kg at rest
        assert energy_gain(trajectory) <= 0.01


def test_obstacles_stay_and_are_hit():
    shelf = replace(body("box/00", 0.4), role="moved")
    trajectory = bullet.simulate(world(body("ball/00", 1.0), shelf))
    assert (trajectory.positions_TN3[:, 1] == trajectory.positions_TN3[0, 1]).all()
    assert (trajectory.contacts[0].a, trajectory.contacts[0].b) == (0, 1)


def test_settled_bodies_stay_where_they_are():
    lying = body("duck/00", 0.01)
    ((position, orientation),) = bullet.settle(world(lying)) or [((0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))]
    scene = world(replace(lying, position=position, orientation=orientation, role="pile"))
    trajectory = bullet.simulate(scene)
    assert np.linalg.norm(trajectory.positions_TN3 - trajectory.positions_TN3[:1], axis=-1).max() < 1e-3
    assert position[2] > 0.05


def test_clearance_sees_air_touch_and_overlap():
    assert bullet.clearance(world(body("ball/00", 0.02))) == pytest.approx(0.02, abs=2e-3)
    assert bullet.clearance(world(body("ball/00", 0.3), body("box/00", 0.5))) < -0.05
    assert bullet.clearance(world(body("ball/00", -0.03))) == pytest.approx(-0.03, abs=2e-3)


def test_the_same_scene_moves_the_same():
    scene = world(body("duck/00", 1.0), replace(body("toy/017", 0.5), position=(0.05, 0.0, 0.2)))
    first, second = bullet.simulate(scene), bullet.simulate(scene)
    np.testing.assert_array_equal(first.positions_TN3, second.positions_TN3)
    np.testing.assert_array_equal(first.energy, second.energy)
    assert first.contacts == second.contacts


def test_physics_takes_true_spheres_for_balls():
    for asset in ("ball/00", "soccer ball/00"):
        assert asset in library.object_ids()
        scene = world(body(asset, 0.5, turn=3))
        assert bullet.simulate(scene).positions_TN3[-1, 0, 2] == pytest.approx(0.15, abs=2e-3)
