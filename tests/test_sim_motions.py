"""The worlds with one law: PyBullet moves their random scenes as the closed form says, and violations break it."""

import math
from dataclasses import replace
from functools import cache
from types import ModuleType

import numpy as np
import pytest
from helpers.worlds import BACKGROUNDS, OBJECTS
from pydantic import ValidationError
from scipy.spatial.transform import Rotation

from posttrain.core.errors import UserError
from sim import dataset, geometry
from sim.physics import analytic, bullet, laws
from sim.scene import Scene, Trajectory
from sim.worlds import collide, pendulum, ramp, throw, topple
from sim.worlds.base import Draw
from sim.worlds.counterfactual import Violation, deviation
from sim.worlds.setups import Made

WORLDS = (throw, ramp, pendulum, collide, topple)
SMALL = {"width": 64, "height": 64, "studio": True, "texture": 0.0, "target_pixels": (5, 64)}
RATE = 240
SCENES = 5  # of each world; 100 were looked at by hand, see docs/worlds.md


def make(world: ModuleType, index: int, **keys) -> Made:
    draw = Draw(np.random.default_rng([11, index]), OBJECTS, BACKGROUNDS, index)
    return world.make(draw, world.Config(**SMALL, **keys), bullet.simulate)


@cache
def scenes(world: ModuleType) -> list[Made]:
    return [make(world, index) for index in range(SCENES)]


def finely(scene: Scene, **changes) -> tuple[Trajectory, np.ndarray]:
    """The motion in RATE frames a second, and the frames' times."""
    frames = (scene.frames - 1) * RATE // int(scene.fps) + 1
    return bullet.simulate(replace(scene, fps=float(RATE), frames=frames, **changes)), np.arange(frames) / RATE


def violate(world: ModuleType, made: Made, kind: str, value: float) -> Trajectory:
    return world.violate(made, Violation(kind, value), bullet.simulate)


def test_a_throw_is_a_parabola_until_it_lands() -> None:
    """Within 0.1 mm, at frame 0 with the launch velocity, and the contact within 0.5 ms."""
    for made in scenes(throw):
        trajectory, times = finely(made.scene)
        vx, vz, g = made.law["vx"], made.law["vz"], made.law["g"]
        landed = trajectory.contacts[0].time
        flying = times < landed
        moved = trajectory.positions_TN3[:, 0] - trajectory.positions_TN3[0, 0]
        np.testing.assert_allclose(moved[flying][:, [0, 2]], laws.flight((vx, vz), times[flying], g), atol=1e-4)
        assert np.abs(moved[flying, 1]).max() < 1e-4
        height = float(geometry.lowest(made.scene.bodies[0])[2])
        assert landed == pytest.approx(laws.flight_time(height, vz, g), abs=5e-4)
    assert {made.law["vz"] == 0 for made in scenes(throw)} == {True, False}  # horizontal and oblique


def down_the_slope(made: Made, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Metres (T,) that the body has moved down the slope, and away from it."""
    slope = made.law["slope"]
    down, normal = ramp.axes(math.radians(abs(slope)), 1 if slope > 0 else -1)
    moved = trajectory.positions_TN3[:, 0] - trajectory.positions_TN3[0, 0]
    return moved @ down, moved @ normal


def test_boxes_slide_and_balls_roll_as_they_should() -> None:
    """Acceleration within 0.3%, and no more than 1 mm into the ramp; a ball's surface moves as its centre."""
    for made in scenes(ramp):
        trajectory, times = finely(made.scene)
        gone, away = down_the_slope(made, trajectory)
        on = gone < made.law["length"]
        on &= np.cumsum(~on) == 0
        slope, friction = math.radians(abs(made.law["slope"])), made.law["friction"]
        expected = laws.roll(slope) if made.motion == "roll" else laws.slide(slope, friction)
        assert made.law["acceleration"] == expected
        fit = 2 * np.polyfit(times[on], gone[on], 2)[0]
        assert fit == pytest.approx(expected, rel=3e-3)
        assert -1e-3 < away[on].min()
        assert away[on].max() < 1e-3
        if made.motion == "roll":
            turns = Rotation.from_quat(np.roll(trajectory.quaternions_TN4[:, 0], -1, axis=-1))
            turned = np.cumsum((turns[1:] * turns[:-1].inv()).magnitude())[on[1:]]
            np.testing.assert_allclose(turned * made.scene.bodies[0].size / 2, gone[1:][on[1:]], atol=2e-3)
    assert {made.motion for made in scenes(ramp)} == {"slide", "roll"}


def test_friction_holds_a_box_if_it_is_at_least_the_tangent_of_the_slope() -> None:
    made = next(made for made in scenes(ramp) if made.motion == "slide")
    tangent = math.tan(math.radians(abs(made.law["slope"])))
    for share, moves in ((1.1, False), (0.9, True)):
        held = violate(ramp, made, "more_friction", max(1.0, share * tangent / made.law["friction"]))
        assert (down_the_slope(made, held)[0][-1] > 0.05) == moves
    assert laws.slide(0.3, math.tan(0.3)) == 0 == laws.slide(0.3, 0.5)


@pytest.mark.parametrize("amplitude", [15.0, 90.0, 150.0])
def test_a_pendulum_swings_with_the_period_of_the_elliptic_integral(amplitude: float) -> None:
    """The angle within 0.2 degrees, the arm within 0.2 mm, and the period within 0.1%."""
    made = make(pendulum, 0, amplitude=(amplitude, amplitude))
    ball, _ = made.scene.bodies
    trajectory, times = finely(replace(made.scene, bodies=(ball,), frames=65))
    arms = trajectory.positions_TN3[:, 0] - made.scene.pivots[0].point
    np.testing.assert_allclose(np.linalg.norm(arms, axis=1), made.law["arm"], atol=2e-4)
    angle, length = np.arctan2(arms[:, 0], -arms[:, 2]), made.law["length"]
    expected = np.sign(angle[0]) * laws.pendulum_angle(length, math.radians(amplitude), times)
    np.testing.assert_allclose(angle, expected, atol=math.radians(0.2))
    k = np.flatnonzero(angle[:-1] * angle[1:] < 0)
    crossings = (k + angle[k] / (angle[k] - angle[k + 1])) / RATE  # half a period apart
    assert 2 * np.diff(crossings).mean() == pytest.approx(made.law["period"], rel=1e-3)


def test_the_period_of_small_swings_is_that_of_the_harmonic_pendulum() -> None:
    assert laws.pendulum_period(0.6, 1e-3) == pytest.approx(2 * math.pi * math.sqrt(0.6 / 9.81), rel=1e-6)
    assert laws.pendulum_period(0.6, math.pi / 2) / laws.pendulum_period(0.6, 1e-3) == pytest.approx(1.18034, abs=1e-5)


def test_a_collision_keeps_momentum_and_the_restitution() -> None:
    """Momentum within 0.01%, velocities after it within 0.012 m/s (Bullet's bounces are a little slower)."""
    for made in scenes(collide):
        trajectory, times = finely(made.scene)
        law, x = made.law, trajectory.positions_TN3[..., 0]
        time = collide.meeting(made.scene, trajectory)
        before, after = times < time - 0.02, times > time + 0.02
        speeds = [[np.polyfit(times[part], x[part, i], 1)[0] for i in (0, 1)] for part in (before, after)]
        masses = np.array([law["mass"], law["mass_2"]])
        np.testing.assert_allclose(speeds[0], [law["v"], law["v_2"]], atol=1e-4)
        np.testing.assert_allclose(speeds[1], [law["u"], law["u_2"]], atol=0.012)
        assert masses @ speeds[1] == pytest.approx(masses @ speeds[0], abs=1e-4 * (masses @ np.abs(speeds[0])))
        start = np.abs(np.diff(x[0])).item() - made.scene.bodies[0].size
        assert time == pytest.approx(start / abs(law["v"] - law["v_2"]), abs=2e-3)
    assert laws.collision((1.0, 1.0), (1.0, 0.0), 1.0) == (0.0, 1.0)
    assert laws.collision((2.0, 1.0), (1.0, -1.0), 0.0) == pytest.approx((1 / 3, 1 / 3))


def test_a_tower_stands_if_every_joint_holds_and_topples_as_a_rigid_body() -> None:
    """Nothing moves by 1 mm, or the tipping angle is the closed form's within 0.04 up to 0.35 radians."""
    for index in range(8):
        made = make(topple, index)
        trajectory, times = finely(made.scene)
        moved = np.linalg.norm(trajectory.positions_TN3 - trajectory.positions_TN3[0], axis=-1).max()
        law = made.law
        if law["margin"] > 0:
            assert made.motion == "stand"
            assert moved < 1e-3
            continue
        assert moved > 0.02
        arm = (trajectory.positions_TN3[:, 0][:, [0, 2]] - [law["edge_x"], law["edge_z"]]) * [law["side"], 1]
        angle = np.arctan2(arm[:, 0], arm[:, 1])
        expected = laws.tipping((law["centre_x"], law["centre_z"]), law["inertia"], times)
        until = np.maximum.accumulate(expected) < 0.35
        np.testing.assert_allclose((angle - angle[0])[until], expected[until], atol=0.04)
    assert laws.margins([0.0, 0.4, 0.0], [1.0, 1.0, 1.0], 1.0) == pytest.approx([0.3, 0.1])


def at_the_end(scene: Scene, trajectory: Trajectory) -> Scene:
    """The scene with the bodies where the motion ends, without those that are not simulated."""
    bodies = [
        replace(body, position=tuple(p.tolist()), orientation=tuple(q.tolist()))
        for body, p, q in zip(scene.bodies, trajectory.positions_TN3[-1], trajectory.quaternions_TN4[-1], strict=True)
        if body.name != "rod" and not body.asset.startswith("rod/")
    ]
    return replace(scene, bodies=tuple(bodies))


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__.rpartition(".")[2])
def test_random_scenes_are_finite_and_nothing_interpenetrates(world: ModuleType) -> None:
    """5 mm at most, at time 0 and at the end."""
    for made in scenes(world):
        scene, trajectory = made.scene, made.trajectory
        assert np.isfinite(trajectory.positions_TN3).all()
        assert np.isfinite(trajectory.quaternions_TN4).all()
        assert all(map(math.isfinite, made.law.values()))
        first = replace(trajectory, positions_TN3=trajectory.positions_TN3[:1])
        first = replace(first, quaternions_TN4=trajectory.quaternions_TN4[:1])
        assert bullet.clearance(at_the_end(scene, first)) > -5e-3
        assert bullet.clearance(at_the_end(scene, trajectory)) > -5e-3


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__.rpartition(".")[2])
def test_every_violation_changes_the_motion_and_starts_as_the_truth(world: ModuleType) -> None:
    made = scenes(world)[0]
    if world is topple:
        made = next(made for made in scenes(world) if made.motion == "topple")
    if world is ramp:
        made = next(made for made in scenes(world) if made.motion == "slide")
    true = made.trajectory.positions_TN3
    most = deviation(true[:1], true)
    for kind, (_, (least, largest), sweep) in world.VIOLATIONS.items():
        off = []
        for value in sweep:
            assert least <= value <= largest
            wrong = violate(world, made, kind, value)
            np.testing.assert_allclose(wrong.positions_TN3[0], true[0], atol=1e-9)
            assert wrong.positions_TN3.shape == true.shape
            assert np.isfinite(wrong.positions_TN3).all()
            off.append(deviation(wrong.positions_TN3, true) / most)
        if kind != "vanish":  # the path is right
            assert off[-1] > 0.02, kind
            assert off[-1] > 0.9 * off[0], kind


def test_violations_break_their_law_by_their_value() -> None:
    thrown = scenes(throw)[0]
    kicked = violate(throw, thrown, "kick", 1.0)
    end = int(thrown.trajectory.contacts[0].time * 16)
    speeds = np.diff(kicked.positions_TN3[: end + 1, 0, 0]) * 16
    assert abs(speeds[-1]) == pytest.approx(abs(speeds[0]) + 1.0, abs=1e-3)

    hung = scenes(pendulum)[0]
    times = np.arange(hung.scene.frames) / hung.scene.fps
    pivot = np.array(hung.scene.pivots[0].point)
    true, grown, stopped, longer = (
        trajectory.positions_TN3[:, 0] - pivot
        for trajectory in (
            hung.trajectory,
            violate(pendulum, hung, "gain", 0.2),
            violate(pendulum, hung, "stop", 0.5),
            violate(pendulum, hung, "stretch", 0.4),
        )
    )
    ratio = np.arctan2(grown[:, 0], -grown[:, 2]) / np.arctan2(true[:, 0], -true[:, 2])
    np.testing.assert_allclose(ratio, np.exp(0.2 * times), rtol=1e-6)
    np.testing.assert_array_equal(stopped[8:], np.tile(stopped[8], (len(stopped) - 8, 1)))
    arm = hung.law["arm"]
    np.testing.assert_allclose(np.linalg.norm(longer, axis=1), arm * (1 + 0.4 * times / times[-1]), rtol=1e-3)

    met = scenes(collide)[0]
    law, masses = met.law, np.array([met.law["mass"], met.law["mass_2"]])
    before = masses @ np.abs([law["v"], law["v_2"]])
    for kind, value, gained, kept in (("momentum", 0.4, 0.4, law["restitution"]), ("more_bounce", 1.5, 0.0, 1.5)):
        x = violate(collide, met, kind, value).positions_TN3[..., 0]
        u = (x[-1] - x[-2]) * met.scene.fps
        change = masses @ (u - [law["v"], law["v_2"]]) * math.copysign(1, law["v"])
        assert change / before == pytest.approx(gained, abs=1e-9)
        assert (u[1] - u[0]) / (law["v"] - law["v_2"]) == pytest.approx(kept)
    for kind, sign in (("overlap", -1), ("repel", 1)):
        x = violate(collide, met, kind, 0.1).contacts
        apart = next(contact.time for contact in x if {contact.a, contact.b} == {0, 1})
        closing = abs(law["v"] - law["v_2"])
        assert sign * (collide.meeting(met.scene, met.trajectory) - apart) * closing == pytest.approx(0.1)


def test_a_scene_s_clips_are_one_or_a_group() -> None:
    world = {"name": "pendulum", **SMALL, "frames": 17}
    (alone,) = dataset.takes(dataset.Job(world=world), "train", 0)
    assert alone.labels.keys() == {"law"}
    violations = {"gain": (0.8,), "stretch": (0.4,)}
    takes = list(dataset.takes(dataset.Job(world=world | {"members": None, "violations": violations}), "train", 0))
    assert [take.labels["violation"] and take.labels["violation"]["kind"] for take in takes] == [None, *violations]
    assert takes[0].scene == alone.scene
    for take in takes:
        assert (take.clip.rgb[0] == alone.clip.rgb[0]).all()
        assert take.labels["law"] == alone.labels["law"]
        assert take.motion == "swing"
    rods = [(take.clip.instances[-1] == 2).sum() for take in takes]
    assert rods[2] > rods[0]  # it stretches with the ball
    row = dataset.describe(dataset.Job(world=world), "train", "x", takes[1])
    assert 0 < row["violation"]["severity"] <= 1


@pytest.mark.parametrize(
    ("world", "keys", "line"),
    [
        (throw, {"violations": {"gain": (0.2,)}}, "no violation is called gain; choose from weak_gravity"),
        (pendulum, {"amplitude": (20.0, 179.0)}, "170"),
        (ramp, {"slope": (0, 20)}, "1 to 44"),
        (topple, {"boxes": (2, 9)}, "5"),
    ],
)
def test_what_has_no_law_is_refused(world: ModuleType, keys: dict, line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        world.Config(**keys)


def test_the_closed_form_engine_refuses_throws_and_pendulums() -> None:
    for world in (throw, pendulum):
        with pytest.raises(UserError) as error:
            analytic.simulate(scenes(world)[0].scene)
        assert (error.value.code, error.value.field) == ("unsupported", "physics.name")
