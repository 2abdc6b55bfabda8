"""Real trackers, read back: each step once, also after a kill, and videos that play."""

import json
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.falling import film, rows_of
from helpers.optional import events, needs
from PIL import Image
from torch import nn

from posttrain.core import recipe
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.core.trackers import check_trackers
from posttrain.evaluation.sample import write_video
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch

FRAMES, FPS = 5, 8


class Points:
    """Four points."""

    ids, key = ("a", "b", "c", "d"), "points"

    def __len__(self) -> int:
        return 4

    def load(self, indices: Sequence[int]) -> Batch:
        points = torch.linspace(-1, 1, 4)[list(indices)]
        return Batch(tuple(self.ids[i] for i in indices), video_BCFHW=points[:, None, None, None, None])


def train(folder: Path, trackers: Sequence[str], until: int = 8) -> None:
    """Train to the end, or be cut off after `until` steps; a video is shown every third step."""

    def validate(step: int) -> tuple[dict[str, float], dict[str, Path]]:
        path = folder / "samples" / f"{step}.mp4"
        write_video(path, film(rows_of(2, FRAMES), 4, 200)[0], FPS)
        return {"val_l2": 1 / step}, {"validation/a": path}

    torch.manual_seed(0)
    config = TrainConfig(steps=8, batch=2, lr=0.1, checkpoint_every=3, trackers=tuple(trackers))
    run = Run(folder, nn.Linear(1, 1), Points(), config, validate, validate_every=3)
    batches = run.batches()
    for batch in batches:
        if run.steps == until:
            batches.close()
            return
        run.step((run.module(batch.video_BCFHW) + batch.video_BCFHW).square().mean())


def curve(rows: Iterable[dict[str, Any]], key: str) -> dict[int, float]:
    """Step -> value, of rows of a log that have it, each step once."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    assert len(dict(found)) == len(found)
    return dict(found)


def wandb_records(path: Path) -> Iterator[Any]:
    """What W&B's own log holds: protobuf messages in the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several pieces
            yield Record.FromString(message)
            message = b""


@needs("tensorboard")
def test_tensorboard_has_each_step_of_a_killed_run_once(tmp_path: Path) -> None:
    train(tmp_path, ["tensorboard"], until=5)  # the last checkpoint is of step 3
    train(tmp_path, ["tensorboard"])
    rows = read_jsonl(tmp_path / "log.jsonl")
    reader = events(tmp_path / "tensorboard" / "posttrain")
    for key in ("loss", "lr", "grad_norm", "seconds", "val_l2"):
        shown = curve([{"step": event.step, key: event.value} for event in reader.Scalars(key)], key)
        assert shown == pytest.approx(curve(rows, key), rel=1e-6), key
    assert list(curve(rows, "loss")) == list(range(1, 9))


@needs("tensorboard")
def test_tensorboard_plays_the_videos(tmp_path: Path) -> None:
    train(tmp_path, ["tensorboard"])
    reader = events(tmp_path / "tensorboard" / "posttrain")
    shown = reader.Images("validation/a")
    assert [event.step for event in shown] == [3, 6, 8]
    gif = Image.open(BytesIO(shown[0].encoded_image_string))
    assert (gif.format, gif.size) == ("GIF", (32, 32))
    truth, shown_for = film(rows_of(2, FRAMES), 4, 200)[0], 0
    for k in range(gif.n_frames):  # equal frames that follow each other are one, shown for longer
        gif.seek(k)
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - truth[shown_for // 120]).mean() < 8
        shown_for += gif.info["duration"]
    assert shown_for == FRAMES * 120  # ms, the nearest to 1 / FPS that a GIF has


@needs("tensorboard")
def test_a_finished_run_started_again_shows_nothing_twice(tmp_path: Path) -> None:
    train(tmp_path, ["tensorboard"])
    before = sorted((tmp_path / "tensorboard").rglob("*"))
    train(tmp_path, ["tensorboard"])
    assert sorted((tmp_path / "tensorboard").rglob("*")) == before


@needs("tensorboard")
def test_a_run_may_go_on_with_other_trackers(tmp_path: Path) -> None:
    train(tmp_path, [], until=5)
    train(tmp_path, ["tensorboard"])
    reader = events(tmp_path / "tensorboard" / "posttrain")
    assert [event.step for event in reader.Scalars("loss")] == [4, 5, 6, 7, 8]


@pytest.mark.slow
def test_wandb_offline_has_the_run_and_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "try", ["wandb"])
    [kept] = (tmp_path / "try" / "wandb").glob("offline-run-*/*.wandb")
    records: list[Any] = []
    until = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in records) and time.monotonic() < until:
        records = list(wandb_records(kept))  # another process writes it
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("posttrain", "try")
    assert {"train.lr", "data", "model"} <= {item.key for item in run.config.update}
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(items["_step"], {"step": items["_step"]}).update(items)
    log = read_jsonl(tmp_path / "try" / "log.jsonl")
    for key in ("loss", "val_l2"):
        assert curve(rows.values(), key) == pytest.approx(curve(log, key))
    assert [step for step, row in rows.items() if any(key.startswith("validation/a") for key in row)] == [3, 6, 8]
    assert len(list(kept.parent.rglob("*.mp4"))) == 3


def test_trackio_has_the_run_and_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # it looks when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    train(tmp_path / "try", ["trackio"], until=5)
    train(tmp_path / "try", ["trackio"])
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("posttrain", "try")
    log = read_jsonl(tmp_path / "try" / "log.jsonl")
    # it keeps what a killed run logged after its last checkpoint; it is logged again, the same
    shown = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert shown == pytest.approx(curve(log, "loss"))
    assert [row["step"] for row in rows if "validation/a" in row] == [3, 6, 8]
    assert len(list((tmp_path / "kept").rglob("*.mp4"))) == 3


def test_an_unknown_tracker_and_one_that_is_not_installed_are_said(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("steps: 1\nbatch: 1\nlr: 1.0\ntrackers: [tensorbord]\n")
    with pytest.raises(UserError, match=r"train\.yaml:4.*tensorboard") as raised:
        recipe.load(path, [], TrainConfig)
    assert (raised.value.code, raised.value.field) == ("value", "trackers.0")
    with pytest.raises(UserError, match="nowhere") as raised:
        check_trackers(["json", "nowhere"])
    assert (raised.value.code, raised.value.field) == ("not_installed", "train.trackers")


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    with pytest.raises(UserError, match="tensorboard") as raised:
        train(tmp_path, ["tensorboard"])
    assert (raised.value.code, raised.value.field) == ("not_installed", "train.trackers")
