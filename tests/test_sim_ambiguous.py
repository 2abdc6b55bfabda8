"""The ambiguous set shows one picture of many falls, and the grid all that its camera can see."""

import math
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.worlds import BACKGROUNDS, OBJECTS, POCKET
from pydantic import ValidationError
from scipy.stats import kstest

from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.metrics import distribution, pisa
from sim import dataset, geometry
from sim.physics import bullet
from sim.physics.base import energy_gain
from sim.render import gl, tiny
from sim.scene import Scene, Trajectory
from sim.show import show
from sim.worlds import ambiguous, grid
from sim.worlds.base import Draw, Take

NEAR = POCKET | {"drop": (0.1, 1.2), "camera_height": (0.5, 0.5), "region": (0.7, 0.0), "target_pixels": (10, 30)}
SETTINGS = [{}, {"studio": False, "texture": 1.0}]  # plain, and textures before a wall


def group(index: int, **config) -> list[Scene]:
    settings = ambiguous.Config(**NEAR | config)
    draw = Draw(np.random.default_rng([3, index]), OBJECTS, BACKGROUNDS, index)
    return ambiguous.group(draw, settings, bullet.simulate)


@cache
def groups() -> list[list[tuple[Scene, Trajectory]]]:
    return [[(scene, bullet.simulate(scene)) for scene in group(i)] for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_first_pictures_are_equal_within_a_grey_level(setting: dict) -> None:
    for index in range(3):
        scene = group(index, **setting, drop=(0.6, 1.0))[0]
        scenes = [ambiguous.at(scene, depth) for depth in (2.0, 3.3, 8.0, 18.0)]
        first, *others = (gl.render(scene, bullet.simulate(scene)) for scene in scenes)
        mask_HW = first.instances[0] == 1
        assert mask_HW.sum() > 20
        for depth, other in zip((3.3, 8.0, 18.0), others, strict=True):
            assert np.abs(other.rgb[0].astype(int) - first.rgb[0]).max() <= 1
            assert (other.instances[0] == 1).sum() == mask_HW.sum()
            np.testing.assert_allclose(other.depth[0][mask_HW], first.depth[0][mask_HW] * depth / 2, rtol=1e-5)
            assert np.abs(other.rgb[6].astype(int) - first.rgb[6]).max() > 20  # and then they fall


@pytest.mark.parametrize("renderer", [gl, tiny])
def test_without_shadows_the_floor_does_not_know_of_the_object(renderer) -> None:
    scene = group(0)[0]
    trajectory = bullet.simulate(scene)
    clip = renderer.render(scene, trajectory)
    seen_THW = clip.instances == 1
    wide_THW = seen_THW | np.roll(seen_THW, 1, 1) | np.roll(seen_THW, -1, 1)
    wide_THW |= np.roll(wide_THW, 1, 2) | np.roll(wide_THW, -1, 2)  # edges mix
    for k in (0, -1):
        assert np.ptp(clip.rgb[k][~wide_THW[k]].astype(int), axis=0).max() <= 1  # one colour, as the floor is plain


@pytest.mark.slow
def test_contact_is_when_the_law_says() -> None:
    signs = set()
    for members in groups():
        beta = ambiguous.slope(members[0][0])
        low, high = distribution.drop_heights(beta, 0.5)
        signs.add(math.copysign(1, beta))
        for scene, trajectory in members:
            _, y, height = geometry.lowest(scene.bodies[0])
            depth = y - scene.camera.position[1]
            assert ambiguous.slope(scene) == pytest.approx(beta)
            assert height == pytest.approx(0.5 + beta * depth)
            assert low <= height <= high
            assert trajectory.contacts[0].time == pytest.approx(pisa.drop_time(height), abs=5e-4)
            assert energy_gain(trajectory) <= 0.02
    assert signs == {-1.0, 1.0}


def test_depths_are_uniform_and_end_at_the_floor() -> None:
    shares = []
    for index in range(8):
        scenes = group(index, members=25)
        beta = ambiguous.slope(scenes[0])
        far = min(18.0, -0.5 / beta) if beta < 0 else 18.0
        depths = [geometry.lowest(scene.bodies[0])[1] - scene.camera.position[1] for scene in scenes]
        shares += [(depth - 2) / (far - 2) for depth in depths]
    assert kstest(shares, "uniform").pvalue > 0.01


def test_a_group_is_a_function_of_its_generator() -> None:
    assert group(5) == [scene for scene, _ in groups()[5]]


def test_density_is_kept_and_mass_is_not() -> None:
    scene = group(1)[0]
    (near,), (far,) = (ambiguous.at(scene, depth).bodies for depth in (2.0, 18.0))
    assert far.size == pytest.approx(9 * near.size)
    assert far.mass == pytest.approx(9**3 * near.mass)


@pytest.mark.slow
def test_the_bottom_row_measures_beta() -> None:
    """To some pixels: the outline's lowest edge is seldom as far away as the lowest point."""
    for members in groups():
        scene, trajectory = members[0]
        beta = ambiguous.slope(scene)
        row = geometry.project(scene.camera, geometry.lowest(scene.bodies[0]))[0][1]
        assert distribution.slope(row, 64, 70.0) == pytest.approx(beta)
        rows = distribution.bottoms(gl.render(scene, trajectory).instances[:1] == 1)
        assert distribution.slope(rows[0], 64, 70.0) == pytest.approx(beta, abs=2.5 / 70)


def test_a_folder_of_groups(tmp_path: Path) -> None:
    job = dataset.Job(world={"name": "ambiguous", **NEAR, "members": 3})
    dataset.write(tmp_path / "set", job, {"train": 2}, workers=1)
    rows = read_jsonl(tmp_path / "set" / "train" / "metadata.jsonl")
    assert [row["file_name"] for row in rows] == [f"0000{i}-{j}.mp4" for i in range(2) for j in range(3)]
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1]
    for row in rows:
        assert row["height"] == pytest.approx(row["camera"]["position"][2] + row["beta"] * row["depth"])
        assert row["contact_time"] == pytest.approx(pisa.drop_time(row["height"]), abs=5e-4)
    first = []
    for row in rows[:3]:
        with av.open(str(tmp_path / "set" / "train" / row["file_name"])) as container:
            first.append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    assert (first[0] == first[1]).all()
    assert (first[0] == first[2]).all()
    assert show(tmp_path / "set", None, 1, tmp_path / "page.html").exists()
    words = f"drop from {rows[0]['height']:.2f} m at a depth of {rows[0]['depth']:.2f} m"
    assert words in (tmp_path / "page.html").read_text()


def filmed(index: int, **config) -> Take:
    draw = Draw(np.random.default_rng([4, index]), OBJECTS, BACKGROUNDS, index)
    [take] = grid.takes(draw, grid.Config(**POCKET | config), bullet.simulate, gl.render)
    return take


@pytest.mark.slow
def test_the_grid_tells_depth_and_height_and_whether_training_saw_them() -> None:
    rows = []
    for index in range(16):
        take = filmed(index)
        scene, trajectory, labels = take.scene, take.trajectory, take.labels
        (body,) = scene.bodies
        assert labels["depth"] == pytest.approx(body.position[1] - scene.camera.position[1])
        assert labels["height"] == pytest.approx(geometry.lowest(body)[2])
        assert scene.camera.position[2] == 0.5
        assert trajectory.contacts[0].time == pytest.approx(pisa.drop_time(labels["height"]), abs=5e-4)
        assert labels["id"] == (1 <= labels["depth"] <= 3 and 0.5 <= labels["height"] <= 1.5)
        pixels = geometry.project(scene.camera, geometry.paths(scene, trajectory, 0))[0]
        assert pixels.min() > 0
        assert pixels.max() < 64
        assert (take.clip.instances == 1).any((1, 2)).all()
        rows.append(labels)
    assert {row["id"] for row in rows} == {True, False}
    assert max(row["depth"] for row in rows) > 4
    assert max(row["height"] for row in rows) > 1.5


@pytest.mark.slow
def test_what_cannot_be_filmed_is_refused() -> None:
    for make in (filmed, group):
        with pytest.raises(UserError) as error:
            make(0, contrast=9.0)
        assert (error.value.code, error.value.field) == ("value", "world")
    with pytest.raises(ValidationError, match="Input should be 1"):
        grid.Config(dropped=(1, 2))
