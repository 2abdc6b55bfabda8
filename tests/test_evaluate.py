"""Evaluation of models whose videos are known, so that every number is."""

import io
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.falling import AMBIGUOUS, FPS, SIDE, SIZE, Oracle, RedTracker, film, rows_of, tell, write_dataset
from rich.console import Console

from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.data.schema import Camera, ClipRow
from posttrain.evaluation import evaluate as room
from posttrain.evaluation import sample
from posttrain.evaluation.benchmarks import base, pisa
from posttrain.evaluation.evaluate import EvalConfig, evaluate, validation, watched_split, weights_fingerprint
from posttrain.evaluation.records import Record, print_table, read_apart, read_records, summary
from posttrain.flow import SamplerConfig
from posttrain.metrics.pisa import even_times
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.training.tripwires import TripwiresConfig, chooses_by_the_test

FRAMES, CLIPS = 17, 3


def square(split: int, clip: int) -> tuple[int, int, int]:
    """First row, column and colour of a square of `write_dataset`."""
    return 2 + 2 * clip + split, 4 + 5 * clip, 200 + 10 * clip


def oracle(rows: Callable[[int], Any], value: float = 0.0) -> Oracle:
    """A model that shows each square at rows(first row); `value` tells its weights from another's."""
    videos = {}
    for split in range(2):
        for clip in range(CLIPS):
            start, column, red = square(split, clip)
            videos[f"square {split}{clip} falls."] = film(rows(start), column, red)[0]
    model = Oracle(videos)
    for parameter in model.transformer.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


HOVER = oracle(lambda start: [start] * FRAMES, 1.0)
FALL = oracle(lambda start: rows_of(start, FRAMES), 2.0)
LATE = oracle(lambda start: [start, *rows_of(start, FRAMES - 1)], 3.0)  # everything one frame late


def models(base: Any = HOVER, psft: Any = LATE) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    return {"base": lambda: nullcontext(base), "psft": lambda: nullcontext(psft)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falling")
    write_dataset(folder, clips=CLIPS, frames=FRAMES, scorecard=False)
    return folder


@pytest.fixture
def config(data: Path) -> EvalConfig:
    return EvalConfig(clips=str(data), seeds=2, batch=2, sampler={"steps": 3})


def with_pisa(**keys: Any) -> Plugin:
    return Plugin("pisa", pisa, pisa.Config(**keys))


def by_row(records: list[Record], split: str = "unseen") -> dict[str, Record]:
    return {record.row: record for record in records if record.split == split}


@pytest.mark.slow
def test_numbers_are_those_of_the_videos(tmp_path: Path, config: EvalConfig) -> None:
    records = evaluate(tmp_path, config, models(), RedTracker())
    assert [(r.split, r.row) for r in records[:6]] == [
        ("seen", "truth"),
        ("seen", "truth_vae"),
        ("seen", "frozen"),
        ("seen", "base"),
        ("seen", "psft"),
        ("unseen", "truth"),
    ]
    rows = by_row(records)
    unit = math.sqrt(2) * SIZE
    for clip in range(CLIPS):
        start, column, _ = square(1, clip)
        true = rows_of(start, FRAMES)
        late = np.array([start, *rows_of(start, FRAMES - 1)])
        for name, shown in (
            ("truth", true),
            ("truth_vae", true),
            ("frozen", [start]),
            ("base", [start]),
            ("psft", late),
        ):
            found, gap = rows[name].clips[clip], np.abs(shown - true)
            overlap = np.maximum(SIDE - gap, 0)
            assert found.numbers["l2"] == pytest.approx(gap.mean() / unit)
            assert found.numbers["iou"] == pytest.approx((overlap / (2 * SIDE - overlap)).mean())
            assert found.numbers["vanished"] == 0
            assert found.true_path[5] == [column + (SIDE - 1) / 2, true[5] + (SIDE - 1) / 2]
            assert len(found.paths) == (1 if name in ("truth", "truth_vae", "frozen") else 2)
    assert summary(rows["base"])["no_contact"]["mean"] == 1
    assert summary(rows["base"])["time_error"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert summary(rows["truth"])["time_error"]["mean"] <= 0.5 / FPS
    assert summary(rows["truth"])["no_contact"]["mean"] == 0
    video = read_video(tmp_path / "samples" / "base" / "test_unseen" / "00001-s1.mp4")
    assert video.shape == (FRAMES, SIZE, SIZE, 3)


@pytest.mark.slow
def test_a_lost_object_is_charged(tmp_path: Path, config: EvalConfig) -> None:
    """A model that lets the square disappear after frame 0."""
    empty = oracle(lambda start: [start] * FRAMES)
    empty.videos_NCFHW[:, :, 1:] = -0.3
    rows = by_row(evaluate(tmp_path, config, models(psft=empty), RedTracker()))
    clip = rows["psft"].clips[0]
    assert clip.numbers["vanished"] == pytest.approx((FRAMES - 1) / FRAMES)
    assert clip.numbers["l2"] == pytest.approx((FRAMES - 1) / FRAMES)
    assert clip.released["l2"] == 0
    assert clip.paths[0][1:] == [None] * (FRAMES - 1)


@pytest.mark.slow
def test_a_grid_is_two_splits(tmp_path: Path, data: Path, config: EvalConfig) -> None:
    grid = tell(data, tmp_path / "grid", lambda i: {"id": i != 1})
    run, both = (
        tmp_path / "run",
        config.model_copy(update={"splits": ("test_unseen",), "benchmark": with_pisa(grid=str(grid))}),
    )
    evaluate(run, both, models(), RedTracker())
    records = read_records(run)
    assert [r.split for r in records] == ["unseen"] * 5 + ["id"] * 5 + ["ood"] * 5
    for name, record in by_row(records, "ood").items():
        known = by_row(records)[name].clips[1]
        assert [clip.numbers["l2"] for clip in record.clips] == [known.numbers["l2"]]
    assert [clip.id for clip in by_row(records, "id")["psft"].clips] == [
        by_row(records)["psft"].clips[i].id for i in (0, 2)
    ]
    with pytest.raises(UserError, match=r"world\.name=grid") as error:
        evaluate(run, both.model_copy(update={"benchmark": with_pisa(grid=str(data))}), models(), RedTracker())
    assert (error.value.code, error.value.field) == ("mismatch", "eval.benchmark.grid")


@pytest.mark.slow
def test_falls_are_kept_apart_with_their_impact_frames(tmp_path: Path, data: Path, config: EvalConfig) -> None:
    folder = tell(data, tmp_path / "ambiguous", lambda i: AMBIGUOUS)
    asked = {"splits": ("test_unseen",), "benchmark": with_pisa(falls={"clips": str(folder), "seeds": 3})}
    run = tmp_path / "run"
    evaluate(run, config.model_copy(update=asked), models(), RedTracker())
    assert {record.split for record in read_records(run)} == {"unseen"}
    falls = {record.row: record for record in read_apart(run)}
    assert list(falls) == ["truth", "base", "psft"]
    assert not (run / "samples" / "frozen" / "falls").exists()
    for clip in range(CLIPS):
        true, late = (falls[name].clips[clip].impact_frames for name in ("truth", "psft"))
        assert falls["base"].clips[clip].impact_frames == [None] * 3
        assert len(set(late)) == 1
        assert 1 <= late[0] - true[0] <= 2
        assert falls["psft"].clips[clip].truth["beta"] == 0.2
        assert len(falls["psft"].clips[clip].lifted or ()) == 3


def test_clip_seed_depends_on_seed_and_clip() -> None:
    seeds = {sample.clip_seed(seed, name) for seed in range(3) for name in ("00000", "00001", "10000")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(tmp_path: Path, data: Path) -> None:
    """The real model: other batches and fewer clips give the same video of a clip, other seeds another one."""
    model = load(ModelConfig(path="pocket", init="random"))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.3)
    clips = Clips(DataConfig(clips=str(data), split="test_seen"))

    def videos(indices: list[int], seed: int) -> np.ndarray:
        rows = [clips.row(i) for i in indices]
        return room.sample_row(None, model, clips.load(indices), rows, seed, SamplerConfig(steps=2))

    together, alone, other = videos([0, 2], 0), videos([2], 0), videos([2], 1)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(other[0].astype(int) - alone[0]).max() > 20


@pytest.mark.slow
def test_a_killed_evaluation_continues(tmp_path: Path, config: EvalConfig) -> None:
    whole = evaluate(tmp_path / "whole", config, models(), RedTracker())
    dying = RedTracker(give_up_after=23)  # references take 2 x 9 clips; the base dies in its second batch
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "cut", config, models(), dying)
    left = json.loads((tmp_path / "cut" / "evaluation" / "base-test_seen.json").read_text())
    assert 0 < len(left["clips"]) < CLIPS
    rest = RedTracker()
    again = evaluate(tmp_path / "cut", config, models(), rest)
    assert rest.calls == 18 + 24 - (18 + 4)
    for a, b in zip(again, whole, strict=True):
        assert replace(a, seconds=0) == replace(b, seconds=0)


@pytest.mark.slow
def test_rows_are_reused_only_when_nothing_changed(
    tmp_path: Path, config: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = by_row(evaluate(tmp_path / "a", config, models(), RedTracker(), tmp_path / "cache"))

    again = RedTracker()
    evaluate(tmp_path / "a", config, models(), again, tmp_path / "cache")
    assert again.calls == 0
    assert "psft on unseen clips: reused from" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "cache")  # as where it was killed before it shared them
    evaluate(tmp_path / "a", config, models(), RedTracker(), tmp_path / "cache")
    lost = RedTracker()  # a sample is gone: its row is made again, or taken from what runs share
    for row in ("psft", "base"):
        (tmp_path / "a" / "samples" / row / "test_unseen" / "00002-s1.mp4").unlink()
    assert by_row(evaluate(tmp_path / "a", config, models(), lost, tmp_path / "cache"))["base"] == first["base"]
    assert lost.calls == CLIPS * 2
    assert "psft/test_unseen/00002-s1.mp4: is missing or damaged" in capsys.readouterr().err
    assert (tmp_path / "a" / "samples" / "base" / "test_unseen" / "00002-s1.mp4").exists()

    trained = RedTracker()  # the tuned model went on training: only its own row is made again
    rows = by_row(evaluate(tmp_path / "a", config, models(psft=FALL), trained, tmp_path / "cache"))
    assert trained.calls == 2 * CLIPS * 2
    assert rows["psft"].clips[0].numbers["l2"] == 0
    assert rows["base"] == first["base"]

    elsewhere = RedTracker()  # another run of the same base
    rows = by_row(evaluate(tmp_path / "b", config, models(), elsewhere, tmp_path / "cache"))
    assert elsewhere.calls == 2 * CLIPS * 2
    assert rows["frozen"] == first["frozen"]
    assert (tmp_path / "b" / "samples" / "base" / "test_unseen" / "00002-s1.mp4").exists()

    changed = config.model_copy(update={"sampler": SamplerConfig(steps=4)})
    sampled = RedTracker()  # references do not depend on the sampler
    evaluate(tmp_path / "b", changed, models(), sampled, tmp_path / "cache")
    assert sampled.calls == 2 * 2 * CLIPS * 2

    other = RedTracker()
    torch.nn.init.constant_(other.module.weight, 5.0)
    evaluate(tmp_path / "b", config, models(), other, tmp_path / "cache")
    assert other.calls == 2 * CLIPS * (3 + 2 * 2)


def test_a_tracker_that_is_named_changes_no_key(tmp_path: Path, config: EvalConfig, data: Path) -> None:
    """What follows the object counts by its weights and source alone."""
    clips = Clips(DataConfig(clips=str(data), split="test_seen"))
    named = config.model_copy(update={"tracker": "elsewhere"})
    one, two = (
        room.blank("base", "test_seen", c, HOVER, clips, room.test_sets(c)["test_seen"], RedTracker())
        for c in (config, named)
    )
    assert one.key == two.key
    assert one.settings != two.settings  # rows of both are not shown together


@pytest.mark.slow
def test_a_model_is_gone_before_the_next_is_loaded(tmp_path: Path, config: EvalConfig) -> None:
    """Two of them may be more than the device holds."""
    loaded: list[weakref.ref[Any]] = []

    @contextmanager
    def ready() -> Iterator[Any]:
        assert all(model() is None for model in loaded)
        model = oracle(lambda start: [start] * FRAMES)
        loaded.append(weakref.ref(model))
        yield model

    evaluate(tmp_path, config, {"base": ready, "psft": ready, "more": ready}, RedTracker())
    assert len(loaded) == 3


@pytest.mark.slow
def test_other_clips_make_other_rows(tmp_path: Path, data: Path, config: EvalConfig) -> None:
    evaluate(tmp_path / "run", config, models(), RedTracker())
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    path = changed / "test_seen" / "metadata.jsonl"
    path.write_text(path.read_text().replace('"drop_height"', '"note": 1, "drop_height"'))
    tracker = RedTracker()
    evaluate(tmp_path / "run", config.model_copy(update={"clips": str(changed)}), models(), tracker)
    assert tracker.calls == CLIPS * (3 + 2 * 2)


def test_an_adapter_that_adds_nothing_does_not_change_the_fingerprint_of_the_base() -> None:
    bare = load(ModelConfig(path="pocket", init="random")).transformer
    adapted = load(ModelConfig(path="pocket", init="random", adapter=AdapterConfig(rank=2, alpha=8))).transformer
    assert weights_fingerprint(adapted, base=True) == weights_fingerprint(bare, base=True)
    before = weights_fingerprint(adapted)
    assert before != weights_fingerprint(
        load(ModelConfig(path="pocket", init="random", adapter=AdapterConfig(rank=2))).transformer
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        trained[-1].add_(1.0)
    assert weights_fingerprint(adapted) != before
    assert weights_fingerprint(adapted, base=True) != weights_fingerprint(bare, base=True)


@pytest.mark.slow
def test_table_shows_the_headline(tmp_path: Path, config: EvalConfig) -> None:
    records = evaluate(tmp_path, config, models(psft=FALL), RedTracker())
    console = Console(width=80, file=io.StringIO())
    print_table(read_records(tmp_path), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split()[:4] == ["Model", "Clips", "L2", "[95%]"]
    assert any(line.startswith("psft") and "unseen" in line and "0.000 [0.000, 0.000]" in line for line in lines)
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert len(records) == 10


def test_left_and_right_do_not_make_none() -> None:
    """Of two samples that drift to either side the report tells how much they drift."""
    assert base.pooled([[0.4, 0.03], [0.2, 0.04], None]) == pytest.approx([0.3, 0.025])
    assert base.pooled([None, None]) is None
    camera = Camera((0, 0, 0), ((40.0, 0, 0), (0, 40.0, 0), (0, 0, 1)))
    row = ClipRow(
        "a.mp4", "", FPS, 9, (SIZE, SIZE), gravity=(0, 0, -9.81), distance=2.0, drop_height=0.0, camera=camera
    )
    drifting = np.zeros((9, SIZE, SIZE), bool)
    for k, mask in enumerate(drifting):
        mask[4 + k : 10 + k, 20 - 2 * k : 26 - 2 * k] = True
    left, right = (
        pisa.card(masks, even_times(len(masks), FPS), row)["drift"] for masks in (drifting, drifting[:, :, ::-1])
    )
    assert left is not None
    assert right is not None
    assert left[0] == pytest.approx(right[0])
    assert left[0] == pytest.approx(2 * FPS * 2.0 / 40, rel=0.05)
    assert pisa.card(drifting, even_times(len(drifting), FPS), replace(row, gravity=None)) == {}


def test_validation_samples_the_model_as_it_is(tmp_path: Path, config: EvalConfig) -> None:
    config = config.model_copy(update={"every": 1})
    validate = validation(tmp_path, config, LATE, RedTracker(), clips=2)
    first, videos = validate(200)
    assert set(first) == {"val_l2", "val_iou", "val_vanished"}
    assert 0 < first["val_l2"] < validation(tmp_path, config, HOVER, RedTracker(), clips=2)(0)[0]["val_l2"]
    assert videos["validation/00001"] == tmp_path / "samples" / "validation" / "step-000200" / "00001.mp4"
    assert all(path.exists() for path in videos.values())


def test_training_looks_at_no_test_clip(tmp_path: Path) -> None:
    """At `validation` where there is one, whichever splits evaluation measures; else at the last of those."""
    write_dataset(tmp_path / "drops", ["validation", "test_seen", "test_unseen"])
    seen: list[tuple[str, list[str]]] = []

    def look(step: int, clips: Any, videos: Any, scores: Any) -> dict[str, float]:
        seen.append((clips.splits[0].folder.name, [clips.row(i).caption for i in range(len(clips))]))
        return {}

    for splits in (("test_unseen",), ("test_seen", "test_unseen")):
        config = EvalConfig(clips=str(tmp_path / "drops"), splits=splits, every=1, seeds=1)
        validation(tmp_path / "run", config, LATE, RedTracker(), clips=2, look=look)(0)
        assert not chooses_by_the_test(TripwiresConfig(on_trip="roll_back"), config)
        assert chooses_by_the_test(TripwiresConfig(on_trip="roll_back", split="test_unseen"), config)
    assert seen == [("validation", ["square 00 falls.", "square 01 falls."])] * 2
    shutil.rmtree(tmp_path / "drops" / "validation")
    assert watched_split(config) == "test_unseen"
    assert chooses_by_the_test(TripwiresConfig(on_trip="roll_back"), config)


def test_nothing_to_measure_is_said(tmp_path: Path, config: EvalConfig) -> None:
    with pytest.raises(UserError, match="test_ood") as error:
        evaluate(tmp_path, config.model_copy(update={"splits": ("test_ood",)}), models(), RedTracker())
    assert error.value.code == "missing"
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    assert error.value.code == "unfinished"
