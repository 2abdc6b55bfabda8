"""A run that is stopped: cut off, killed or asked to stop it ends the same, and clear words about what is damaged."""

import errno
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import launch
from helpers.points import Cut, Points, assert_same, config, log, network, rolled, train

from posttrain.core.errors import UserError
from posttrain.training.run import Run


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_cut_off_between_any_two_updates_it_ends_the_same(tmp_path, every):
    """Before the gradient of each of the 16 micro-batches, and started again."""
    whole = rolled(tmp_path / "whole")
    for cut in range(16):
        folder = tmp_path / str(cut)
        with pytest.raises(Cut):
            rolled(folder, cut, every)
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert left == [f"step-{step:06d}" for step in (3, 6) if 2 * step <= cut]  # between rollouts alone
        assert_same(whole, rolled(folder, every=every))
        assert log(tmp_path / "whole") == log(folder)


def asked(folder: Path) -> None:
    """Asked to stop in the first update of the second rollout."""
    folder.mkdir()
    sys.stderr = open(folder / "stderr", "w", buffering=1)
    run = Run(folder, network(), Points(), config(checkpoint_every=100))
    for batch in run.rollouts(lambda batch: batch, updates=3):
        if run.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        run.step(run.module(batch.video_BCFHW).square().mean())


@pytest.mark.slow
def test_asked_to_stop_it_ends_with_the_rollout(tmp_path):
    process = launch(asked, tmp_path / "run")
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]
    assert (tmp_path / "run" / "stderr").read_text().startswith("SIGTERM: saved step 6 of 8")


def child(folder: Path, pause: float) -> None:
    """A whole run in a process of its own; what it says goes to a file."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    weights = train(Run(folder, network(), Points(), config(steps=40, accumulate=2, checkpoint_every=2)), pause)
    torch.save(weights, folder / "end.pt")


def start(folder: Path, pause: float = 0.0) -> Any:
    folder.mkdir(exist_ok=True)
    return launch(child, folder, pause)


def steps_in(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(process: Any, folder: Path, steps: int) -> None:
    while steps_in(folder) < steps:
        assert process.is_alive()
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = start(whole)
    moments = random.Random(0)
    kills = 0
    while steps_in(cut) < 36:
        process = start(cut)
        wait_for_steps(process, cut, steps_in(cut) + 4)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    last = start(cut)
    last.join()
    undisturbed.join()
    assert undisturbed.exitcode == last.exitcode == 0
    assert "continues from step" in (cut / "stderr").read_text()
    assert_same(torch.load(whole / "end.pt"), torch.load(cut / "end.pt"))
    assert log(whole) == log(cut)
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == ["step-000038", "step-000040"]  # no remnants


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(tmp_path, number):
    process = start(tmp_path, pause=0.02)
    wait_for_steps(process, tmp_path, 5)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    steps = steps_in(tmp_path)
    said = (tmp_path / "stderr").read_text()
    assert said == f"{number.name}: saved step {steps} of 40; start again to continue\n"
    assert (tmp_path / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    whole = train(Run(tmp_path / "whole", network(), Points(), config()))
    train(Run(tmp_path / "cut", network(), Points(), config()))
    kept = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000006", "step-000008"]  # the last two
    with open(kept[-1] / "state.pt", "rb+") as stream:
        stream.truncate(100)
    run = Run(tmp_path / "cut", network(), Points(), config())
    assert "step-000008: is damaged" in capsys.readouterr().err
    assert run.steps == 6
    assert_same(whole, train(run))
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


@pytest.mark.parametrize("damage", [lambda path: path.write_text(path.read_text().replace("1", "2", 1)), Path.unlink])
def test_a_damaged_log_is_said(tmp_path, capsys, damage):
    train(Run(tmp_path, network(), Points(), config()))
    train(Run(tmp_path, network(), Points(), config()))
    assert "log.jsonl" not in capsys.readouterr().err
    damage(tmp_path / "log.jsonl")
    train(Run(tmp_path, network(), Points(), config()))
    assert "log.jsonl: is missing or not what was written" in capsys.readouterr().err


def test_a_disk_that_does_not_answer_loses_no_checkpoint(tmp_path, monkeypatch):
    train(Run(tmp_path, network(), Points(), config()))
    before = log(tmp_path)

    def silent(path: Path) -> bytes:  # no real disk can be made to fail so here
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", silent)
        with pytest.raises(OSError, match="Input/output error"):
            Run(tmp_path, network(), Points(), config())
    assert Run(tmp_path, network(), Points(), config()).steps == 8
    assert log(tmp_path) == before


def test_the_log_stays_until_training_begins_again(tmp_path):
    train(Run(tmp_path, network(), Points(), config()))
    shutil.rmtree(tmp_path / "checkpoints")
    run = Run(tmp_path, network(), Points(), config())
    assert len(log(tmp_path)) == 8
    train(run)
    assert [row["step"] for row in log(tmp_path)] == list(range(1, 9))


def test_a_finished_run_started_again_gives_its_weights(tmp_path):
    assert_same(
        train(Run(tmp_path, network(), Points(), config())), train(Run(tmp_path, network(), Points(), config()))
    )


def test_other_settings_or_clips_do_not_continue_a_run(tmp_path):
    train(Run(tmp_path, network(), Points(), config()))
    with pytest.raises(UserError, match="step-000008") as raised:
        Run(tmp_path, network(), Points(), config(lr=2e-2))
    assert (raised.value.code, raised.value.field) == ("other_run", "train.lr")
    other = Points()
    other.key = "other points"
    with pytest.raises(UserError) as raised:
        Run(tmp_path, network(), other, config())
    assert (raised.value.code, raised.value.field) == ("other_run", "data")
    start = network()
    start[0].bias.data += 1  # frozen, so in no checkpoint
    with pytest.raises(UserError) as raised:
        Run(tmp_path, start, Points(), config())
    assert (raised.value.code, raised.value.field) == ("other_run", "model")
    assert len(log(tmp_path)) == 8  # and nothing was lost
