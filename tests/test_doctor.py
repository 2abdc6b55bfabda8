"""The doctor's findings on this machine and on one that lacks things; the benchmark's table."""

import io
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.tiny import wan_folder
from rich.console import Console

from posttrain.commands.bench import bench, print_timings
from posttrain.commands.doctor import (
    check_codecs,
    check_disk,
    check_packages,
    check_renderer,
    check_torch,
    check_weights,
    doctor,
)
from posttrain.core.errors import UserError
from posttrain.core.files import sha256
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.nets.tracker import Tracker


def test_this_machine_can_run_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    for check in (check_torch, check_codecs, check_renderer, check_packages):
        assert [finding for finding in check() if finding.state == "bad"] == []
    assert doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "python",
        "packages",
        "torch",
        "renderer",
        "codecs",
        "weights",
        "disk",
        "machine",
    ]


def test_other_versions_are_named(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"# tested\nnumpy==1.0\nscipy=={version('scipy')} # the rest\nno-such-package==3.1\n")
    (finding,) = check_packages(constraints)
    assert finding.state == "note"
    assert finding.text == "1 of 3 as tested, 1 not installed (no-such-package)"
    assert f"numpy {version('numpy')}, tested 1.0" in finding.remedy
    (finding,) = check_packages(tmp_path / "absent.txt")
    assert finding.state == "note"


def test_changed_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    for name in ("vae/a.safetensors", "vae/b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    sums = "".join(f"{sha256(tmp_path / name)}  {name}\n" for name in ("vae/a.safetensors", "vae/b.safetensors"))
    (tmp_path / "SHA256SUMS").write_text(sums)
    assert [finding.state for finding in check_weights(tmp_path)] == ["ok"]
    (tmp_path / "vae" / "b.safetensors").write_bytes(b"damaged")
    (finding,) = check_weights(tmp_path)
    assert finding.state == "bad"
    assert "vae/b.safetensors" in finding.text
    assert "vae/a.safetensors" not in finding.text
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  ../outside\n")
    with pytest.raises(UserError, match="outside"):
        list(check_weights(tmp_path))


def test_disk_is_that_of_the_folder(tmp_path: Path) -> None:
    (finding,) = check_disk(tmp_path)
    assert finding.text == f"{shutil.disk_usage(tmp_path).free / 2**30:.1f} GiB free here"


@pytest.mark.slow
def test_bench_times_every_stage(tmp_path: Path) -> None:
    model = load(ModelConfig(path=str(wan_folder(tmp_path / "wan")), adapter=AdapterConfig(rank=2)))
    calls = []
    timings = bench(model, Tracker((8, 8)), lambda: calls.append(1), size=(5, 32, 32), batch=2, steps=2, repeats=2)
    assert len(calls) == 3
    assert [row.clips for row in timings] == [2] * 6 + [1]
    seconds = {row.stage: row.seconds for row in timings}
    assert min(seconds.values()) > 0
    ratio = {row.stage: row.ratio for row in timings}
    assert ratio["autoencoder, decode"] == seconds["autoencoder, decode"] / seconds["autoencoder, encode"]
    assert all(p.grad is None for p in model.transformer.parameters())
    console = Console(width=100, file=io.StringIO())
    print_timings(timings, console)
    assert len(console.file.getvalue().splitlines()) == 8  # type: ignore[attr-defined]
