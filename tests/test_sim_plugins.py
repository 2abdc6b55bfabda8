"""Every renderer, engine and world keeps the laws of its kind, and so do new ones that CONTRIBUTING.md adds."""

import importlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sim_laws import ENGINE_LAWS, RENDERER_LAWS, WORLD_LAWS, its_clips_can_be_written

from posttrain.core import recipe
from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, plugins
from sim import cli, dataset, geometry

ROOT = Path(__file__).parent.parent
RECIPE = """
out: clips
world: {name: drop, width: 64, height: 64, frames: 9, dropped: [1, 1], pile: [0, 0], region: [0.7, 0.0]}
splits: {train: 1}
"""
SMALL = {"width": 64, "height": 64, "frames": 9}
ALONE = {"dropped": (1, 1), "pile": (0, 0), "region": (0.7, 0.0)}
WORLDS: dict[str, dict[str, Any]] = {  # what makes a world's scenes quick; a new one is filmed as it is
    "drop": {"dropped": (1, 2), "pile": (0, 1)},
    "motion": ALONE,
    "counterfactual": ALONE | {"members": 3},
    "throw": {"members": 3},
    "ramp": {"members": 3},
    "pendulum": {"members": 3},
    "collide": {"members": 3, "gap": (0.1, 0.2)},  # they meet within 9 frames
    "topple": {"members": 3},
    "ambiguous": {"members": 2, "drop": (0.5, 1.0), "camera_height": (0.5, 0.5), "region": (0.7, 0.0)},
}


def part(package: str, name: str, **keys: Any) -> Plugin:
    return recipe.PluginFrom(package).parse({"name": name, **keys})


@pytest.mark.parametrize("name", plugins("sim.render"))
@pytest.mark.parametrize("law", RENDERER_LAWS, ids=lambda law: law.__name__)
def test_every_renderer_keeps_the_laws(name: str, law) -> None:
    plugin = part("sim.render", name)
    law(partial(plugin.module.render, config=plugin.config))


@pytest.mark.parametrize("name", plugins("sim.physics"))
@pytest.mark.parametrize("law", ENGINE_LAWS, ids=lambda law: law.__name__)
def test_every_engine_keeps_the_laws(name: str, law) -> None:
    plugin = part("sim.physics", name)
    law(partial(plugin.module.simulate, config=plugin.config))


@pytest.mark.parametrize("name", plugins("sim.worlds"))
@pytest.mark.parametrize("law", WORLD_LAWS, ids=lambda law: law.__name__)
def test_every_world_keeps_the_laws(name: str, law) -> None:
    law(dataset.Job(world={"name": name, **SMALL, **WORLDS.get(name, {})}))


@pytest.mark.parametrize("name", plugins("sim.worlds"))
def test_every_world_s_clips_can_be_written(name: str, tmp_path: Path) -> None:
    its_clips_can_be_written(dataset.Job(world={"name": name, **SMALL, **WORLDS.get(name, {})}), tmp_path)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Plugin]:
    """The file that a section of CONTRIBUTING.md writes, in a folder that belongs to its package for this test."""
    section, package = request.param
    text = (ROOT / "CONTRIBUTING.md").read_text()
    path, code = re.search(
        rf"^##+ {section}\n.*?This one, `([\w/]+\.py)`.*?```python\n(.*?)```", text, re.S | re.M
    ).groups()
    assert Path(path).parent == Path(*package.split("."))
    (tmp_path / Path(path).name).write_text(code)
    monkeypatch.setattr(module := importlib.import_module(package), "__path__", [*module.__path__, str(tmp_path)])
    yield part(package, Path(path).stem)
    monkeypatch.delitem(importlib.sys.modules, f"{package}.{Path(path).stem}")


@pytest.mark.parametrize("example", [("A new renderer", "sim.render")], indirect=True)
def test_the_guide_s_renderer_keeps_the_laws_and_films(example: Plugin, tmp_path: Path) -> None:
    for law in RENDERER_LAWS:
        law(partial(example.module.render, config=example.config))
    films(f"renderer.name={example.name}", tmp_path)


@pytest.mark.parametrize("example", [("A new physics engine", "sim.physics")], indirect=True)
def test_the_guide_s_engine_keeps_the_laws_and_films(example: Plugin, tmp_path: Path) -> None:
    for law in ENGINE_LAWS:
        law(partial(example.module.simulate, config=example.config))
    films(f"physics.name={example.name}", tmp_path)


def films(override: str, folder: Path) -> None:
    """A recipe that names the new plug-in makes clips."""
    (folder / "recipe.yaml").write_text(RECIPE)
    its_clips_can_be_written(recipe.load(folder / "recipe.yaml", [override], cli.Recipe), folder / "clips")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("renderer.name=shaders", "sim/render"),
        ("renderer.name=base", "sim/render"),
        ("physics.name=foo", "sim/physics"),
        ("world.name=dataset", "sim/worlds"),
        ("renderer={name: tiny, supersampel: 2}", "supersampel"),
        ("renderer.supersample=9", "renderer.supersample"),
        ("physics={name: bullet, steps: 3}", "physics.steps"),
        ("world.fps=0", "world.fps"),
        ("world.fps=-16", "world.fps"),
        ("world.fps=.nan", "world.fps"),
        ("world.frames=0", "world.frames"),
        ("world.width=0", "world.width"),
        ("world.height=-3", "world.height"),
        ("world.drop=[1.5,0.5]", "world.drop"),
        ("world.dropped=[3,2]", "world.dropped"),
        ("world.dropped=[0,1]", "world.dropped"),
        ("world.dropped=[1,300]", "255"),  # a mask numbers no more
        ("world.size=[0.001,0.4]", "size"),  # less than a pixel
        ("world.size=[0.3,.inf]", "world.size"),
        ("world.gravity=0", "world.gravity"),
        ("world.restitution=[0.5,1.2]", "world.restitution"),
        ("world={name: drop, restitution: [1, 1], floor_restitution: [1, 1]}", "restitution"),
        ("world.sun=[10,120]", "world.sun"),
        ("world.target_pixels=[24,12]", "world.target_pixels"),
        ("world={name: grid, depth: [0, 1]}", "world.depth"),
        ("world={name: grid, size: [0.001, 0.4]}", "size"),
        ("world={name: ambiguous, depth: [3, 2]}", "world.depth"),
        ("world={name: motion, period: [0, 1]}", "world.period"),
        ("splits={}", "splits"),
        ("splits={../x: 1}", "splits"),
        ("seed=-1", "seed"),
    ],
)
def test_what_cannot_be_filmed_is_one_line_before_anything_is_filmed(
    override: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert cli.main(["make", "recipe.yaml", override]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "clips").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"physics": "analytic", "world": {"name": "drop", "shapes": ("box",)}},
        {"physics": "analytic", "world": {"name": "drop", "shapes": ("ball",), "pile": (1, 1)}},
        {"physics": "analytic", "world": {"name": "counterfactual", "shapes": ("ball",)}},
        {"renderer": "tiny", "world": {"name": "counterfactual", "violations": {"melt": (0.5,)}}},
    ],
    ids=["a box turns", "a pile", "interventions", "melting"],
)
def test_what_a_plugin_cannot_do_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    world = SMALL | ALONE | changes["world"]
    others = {key: {"name": name} for key, name in changes.items() if key != "world"}
    with pytest.raises(UserError) as error:
        list(dataset.takes(dataset.Job(world=world, **others), "train", 0))
    assert error.value.code == "unsupported"
    assert error.value.field in ("physics.name", "renderer.name")
    assert "\n" not in str(error.value)


def test_balls_fall_in_closed_form_as_in_bullet() -> None:
    """The same draws, two engines: the same scene, and the same fall to a millimetre."""
    world = {"name": "drop", **SMALL, **ALONE, "shapes": ("ball",), "frames": 6}
    for index in range(3):
        engines = [{"name": "bullet"}, {"name": "analytic"}]
        one, other = (next(dataset.takes(dataset.Job(world=world, physics=e), "train", index)) for e in engines)
        assert one.scene == other.scene
        landing = other.trajectory.contacts[0].time if other.trajectory.contacts else 1.0
        before = int(landing * 16) + 1
        a, b = (take.trajectory.positions_TN3[:before] for take in (one, other))
        assert abs(a - b).max() < 1e-3


def test_what_is_smaller_than_two_pixels_is_not_filmed() -> None:
    """At 2 to 2.5 m 0.06 m are 2 pixels along the longest side and less along the others: such are drawn again."""
    world = {"name": "grid", **SMALL, "frames": 2, "size": (0.06, 0.1), "depth": (2.0, 2.5), "drop": (0.5, 0.6)}
    for index in range(6):
        take = next(dataset.takes(dataset.Job(world=world), "train", index))
        pixels = geometry.project(take.scene.camera, geometry.paths(take.scene, take.trajectory, 0)[0])[0]
        assert np.sqrt(np.ptp(pixels, axis=0).prod()) >= 2
        assert (take.clip.instances[0] == 1).any()
