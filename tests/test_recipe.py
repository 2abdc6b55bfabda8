"""Recipes: typed, strict, and with errors that name the line and the remedy."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

import sim.cli
from posttrain import cli
from posttrain.commands.experiment import Recipe as Experiment
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line", "code", "field"),
    [
        ("clips:", "clps:", 4, "unknown_key", "data.clps"),
        ("run:", "rnu:", 2, "unknown_key", "rnu"),
        ("shift:", "shfit:", 6, "unknown_key", "method.shfit"),
        ("limit: 3", "zzz: 3", 5, "unknown_key", "data.zzz"),
        ("limit: 3", "limit: some", 5, "value", "data.limit"),
        ("limit: 3", "limit: 0", 5, "value", "data.limit"),
        ("limit: 3", "limit: 2.5", 5, "value", "data.limit"),
        ("limit: 3", "limit: 1e300", 5, "value", "data.limit"),
        ("limit: 3", "limit: " + "9" * 30, 5, "format", ""),
        ("data/drops", "7", 4, "value", "data.clips"),
        ("shift: 2.0", "shift: far", 6, "value", "method.shift"),
        ("shift: 2.0", "shift: .nan", 6, "value", "method.shift"),
        ("shift: 2.0", "shift: -.inf", 6, "value", "method.shift"),
        ("shift: 2.0", "shift: 1e999", 6, "value", "method.shift"),
        ("shift: 2.0", "1: 2.0", 6, "value", "method.1"),
        ("shift: 2.0", "self: 2.0", 6, "unknown_key", "method.self"),
        ("name: psft", "name: pstf", 6, "unknown_name", "method"),
        ("name: psft", "name: base", 6, "unknown_name", "method"),
        ("name: psft, ", "", 6, "required", "method"),
        ("{name: psft, shift: 2.0}", "{}", 6, "required", "method"),
        ("name: psft", "name: [psft]", 6, "required", "method"),
        ("run: try\n", "", 2, "required", "run"),
        ("run: try", "run: try\nrun: two", 3, "duplicate", "run"),
        ("{train: 4}", "{train: 4", 8, "format", ""),
        ("{train: 4}", "{train: many}", 7, "value", "splits.train"),
        ("{train: 4}", "!!python/name:os.system", 7, "format", ""),
        ("{train: 4}", "2026-13-01", None, "format", ""),
        ("{train: 4}", "!!timestamp x", None, "format", ""),
        ("{train: 4}", "!!bool x", None, "format", ""),
        ("{train: 4}", "!!int ''", None, "format", ""),
        ("{train: 4}", "a\x07b", None, "format", ""),
        ("{train: 4}", "{[a]: 1}", 7, "format", ""),
        ("{train: 4}", "&self [*self]", None, "format", ""),
        ("{train: 4}", "[" * 5000, None, "format", ""),
    ],
)  # fmt: skip
def test_a_mistake_names_its_line_and_its_key(path, old, new, line, code, field):
    assert old in TEXT
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError) as raised:
        load(path, [], Recipe)
    assert (raised.value.code, raised.value.field) == (code, field)
    assert str(raised.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_mistake_is_answered_with_what_was_meant(path):
    for override, near in (("data.lmit=3", "'limit'"), ("rnu=x", "'run'"), ("method.name=pstf", "'psft'")):
        with pytest.raises(UserError, match=near):
            load(path, [override], Recipe)


@pytest.mark.parametrize(
    ("override", "code", "field"),
    [
        ("data.lmit=3", "unknown_key", "data.lmit"),
        ("data={clips: a, lmit: 2}", "unknown_key", "data.lmit"),
        ("data={clips: a, clips: b}", "duplicate", "data.clips"),
        ("data.limit=x", "value", "data.limit"),
        ("data=3", "value", "data"),
        ("run.name=x", "value", "run"),
        ("run", "value", ""),
        ("run={", "format", "run"),
        ("run=!!timestamp x", "format", "run"),
        ("method.shift=nan", "value", "method.shift"),
        ("method={shift: 3}", "required", "method"),
        ("lr=" + "9" * 30, "format", "lr"),
    ],
)
def test_a_mistaken_override_is_named(path, override, code, field):
    with pytest.raises(UserError) as raised:
        load(path, [override], Recipe)
    assert (raised.value.code, raised.value.field) == (code, field)
    assert str(raised.value).startswith(f"{override}: ")


def test_a_number_may_be_written_with_an_exponent(path):
    """1e3 is a whole number, and the text "1e3" stays one in the resolved recipe."""
    plan = load(path, ["data.limit=1e3", "lr=1e-4", "run='1e3'"], Recipe)
    assert (plan.data.limit, plan.lr, plan.run) == (1000, 1e-4, "1e3")
    path.write_text(dump(plan))
    assert load(path, [], Recipe) == plan


def test_a_recipe_is_bounded(path):
    """Nested anchors that stand for 9^6 values, and much text, are refused at once; what is echoed is short."""
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 6))
    for text in (TEXT + bomb, TEXT + "# long\n" * 200_000):
        path.write_text(text)
        with pytest.raises(UserError) as raised:
            load(path, [], Recipe)
        assert raised.value.code == "format"
    path.write_text(TEXT)
    for override in ("lr=" + "x" * 1000, "run=[" + "1, " * 1000 + "]", "data.limit=[" + "\x1b]2;x" * 200 + "]"):
        with pytest.raises(UserError) as raised:
            load(path, [override], Recipe)
        assert len(str(raised.value)) < 300
        assert str(raised.value).isprintable()


def test_runs_of_a_sweep_have_folders_of_their_own(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "pocket" / "psft_sizes.yaml"
    for sweep, code in (
        ("{data.clips: [a/b, a-b]}", "duplicate"),
        ("{data.limit: [1, '1']}", "duplicate"),
        ("{data.clips: [..]}", "value"),
        ("{data.clips: ['']}", "value"),
        ("{data.limit: []}", "value"),
    ):
        with pytest.raises(UserError) as raised:
            load(recipe, [f"sweep={sweep}"], Experiment)
        assert (raised.value.code, raised.value.field.partition(".")[0]) == (code, "sweep")
    table = "{rows: {a: {data.limit: 3}}, seeds: [1, 1]}"
    with pytest.raises(UserError) as raised:
        load(recipe, ["sweep=null", f"table={table}"], Experiment)
    assert (raised.value.code, raised.value.field) == ("duplicate", "table.seeds")


def test_a_recipe_that_is_not_there(tmp_path, path):
    with pytest.raises(UserError, match=r"y\.yaml: .*x\.yaml"):
        load(tmp_path / "y.yaml", [], Recipe)
    for wrong in (tmp_path / "nowhere" / "y.yaml", tmp_path, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(UserError) as raised:
            load(wrong, [], Recipe)
        assert raised.value.code == "missing"
    for content in (b"- a\n- b\n", b"", b"run: \xe4\n", b"!!set {a, b}"):
        path.write_bytes(content)
        with pytest.raises(UserError) as raised:
            load(path, [], Recipe)
        assert raised.value.code == "format"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(TEXT, encoding=encoding)
        assert load(path, [], Recipe).run == "try"


def test_a_name_leads_to_a_module_of_its_package():
    assert resolve("methods", "psft").__name__ == "posttrain.methods.psft"
    assert resolve("sim.worlds", "drop").__name__ == "sim.worlds.drop"
    with pytest.raises(UserError, match="'wan'") as raised:
        resolve("models", "wam")
    assert raised.value.code == "unknown_name"


def posttrain(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[Any]":
    command = [sys.executable, "-m", "posttrain", *arguments]
    root = str(Path(__file__).parent.parent)
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_line_says_a_mistake_in_one_line(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "pocket" / "psft.yaml"
    done = posttrain("run", str(recipe), "train.stpes=3", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "train.stpes=3: train.stpes: unknown key, did you mean 'steps'? [unknown_key]\n"
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
    assert capsys.readouterr().err == f"{words[-1]}: {key}: unknown key, did you mean {meant!r}? [unknown_key]\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (o, v)
        for o in ("--fps", "--guidance", "--scale", "--seed", "--steps")
        for v in ("nan", "-inf", "1e999", "9" * 400)
    ]
    + [("--fps", "0"), ("--fps", "-16"), ("--seed", "-1"), ("--frames", "0"), ("--height", "x" * 1000)],
)
def test_a_number_that_is_none_ends_the_command(capsys, option, value):
    with pytest.raises(SystemExit) as raised:
        cli.main(["sample", "pocket", "--prompt", "a", option, value])
    assert raised.value.code == 2
    assert all(len(line) < 400 for line in capsys.readouterr().err.splitlines())


def test_a_name_that_is_too_long_is_one_line(capsys):
    assert cli.main(["train", "x" * 300]) == 1
    assert capsys.readouterr().err.endswith(" [missing]\n")


@pytest.mark.parametrize("words", [["export", "x.yaml", "--chekc"], ["bench", "lr=3"]])
def test_what_no_command_takes_is_refused(capsys, words):
    with pytest.raises(SystemExit) as raised:
        cli.main(words)
    assert raised.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err
