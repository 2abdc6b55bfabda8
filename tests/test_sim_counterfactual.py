"""Known violations: each breaks its law by its value, and all share the true clip's first frame."""

import base64
import itertools
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers.worlds import BACKGROUNDS, OBJECTS, POCKET, body, world
from PIL import Image
from pydantic import ValidationError

from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from sim import dataset, geometry
from sim.bench import bench
from sim.physics import analytic, bullet
from sim.render import gl
from sim.scene import Scene, Trajectory
from sim.show import show
from sim.worlds import counterfactual
from sim.worlds.base import Draw
from sim.worlds.counterfactual import Violation

TIMES = np.arange(33) / 16
HEIGHT = 0.6


def violate(scene: Scene, true: Trajectory, violation: Violation) -> Trajectory:
    return counterfactual.violate(scene, true, violation, bullet.simulate)


def group(key: int, index: int, config: counterfactual.Config) -> tuple[Scene, Trajectory, list[Violation]]:
    draw = Draw(np.random.default_rng([key, index]), OBJECTS, BACKGROUNDS, index)
    return counterfactual.group(draw, config, bullet.simulate)


@pytest.fixture(scope="module")
def ball() -> tuple[Scene, Trajectory]:
    """A ball that keeps half of its speed at a bounce."""
    scene = world(body("ball/00", HEIGHT, restitution=0.5))
    return scene, bullet.simulate(scene)


def lowest(scene: Scene, trajectory: Trajectory) -> np.ndarray:
    """Heights of the target's lowest point over time, metres."""
    return trajectory.positions_TN3[:, 0, 2] - scene.bodies[0].size / 2


@pytest.mark.parametrize(("kind", "value"), [("weak_gravity", 0.3), ("strong_gravity", 2.0)])
def test_gravity_is_scaled(ball: tuple[Scene, Trajectory], kind: str, value: float) -> None:
    wrong = violate(*ball, Violation(kind, value))
    fall = analytic.Fall(HEIGHT, gravity=9.81 * value)
    before = fall.contacts(9.0)[0] > TIMES
    np.testing.assert_allclose(lowest(ball[0], wrong)[before], fall.at(TIMES)[0][before], atol=1e-3)
    assert wrong.contacts[0].time == pytest.approx(fall.contacts(9.0)[0], abs=5e-4)


def test_gravity_sideways_and_up(ball: tuple[Scene, Trajectory]) -> None:
    tilted = violate(*ball, Violation("sideways_gravity", 30.0))
    x_T, z_T = tilted.positions_TN3[:6, 0, 0], tilted.positions_TN3[:6, 0, 2]
    np.testing.assert_allclose(x_T - x_T[0], 9.81 * 0.5 * TIMES[:6] ** 2 / 2, atol=1e-3)  # sin 30
    np.testing.assert_allclose(z_T[0] - z_T, 9.81 * 0.75**0.5 * TIMES[:6] ** 2 / 2, atol=1e-3)
    up = lowest(ball[0], violate(*ball, Violation("upward_gravity", 0.5)))
    np.testing.assert_allclose(up, HEIGHT + 9.81 * 0.5 * TIMES**2 / 2, atol=1e-3)


def test_it_hovers_at_the_share_of_its_fall(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    for value in (0.25, 1.0):
        heights = lowest(scene, violate(scene, true, Violation("hover", value)))
        np.testing.assert_allclose(heights[8:], value * HEIGHT, atol=2e-3)
    assert np.ptp(heights) == 0


def test_a_release_is_late_by_its_seconds(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    late = violate(scene, true, Violation("delay", 0.25))
    assert (late.positions_TN3[:5] == true.positions_TN3[0]).all()
    assert (late.positions_TN3[4:] == true.positions_TN3[:-4]).all()
    assert late.contacts[0].time == pytest.approx(true.contacts[0].time + 0.25)


def test_it_lands_below_the_floor(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    for depth in (0.05, 0.4):
        sunk = violate(replace(scene, frames=65), true, Violation("tunnel_floor", depth))
        assert lowest(scene, sunk)[-1] == pytest.approx(-depth, abs=6e-3)
        assert sunk.contacts[0].time == pytest.approx(analytic.fall_time(HEIGHT + depth), abs=5e-4)


def test_it_sinks_into_the_pile_and_the_pile_does_not_notice() -> None:
    box = replace(body("box/00", 0.0), orientation=(1.0, 0.0, 0.0, 0.0), role="pile")
    box = replace(box, position=(0.0, 0.0, float(-geometry.outline(box)[:, 2].min())))
    top = float(geometry.outline(box)[:, 2].max()) + box.position[2]
    above = replace(body("ball/00", top + 0.5), position=(0.0, 0.0, top + 0.5 + 0.15))
    scene = world(above, box)
    true = bullet.simulate(scene)
    for depth in (0.05, 0.1):
        sunk = violate(scene, true, Violation("tunnel_pile", depth))
        contact = next(c.time for c in sunk.contacts if 0 in (c.a, c.b))
        assert contact == pytest.approx(analytic.fall_time(0.5 + depth), abs=5e-4)
        np.testing.assert_allclose(sunk.positions_TN3[:, 1], np.tile(sunk.positions_TN3[0, 1], (33, 1)), atol=2e-3)


def test_bounces_are_higher_or_lower(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    for kind, value, kept in (("more_bounce", 0.8, 0.8), ("less_bounce", 0.5, 0.25), ("more_bounce", 0.1, 0.5)):
        wrong = violate(scene, true, Violation(kind, value))
        first = wrong.contacts[0].time
        top = lowest(scene, wrong)[(first < TIMES) & (first + 2.2 * kept * first > TIMES)].max()
        assert top == pytest.approx(kept**2 * HEIGHT, rel=0.15, abs=0.01)  # the frames may miss the top


@pytest.mark.parametrize(("kind", "value", "kept"), [("more_bounce", 0.8, 0.8), ("less_bounce", 0.25, 0.125)])
def test_bounces_off_a_pile_change_with_the_targets_own(kind: str, value: float, kept: float) -> None:
    """Restitutions are multiplied: on a heavy box of 1 as on a floor of 1."""
    box = replace(body("box/00", 0.0, restitution=1.0), orientation=(1.0, 0.0, 0.0, 0.0), role="pile", mass=1e4)
    box = replace(box, position=(0.0, 0.0, float(-geometry.outline(box)[:, 2].min())))
    top = float(geometry.outline(box)[:, 2].max()) + box.position[2]
    above = replace(body("ball/00", top + HEIGHT, restitution=0.5), position=(0.0, 0.0, top + HEIGHT + 0.15))
    scene = world(above, box)
    true = bullet.simulate(scene)
    for e, trajectory in ((0.5, true), (kept, violate(scene, true, Violation(kind, value)))):
        first = next(c.time for c in trajectory.contacts if 0 in (c.a, c.b))
        flight = (first < TIMES) & (first + 2.2 * e * first > TIMES)
        rebound = lowest(scene, trajectory)[flight].max() - top
        assert rebound == pytest.approx(e**2 * HEIGHT, rel=0.2, abs=0.02)


def test_energy_comes_from_nowhere(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    for gained in (0.2, 0.6):
        wrong = violate(scene, true, Violation("energy", gained))
        after = lowest(scene, wrong)[6:]
        assert after.max() == pytest.approx(0.25 * HEIGHT + gained, rel=0.08)
        bounced = int(true.contacts[0].time * 240) + 3
        assert wrong.energy[bounced] - true.energy[bounced] == pytest.approx(9.81 * gained, rel=0.02)  # it weighs 1 kg


def test_it_jumps_aside_at_half_the_fall(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    wrong = violate(scene, true, Violation("teleport", 0.3))
    jump = true.contacts[0].time / 2
    before = jump > TIMES
    assert (wrong.positions_TN3[before] == true.positions_TN3[before]).all()
    moved = wrong.positions_TN3[~before, 0] - true.positions_TN3[~before, 0]
    np.testing.assert_allclose(moved[:2], [[0.3, 0.0, 0.0]] * 2, atol=1e-6)


def test_slow_motion_is_the_truth_at_another_rate(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    slow = violate(scene, true, Violation("slow_motion", 0.5))
    before = true.contacts[0].time > TIMES[:17]
    np.testing.assert_allclose(slow.positions_TN3[::2][before], true.positions_TN3[:17][before], atol=1e-5)
    np.testing.assert_allclose(slow.positions_TN3[::2], true.positions_TN3[:17], atol=0.03)  # a step's worth of bounce
    assert slow.contacts[0].time == pytest.approx(2 * true.contacts[0].time, abs=1e-3)
    stopped = violate(scene, true, Violation("slow_motion", 0.0))
    assert (stopped.positions_TN3 == true.positions_TN3[0]).all()


def test_what_vanishes_is_gone_and_what_melts_shrinks(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    truth = gl.render(scene, true)
    areas = truth.instances.astype(bool).sum((1, 2))
    gone = gl.render(scene, violate(scene, true, Violation("vanish", 0.5))).instances.astype(bool).sum((1, 2))
    seen = TIMES <= TIMES[-1] - 0.5
    assert (gone[seen] == areas[seen]).all()
    assert not gone[~seen].any()
    melted = gl.render(scene, violate(scene, true, Violation("melt", 0.5))).instances.astype(bool).sum((1, 2))
    size = 1 - 0.5 * TIMES / TIMES[-1]
    np.testing.assert_allclose(melted, areas * size**2, rtol=0.15, atol=4)


@pytest.mark.slow
def test_the_bench_tells_what_a_group_costs() -> None:
    world = {"name": "counterfactual", **POCKET, "dropped": (1, 1), "pile": (0, 0), "members": 2}
    lines = [line.split(maxsplit=1) for line in bench(dataset.Job(world=world), groups=1).splitlines()]
    seconds = {name: float(number) for number, name in lines}
    assert seconds.keys() > {"a group of 2", "its set-up", "a simulation", "a render", "a write"}
    assert all(number > 0 for number in seconds.values())
    with pytest.raises(UserError) as error:
        bench(dataset.Job(world={"name": "drop"}))
    assert (error.value.code, error.value.field) == ("value", "world.name")


def test_severity_by_hand() -> None:
    true = np.zeros((3, 2, 3))
    true[1:, 0, 2] = -1, -2  # one body falls by 1 m a frame, the other rests: the frozen clip is off by 3 / 6 m
    wrong = true.copy()
    wrong[2, 1, 0] = 0.6
    assert counterfactual.deviation(np.broadcast_to(true[:1], true.shape), true) == pytest.approx(0.5)
    assert counterfactual.deviation(wrong, true) == pytest.approx(0.1)
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[:, :2, :2] = True
    other = masks.copy()
    other[1, 0] = False
    assert counterfactual.mask_deviation(other, masks) == 1.0


def test_the_static_clip_has_severity_1_and_the_true_one_0(ball: tuple[Scene, Trajectory]) -> None:
    scene, true = ball
    clip = gl.render(scene, true)
    still = counterfactual.static(scene, bullet.simulate)
    picture = gl.render(scene, still)
    for kind in ("hover", "melt"):
        assert counterfactual.severity(scene, kind, clip, true, true, clip) == 0
        assert counterfactual.severity(scene, kind, picture, still, true, clip) == pytest.approx(1)


@pytest.mark.slow
def test_a_group_shares_its_first_picture(tmp_path: Path) -> None:
    """Byte for byte, as decoded from the files; and every kind differs from the truth later."""
    values = {kind: (sweep[-1],) for kind, (_, _, sweep) in counterfactual.VIOLATIONS.items()}
    one = POCKET | {"dropped": (1, 1), "pile": (1, 1), "restitution": (0.6, 0.9)}
    job = dataset.Job(world={"name": "counterfactual", **one, "violations": values})
    dataset.write(tmp_path / "groups", job, {"train": 1}, workers=1)
    rows = read_jsonl(tmp_path / "groups" / "train" / "metadata.jsonl")
    assert [row["file_name"] for row in rows] == [f"00000-{i}.mp4" for i in range(1 + len(values))]
    assert {row["group"] for row in rows} == {0}
    assert rows[0]["violation"] is None
    assert [row["violation"]["kind"] for row in rows[1:]] == list(values)
    videos = []
    for row in rows:
        with av.open(str(tmp_path / "groups" / "train" / row["file_name"])) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    for row, video in zip(rows[1:], videos[1:], strict=True):
        assert (video[0] == videos[0][0]).all(), row["violation"]
        assert (video != videos[0]).any(), row["violation"]
        assert 0 < row["violation"]["severity"] <= 1
        assert row["caption"] == rows[0]["caption"]
        assert row["drop_height"] == rows[0]["drop_height"]  # what is true, however it falls here

    for output in ("sheet.png", "page.html"):
        assert show(tmp_path / "groups", None, 1, tmp_path / output).exists()
    assert Image.open(tmp_path / "sheet.png").size == (8 * 128, len(rows) * (128 + 14))
    page = (tmp_path / "page.html").read_text()
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"><figcaption>([^<]+)', page)
    assert [words for _, words in pictures][:2] == ["true", f"weak gravity 0.2 of g, severity {severity(rows[1])}"]
    assert Image.open(BytesIO(base64.b64decode(pictures[0][0]))).n_frames > 10  # equal ones are one


def severity(row: dict[str, Any]) -> str:
    return f"{row['violation']['severity']:.2f}"


def test_groups_are_drawn(tmp_path: Path) -> None:
    config = counterfactual.Config(**POCKET, dropped=(1, 1), pile=(0, 0), members=4)
    names = []
    for index in range(3):
        _, _, violations = group(5, index, config)
        assert len(violations) == 3
        assert not any(violation.kind == "tunnel_pile" for violation in violations)  # there is none
        names.append([(violation.kind, violation.value) for violation in violations])
    assert len({str(name) for name in names}) == 3


@pytest.mark.slow
def test_severity_does_not_fall_as_the_knob_grows() -> None:
    """Of one scene it may, as bounces are chaotic; the mean over scenes may not (docs/log has all kinds)."""
    config = counterfactual.Config(**POCKET, dropped=(1, 1), pile=(0, 1), drop=(0.5, 0.8), restitution=(0.6, 0.9))
    severities: dict[str, dict[float, list[float]]] = {}
    for index in range(8):
        scene, true, violations = group(9, index, config)
        most = counterfactual.deviation(true.positions_TN3[:1], true.positions_TN3)
        for violation in violations:
            if violation.kind in ("delay", "hover", "slow_motion", "tunnel_floor", "sideways_gravity"):
                wrong = violate(scene, true, violation)
                off = counterfactual.deviation(wrong.positions_TN3, true.positions_TN3) / most
                severities.setdefault(violation.kind, {}).setdefault(violation.value, []).append(min(1.0, off))
    for kind, values in severities.items():
        means = [float(np.mean(v)) for v in values.values()]
        assert all(b > a - 0.02 for a, b in itertools.pairwise(means)), (kind, means)


@pytest.mark.parametrize(
    ("violations", "line"),
    [
        ({"flying": (1.0,)}, "no violation is called flying; choose from weak_gravity"),
        ({"hover": (1.5,)}, "hover is 1.5, not 0 to 1 of the fall missing"),
        ({"strong_gravity": (0.5,)}, "strong_gravity is 0.5, not 1 to 20 of g"),
        ({"delay": (-1.0,)}, "delay is -1, not 0 to 60 s until the release"),
    ],
)
def test_what_cannot_be_broken_so_is_refused(violations: dict[str, tuple[float, ...]], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        counterfactual.Config(violations=violations)
