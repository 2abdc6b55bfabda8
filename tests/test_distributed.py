"""Two real processes: the numbers of one, DeepSpeed's ZeRO-2 among them, and none that runs alone unasked."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from helpers import ranks
from helpers.falling import write_dataset, write_groups
from helpers.forked import together, two_ranks
from helpers.optional import needs
from helpers.tiny import wan_folder
from safetensors.torch import load_file

from posttrain import cli
from posttrain.core import distributed
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.models import lora

ROOT = Path(__file__).parent.parent
STEPS = 16
RECIPE: dict[str, Any] = {
    "run": "alone",
    "model": {"path": "wan", "adapter": {"rank": 2, "alpha": 4}},
    "data": {"clips": "drops"},
    "method": {"name": "psft"},
    "train": {"steps": STEPS, "batch": 4, "accumulate": 2, "lr": 0.01, "clip": 0.1, "schedule": "cosine", "ema": 0.9},
    "export": ["diffusers"],
}
RECIPE["train"]["checkpoint_every"] = 2
TOLERANCE = 3e-5  # of an adapter's elements, which grow up to 0.15; 4e-6 was measured
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, clips, a recipe, and the run that one process makes of it."""
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    write_dataset(path / "drops", ["train"], clips=3, frames=5)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with contextlib.chdir(path):
        assert cli.main(["run", "recipe.yaml"]) == 0
    return path


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """`python -m COMMAND` in `folder`, with one thread per process."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and all that it said."""
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def launch(home: Path, how: str, run: str) -> subprocess.Popen[str]:
    config = ["--config_file", str(ROOT / "recipes" / "launch" / f"{how}.yaml")]
    return start(home, *ACCELERATE, *config, "-m", "posttrain", "run", "recipe.yaml", f"run={run}")


def posttrain(*command: str) -> None:
    """The command, in a process of its own."""
    raise SystemExit(cli.main(command))


def adapter(home: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(home / "runs" / run / "adapter" / lora.FILE)


def assert_same_training(home: Path, run: str) -> None:
    """The loss of each step, and the adapter, are those of the process alone."""
    for a, b in zip(*(read_jsonl(home / "runs" / name / "log.jsonl") for name in ("alone", run)), strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
    alone, other = adapter(home, "alone"), adapter(home, run)
    assert alone.keys() == other.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert max(tensor.abs().max() for name, tensor in alone.items() if "lora_B" in name) > 1000 * TOLERANCE


KINDS = ("gradients", "rewarded")  # of PSFT, of ORO


@pytest.mark.slow
def test_two_processes_have_the_gradients_and_the_curve_of_one(tmp_path, home):
    together(home, two_ranks(), ranks.train, tmp_path, Path("wan"))
    alone = {kind: ranks.gradients(tmp_path / kind, home / "wan", kind == "rewarded") for kind in KINDS}
    ranks.curve(tmp_path / "alone-curve")
    ranks.preferences(tmp_path / "alone-preferences", home / "wan")
    for kind, gradients in alone.items():
        both = torch.load(tmp_path / f"{kind}.pt")
        assert both.keys() == gradients.keys()
        assert sum(gradient.abs().max() > 1e-3 for gradient in gradients.values()) > 10, kind
        for name, gradient in gradients.items():
            torch.testing.assert_close(both[name], gradient, rtol=0, atol=1e-5, msg=f"{kind}: {name}")
    one, two = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("alone-curve", "curve"))
    assert len(one) == 10
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0, abs=1e-9)
    for name in ranks.PREFERENCES:
        logs = (tmp_path / place / name / "log.jsonl" for place in ("alone-preferences", "preferences"))
        for one, two in zip(*map(read_jsonl, logs), strict=True):
            for key in ("loss", "margin", "err_l_ref", "grad_norm"):
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), (name, one["step"], key)
            assert one["step"] == 1 or abs(one["margin"]) > 1e-5


@pytest.mark.slow
def test_accelerate_launches_two_that_train_as_one(home):
    code, said = finish(launch(home, "ddp", "ddp"))
    assert code == 0, said
    assert_same_training(home, "ddp")


@pytest.mark.slow
def test_two_processes_share_the_sampling(home):
    """Of three clips one makes two samples, the other one; one process shows the groups."""
    groups = "data.groups={losers: 1, samples: [made], samples_each: 1, sampler: {steps: 1, guidance: 1}}"
    command = ("groups", "recipe.yaml", groups, "method={name: gdpo}", "model.conditioning=text", "run=shared")
    said = together(home, two_ranks(), posttrain, *command)
    assert said.count("made: 2 samples made, 0 existed") == said.count("made: 1 samples made, 0 existed") == 1
    assert said.count("groups: 3 of 1 losers each") == 1
    assert len(list((home / "made").glob("*.mp4"))) == 3


@pytest.fixture(scope="module")
def zero2(home: Path) -> list[dict[str, str]]:
    """The environment variables that accelerate gives to each process under ZeRO-2; their run was killed at step 5."""
    log = home / "runs" / "zero2" / "log.jsonl"
    launcher = launch(home, "zero2", "zero2")
    while launcher.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.01)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    variables = [process.environ() for process in processes]
    for process in (*processes, launcher):
        process.kill()
    code, said = finish(launcher)
    assert code == -signal.SIGKILL, said
    assert len(read_jsonl(log)) < STEPS
    # without torch's own, by which a process asks the launcher, which is gone
    ours = [{k: v for k, v in names.items() if not k.startswith("TORCH")} for names in variables if "RANK" in names]
    return sorted(ours, key=lambda names: names["RANK"])


def with_a_port(ranks: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same at a port that is free now."""
    return [names | {"MASTER_PORT": now["MASTER_PORT"]} for names, now in zip(ranks, two_ranks(), strict=True)]


@pytest.mark.slow
@needs("deepspeed")
def test_zero_2_takes_winner_and_losers_in_turn(home, zero2):
    """No gradient is lost or stepped with before all members gave theirs."""
    write_groups(home / "groups", groups=4, losers=2)
    changes = {"data": {"clips": "groups", "groups": {"losers": 2, "counterfactuals": True}}}
    changes["method"] = {"name": "gdpo", "mode": "sum", "backward": "in_turn"}
    changes["train"] = RECIPE["train"] | {"steps": 4}
    for run in ("alone-groups", "zero2-groups"):
        (home / f"{run}.yaml").write_text(yaml.safe_dump(RECIPE | changes | {"run": run}))
    with contextlib.chdir(home):
        assert cli.main(["run", "alone-groups.yaml"]) == 0
    together(home, with_a_port(zero2), posttrain, "run", "zero2-groups.yaml")
    logs = (read_jsonl(home / "runs" / run / "log.jsonl") for run in ("alone-groups", "zero2-groups"))
    for alone, zero in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "err_l"):
            assert zero[key] == pytest.approx(alone[key], rel=1e-3), (key, alone["step"])


@pytest.mark.slow
@needs("deepspeed")
def test_zero_2_killed_and_continued_trains_as_one_process_which_can_take_over(home, zero2):
    said = together(home, with_a_port(zero2), posttrain, "run", "recipe.yaml", "run=zero2")
    assert "runs/zero2: continues from step" in said
    assert_same_training(home, "zero2")
    # what a checkpoint holds does not tell how many processes wrote it
    alone, zero = (
        torch.load(home / "runs" / run / "checkpoints" / "step-000016" / "state.pt") for run in ("alone", "zero2")
    )
    assert alone["optimizer"]["param_groups"] == zero["optimizer"]["param_groups"]
    for i, moments in alone["optimizer"]["state"].items():
        for name, tensor in moments.items():
            atol = 1e-3 * float(tensor.abs().max())
            torch.testing.assert_close(zero["optimizer"]["state"][i][name], tensor, rtol=0, atol=atol)

    # and one process goes on from the last but one
    checkpoints = home / "runs" / "zero2" / "checkpoints"
    for path in (home / "runs" / "zero2" / "trained.json", checkpoints / "step-000016" / "meta.json"):
        path.unlink()
    with contextlib.chdir(home):
        assert cli.main(["train", "recipe.yaml", "run=zero2"]) == 0
    assert (checkpoints / "damaged-step-000016").exists()
    assert_same_training(home, "zero2")


@pytest.mark.slow
def test_two_that_would_be_one_are_refused(home, capfd):
    """The launcher is called in this process; what it launches is one of its own."""
    command = ("--cpu", "--num_processes", "2", "-m", "posttrain", "train", "recipe.yaml", "run=cpu")
    with contextlib.chdir(home), pytest.raises(subprocess.CalledProcessError):
        launch_command(launch_command_parser().parse_args(command))
    said = capfd.readouterr().err
    assert "several processes were asked for and 1 started; use --config_file recipes/launch/ddp.yaml" in said
    assert not (home / "runs" / "cpu" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("WORLD_SIZE", "2", "2 processes were asked for and 1 started; use --config_file"),
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch: FSDP is not supported; use --config_file"),
    ],
)
def test_what_a_launcher_asks_in_vain_is_said(monkeypatch, name, value, line):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        distributed.process()


@needs("deepspeed")
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ZERO_STAGE", "3", "zero_stage is 3; set 2, see recipes/launch/zero2.yaml"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device is cpu, which is not supported; leave it out"),
        ("CONFIG_FILE", "mine.json", "config_file is mine.json, which is not supported"),
    ],
)
def test_more_than_zero_2_is_refused(monkeypatch, name, value, line):
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(UserError, match=line):
        distributed.zero_plugin(1, 1, 1.0, False)
