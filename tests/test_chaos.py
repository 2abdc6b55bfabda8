"""The fast part of `make chaos` (chaos.py), and what an undisturbed run, a killed and a damaged one leave."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import Attacks, attack, ended, result, verdict
from helpers.killed import STAGES, Hit, start


@pytest.mark.slow
def test_nothing_that_is_read_ends_in_a_traceback() -> None:
    counts = attack(0.1, seed=0, runs=False)
    assert {"recipe", "model", "clips", "scores", "server"} == counts.keys()
    assert not any(found["wrong"] for found in counts.values())
    assert all(found["refused"] for found in counts.values())


@pytest.mark.slow
def test_undisturbed_killed_and_damaged_runs_end_byte_equal(tmp_path: Path) -> None:
    """A run that is killed in the middle of each of its stages, one after the other, videos included.

    `Attacks` has made the undisturbed one, in other processes.
    """
    attacks, draws = Attacks(tmp_path), random.Random(0)
    made = [name for name in attacks.expected if name.endswith(".mp4")]
    assert {name.split("/")[0] for name in made} == {"drops", "made", "runs"}
    home = attacks.home(["drops", "made", "runs"])
    assert not result(home)
    for stage in STAGES:
        middle = len(attacks.gaps[stage]) // 2
        seconds = attacks.gaps[stage][0] / 2 if stage == "filming" else 0.0
        process = start(home, "run", "recipe.yaml", hit=Hit(stage, middle, seconds, signal.SIGKILL))
        assert not ended(home, process)
        assert process.exitcode == -signal.SIGKILL, stage
        assert result(home) != attacks.expected
    assert verdict(home, attacks.expected) == "right"
    assert attacks.damage("made/*-s*.mp4", draws) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["posttrain", "sim"])
def test_ctrl_c_in_the_first_moment_is_one_line(module: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "make" if module == "sim" else "run", "nowhere.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    while not _heeds(process.pid, signal.SIGTERM):  # before that, Python itself says what it likes
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert said.count("\n") == 1


def _heeds(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
