"""Scoring anybody's videos against PisaBench as published, and against a dataset folder: numbers known beforehand."""

import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers.falling import FPS, GRAVITY, SIDE, SIZE, RedTracker, film, rows_of, write_dataset
from helpers.pisabench import COLUMN, LINE, ClickTracker, open_real, square, write_real, write_sim, write_video

from posttrain.core import files
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.evaluation import score
from posttrain.evaluation.benchmarks.pisabench import open_benchmark
from posttrain.evaluation.records import print_table, summary
from posttrain.reporting import report

UNIT = math.sqrt(2) * SIZE
CENTRED = ((0, 0), (8, 8), (0, 0), (0, 0))  # above and below, of frames, rows, columns and colours
AT_16 = [0, 8, 15]  # frames of it that are 1/16 s apart, rounded; the published code takes 0, 7, 15


def test_real_clips_are_compared_at_the_right_moments_in_both_conventions(tmp_path) -> None:
    real = write_real(tmp_path / "real", [LINE])
    write_video(tmp_path / "good" / "0000.mp4", square(AT_16)[0])
    write_video(tmp_path / "late" / "0000.mp4", square([0, 6, 13])[0])
    tracker = ClickTracker()
    benchmark = open_real(real, tracker, tmp_path / "cache")
    assert [(truth.id, truth.caption, truth.row.fps) for truth in benchmark["real"]] == [
        ("0000", "A red square 0 falls.", 120)
    ]
    folders = {name: tmp_path / name for name in ("good", "late")}
    rows = {record.model: record for record in score.score(tmp_path / "out", benchmark, folders, tracker)}
    good, late = rows["good"].clips[0], rows["late"].clips[0]
    assert good.numbers["l2"] == good.numbers["chamfer"] == good.numbers["vanished"] == 0
    assert good.numbers["iou"] == 1
    assert good.released["l2"] == pytest.approx((0 + 1 + 0) / 3 / 2 / UNIT)  # mean over x and y
    assert late.numbers["l2"] == pytest.approx((0 + 2 + 2) / 3 / UNIT)
    assert late.released["l2"] == pytest.approx((0 + 1 + 2) / 3 / 2 / UNIT)
    assert good.true_path == good.paths[0]
    assert summary(rows["late"])["released"]["l2"]["mean"] == late.released["l2"]
    # the highest of the clicked objects, its own clicks alone, no more pictures than are needed
    assert tracker.clicked == [(20, 20, [[14, 4], [15, 2], [1, 1]], [1, 1, 0])]


def unsaid(folder: Path) -> Path:
    """The same clips, whose files do not say the rate."""
    for path in folder.rglob("clip_info.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fps"}))
    return folder


@pytest.mark.slow
def test_a_benchmark_says_its_rate_or_is_asked_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set of one's own at 16 frames per second, in PisaBench's layout, against itself."""
    mine, tracker = unsaid(write_real(tmp_path / "mine", [rows_of(2, 17).tolist()])), ClickTracker()
    with pytest.raises(UserError) as error:
        open_real(mine, tracker, tmp_path / "cache")
    assert (error.value.code, error.value.field) == ("required", "--truth-fps")
    truths = open_benchmark(mine, tracker.clicks, "tracker", tmp_path / "cache", fps=16)
    write_video(tmp_path / "same" / "0000.mp4", square(rows_of(2, 17))[0])
    (record,) = score.score(tmp_path / "out", truths, {"same": tmp_path / "same"}, tracker)
    assert record.clips[0].numbers["l2"] == 0
    assert record.clips[0].numbers["span"] == 1
    with pytest.raises(UserError) as error:
        open_benchmark(write_real(tmp_path / "real", [[2, 3]]), tracker.clicks, "", tmp_path / "cache", fps=16)
    assert (error.value.code, error.value.field) == ("conflict", "--truth-fps")
    with pytest.raises(UserError) as error:
        open_benchmark(mine, tracker.clicks, "", tmp_path / "cache", fps=0)
    assert (error.value.code, error.value.field) == ("value", "--truth-fps")
    write_dataset(tmp_path / "drops", clips=1)
    with pytest.raises(UserError) as error:
        open_benchmark(tmp_path / "drops", fps=16)
    assert (error.value.code, error.value.field) == ("conflict", "--truth-fps")
    assert "is assumed" not in capsys.readouterr().err
    # what was published is known by its number of real clips, or the names of simulated ones, and it is said
    for i in range(1, 361):
        shutil.copytree(mine / "0000", mine / f"{i:04d}")
    assert open_real(mine, tracker, tmp_path / "cache")["mine"][360].row.fps == 120
    assert "mine: " in capsys.readouterr().err
    published = open_benchmark(write_sim(tmp_path / "sim", 1))
    assert {truth.row.fps for truths in published.values() for truth in truths} == {16}
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["seen", "unseen"]


def test_masks_from_clicks_are_kept_until_a_longer_video_needs_more(tmp_path) -> None:
    real = write_real(tmp_path / "real", [[0] * 40 + [5] * 20])
    tracker = ClickTracker()
    truth = open_real(real, tracker, tmp_path / "cache")["real"][0]
    first = truth.masks(10)
    assert first.shape == (10, SIZE, SIZE)
    assert first.sum() == 10 * SIDE**2
    np.testing.assert_array_equal(open_real(real, tracker, tmp_path / "cache")["real"][0].masks(7), first[:7])
    assert [shown for shown, *_ in tracker.clicked] == [10]
    longer = open_real(real, tracker, tmp_path / "cache")["real"][0].masks(99)
    assert [tuple(some[:2]) for some in tracker.clicked] == [(10, 60), (60, 60)]  # SAM 2 is told the whole length
    np.testing.assert_array_equal(longer[:10], first)
    assert longer[50, 5 + SIDE - 1, COLUMN]
    other = open_benchmark(real, tracker.clicks, "another tracker", tmp_path / "cache")["real"][0]
    assert other.key != truth.key
    other.masks(1)
    assert len(tracker.clicked) == 3


def test_masks_beside_real_pictures_are_used(tmp_path) -> None:
    real = write_real(tmp_path / "real", [LINE])
    masks = np.zeros((20, 2, SIZE, SIZE), bool)
    masks[:, 1, 3:7, 5:9] = True
    np.savez_compressed(real / "0000" / "mask.npz", mask=masks)
    truth = open_benchmark(real)["real"][0]
    np.testing.assert_array_equal(truth.masks(4), masks[:4, 1])
    np.savez_compressed(real / "0000" / "mask.npz", mask=masks[:, :1])  # the clicks are on two objects
    with pytest.raises(UserError, match=r"mask.npz: mask is \(.*, 1, .*\), not \(frames, 2 or more objects, H, W\)"):
        open_benchmark(real)["real"][0].masks(4)


def test_simulated_clips_have_splits_and_their_last_object_drops(tmp_path) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim"))
    assert {split: [truth.id for truth in truths] for split, truths in benchmark.items()} == {
        "seen": ["00", "01"],
        "unseen": ["00", "01"],
    }
    for name in ("seen/00", "seen/01", "unseen/01"):
        pictures = square(rows_of(2 + int(name[-1]), 9))[0]
        write_video(tmp_path / "mine" / f"{name}-s0.mp4", pictures)
        write_video(tmp_path / "mine" / f"{name}-s1.mp4", np.repeat(pictures[:1], 9, 0))
    records = score.score(tmp_path / "out", benchmark, {"mine": tmp_path / "mine"}, RedTracker())
    assert [(record.split, record.total, record.seeds) for record in records] == [
        ("unseen", 1, 2),
        ("seen", 2, 2),
    ]
    clip = records[1].clips[1]
    frozen = np.abs(rows_of(3, 9) - 3).mean() / UNIT
    assert clip.id == "01"
    assert clip.numbers["l2"] == pytest.approx((0 + frozen) / 2)
    assert clip.numbers["time_error"] is None  # the drop height is not published
    assert open_benchmark(tmp_path / "sim" / "unseen").keys() == {"unseen"}
    assert open_benchmark(tmp_path).keys() == {"sim/seen", "sim/unseen"}


def test_our_own_clips_serve_too(tmp_path) -> None:
    write_dataset(tmp_path / "drops", clips=2, frames=17)
    for split in ("test_seen", "test_unseen"):
        for i in range(2):
            pictures = film(rows_of(2 + 2 * i + (split == "test_unseen"), 17), 4 + 5 * i, 200 + 10 * i)[0]
            write_video(tmp_path / "perfect" / split / f"{i:05d}-s0.mp4", pictures)
    records = score.score(
        tmp_path / "out", open_benchmark(tmp_path / "drops"), {"p": tmp_path / "perfect"}, RedTracker()
    )
    assert [(record.split, record.fps, record.frames) for record in records] == [
        ("unseen", 16, 17),
        ("seen", 16, 17),
    ]
    for record in records:
        for clip in record.clips:
            assert clip.numbers["l2"] == 0
            assert clip.numbers["time_error"] <= 0.5 / FPS


def test_padding_is_cut_off_and_size_does_not_matter(tmp_path) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim", 1) / "seen")
    late = square([2, *rows_of(2, 8)])[0]
    wide = np.zeros((9, SIZE, 56, 3), np.uint8)
    wide[:, :, 12:44] = late
    tall = np.zeros((9, 48, SIZE, 3), np.uint8)
    tall[:, 8:40] = late
    double = wide.repeat(2, 1).repeat(2, 2)
    for name, pictures in (("same", late), ("wide", wide), ("tall", tall), ("double", double)):
        write_video(tmp_path / name / "00.mp4", pictures)
    names = ("same", "wide", "tall", "double")
    records = score.score(tmp_path / "out", benchmark, {name: tmp_path / name for name in names}, RedTracker())
    clips = {record.model: record.clips[0] for record in records}
    assert clips["same"].numbers["l2"] > 0.005
    for name in names:
        assert clips[name] == clips["same"], name
    assert score.scored_size((1024, 1024)) == (256, 256)
    assert score.scored_size((64, 64)) == (64, 64)
    assert score.scored_size((480, 832)) == (256, 440)


def test_a_wrong_rate_in_the_files_can_be_mended(tmp_path) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim", 1) / "seen")
    write_video(tmp_path / "a" / "00.mp4", square(rows_of(2, 9))[0], fps=10)
    wrong = score.score(tmp_path / "one", benchmark, {"a": tmp_path / "a"}, RedTracker())[0]
    right = score.score(tmp_path / "two", benchmark, {"a": tmp_path / "a"}, RedTracker(), fps=16)[0]
    assert (wrong.fps, right.fps) == (10, 16)
    assert wrong.clips[0].numbers["l2"] > 0
    assert right.clips[0].numbers["l2"] == 0


def filmed_at(path: Path, times_F: np.ndarray, codec: str, pixels: str, start: int = 2, column: int = 4) -> None:
    """The fall of `write_dataset`'s first clips, filmed at other moments, with a time stamp for each picture.

    Edges lie between pixels: bodies that jump from one to the next seem to stand still and go on.
    """
    tops, rows = np.minimum(start + GRAVITY * times_F**2 / 2, SIZE - SIDE)[:, None], np.arange(SIZE)
    covered_FH = np.clip(np.minimum(rows + 1, tops + SIDE) - np.maximum(rows, tops), 0, 1)
    pictures = np.full((len(times_F), SIZE, SIZE, 3), 90.0)
    pictures[:, :, column : column + SIDE] += covered_FH[..., None, None] * (np.array([200, 20, 20]) - 90)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100 if codec == "gif" else 1000)
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, pixels
        if codec != "gif":
            stream.options = {"crf": "4"}
        for t, picture in zip(times_F, pictures.round().astype(np.uint8), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.time_base = Fraction(1, 100 if codec == "gif" else 1000)
            frame.pts = round(t / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.slow
def test_each_frame_has_its_own_time(tmp_path: Path) -> None:
    """One fall as GIF, WebM, at 60 frames per second, at any moments: L2 within 0.02, IoU 0.15, g 6%, whole spans."""
    write_dataset(tmp_path / "drops", ["test_unseen"], clips=1, frames=17)
    some = np.random.default_rng(1).choice(np.arange(1, 60), 40, replace=False)
    kinds = {
        "gif": ("gif", np.arange(31) / 30, "gif", "rgb8"),
        "webm": ("webm", np.arange(25) / 24, "libvpx-vp9", "yuv444p"),
        "fast": ("mp4", np.arange(61) / 60, "libx264", "yuv444p"),
        "varying": ("mkv", np.array([0, *np.sort(some), 60]) / 60, "libx264", "yuv444p"),
    }
    for name, (suffix, times_F, codec, pixels) in kinds.items():
        filmed_at(tmp_path / name / f"00000.{suffix}", times_F, codec, pixels)
    benchmark = open_benchmark(tmp_path / "drops")
    for name in kinds:
        (record,) = score.score(tmp_path / name / "out", benchmark, {name: tmp_path / name}, RedTracker())
        clip = record.clips[0]
        assert clip.numbers["l2"] < 0.02, name
        assert clip.numbers["iou"] > 0.85, name
        assert clip.numbers["span"] == 1, name
        g = clip.physics["g"]
        assert g is not None
        assert g[0] == pytest.approx(9.81, rel=0.06), name
        assert record.frames == len(kinds[name][1])
        shown = read_video(tmp_path / name / "out" / "samples" / name / "test_unseen" / "00000-s0.mp4")
        assert len(shown) == len(clip.paths[0]) == record.frames


def test_a_video_begins_as_its_clip_does(tmp_path: Path) -> None:
    """Another clip's video under this clip's name, and a true one without its first frames, are refused by name."""
    write_dataset(tmp_path / "drops", ["test_unseen"], clips=2, frames=17)
    true = [film(rows_of(2 + 2 * i, 17), 4 + 5 * i, 200 + 10 * i)[0] for i in (0, 1)]
    benchmark = open_benchmark(tmp_path / "drops")
    for name, pictures in (("other", true[1]), ("later", true[0][4:]), ("tall", np.pad(true[1], CENTRED))):
        write_video(tmp_path / name / "00000.mp4", pictures)
        with pytest.raises(UserError, match=rf"{name}/00000\.mp4.* clip 00000") as error:
            score.score(tmp_path / "out", benchmark, {name: tmp_path / name}, RedTracker())
        assert error.value.code == "mismatch"
    write_video(tmp_path / "true" / "00000.mp4", np.pad(true[0], CENTRED))
    (record,) = score.score(tmp_path / "out", benchmark, {"true": tmp_path / "true"}, RedTracker())
    assert record.clips[0].numbers["l2"] == 0
    # what is made here continues that picture, however badly
    write_video(tmp_path / "made" / "00000.mp4", np.zeros_like(true[0]))
    score.score(tmp_path / "made" / "out", benchmark, {"made": tmp_path / "made"}, RedTracker(), made=["made"])


def test_a_short_video_no_longer_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first frame frozen into 5 frames and 17: the shorter one is worse, and the table says what it lacks."""
    write_dataset(tmp_path / "drops", ["test_unseen"], clips=1, frames=17)
    frozen = np.repeat(film(rows_of(2, 1), 4, 200)[0], 17, 0)
    write_video(tmp_path / "short" / "00000.mp4", frozen[:5])
    write_video(tmp_path / "whole" / "00000.mp4", frozen)
    folders = {name: tmp_path / name for name in ("short", "whole")}
    short, whole = score.score(tmp_path / "out", open_benchmark(tmp_path / "drops"), folders, RedTracker())
    gaps = rows_of(2, 17) - 2
    assert short.clips[0].numbers["l2"] == pytest.approx((gaps[:5].sum() / UNIT + 12) / 17)
    assert whole.clips[0].numbers["l2"] == pytest.approx(gaps.mean() / UNIT)
    assert short.clips[0].numbers["span"] == pytest.approx(5 / 17)
    assert short.clips[0].released["l2"] == pytest.approx(gaps[:5].mean() / 2 / UNIT)
    assert short.clips[0].physics["permanence"] == [pytest.approx(5 / 17, abs=1e-6), 0]
    print_table([short, whole])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "true clip" in line]
    assert "short 0.29" in line
    assert "whole 1.00" in line
    report.report(tmp_path / "out")
    told = files.read_json(tmp_path / "out" / "report.json")
    assert [row["span"]["mean"] for row in told["rows"]] == [pytest.approx(5 / 17), 1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "short 0.29" in page
    assert ">Compared<small>" in page


def test_a_killed_scoring_continues_and_nothing_is_scored_twice(tmp_path, capsys) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim", 3) / "seen")
    for i in range(3):
        write_video(tmp_path / "a" / f"{i:02d}.mp4", square([2 + i] * 9)[0])
    folders = {"a": tmp_path / "a"}
    whole = score.score(tmp_path / "whole", benchmark, folders, RedTracker())
    with pytest.raises(KeyboardInterrupt):
        score.score(tmp_path / "cut", benchmark, folders, RedTracker(give_up_after=2))
    rest = RedTracker()
    again = score.score(tmp_path / "cut", benchmark, folders, rest)
    assert rest.calls == 1
    assert replace(again[0], seconds=0) == replace(whole[0], seconds=0)
    reused = RedTracker()
    score.score(tmp_path / "cut", benchmark, folders, reused)
    assert reused.calls == 0
    assert "a on seen clips: reused from" in capsys.readouterr().err
    write_video(tmp_path / "a" / "01.mp4", square(rows_of(3, 9))[0])
    changed = score.score(tmp_path / "cut", benchmark, folders, reused)
    assert reused.calls == 3
    assert changed[0].clips[1].numbers["l2"] == 0


def test_scores_of_another_tracker_do_not_mix(tmp_path) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim", 1) / "seen")
    write_video(tmp_path / "a" / "00.mp4", square([2] * 9)[0])
    score.score(tmp_path / "out", benchmark, {"a": tmp_path / "a"}, RedTracker())
    other = RedTracker()
    torch.nn.init.constant_(other.module.weight, 5.0)
    with pytest.raises(
        UserError, match=r"protocol\.json: its scores were made with another tracker; choose another --out"
    ):
        score.score(tmp_path / "out", benchmark, {"a": tmp_path / "a"}, other)


def test_what_has_no_video_is_said(tmp_path, capsys) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim"))
    write_video(tmp_path / "a" / "seen" / "01.mp4", square([3] * 9)[0])
    score.score(tmp_path / "out", benchmark, {"a": tmp_path / "a"}, RedTracker())
    said = capsys.readouterr().err
    assert "a on seen clips: 1 of 2 have a video in" in said
    assert f"a on unseen clips: left out, {tmp_path / 'a'} has no video of them\n" in said
    write_video(tmp_path / "b" / "01.mp4", square([2] * 9)[0])
    with pytest.raises(UserError, match=r"b: has no video of any clip; name them by the clips, as in seen/00\.mp4"):
        score.score(tmp_path / "out", benchmark, {"b": tmp_path / "b"}, RedTracker())


def test_what_is_wrong_with_a_benchmark_is_named(tmp_path) -> None:
    real = write_real(tmp_path / "real", [LINE[:2]])
    info = real / "0000" / "clip_info.json"
    with pytest.raises(UserError, match=r"0000: SAM 2 must make its masks from clicks; name one, as in --tracker face"):
        open_benchmark(real)
    good = json.loads(info.read_text())
    for points in ([], [{"positive": []}], [{"positive": [[40, 1]]}], [{"positive": [[1, "a"]]}], "x", [[1, 2]]):
        info.write_text(json.dumps(good | {"points": points}))
        with pytest.raises(UserError, match=r"clip_info\.json: points"):
            open_benchmark(real)
    info.write_text("{}")
    with pytest.raises(UserError, match=r"clip_info\.json: prompt: is missing"):
        open_benchmark(real)
    for fps in (0, -16, "16", True):
        info.write_text(json.dumps(good | {"fps": fps}))
        with pytest.raises(UserError) as error:
            open_benchmark(real)
        assert (error.value.code, error.value.field) == ("value", "fps")
    info.write_text(json.dumps(good))
    (real / "0000" / "00001.jpg").write_bytes(b"x")
    tracker = ClickTracker()
    with pytest.raises(UserError, match=r"00001\.jpg: cannot be read as a picture"):
        open_real(real, tracker, tmp_path / "cache")["real"][0].masks(9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no clips to compare with"):
        open_benchmark(tmp_path / "empty")


def test_pickles_in_masks_are_refused(tmp_path) -> None:
    sim = write_sim(tmp_path / "sim", 1)
    np.savez(sim / "seen" / "00" / "mask.npz", mask=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"mask\.npz: is missing or damaged"):
        open_benchmark(sim)["seen"][0].masks(1)
