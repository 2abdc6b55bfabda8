"""Rows of datasets: all that sim writes is read, and what is wrong in a row is said in one line."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data import schema
from posttrain.data.schema import ClipRow

ROOT = Path(__file__).parent.parent
ROW: dict[str, Any] = {
    "file_name": "00000.mp4",
    "caption": "a ball falls.",
    "fps": 16,
    "frames": 5,
    "size": [32, 48],
    "sha256": "ab",
    "target": 0,
    "gravity": [0, 0, -9.81],
    "camera": {"position": [0, 0, 0.5], "intrinsics": [[70.0, 0, 24], [0, 70.0, 16], [0, 0, 1]]},
    "contacts": [{"time": 0.4, "pair": [0, -1], "impulse": 0.1}],
    "violation": None,
    "note": "of somebody's own",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "more"),
    [("drop", []), ("violations", ["world.members=3"]), ("ambiguous", ["world.members=2"]), ("grid", [])],
)
def test_what_sim_writes_is_read_whole(tmp_path: Path, world: str, more: list[str]) -> None:
    """Every field of every row has a place, at every depth, with the same value."""
    recipe = ROOT / "recipes" / "pocket" / f"{world}.yaml"
    command = [sys.executable, "-m", "sim", "make", str(recipe), f"out={tmp_path}", "splits={train: 1}", *more]
    subprocess.run([*command, "--workers", "1"], check=True, capture_output=True)
    metadata = tmp_path / "train" / "metadata.jsonl"
    rows = schema.read(metadata)
    assert rows
    for row, written in zip(rows, files.read_jsonl(metadata), strict=True):
        held = json.loads(json.dumps(asdict(row)))
        assert {name: held[name] for name in written} == written
        assert schema.to_json(row) == written


def test_a_row_keeps_what_it_does_not_know() -> None:
    row = schema.from_json(ROW, "here:1")
    assert (row.size, row.camera and row.camera.position, row.violation) == ((32, 48), (0, 0, 0.5), None)
    assert row.contacts[0].pair == (0, -1)
    assert schema.to_json(row) == ROW
    assert schema.facts(row, ("gravity", "beta")) == {"gravity": [0, 0, -9.81], "beta": None}


def test_a_row_of_a_users_own_video() -> None:
    row = ClipRow("a.mp4", "a cat.", 8.0, 9, (64, 96), "ab")
    known = {"file_name": "a.mp4", "caption": "a cat.", "fps": 8.0, "frames": 9, "size": [64, 96], "sha256": "ab"}
    assert schema.to_json(row) == known
    assert schema.from_json(known, "here:1") == row


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fps", "16"),
        ("frames", 5.5),
        ("size", [32]),
        ("target", True),
        ("gravity", -9.81),
        ("caption", None),
        ("camera.position", [0, 0]),
        ("contacts.0.time", "early"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, field: str, value: Any) -> None:
    wrong = json.loads(json.dumps(ROW))
    *way, last = field.split(".")
    inner = wrong
    for key in way:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    metadata = tmp_path / "metadata.jsonl"
    files.write_jsonl(metadata, [ROW, wrong])
    with pytest.raises(UserError, match=r"metadata\.jsonl:2") as error:
        schema.read(metadata)
    assert error.value.code == "format"
    assert error.value.field.startswith(field)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError) as error:
        schema.from_json({name: value for name, value in ROW.items() if name != "fps"}, "here:1")
    assert (error.value.code, error.value.field) == ("format", "fps")
