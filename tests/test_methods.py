"""What a method is: all that there are, and the one that CONTRIBUTING.md adds."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.falling import write_dataset
from helpers.tiny import wan_folder

import posttrain.methods
from posttrain import cli
from posttrain.core.files import read_jsonl
from posttrain.core.recipe import Plugin, plugins, resolve
from posttrain.methods.base import method_of, sampler
from posttrain.training.run import Run

ROOT = Path(__file__).parent.parent
RECIPE: dict[str, Any] = {
    "model": {"path": "wan", "adapter": {"rank": 2}},
    "data": {"clips": "drops"},
    "train": {"steps": 4, "batch": 2, "lr": 0.01, "checkpoint_every": 1},
}
PSFT = {"name": "psft", "timesteps": "uniform", "shift": 1.0}  # what the example is with power 2


def named(name: str, **settings: Any) -> Plugin:
    module = resolve(("methods", "pretraining"), name)
    return Plugin(name, module, module.Config(**settings))


def test_methods_train_what_there_is() -> None:
    trained = {name: method_of(named(name)).TRAINS for name in plugins("pretraining")}
    assert trained == {
        "depth_net": ("depth",),
        "flow_net": ("raft",),
        "segmenter": ("tracker", "sam2"),
        "vae": ("vae", "opensora_vae"),
    }
    assert {name for names in trained.values() for name in names} <= set(plugins("nets"))
    assert {"gdpo", "oro", "psft"} <= set(plugins("methods"))
    rewards = [{"name": "object"}, {"name": "flow"}]
    parts = [named("gdpo"), named("oro", rewards=rewards), named("psft")]
    assert [method_of(part).TRAINS for part in parts] == ["video"] * 3
    assert [method_of(part).GROUPS for part in parts] == [True, False, False]
    assert [[r.name for r in method_of(p).rewards(p.config)] for p in parts] == [[], ["object", "flow"], []]
    assert [sampler(part.config) is None for part in parts] == [True, False, True]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, a few clips, and CONTRIBUTING's file as the method `power`."""
    home = tmp_path_factory.mktemp("home")
    wan_folder(home / "wan")
    write_dataset(home / "drops", ["train"], clips=3, frames=5)
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## A new method\n")[1].split("\n## ")[0]
    lies, line = re.findall(r"`(posttrain/methods/<name>\.py|method: \{.*?\})`", section)[:2]
    assert lies == "posttrain/methods/<name>.py"
    (home / "methods").mkdir()
    (home / "methods" / "power.py").write_text(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0])
    (home / "psft.yaml").write_text(yaml.safe_dump({**RECIPE, "run": "psft", "method": PSFT}))
    lines = line.replace("<name>", "power").replace("1.0", "2.0")
    (home / "power.yaml").write_text(yaml.safe_dump({**RECIPE, "run": "power"}) + lines)
    posttrain.methods.__path__.append(str(home / "methods"))
    importlib.invalidate_caches()
    yield home
    posttrain.methods.__path__.remove(str(home / "methods"))
    del sys.modules["posttrain.methods.power"], posttrain.methods.power


def command(home: Path, *words: str) -> None:
    with contextlib.chdir(home):
        assert cli.main(words) == 0


@pytest.mark.slow
def test_adding_a_method_is_one_file_and_one_line(home: Path) -> None:
    """With power 2 it is PSFT at times drawn evenly."""
    logs = []
    for name in ("power", "psft"):
        command(home, "train", f"{name}.yaml")
        assert (home / "runs" / name / "adapter" / "pytorch_lora_weights.safetensors").is_file()
        logs.append([row["loss"] for row in read_jsonl(home / "runs" / name / "log.jsonl")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert len(set(logs[0])) == 4


@pytest.mark.slow
def test_the_dry_run_and_the_recipe_know_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for name in ("power", "psft"):
        with contextlib.chdir(home):
            cli.main(["doctor", f"{name}.yaml"])
        lines += [line for line in capsys.readouterr().out.splitlines() if " recipe " in line]
    assert lines[0].partition("(")[0] == lines[1].partition("(")[0]
    assert "2 clips at once of 5 x 32 x 32" in lines[0]
    with contextlib.chdir(home):
        assert cli.main(["train", "power.yaml", "method.pover=1", "run=other"]) == 1
    assert "method.pover" in capsys.readouterr().err


def test_the_example_of_rollouts_calls_what_there_is() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## A new method\n")[1].split("\n## ")[0]
    used = set(re.findall(r"run\.(\w+)\(", section))
    assert used == {"batches", "rollouts", "step"}
    assert all(callable(getattr(Run, name)) for name in used)
