"""Recipes: typed, strict, and with errors that name the line and the remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

import sim.cli
from posttrain import cli
from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, PluginFrom, Strict, dump, load, resolve


class Data(Strict):
    clips: str | list[str]
    limit: int | None = Field(None, ge=1)


class Recipe(Strict):
    run: str
    data: Data
    method: Annotated[Plugin, PluginFrom("methods")]
    lr: float = 1e-3
    extra: Data | None = None
    splits: dict[str, int] = Field(default_factory=dict)


TEXT = """\
# a comment
run: try
data:
  clips: data/drops
  limit: 3
method: {name: psft, shift: 2.0}
splits: {train: 4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(TEXT)
    return file


def test_values_are_typed_and_a_name_is_a_file(path):
    plan = load(path, [], Recipe)
    assert plan.data == Data(clips="data/drops", limit=3)
    assert plan.method.module.__name__ == "posttrain.methods.psft"
    assert plan.method.config == plan.method.module.Config(shift=2.0)
    with pytest.raises(ValueError, match="frozen"):
        plan.run = "other"


def test_overrides_win_and_may_add_or_remove(path):
    plan = load(path, ["data.limit=null", "method.shift=5", "extra.clips=[a, b]", "lr=1e-2", "splits.test=2"], Recipe)
    assert plan.data.limit is None
    assert plan.method.config.shift == 5
    assert plan.extra == Data(clips=["a", "b"])
    assert plan.lr == 0.01
    assert plan.splits == {"train": 4, "test": 2}


def test_the_resolved_recipe_reads_back_to_the_same(path):
    plan = load(path, ["lr=3e-5", "extra.clips=[a, b]"], Recipe)
    path.write_text(dump(plan))
    assert load(path, [], Recipe) == plan


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("clips:", "clps:", "x.yaml:4: data.clps: unknown key, did you mean 'clips'?"),
        ("run:", "rnu:", "x.yaml:2: rnu: unknown key, did you mean 'run'?"),
        ("shift:", "shfit:", "x.yaml:6: method.shfit: unknown key, did you mean 'shift'?"),
        ("limit: 3", "zzz: 3", "x.yaml:5: data.zzz: unknown key, choose from: clips, limit"),
        ("limit: 3", "limit: some", "x.yaml:5: data.limit: input should be a valid integer, unable to parse string"),
        ("limit: 3", "limit: 0", "x.yaml:5: data.limit: input should be greater than or equal to 1, not 0"),
        ("data/drops", "7", "x.yaml:4: data.clips: input should be a valid string, not 7"),
        ("shift: 2.0", "shift: far", "x.yaml:6: method.shift: input should be a valid number"),
        ("name: psft", "name: pstf", "x.yaml:6: method: posttrain/methods: has no 'pstf', did you mean 'psft'?"),
        ("name: psft, ", "", "x.yaml:6: method: should be a mapping with a 'name'"),
        ("run: try\n", "", "x.yaml:2: run: is missing"),
        ("run: try", "run: try\nrun: two", "x.yaml:3: run: stands here twice; keep one"),
        ("{train: 4}", "{train: 4", "x.yaml:8: is not YAML"),
        ("{train: 4}", "{train: many}", "x.yaml:7: splits.train: input should be a valid integer"),
        ("{train: 4}", "!!python/name:os.system", "x.yaml:7: is not YAML"),
        ("{train: 4}", "2026-13-01", "x.yaml: is not YAML"),
        ("{train: 4}", "a\x07b", "x.yaml: is not YAML"),
        ("{train: 4}", "{[a]: 1}", "x.yaml:7: is not YAML"),
        ("{train: 4}", "&self [*self]", "x.yaml: is not YAML"),
    ],
)
def test_a_mistake_names_its_line_and_the_remedy(path, old, new, message):
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        load(path, [], Recipe)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.lmit=3", "data.lmit=3: data.lmit: unknown key, did you mean 'limit'?"),
        ("data={clips: a, lmit: 2}", "data={clips: a, lmit: 2}: data.lmit: unknown key, did you mean 'limit'?"),
        ("data.limit=x", "data.limit=x: data.limit: input should be a valid integer"),
        ("data=3", "data=3: data: should be a mapping, not 3"),
        ("run.name=x", "run.name=x: run is not a mapping"),
        ("run", "run: an override is written key=value, as in train.steps=20"),
        ("run={", "run={: the value is not YAML"),
    ],
)
def test_a_mistaken_override_is_named(path, override, message):
    with pytest.raises(UserError) as raised:
        load(path, [override], Recipe)
    assert str(raised.value).startswith(message)


def test_a_recipe_that_is_not_there(tmp_path, path):
    with pytest.raises(UserError, match=r"y\.yaml: does not exist, did you mean '.*x\.yaml'\?"):
        load(tmp_path / "y.yaml", [], Recipe)
    with pytest.raises(UserError, match=r"nowhere/y\.yaml: does not exist, name a recipe"):
        load(tmp_path / "nowhere" / "y.yaml", [], Recipe)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path, [], Recipe)
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match=r"x\.yaml:1: should be a mapping"):
        load(path, [], Recipe)


def test_a_name_leads_to_a_file_of_its_room():
    assert resolve("methods", "psft").__name__ == "posttrain.methods.psft"
    assert resolve("sim.worlds", "drop").__name__ == "sim.worlds.drop"
    with pytest.raises(UserError, match="posttrain/models: has no 'wam', did you mean 'wan'"):
        resolve("models", "wam")


def posttrain(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[Any]":
    command = [sys.executable, "-m", "posttrain", *arguments]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)


def test_the_command_line_says_a_mistake_in_one_line(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "pocket" / "psft.yaml"
    done = posttrain("run", str(recipe), "train.stpes=3", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "train.stpes=3: train.stpes: unknown key, did you mean 'steps'?\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "words", "meant"),
    [
        (cli.main, ["export", "psft.yaml", "--check", "rum=x"], "run"),
        (cli.main, ["export", "psft.yaml", "run=x", "--check", "rum=x"], "run"),
        (sim.cli.main, ["make", "drop.yaml", "--workers", "2", "sed=1"], "seed"),
    ],
)
def test_overrides_may_follow_options(monkeypatch, capsys, main, words, meant):
    monkeypatch.chdir(Path(__file__).parent.parent / "recipes" / "pocket")
    assert main(words) == 1
    key = words[-1].partition("=")[0]
    assert capsys.readouterr().err == f"{words[-1]}: {key}: unknown key, did you mean {meant!r}?\n"


@pytest.mark.parametrize("words", [["export", "x.yaml", "--chekc"], ["bench", "lr=3"]])
def test_what_no_command_takes_is_refused(capsys, words):
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err
