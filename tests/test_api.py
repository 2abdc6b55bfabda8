"""The Python API: light to import, typed, and what docs/examples does with it, at tiny size."""

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
from helpers.falling import write_dataset
from helpers.project import ROOT
from helpers.tiny import wan_folder

import posttrain
import posttrain.api
import posttrain.rewards
import sim
import sim.api
from posttrain.core import files
from sim.assets import surfaces

EXAMPLES = ROOT / "docs" / "examples"
TINY = ["model.path=wan", "data.make=null", "data.clips=drops", "train.steps=1", "train.batch=1"]
MEASURED = ["eval.clips=drops", "eval.every=0", "eval.seeds=1", "eval.limit=1", "eval.sampler.steps=1"]
UNMEASURED = ["eval=null", "tripwires=null"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a few clips, and no recipe: those of the package are used."""
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    write_dataset(path / "drops", ["train", "test_seen", "test_unseen"], clips=2, frames=5)
    return path


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def lines(name: str) -> int:
    return sum(bool(line.strip()) for line in (EXAMPLES / f"{name}.py").read_text().splitlines())


@pytest.mark.slow
def test_imports_are_light() -> None:
    code = "import sys, posttrain, sim; posttrain.UserError; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pydantic", "yaml", "pybullet", "posttrain.api", "sim.api"} & set(loaded)


@pytest.mark.parametrize("package", [posttrain, sim])
def test_what_is_offered_is_there(package: ModuleType) -> None:
    api = importlib.import_module(f"{package.__name__}.api")
    assert all(getattr(package, name) is getattr(api, name) for name in package.__all__)
    assert (Path(str(package.__file__)).parent / "py.typed").is_file()
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_the_colours_are_those_of_the_surfaces() -> None:
    assert get_args(sim.api.Color) == (*surfaces.HUES, *sim.api.GREYS)


def test_a_scene_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(tmp_path):
        module = example("scene_by_hand")
    assert posttrain.read_video(tmp_path / "fall.mp4").shape == (33, 64, 64, 3)
    assert module.scene.bodies[0].position[2] == pytest.approx(0.8 + 0.15, abs=1e-3)
    falls = float(capsys.readouterr().out.split()[-2])
    assert falls == pytest.approx((2 * 0.8 / 9.81) ** 0.5, abs=5e-4)
    still_3 = np.ptp(module.trajectory.positions_TN3[:, 1], axis=0)  # a pile waits at rest
    assert still_3.max() < 1e-3
    assert {0, 1, 2} == set(np.unique(module.clip.instances))
    assert lines("scene_by_hand") <= 15


@pytest.mark.slow
def test_psft_in_thirty_lines(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.chdir(home):
        example("psft").main(*TINY, *MEASURED)
    out = capsys.readouterr().out
    assert "psft unseen L2" in out
    assert "cone-falls-s1-psft.mp4" in out
    for name in ("README.md", "my-psft_comfyui.safetensors", "pytorch_lora_weights.safetensors"):
        assert (home / "runs" / "my-psft" / "adapter" / name).is_file()
    assert lines("psft") <= 30


@pytest.mark.slow
def test_a_new_reward(home: Path) -> None:
    known = list(posttrain.rewards.__path__)
    try:
        with contextlib.chdir(home):
            folder = home / example("new_reward").main(*TINY, *UNMEASURED, "model.start=null", "method.frames=5")
    finally:
        posttrain.rewards.__path__[:] = known
    [row] = files.read_jsonl(folder / "log.jsonl")
    assert -2 <= row["reward_still"] <= 0


@pytest.mark.slow
def test_scores_of_a_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = home / "videos"
    videos.mkdir()
    for path in (home / "drops" / "test_unseen").glob("*.mp4"):
        (videos / f"{path.stem}-s0.mp4").write_bytes(path.read_bytes())
    with contextlib.chdir(home):
        example("score_folder").main("videos", "drops", "test_unseen")
        said = capsys.readouterr().out
        rows = posttrain.evaluate_videos(home / "drops", {"mine": home / "drops"}, output="out")
    assert said.count("physics") == 2
    assert {row["file_name"] for row in files.read_jsonl(videos / "scores.jsonl")} == {"00000-s0.mp4", "00001-s0.mp4"}
    assert {(row["model"], row["split"]) for row in rows} >= {("mine", "unseen"), ("mine", "seen")}
    assert (home / "out" / "report.html").is_file()
    assert capsys.readouterr().out == ""  # tables are printed where they are asked for


UNKNOWN: Any = "unknown"
REFUSED: list[tuple[Any, str, str]] = [
    (lambda: posttrain.load_recipe("recipes/pocket/psft.yaml", "train.stps=3"), "unknown_key", "train.stps"),
    (lambda: posttrain.load_recipe("recipes/pocket/none.yaml"), "missing", ""),
    (lambda: posttrain.sample("pocket", "a ball falls.", np.zeros((8, 8, 3))), "value", "image"),
    (lambda: posttrain.sample("pocket", "a ball falls.", steps=0), "value", "steps"),
    (lambda: posttrain.sample("pocket", "a ball falls.", seeds=[-1]), "value", "seeds"),
    (lambda: posttrain.export("runs/x", formats=["zip"]), "unknown_name", "export"),
    (lambda: posttrain.score("x", UNKNOWN), "unknown_name", "--judge"),
    (lambda: sim.make_body("cloud"), "unknown_name", "shape"),
    (lambda: sim.make_body(color=UNKNOWN), "unknown_name", "color"),
    (lambda: sim.make_body(size=0), "value", "size"),
    (lambda: sim.make_scene([]), "value", "target"),
    (lambda: sim.film(UNKNOWN, UNKNOWN, renderer="eye"), "unknown_name", ""),
    (lambda: sim.write_video("x.mp4", np.zeros((2, 8, 8, 3)), 16), "value", "rgb"),
]


@pytest.mark.parametrize(("call", "code", "field"), REFUSED)
def test_what_is_wrong_has_a_code_and_a_field(call: Any, code: str, field: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(posttrain.UserError) as error:
        call()
    assert (error.value.code, error.value.field) == (code, field)


def test_a_recipe_that_was_loaded_takes_no_overrides(tmp_path: Path) -> None:
    recipe = posttrain.load_recipe("recipes/pocket/psft.yaml")
    with contextlib.chdir(tmp_path), pytest.raises(posttrain.UserError) as error:
        posttrain.train(recipe, "train.steps=3")
    assert error.value.code == "conflict"
    assert not list(tmp_path.iterdir())  # loading writes nothing


def test_a_shipped_recipe_gives_way_to_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "pocket" / "psft.yaml"
    with contextlib.chdir(tmp_path):
        recipe = posttrain.load_recipe("recipes/pocket/psft.yaml")
        assert recipe == posttrain.load_recipe(posttrain.RECIPES / "pocket" / "psft.yaml")
        path.parent.mkdir(parents=True)
        path.write_text((posttrain.RECIPES / "pocket" / "psft.yaml").read_text().replace("pocket-psft", "own"))
        assert (recipe.run, posttrain.load_recipe("recipes/pocket/psft.yaml").run) == ("pocket-psft", "own")
        with pytest.raises(posttrain.UserError):
            posttrain.load_recipe("recipes/../api.py")


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.rglob("*.py")))
def test_the_page_shows_the_examples_as_they_are(name: str) -> None:
    [path] = EXAMPLES.rglob(name)
    assert f"```python\n{path.read_text()}```" in (ROOT / "docs" / "python.md").read_text()
