"""Judges: what a score is worth by hand, the simulator's truth, and whole folders."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers.falling import FPS, SIZE, RedTracker, film, rows_of, write_clip, write_dataset, write_groups
from helpers.forked import launch
from helpers.llava import count, samples, url

from posttrain import cli
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import Scores, gather
from posttrain.evaluation.sample import write_video
from posttrain.judges import simulator
from posttrain.judges.folder import find
from posttrain.judges.questions import MASS, pictures, questions, spread, weigh, word

CPU = torch.device("cpu")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """With drops, a dataset folder of groups, and made, a folder of samples."""
    write_groups(tmp_path / "drops")
    samples(tmp_path / "made")
    with contextlib.chdir(tmp_path):
        yield tmp_path


# ---------------------------------------------------------------- questions


def test_the_questions_are_those_of_videocon_physics() -> None:
    assert questions("a cup falls.") == (
        'Does this video entail the description: "a cup falls."?',
        "Does this video follow the physical laws?",
    )


def test_an_answer_by_hand() -> None:
    assert weigh(0.3, 0.1, "", "") == pytest.approx((0.75, 0.4))
    assert weigh(0.0, 0.1, "", "") == (0, 0.1)
    for yes, no in ((1e-30, 3e-30), (0.0, 0.0), (MASS / 2.1, MASS / 2.1), (math.nan, 0.5)):
        with pytest.raises(UserError, match="me: ") as caught:
            weigh(yes, no, "me", "a?")
        assert caught.value.code == "answer"


def test_spellings_of_yes_and_no() -> None:
    for token in (
        "Yes",
        " yes",
        "YES",
        "\u0120Yes",
        "\u2581yes",
        "Yes,",
        "**Yes",
        '"Yes"',
        "\u010aYes",
        "Yes.\n",
        "\u201cyes\u201d",
    ):
        assert word(token) == "yes", token
    for token in ("No", "\u0120no", "\u2581No", "NO!", " No."):
        assert word(token) == "no", token
    for token in ("Yesterday", "not", "Now", "None", "<think>", "Ye", "", "\u0120", "N", "yes no", "\u0120\u0120noyes"):
        assert word(token) == "", token


def test_pictures_are_evenly_spread(tmp_path: Path) -> None:
    assert spread(np.arange(33) / 16, 5).tolist() == [0, 8, 16, 24, 32]
    assert spread(np.arange(10) / 16, 4).tolist() == [0, 3, 6, 9]
    assert spread(np.arange(3) / 16, 16).tolist() == [0, 1, 2]
    assert spread(np.arange(9) / 16, 1).tolist() == [0]
    assert spread(np.array([0, 0.1, 0.2, 0.3, 1.0, 2.0]), 3).tolist() == [0, 4, 5]  # by time, not by number
    video, instances = film(rows_of(2, 9), 8, 200)
    write_clip(tmp_path / "a.mp4", video, instances)
    assert (pictures(tmp_path / "a.mp4", 3) == video[[0, 4, 8]]).all()


# ---------------------------------------------------------------- the simulator


def test_severity_and_metrics_by_hand() -> None:
    assert simulator.of_severity(0.25) == (1.0, 0.75)
    assert simulator.of_metrics(l2=0.02, l2_frozen=0.08, vanished=0.1) == pytest.approx((0.9, 0.75))
    assert simulator.of_metrics(l2=0.0, l2_frozen=0.3, vanished=0.0) == (1.0, 1.0)
    assert simulator.of_metrics(l2=0.3, l2_frozen=0.3, vanished=0.0) == (1.0, 0.0)
    assert simulator.of_metrics(l2=0.0, l2_frozen=0.0, vanished=0.0) == (1.0, 1.0)  # nothing moves, in neither
    assert simulator.of_metrics(l2=0.01, l2_frozen=0.0, vanished=0.0) == (1.0, 0.0)


def test_laws_of_the_mapping() -> None:
    """Scores are in [0, 1], and no better for what is worse."""
    random = np.random.default_rng(0)
    for l2, more, frozen, vanished in random.random((200, 4)):
        some, worse = (simulator.of_metrics(value, frozen, vanished) for value in (l2, l2 + more))
        assert all(0 <= score <= 1 for score in (*some, *worse))
        assert worse.pc <= some.pc
    severities = np.linspace(0, 1, 11)
    found = [simulator.of_severity(severity).pc for severity in severities]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1.0, 0.0)


def test_samples_against_their_truth(tmp_path: Path) -> None:
    """The truth itself; two rows too low; frozen; gone in the last quarter; twice as large and at half the rate."""
    write_dataset(tmp_path / "drops", ["train"], clips=1, frames=16)
    (tmp_path / "made").mkdir()
    true = rows_of(2, 16)
    low = np.minimum(true + 2, SIZE - 6)
    low[0] = 2
    shown = {"s0": film(true, 4, 200), "s1": film(low, 4, 200), "s2": film([2] * 16, 4, 200), "s3": film(true, 4, 200)}
    shown["s3"][0][12:] = 90
    for name, (video, instances) in shown.items():
        write_clip(tmp_path / "made" / f"00000-{name}.mp4", video, instances)
    large = film(true, 4, 200)[0][::2].repeat(2, 1).repeat(2, 2)
    write_video(tmp_path / "made" / "00000-s4.mp4", large, FPS / 2)

    clips = Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False)
    judge = simulator.samples(clips, RedTracker(), CPU)
    found = [judge(tmp_path / "made" / f"00000-s{seed}.mp4", "") for seed in range(5)]
    assert found[0] == (1.0, 1.0)
    assert found[1] == pytest.approx((1.0, 1 - (low - true).mean() / (true - 2).mean()))
    assert found[2] == (1.0, 0.0)
    frozen = (true - 2).mean() / (math.sqrt(2) * SIZE)
    assert found[3] == pytest.approx((0.75, max(0.0, 1 - 0.25 / frozen)))  # where it vanished, L2 is 1
    assert found[4].sa == 1
    assert found[4].pc > 0.95  # compressed with loss


def test_short_varying_and_other_samples_are_judged_by_their_frames_own_times(tmp_path: Path) -> None:
    """Missing frames are charged; half of the frames at their own times are the truth; other clips are refused."""
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=17)
    made, true = tmp_path / "made", rows_of(2, 17)
    made.mkdir()
    write_clip(made / "00000-s0.mp4", *film(true[:9], 4, 200))
    some = np.array([0, 1, 2, 4, 5, 8, 9, 10, 11, 13, 14, 16])
    with av.open(str(made / "00000-s1.mkv"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=1000, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "rgb24"
        for k, picture in zip(some, film(true[some], 4, 200)[0], strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * k / FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_clip(made / "00000-s2.mp4", *film(rows_of(4, 17), 9, 210))
    write_clip(made / "00000-s3.mp4", *film(true[4:], 4, 200))
    judge = simulator.samples(Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False), RedTracker(), CPU)
    short, frozen = judge(made / "00000-s0.mp4", ""), (true - 2).mean() / (math.sqrt(2) * SIZE)
    assert short == pytest.approx((1 - 8 / 17, max(0.0, 1 - 8 / 17 / frozen)))
    assert judge(made / "00000-s1.mkv", "") == (1.0, 1.0)
    for name in ("00000-s2.mp4", "00000-s3.mp4"):
        with pytest.raises(UserError, match=name) as error:
            judge(made / name, "")
        assert error.value.code == "mismatch"


def test_samples_are_judged_by_the_clip_that_is_meant(tmp_path: Path) -> None:
    """Of clips called scene and scene-s2 each shall have the other's seed 2."""
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=9)
    place = tmp_path / "drops" / "train"
    rows = read_jsonl(place / "metadata.jsonl")
    for row, name in zip(rows, ("scene", "scene-s2"), strict=True):
        (place / row["file_name"]).rename(place / f"{name}.mp4")
        row |= {"file_name": f"{name}.mp4"}
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "made").mkdir()
    write_clip(tmp_path / "made" / "scene-s2.mp4", *film(rows_of(2, 9), 4, 200))
    write_clip(tmp_path / "made" / "scene-s2-s0.mp4", *film(rows_of(4, 9), 9, 210))
    found, _ = find(tmp_path / "made", tmp_path / "drops", "train")
    assert [(v.name, v.caption) for v in found] == [
        ("scene-s2-s0.mp4", "square 01 falls."),
        ("scene-s2.mp4", "square 00 falls."),
    ]
    judge = simulator.samples(Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False), RedTracker(), CPU)
    assert [judge(video.path, video.caption) for video in found] == [(1.0, 1.0)] * 2
    with pytest.raises(UserError, match=r"other-s0\.mp4") as caught:
        judge(tmp_path / "made" / "other-s0.mp4", "")
    assert caught.value.code == "mismatch"


# ---------------------------------------------------------------- whole folders


def test_a_folder_of_groups_by_severity(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "drops", "--judge", "simulator"]) == 0
    rows = read_jsonl(home / "drops" / "train" / "scores.jsonl")
    assert [row["file_name"] for row in rows] == [f"0000{g}-{i}.mp4" for g in (0, 1) for i in range(4)]
    assert [(row["sa"], row["pc"]) for row in rows] == [(1.0, 1.0), (1.0, 0.75), (1.0, 0.5), (1.0, 0.25)] * 2
    assert "scores: 8 videos, on average sa 1.000, pc 0.625" in capsys.readouterr().out
    clips = Clips(DataConfig(clips="drops"), preload=False, violated=True)
    members, _ = gather(clips, GroupsConfig(counterfactuals=True))
    for row, index in zip(rows, range(8), strict=True):
        if clips.row(index).violation:
            assert members.scores(index) == (row["sa"], row["pc"])  # what groups take it for


@pytest.mark.slow
def test_samples_are_scored_where_groups_look(home: Path, llava: Path, port: int) -> None:
    """By a model and by its server, with the same result; what is no sample of a true clip is left alone."""
    write_video(home / "made" / "other-s0.mp4", film(rows_of(2, 5), 8, 200)[0], FPS)
    common = ["score", "made", "--clips", "drops", "--frames", "2"]
    assert cli.main([*common, "--judge", "vlm", "--model", str(llava)]) == 0
    config = GroupsConfig(losers=2, samples=("made",))
    members, groups = gather(Clips(DataConfig(clips="drops"), preload=False), config)
    found = [members.scores(index) for group in groups for index in sorted(group.losers)]
    assert len(set(found)) == 4
    rows = read_jsonl(home / "made" / "scores.jsonl")
    assert [Scores(row["sa"], row["pc"]) for row in rows] == found
    assert {row["judge"] for row in rows} == {f"vlm {llava}, 2 frames"}
    assert all(MASS <= row["mass"] <= 1.001 for row in rows)
    (home / "made" / "scores.jsonl").unlink()
    before = count(port)
    assert cli.main([*common, "--judge", "endpoint", "--model", "tiny", "--url", url(port)]) == 0
    assert count(port) == before + 8
    again = read_jsonl(home / "made" / "scores.jsonl")
    assert [row["file_name"] for row in again] == [row["file_name"] for row in rows]
    for old, new in zip(rows, again, strict=True):
        assert (new["sa"], new["pc"]) == pytest.approx((old["sa"], old["pc"]), abs=1e-6)


def test_samples_by_the_embedded_tracker(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores that another version of the judge gave, or an unknown one, are given again, which a line says."""
    command = ["score", "made", "--clips", "drops", "--judge", "simulator"]
    assert cli.main(command) == 0
    path = home / "made" / "scores.jsonl"
    rows = read_jsonl(path)
    assert len(rows) == 4
    assert all(0 <= row[key] <= 1 for row in rows for key in ("sa", "pc"))
    assert "another version" not in capsys.readouterr().err
    judge, older = rows[0]["judge"], [{**row, "sa": 0.123, "key": "other", "version": "other"} for row in rows[:2]]
    del older[0]["version"]
    files.write_jsonl(path, [*map(files.seal, older), *rows[2:]])
    assert cli.main(command) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "another version" in line]
    assert said == [f"made/scores.jsonl: 2 scores are of another version of {judge}; scored again"]
    assert read_jsonl(path) == rows
    damaged = [rows[0], {**rows[1], "file_name": "00009-s0.mp4"}, {**rows[2], "judge": "who"}, {**rows[3], "sa": 0.5}]
    (home / "made" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damaged))
    assert cli.main(["score", "made", "--clips", "drops", "--judge", "simulator"]) == 0
    assert read_jsonl(home / "made" / "scores.jsonl") == rows


@pytest.mark.slow
def test_what_changed_is_scored_again_and_judges_are_not_mixed(
    home: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["score", "made", "--clips", "drops", "--frames", "2"]
    command = [*common, "--judge", "endpoint", "--model", "tiny", "--url", url(port)]
    assert cli.main(command) == 0
    rows, before = read_jsonl(home / "made" / "scores.jsonl"), count(port)
    assert cli.main(command) == 0
    assert count(port) == before
    write_video(home / "made" / "00001-0-s0.mp4", film([2, 2, 3, 4, 9], 16, 250)[0], FPS)
    assert cli.main(command) == 0
    assert count(port) == before + 2
    again = read_jsonl(home / "made" / "scores.jsonl")
    assert [row["file_name"] for row in again] == [row["file_name"] for row in rows]
    assert [old == new for old, new in zip(rows, again, strict=True)] == [True, True, False, True]
    capsys.readouterr()
    assert cli.main([*command, "--frames", "3"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("made/scores.jsonl: ")
    assert said.endswith("[other_run]")
    assert read_jsonl(home / "made" / "scores.jsonl") == again


def scored(home: Path, command: list[str]) -> None:
    os.chdir(home)
    raise SystemExit(cli.main(command))


@pytest.mark.slow
def test_a_killed_scoring_continues(home: Path, port: int) -> None:
    """SIGKILL after the second row of eight; then only what is missing is asked, at most one clip's answers twice."""
    command = ["score", "drops", "--judge", "endpoint", "--model", "tiny", "--url", url(port, "slow"), "--frames", "2"]
    path, before = home / "drops" / "train" / "scores.jsonl", count(port)
    process = launch(scored, home, command)
    while not path.exists() or len(read_jsonl(path)) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = read_jsonl(path)
    assert 2 <= len(kept) < 8
    command[7] = url(port)
    assert cli.main(command) == 0
    rows = read_jsonl(path)
    assert rows[: len(kept)] == kept
    assert len(rows) == 8
    assert 16 <= count(port) - before <= 17


@pytest.mark.parametrize(
    ("command", "begins", "code"),
    [
        (["made", "--judge", "vlm", "--clips", "drops"], "--model: ", "required"),
        (["made", "--judge", "endpoint", "--model", "m"], "--url: ", "required"),
        (["drops", "--judge", "simulator", "--model", "m"], "--model: ", "conflict"),
        (["made", "--judge", "vlm", "--model", "m", "--rate", "3"], "--rate: ", "conflict"),
        (["made", "--judge", "vlm", "--model", "m", "--side", "64"], "--side: ", "conflict"),
        (["drops", "--judge", "simulator", "--clips", "drops"], "drops: ", "no_clips"),
        (["made", "--judge", "simulator"], "made/00000-0-s0.mp4: ", "required"),
        (["missing", "--judge", "simulator"], "missing: ", "no_clips"),
    ],
)
def test_what_does_not_go_together_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], command: list[str], begins: str, code: str
) -> None:
    assert cli.main(["score", *command]) == 1
    line = capsys.readouterr().err
    assert line.startswith(begins)
    assert line.endswith(f" [{code}]\n")
    assert line.count("\n") == 1
