"""The fast part of `make chaos` (chaos.py), and what an undisturbed run, a killed and a damaged one leave."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import attack, flips, kills, make_home, result, start


@pytest.mark.slow
def test_nothing_that_is_read_ends_in_a_traceback() -> None:
    counts = attack(0.05, seed=0, runs=False)
    assert {"recipes", "manifests", "server"} == counts.keys()
    assert not any(found["wrong"] for found in counts.values())
    assert all(found["refused"] for found in counts.values())


@pytest.mark.slow
def test_undisturbed_killed_and_damaged_runs_end_byte_equal(tmp_path: Path) -> None:
    """Losers, training, evaluation, report and export, videos included."""
    first, second = (make_home(tmp_path / name / "home") for name in "ab")
    process, began = start(first, "run", "recipe.yaml"), time.monotonic()
    process.join()
    assert process.exitcode == 0, (first / "output").read_text()
    expected = result(first)
    assert any(name.endswith(".mp4") for name in expected)
    draws, seconds = random.Random(0), time.monotonic() - began
    for name in ("runs", "made"):
        (second / name).mkdir()
    assert set(kills(second, expected, seconds, draws, most=2)) == {"right"}
    assert set(flips(first, expected, draws)) <= {"right", "refused"}


@pytest.mark.parametrize("module", ["posttrain", "sim"])
def test_ctrl_c_in_the_first_second_is_one_line(module: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", module, "make" if module == "sim" else "run", "nowhere.yaml"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    assert said.count("\n") == 1
