"""The fast part of `make chaos` (chaos.py), and what two undisturbed runs and a killed one leave."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos import attack, flips, kills, make_home, result, start


def test_nothing_that_is_read_ends_in_a_traceback() -> None:
    counts = attack(0.2, seed=0, runs=False)
    assert {"recipes", "manifests", "server"} == counts.keys()
    assert not any(found["wrong"] for found in counts.values())
    assert all(found["refused"] for found in counts.values())


def test_undisturbed_killed_and_damaged_runs_end_byte_equal(tmp_path: Path) -> None:
    """Losers, training, evaluation, report and export, videos included."""
    homes, found = [make_home(tmp_path / name / "home") for name in "ab"], []
    for home in homes:
        process, began = start(home, "run", "recipe.yaml"), time.monotonic()
        process.join()
        assert process.exitcode == 0, (home / "output").read_text()
        found.append(result(home))
    assert found[0] == found[1]
    assert any(name.endswith(".mp4") for name in found[0])
    draws, seconds = random.Random(0), time.monotonic() - began
    assert set(kills(homes[0], found[0], seconds, draws, most=2)) == {"right"}
    assert set(flips(homes[1], found[1], draws)) <= {"right", "refused"}


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
