"""Videos of any kind: which frames are seen and when, which part of the picture, which files are left out, and why."""

import csv
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from falling import film, rows_of, write_dataset
from test_stages import command, contents
from tiny import wan_folder

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data import videos
from posttrain.data.dataset import Clips, DataConfig, open_split
from posttrain.data.latents import Latents
from posttrain.data.videos import Wanted, centred, choose, entries, inspect, moved, nearest, plan, read, see
from posttrain.models.base import ModelConfig
from posttrain.models.wan import loading as wan

LEVEL = 4  # frame k of a test video is grey of brightness 4 k
WANTED = {"frames": 5, "fps": 8.0, "size": [16, 16]}


def write(
    path: Path,
    times: Sequence[float],
    size: tuple[int, int] = (32, 32),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    mark: int | None = None,
    turned: int = 0,
    aspect: Fraction | None = None,
    sound: bool = False,
    base: int = 12000,
) -> Path:
    """A video whose frame k is shown at times[k] seconds; `mark`: a white top left corner of so many pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, base)
        if codec == "libx264":
            stream.options = {"crf": "1", "bf": "2"}  # frames lie in the file in another order than that of time
        if turned:
            stream.set_display_rotation(turned)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if sound:
            audio = container.add_stream("aac", rate=44100)
        for k, time in enumerate(times):
            picture = np.full((*size, 3), LEVEL * k, np.uint8)
            if mark:
                picture[:mark, :mark] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * base), Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
            silence.sample_rate = 44100
            for part in (silence, None):
                container.mux(audio.encode(part))
    return path


def steady(count: int, fps: float) -> list[float]:
    return [k / fps for k in range(count)]


def shown(pictures: np.ndarray) -> list[int]:
    """Which frame of the file each picture is."""
    return [round(float(picture[4:-4, 4:-4].mean()) / LEVEL) for picture in pictures]


def clip_of(path: Path, wanted: Wanted) -> np.ndarray:
    view, notes = see(inspect(path), wanted)
    assert view is not None, notes
    return read(path, view)


# ---------------------------------------------------------------- time


def test_the_nearest_frame_is_seen_and_of_two_the_earlier() -> None:
    times = np.array([0.0, 1.0, 2.0, 4.0])
    assert nearest(times, np.array([0.0, 0.4, 0.5, 0.6, 1.5, 2.9, 3.0, 3.1, 9.0])).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    random = np.random.default_rng(0)
    times, at = np.cumsum(random.uniform(0.01, 0.1, 50)), random.uniform(0, 3, 200)
    assert nearest(times, at).tolist() == np.abs(times[:, None] - at).argmin(0).tolist()


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4]),
        (30, [0, 4, 7, 11, 15]),  # 3.75 per frame: 3.75, 7.5 (the earlier), 11.25, 15
        (24, [0, 3, 6, 9, 12]),
        (120, [0, 15, 30, 45, 60]),
        (6, [0, 1, 1, 2, 3]),  # 0.75 per frame: 0.75, 1.5 (the earlier), 2.25, 3
    ],
)
def test_a_file_is_retimed_by_its_own_clock(tmp_path, fps, expected) -> None:
    path = write(tmp_path / "a.mp4", steady(expected[-1] + 1, fps))
    assert shown(clip_of(path, Wanted(5, 8.0, (32, 32)))) == expected


def test_a_varying_rate_is_followed(tmp_path) -> None:
    times = [0, 0.01, 0.02, 0.13, 0.2, 0.24, 0.26, 0.3, 0.37, 0.45, 0.52]
    path = write(tmp_path / "a.mp4", times)
    assert shown(clip_of(path, Wanted(5, 8.0, (32, 32)))) == [0, 3, 5, 8, 10]
    assert see(inspect(path), Wanted(5, 8.0, (32, 32)))[1] == ["retimed: a varying rate to 8 fps"]


@pytest.mark.parametrize(
    ("count", "fps", "long_enough"), [(5, 8, True), (4, 8, False), (16, 30, True), (15, 30, False), (61, 120, True)]
)
def test_a_clip_that_ends_too_early_is_left_out(count, fps, long_enough) -> None:
    places, _, notes = plan(np.array(steady(count, fps)), (32, 32), Wanted(5, 8.0, (32, 32)))
    assert (places is not None) == long_enough
    if not long_enough:
        assert notes == [f"too short: its last frame is at {(count - 1) / fps:.2f} s, 5 frames at 8 fps reach 0.50 s"]


def test_what_is_done_is_said() -> None:
    def notes(count: int, fps: float, size: tuple[int, int], wanted: tuple[int, int] = (16, 16)) -> list[str]:
        return plan(np.array(steady(count, fps)), size, Wanted(5, 8.0, wanted))[2]

    assert notes(5, 8, (16, 16)) == []
    assert notes(5, 8, (32, 32)) == ["scaled: 32 x 32 to 16 x 16 pixels"]
    assert notes(5, 8, (8, 8)) == ["enlarged: 8 x 8 to 16 x 16 pixels"]
    assert notes(16, 30, (16, 16)) == ["retimed: 30 fps to 8 fps"]
    assert notes(4, 6, (16, 16)) == ["retimed: 6 fps to 8 fps, 1 pictures are held"]
    assert notes(25, 8, (16, 16)) == ["cut: the first 0.50 of 3.00 s"]
    assert notes(5, 8, (16, 32)) == ["cropped: 16 x 32 to 16 x 16 pixels (height x width)"]
    assert notes(5, 8, (101, 33)) == [
        "cropped: 101 x 33 to 33 x 33 pixels (height x width)",
        "scaled: 33 x 33 to 16 x 16 pixels",
    ]


# ---------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("size", "shape", "box"),
    [
        ((1080, 1920), (256, 256), (0, 420, 1080, 1080)),
        ((1920, 1080), (256, 256), (420, 0, 1080, 1080)),
        ((1920, 1080), (480, 832), (648, 0, 623, 1080)),  # a portrait clip gives a landscape strip
        ((481, 853), (480, 832), (0, 9, 481, 834)),
        ((64, 64), (64, 64), (0, 0, 64, 64)),
    ],
)
def test_the_box_is_the_largest_in_the_middle(size, shape, box) -> None:
    assert centred(size, shape) == box


@pytest.mark.parametrize(
    ("crop", "wide", "tall"),
    [
        ("top", (0, 420, 1080, 1080), (0, 0, 1080, 1080)),
        ("bottom", (0, 420, 1080, 1080), (840, 0, 1080, 1080)),
        ("left", (0, 0, 1080, 1080), (420, 0, 1080, 1080)),
        ("right", (0, 840, 1080, 1080), (420, 0, 1080, 1080)),
    ],
)
def test_the_box_may_lie_at_a_side(crop, wide, tall) -> None:
    for size, box in (((1080, 1920), wide), ((1920, 1080), tall)):
        assert moved(centred(size, (256, 256)), size, crop) == box


def test_without_cropping_another_shape_is_left_out(tmp_path) -> None:
    write(tmp_path / "a.mp4", steady(5, 8), (32, 32))
    write(tmp_path / "b.mp4", steady(5, 8), (32, 34))
    config = DataConfig(clips=str(tmp_path), **WANTED, crop="none", uncaptioned="empty")
    clips = Clips(config, preload=False)
    assert clips.ids == ["a.mp4"]
    assert clips.splits[0].told[1]["notes"] == ["another shape: 32 x 34 pixels (height x width), and data.crop is none"]
    with pytest.raises(ValueError, match="crop is for clips of another size"):
        DataConfig(clips="x", crop="left")


def test_pictures_are_cropped_in_the_middle_and_scaled(tmp_path) -> None:
    path = write(tmp_path / "a.mp4", [0], (32, 64), mark=16)
    whole = clip_of(path, Wanted(1, 8.0, (32, 64)))[0, :, :, 0]
    assert (whole[2:14, 2:14] > 250).all()
    assert whole[20:, 20:].max() < 5
    assert clip_of(path, Wanted(1, 8.0, (32, 32)))[0].max() < 30  # columns 16 to 48, beside the mark
    half = clip_of(path, Wanted(1, 8.0, (16, 32)))[0, :, :, 0]
    assert (half[1:7, 1:7] > 250).all()
    assert half[10:, 10:].max() < 5


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_turned_phone_video_is_upright(tmp_path, turned) -> None:
    path = write(tmp_path / "a.mp4", steady(5, 8), (32, 48), mark=12, turned=turned)
    facts = inspect(path)
    assert facts.size == ((32, 48) if turned == 180 else (48, 32))
    picture = clip_of(path, Wanted(5, 8.0, facts.size))[0, :, :, 0]
    bright = {
        (row, column)
        for row, part in ((0, slice(2, 10)), (1, slice(-10, -2)))
        for column, side in ((0, slice(2, 10)), (1, slice(-10, -2)))
        if picture[part, side].mean() > 200
    }
    assert bright == {{90: (1, 0), 180: (1, 1), -90: (0, 1)}[turned]}  # counterclockwise: down, across, right


def test_wide_pixels_are_made_square(tmp_path) -> None:
    path = write(tmp_path / "a.mp4", [0], (32, 32), mark=16, aspect=Fraction(2, 1))
    assert inspect(path).size == (32, 64)
    picture = clip_of(path, Wanted(1, 8.0, (32, 64)))[0, :, :, 0]
    assert picture[8, 28] > 200
    assert picture[8, 36] < 60


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.gif", "gif", "gray"),
    ],
)
def test_other_containers_are_read(tmp_path, name, codec, pixels) -> None:
    path = write(tmp_path / name, steady(8, 10), codec=codec, pixels=pixels, base=10 if name == "a.avi" else 12000)
    assert shown(clip_of(path, Wanted(3, 5.0, (32, 32)))) == [0, 2, 4]


def test_sound_does_not_matter(tmp_path) -> None:
    silent, loud = write(tmp_path / "a.mp4", steady(5, 8)), write(tmp_path / "b.mp4", steady(5, 8), sound=True)
    np.testing.assert_array_equal(clip_of(silent, Wanted(5, 8.0, (16, 16))), clip_of(loud, Wanted(5, 8.0, (16, 16))))


# ---------------------------------------------------------------- lists


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("metadata.jsonl", ("file_name", "caption")),  # finetrainers, videofolder
        ("metadata.csv", ("video", "prompt")),  # DiffSynth-Studio
        ("metadata.csv", ("file_name", "text")),
        ("metadata.json", ("video", "prompt")),
        ("train/metadata.csv", ("path", "text")),
    ],
)
def test_tables_are_read(tmp_path, name, columns) -> None:
    file, text = columns
    table(tmp_path / name, [{"other": 1, file: f"v/{i}.mp4", text: f'clip {i}, "so"'} for i in range(2)])
    found = entries(tmp_path, "train")
    assert [(entry.name, entry.caption) for entry in found] == [
        ("v/0.mp4", 'clip 0, "so"'),
        ("v/1.mp4", 'clip 1, "so"'),
    ]
    assert found[0].folder == (tmp_path / name).parent
    assert entries(tmp_path / name, "train") == found


def test_lists_and_captions_beside_the_videos_are_read(tmp_path) -> None:
    (tmp_path / "videos.txt").write_text("v/b.mp4\nv/a.mp4\n")
    (tmp_path / "prompt.txt").write_text("second\nfirst\n")
    assert [(e.name, e.caption) for e in entries(tmp_path, "train")] == [("v/b.mp4", "second"), ("v/a.mp4", "first")]
    (tmp_path / "prompt.txt").write_text("second\n")
    with pytest.raises(UserError, match=r"prompt\.txt: has 1 lines, but videos\.txt 2; write one caption a line"):
        entries(tmp_path, "train")
    for name, text in (("b.MP4", "it falls\n"), ("a.mov", ""), ("c.mkv", None)):
        (tmp_path / "beside" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "beside" / name).touch()
        if text is not None:
            (tmp_path / "beside" / name).with_suffix(".txt").write_text(text)
    (tmp_path / "beside" / "notes.md").touch()
    found = [(entry.name, entry.caption) for entry in entries(tmp_path / "beside", "train")]
    assert found == [("a.mov", None), ("b.MP4", "it falls"), ("c.mkv", None)]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "videos.txt"])
@pytest.mark.parametrize("prefix", ["train/", ""])
def test_a_list_beside_the_splits_counts_before_their_videos(tmp_path, name, prefix) -> None:
    """Names as in a videofolder, train/a.mp4, or as DiffSynth-Studio once had it, a.mp4, which lies in train/."""
    for video in ("train/a.mp4", "train/b.mp4", "test/c.mp4"):
        write(tmp_path / video, steady(5, 8))
    rows = [{"file_name": f"{prefix}{video}.mp4", "text": f"{video} falls"} for video in "ba"]
    rows += [{"file_name": "test/c.mp4", "text": "another split's"}]
    if name == "videos.txt":
        (tmp_path / name).write_text("\n".join(row["file_name"] for row in rows))
        (tmp_path / "prompts.txt").write_text("\n".join(row["text"] for row in rows))
    else:
        table(tmp_path / name, rows)
    found = entries(tmp_path, "train")
    assert [(entry.name, entry.caption) for entry in found] == [
        ("train/b.mp4", "b falls"),
        ("train/a.mp4", "a falls"),
    ]
    assert len(choose(found, Wanted(5, 8.0, (16, 16)), "leave_out")[0]) == 2
    if prefix:
        assert entries(tmp_path, "val") == []  # what is listed is other splits'
    if name != "videos.txt":
        assert entries(tmp_path / name, "train") == found


def test_a_list_that_is_none_is_named(tmp_path) -> None:
    table(tmp_path / "metadata.csv", [{"clip": "a.mp4", "text": "x"}])
    with pytest.raises(UserError, match=r"metadata\.csv: has no column of file names; call it one of file_name, video"):
        entries(tmp_path, "train")
    table(tmp_path / "metadata.csv", [{"video": "", "text": "x"}])
    with pytest.raises(UserError, match=r"metadata\.csv:1: names no video"):
        entries(tmp_path, "train")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet: is no folder and no"):
        entries(tmp_path / "a.parquet", "train")


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "link.mp4"])
def test_a_list_may_not_lead_out_of_its_folder(tmp_path, name) -> None:
    write(tmp_path / "a.mp4", steady(5, 8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "a.mp4")
    table(tmp_path / "in" / "metadata.csv", [{"video": name, "prompt": "x"}])
    with pytest.raises(UserError, match="points outside the folder"):
        entries(tmp_path / "in", "train")
    (tmp_path / "in" / "metadata.csv").unlink()
    with pytest.raises(UserError, match="points outside the folder"):
        entries(tmp_path / "in", "train")


def mine(folder: Path) -> Path:
    """Videos of all kinds, good and bad."""
    write(folder / "same.mp4", steady(5, 8), (16, 16))
    write(folder / "wide.mp4", steady(21, 30), (16, 34), mark=6)
    write(folder / "short.mp4", steady(3, 8))
    write(folder / "torn.mp4", steady(9, 8))
    os.truncate(folder / "torn.mp4", 700)
    (folder / "text.mp4").write_text("not a video")
    write(folder / "mute.mp4", steady(6, 8))
    (folder / "twin.mp4").write_bytes((folder / "same.mp4").read_bytes())
    names = ["same", "wide", "short", "torn", "text", "gone", "twin", "same"]
    rows = [{"file_name": f"{name}.mp4", "caption": f"{name.replace('twin', 'same')} falls"} for name in names]
    rows[-1]["caption"] = "another caption"
    rows.insert(5, {"file_name": "mute.mp4", "caption": " "})
    table(folder / "metadata.jsonl", rows)
    return folder


def test_what_is_left_out_is_told_with_the_reason(tmp_path) -> None:
    rows, views, told = choose(entries(mine(tmp_path), "train"), Wanted(5, 8.0, (16, 16)), "leave_out")
    assert [(row["file_name"], row["caption"]) for row in rows] == [
        ("same.mp4", "same falls"),
        ("wide.mp4", "wide falls"),
        ("same.mp4", "another caption"),
    ]
    assert len(views) == 3
    assert [(row["file"], row["used"], *row["notes"]) for row in told] == [
        ("same.mp4", True),
        (
            "wide.mp4",
            True,
            "retimed: 30 fps to 8 fps",
            "cut: the first 0.50 of 0.67 s",
            "cropped: 16 x 34 to 16 x 16 pixels (height x width)",
        ),
        ("short.mp4", False, "too short: its last frame is at 0.25 s, 5 frames at 8 fps reach 0.50 s"),
        ("torn.mp4", False, "cannot be read: torn or no video"),
        ("text.mp4", False, "cannot be read: torn or no video"),
        ("mute.mp4", False, "no caption"),
        ("gone.mp4", False, "does not exist"),
        ("twin.mp4", False, "double: same.mp4 is the same video with the same caption"),
        ("same.mp4", True),
    ]
    lines = videos.summary(told, 2)
    assert lines[0] == "3 of 9 videos are used (1 retimed, 1 cut, 1 cropped), 6 left out"
    assert lines[1].startswith("left out: short.mp4 (too short: ")
    assert lines[3] == "and 4 more"


def test_captions_may_be_empty_and_clips_few_if_the_recipe_says_so(tmp_path) -> None:
    found = entries(mine(tmp_path), "train")
    rows, _, _ = choose(found, Wanted(5, 8.0, (16, 16)), "empty")
    assert [row["caption"] for row in rows if row["file_name"] == "mute.mp4"] == [""]
    rows, _, told = choose(found, Wanted(5, 8.0, (16, 16)), "leave_out", limit=1)
    assert len(rows) == 1
    assert told[1]["notes"] == ["over data.limit: 1 clips"]
    with pytest.raises(UserError, match=r"none of its 9 videos can be used \(5 too short, 2 cannot be read, "):
        choose(found, Wanted(5, 1.0, (16, 16)), "leave_out")


# ---------------------------------------------------------------- clips


def test_clips_are_those_of_the_recipe(tmp_path) -> None:
    clips = Clips(DataConfig(clips=str(mine(tmp_path / "mine")), **WANTED), preload=False)
    assert clips.ids == ["same.mp4", "wide.mp4", "same.mp4"]
    assert not clips.annotated
    batch = clips.load([1, 0])
    assert batch.video_BCFHW.shape == (2, 3, 5, 16, 16)
    assert batch.instances_BFHW is None
    assert batch.target_B is None
    middle = (batch.video_BCFHW[0, 0, :, 8, 8] + 1) * 127.5 / LEVEL
    assert middle.round().int().tolist() == [0, 4, 7, 11, 15]
    assert clips._decoded == {}  # one at a time: nothing is kept


def test_a_dataset_folder_is_retimed_with_its_masks_and_only_if_asked(tmp_path) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=9)
    plain = Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False)
    asked = Clips(DataConfig(clips=str(tmp_path / "drops"), frames=5, fps=8, size=(16, 16)), preload=False)
    truth, instances = film(rows_of(2, 9), 4, 200)
    video, found = asked.read(0)
    assert video.shape == (5, 16, 16, 3)
    np.testing.assert_array_equal(found, instances[::2, 1::2, 1::2])
    assert np.abs(video[3, 8:, 8:].astype(int) - truth[6, 17::2, 17::2]).max() <= 60
    assert asked.annotated
    assert asked.splits[0].told[0]["notes"] == ["retimed: 16 fps to 8 fps", "scaled: 32 x 32 to 16 x 16 pixels"]
    same = Clips(DataConfig(clips=str(tmp_path / "drops"), frames=9, fps=16, size=(32, 32)), preload=False)
    assert same.key == plain.key != asked.key
    assert not same.splits[0].told
    with pytest.raises(UserError, match=r"metadata\.jsonl: its clips cannot be used \(too short: "):
        Clips(DataConfig(clips=str(tmp_path / "drops"), frames=33, fps=16, size=(16, 16)))


def test_both_kinds_of_folder_go_together(tmp_path) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=9)
    both = Clips(DataConfig(clips=[str(tmp_path / "drops"), str(mine(tmp_path / "mine"))], **WANTED), preload=False)
    assert len(both) == 5
    assert both.load(range(5)).video_BCFHW.shape == (5, 3, 5, 16, 16)
    assert not both.annotated


def test_without_wanted_kind_any_videos_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"train/metadata\.jsonl: does not exist; .*mine holds videos: train on"):
        Clips(DataConfig(clips=str(mine(tmp_path / "mine"))))
    table(tmp_path / "hers" / "train" / "metadata.jsonl", [{"file_name": "a.mp4", "caption": "x"}])
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: fps: is missing; such clips are trained on with"):
        open_split(tmp_path / "hers", "train")


def test_latents_change_with_what_is_seen(tmp_path) -> None:
    model = wan.load(ModelConfig(path=str(wan_folder(tmp_path / "model" / "wan"))))
    mine(tmp_path / "mine")

    def latents(**changes: Any) -> Latents:
        config = DataConfig(clips=str(tmp_path / "mine"), **{**WANTED, **changes})
        return Latents(model, Clips(config, preload=False), tmp_path / "cache")

    first, again = latents(), latents()
    assert first.keys == again.keys
    assert len(set(first.keys)) == 3  # one video under two captions is two entries
    z0 = first.load([1]).z0_BCFHW
    with torch.no_grad():
        pixels = Clips(DataConfig(clips=str(tmp_path / "mine"), **WANTED), preload=False).load([1]).video_BCFHW
        assert torch.equal(z0, model.encode(pixels))
    assert first.load([1]).target_B is None
    for change in ({"fps": 12}, {"frames": 1}, {"size": [16, 8]}):
        assert not set(first.keys) & set(latents(**change).keys), change


# ---------------------------------------------------------------- the command

RECIPE = """
run: mine
model: {path: wan, adapter: {rank: 2}}
data: {clips: mine, frames: 5, fps: 8, size: [32, 32]}
method: {name: psft}
train: {steps: 2, batch: 2, lr: 0.01}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    mine(path / "mine")
    (path / "recipe.yaml").write_text(RECIPE)
    return path


def test_any_videos_train_psft_and_are_listed_before(home) -> None:
    code, _, said = command(home, "run", "recipe.yaml")
    assert code == 0, said
    told, trained = said.index("mine: 3 of 9 videos are used"), said.index("training 2/2")
    assert told < trained
    assert "clips: all is listed in runs/mine/clips.jsonl" in said[:trained]
    listed = files.read_jsonl(home / "runs" / "mine" / "clips.jsonl")
    assert len(listed) == 9
    assert listed[2] == {
        "clips": "mine",
        "file": "short.mp4",
        "used": False,
        "notes": ["too short: its last frame is at 0.25 s, 5 frames at 8 fps reach 0.50 s"],
    }
    assert (home / "runs" / "mine" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    before = contents(home / "runs" / "mine" / "adapter")
    code, out, said = command(home, "run", "recipe.yaml")
    assert code == 0
    assert "latents: 3 of 3 are in" in out
    assert contents(home / "runs" / "mine" / "adapter") == before


def test_a_method_that_needs_masks_refuses_them(home) -> None:
    arguments = (
        "train",
        "recipe.yaml",
        "run=masks",
        "method={name: segmenter}",
        "model={family: tracker, path: pocket}",
    )
    code, _, said = command(home, *arguments)
    assert code == 1
    assert said.splitlines()[-1].startswith(
        "mine: has no masks, which segmenter learns from; use clips that `sim make` filmed"
    )


def test_half_a_wish_is_refused(home) -> None:
    code, _, said = command(home, "train", "recipe.yaml", "run=half", "data.fps=null")
    assert code == 1
    assert said == "recipe.yaml:4: data: frames, fps and size say together what clips shall be; give all three\n"


def test_test_clips_of_another_kind_are_still_refused(home) -> None:
    write_dataset(home / "drops", ["test_seen", "test_unseen"], clips=1, frames=5)
    code, _, said = command(home, "train", "recipe.yaml", "run=kinds", "eval={clips: drops}")
    assert code == 1
    assert said.splitlines()[-1].startswith(
        "drops/test_seen/metadata.jsonl: fps is 16, but 8.0 in mine; clips are not "
    )
