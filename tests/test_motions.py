"""posttrain/metrics/motions.py: scorecards of rendered clips against the simulator's truth, and of clips that lie."""

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from posttrain.data import schema
from posttrain.evaluation.benchmarks import pisa
from posttrain.metrics import motions
from posttrain.metrics.physics import Measure
from posttrain.metrics.pisa import even_times
from sim import dataset
from sim.worlds.base import Take

POCKET = {
    "width": 64, "height": 64, "frames": 33, "camera_gap": 1.6, "camera_height": (0.5, 0.5), "camera_step": (0, 0),
    "texture": 0.0, "studio": True, "contrast": 0.4, "sun": (82, 90), "target_pixels": (6, 24),
}  # fmt: skip
SHAPES = ["ball", "barrel", "box", "cone", "cylinder", "prism", "pyramid", "stone"]
WORLDS: dict[str, dict[str, Any]] = {
    "throw": {"size": (0.25, 0.35), "shapes": SHAPES, "restitution": (0.1, 0.4)},
    "ramp": {"size": (0.25, 0.35)},
    "pendulum": {"size": (0.2, 0.3)},
    "collide": {"size": (0.3, 0.4)},
    "topple": {"size": (0.25, 0.35)},
}
ZERO = dict.fromkeys(("sideways", "angle", "lift", "gain", "stretch", "momentum", "overlap"), 0.0)
# what the fits' errors stay below on true clips, in the quantities' units; docs/measuring.md
WITHIN = {
    "throw": {"g": 1.0, "vx": 0.08, "vz": 0.15, "contact": 0.03, "sideways": 0.6},
    "ramp": {"acceleration": 0.15, "friction": 0.015, "share": 0.05, "angle": 0.6, "lift": 0.012},
    "pendulum": {"period": 0.003, "g": 0.05, "amplitude": 0.8, "gain": 0.008, "arm": 0.006, "stretch": 0.003},
    "collide": {
        "v": 0.05, "v_2": 0.05, "u": 0.03, "u_2": 0.04, "contact": 0.02, "momentum": 0.04, "restitution": 0.05,
        "energy": 0.08, "overlap": 0.03,
    },
    "topple": {"g": 3.0, "fallen": 0.08},
}  # fmt: skip


def films(world: str, index: int, **keys: Any) -> list[Take]:
    job = dataset.Job(
        world={"name": world, **POCKET, **WORLDS[world], **keys}, renderer={"name": "gl", "supersample": 2}
    )
    return list(dataset.takes(job, "train", index))


def card(take: Take) -> dict[str, Measure | None]:
    scene = take.scene
    focal = scene.camera.focal / scene.camera.sensor * scene.camera.width
    depth = scene.bodies[0].position[1] - scene.camera.position[1]
    times = even_times(scene.frames, scene.fps)
    masks, others = (take.clip.instances == i for i in (1, 2))
    return motions.scorecard(take.motion, take.labels["law"], masks, times, focal, depth, scene.camera.position, others)


def truth(take: Take) -> dict[str, float]:
    """The true values of a true clip's quantities, from the simulator."""
    law, path, contacts = take.labels["law"], take.trajectory.positions_TN3[:, 0], take.trajectory.contacts
    known = ZERO | law | {"permanence": 1.0, "fallen": float(path[0, 2] - path[-1, 2])}
    if "acceleration" in law:
        known["share"] = law["acceleration"] / law["g"] / math.sin(math.radians(abs(law["slope"])))
    if take.motion == "roll":
        del known["friction"]
    pair = {0, 1} if take.motion == "collide" else {0, -1}
    if met := [contact.time for contact in contacts if {contact.a, contact.b} == pair]:
        known["contact"] = met[0]
    if "u" in law:
        masses = np.array([law["mass"], law["mass_2"]])
        known["energy"] = float(
            masses @ np.square([law["u"], law["u_2"]]) / (masses @ np.square([law["v"], law["v_2"]]))
        )
    return known


@cache
def group(world: str, index: int, *kinds: tuple[str, float]) -> list[Take]:
    """A true clip, and a clip of each violation."""
    violations: dict[str, tuple[float, ...]] = {}
    for kind, value in kinds:
        violations[kind] = (*violations.get(kind, ()), value)
    return films(world, index, members=None, violations=violations)


@pytest.mark.parametrize("world", WORLDS)
def test_true_clips_have_the_simulator_s_values(world: str) -> None:
    """Within the errors of docs/measuring.md, and mostly within two sigmas."""
    off = []
    for index in range(6):
        (take,) = films(world, index)
        measured, known = card(take), truth(take)
        assert measured["permanence"] == (1, 0)
        for name, within in WITHIN[world].items():
            if (measure := measured[name]) is not None and name in known:
                assert abs(measure.value - known[name]) < within, (index, name, measure, known[name])
                off.append(abs(measure.value - known[name]) / measure.sigma)
    assert len(off) >= 8
    assert np.mean(np.array(off) < 2) > 0.8


def value(take: Take, name: str) -> float:
    measure = card(take)[name]
    assert measure is not None
    return measure.value


def test_a_throw_in_weak_gravity_and_one_that_is_kicked() -> None:
    true, weak, kicked = group("throw", 1, ("weak_gravity", 0.4), ("kick", 2.0))
    assert value(true, "g") == pytest.approx(9.81, abs=1.0)
    assert value(weak, "g") == pytest.approx(0.4 * 9.81, abs=0.6)
    assert abs(value(kicked, "sideways")) > 4 * abs(value(true, "sideways")) + 1


def test_a_slide_with_less_friction_and_one_into_the_ramp() -> None:
    index = next(i for i in range(9) if films("ramp", i)[0].motion == "slide")
    true, slippery, sunk, high = group("ramp", index, ("less_friction", 0.25), ("sink", 0.12), ("float", 0.2))
    friction = true.labels["law"]["friction"]
    assert value(true, "friction") == pytest.approx(friction, abs=0.015)
    assert value(slippery, "friction") == pytest.approx(0.25 * friction, abs=0.02)
    assert value(high, "lift") == pytest.approx(0.2, abs=0.02)
    assert -0.12 < value(sunk, "lift") < -0.03  # the ramp hides the lower part of the box


def test_a_ball_that_slips_is_faster_than_one_that_rolls() -> None:
    index = next(i for i in range(9) if films("ramp", i)[0].motion == "roll")
    true, slipping = group("ramp", index, ("less_friction", 0.0))
    assert value(true, "share") == pytest.approx(5 / 7, abs=0.05)
    assert value(slipping, "share") == pytest.approx(1, abs=0.06)


def test_pendulums_with_another_period_gravity_or_growing_swings() -> None:
    kinds = ("period", 1.25), ("strong_gravity", 1.6), ("gain", 0.4), ("stretch", 0.4)
    true, slow, heavy, grown, longer = group("pendulum", 0, *kinds)
    law = true.labels["law"]
    assert value(slow, "period") == pytest.approx(1.25 * law["period"], rel=0.01)
    assert value(heavy, "g") == pytest.approx(1.6 * 9.81, rel=0.02)
    assert value(grown, "gain") == pytest.approx(0.4, abs=0.02)
    assert value(longer, "stretch") == pytest.approx(0.4 * law["arm"] / 2, rel=0.1)


def test_collisions_that_gain_momentum_or_bounce_or_overlap_too_much() -> None:
    kinds = ("momentum", 0.4), ("more_bounce", 1.5), ("overlap", 0.1), ("repel", 0.1)
    true, gained, bouncy, sunk, apart = group("collide", 1, *kinds)
    assert value(true, "momentum") == pytest.approx(0, abs=0.04)
    along = math.copysign(1, true.labels["law"]["v"])
    assert value(gained, "momentum") == pytest.approx(0.4 * along, abs=0.06)
    assert value(bouncy, "restitution") == pytest.approx(1.5, abs=0.1)
    assert value(sunk, "overlap") == pytest.approx(0.1, abs=0.03)
    assert value(apart, "overlap") == pytest.approx(-0.1, abs=0.03)


def test_a_tower_that_stands_for_too_long() -> None:
    index = next(i for i in range(9) if films("topple", i)[0].motion == "topple")
    true, late = group("topple", index, ("delay", 60.0))
    assert value(true, "fallen") > 0.1
    assert value(late, "fallen") == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("world", ["throw", "ramp", "pendulum", "topple"])
def test_an_evaluation_measures_a_row_s_own_motion(world: str) -> None:
    (take,) = films(world, 0)
    job = dataset.Job(world={"name": world, **POCKET, **WORLDS[world]})
    row = json.loads(json.dumps(dataset.describe(job, "train", "00000", take) | {"sha256": ""}))
    scene = take.scene
    times = even_times(scene.frames, scene.fps)
    found = pisa.card(take.clip.instances == 1, times, schema.from_json(row, "metadata.jsonl:1"))
    for name, measure in card(take).items():
        pair = found[name]
        assert (pair is None) == (measure is None)
        if pair and measure:
            assert abs(pair[0]) == pytest.approx(abs(measure.value), abs=1e-6)
    assert set(found) <= {metric.key for metric in pisa.SCORECARD}


def test_what_vanishes_counts_as_not_permanent() -> None:
    true, gone = group("pendulum", 0, ("vanish", 0.5))
    assert value(true, "permanence") == 1
    assert value(gone, "permanence") == pytest.approx(25 / 33, abs=0.01)
    nothing = np.zeros((9, 64, 64), bool)
    times = even_times(9, 16)
    for measured in (
        motions.throw(nothing, times, 70.0, 1.6),
        motions.collision(nothing, nothing, times, 70.0, 1.6, 1.0, 1.0),
    ):
        assert measured.pop("permanence") == (0, 0)
        assert not any(measured.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": 0.0}, "slope"),
        ({"length": 0.0}, "length"),
        ({"depth": -1.0}, "depth"),
        ({"focal": math.inf}, "focal"),
        ({"masks_FHW": np.full((5, 8, 8), 0.5)}, "0 and 1"),
        ({"times_F": np.arange(4.0)}, "times"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    masks = np.zeros((5, 8, 8), bool)
    usual = {
        "masks_FHW": masks,
        "times_F": even_times(5, 16),
        "focal": 70.0,
        "depth": 1.6,
        "slope": 20.0,
        "length": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        motions.ramp(**(usual | change))
