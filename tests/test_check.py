"""posttrain/pretraining/check.py: the figures of the pocket's README."""

from pathlib import Path

import pytest
import torch
from helpers.falling import RedTracker, write_dataset
from helpers.tiny import wan_folder

from posttrain.core.files import read_jsonl, write_jsonl
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.nets import tracker
from posttrain.pretraining import check

BODY = {
    "asset": "ball",
    "name": "ball",
    "size": 0.1,
    "mass": 1.0,
    "friction": 0.5,
    "restitution": 0.2,
    "role": "dropped",
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three falling squares; the last one in company."""
    write_dataset(tmp_path / "squares", ["test_unseen"], clips=3, frames=9)
    metadata = tmp_path / "squares" / "test_unseen" / "metadata.jsonl"
    rows = [row | {"motion": "drop", "bodies": [BODY] * (1 + i // 2)} for i, row in enumerate(read_jsonl(metadata))]
    write_jsonl(metadata, rows)
    return tmp_path / "squares"


def test_a_perfect_segmenter_and_one_that_stays_behind(dataset: Path) -> None:
    clips = Clips(DataConfig(clips=str(dataset), split="test_unseen"))
    rows = check.measure(RedTracker(), clips, check.truth)
    assert [row["iou"] for row in rows] == [1, 1, 1]
    assert [row["l2"] for row in rows] == [0, 0, 0]
    assert [row["company"] for row in rows] == ["alone", "alone", "others in view"]
    assert {row["size"] for row in rows} == {" 6 to 8 px"}
    # who never moves overlaps only while the square, 6 pixels high and 64 pixels/s^2 fast, is still near
    frozen = check.measure(lambda video, mask: mask[:, None].float().expand(video[:, 0].shape), clips, check.truth)
    dropped = [min(round(64 * (t / 16) ** 2 / 2), 24) for t in range(1, 9)]
    expected = sum(max(6 - d, 0) / (6 + min(d, 6)) for d in dropped) / 8
    assert frozen[0]["iou"] == pytest.approx(expected)


def test_noise_is_measured_in_decibels(dataset: Path) -> None:
    clips = Clips(DataConfig(clips=str(dataset), split="test_unseen"))
    rows = check.measure(RedTracker(), clips, lambda batch: check.truth(batch) + 0.2)
    assert rows[0]["psnr"] == pytest.approx(10 * torch.log10(torch.tensor(4 / 0.04)).item(), abs=1e-3)


@pytest.mark.parametrize(
    ("part", "lines"),
    [("segmenter", ["alone", "drop"]), ("vae", ["true", "through the VAE"]), ("base", ["base", "frozen"])],
)
def test_tables(part: str, lines: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker.Model(tracker.Tracker((8, 8))).save(tmp_path / "tracker")
    model = wan_folder(tmp_path / "wan")
    folders = ["--clips", str(dataset), "--model", str(model), "--segmenter", str(tmp_path / "tracker")]
    assert check.main([part, *folders, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {line} |" in printed for line in lines)
    assert "nan" not in printed


def test_a_missing_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker.Model(tracker.Tracker((8, 8))).save(tmp_path / "tracker")
    assert check.main(["vae", "--clips", str(tmp_path / "none"), "--segmenter", str(tmp_path / "tracker")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
