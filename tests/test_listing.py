"""Videos that a recipe names: lists and captions, which are left out and why, and a run on them."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import command, contents
from helpers.falling import film, rows_of, write_dataset
from helpers.tiny import wan_folder
from helpers.videos import LEVEL, WANTED, mine, shown, steady, table, write
from PIL import Image

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data import listing
from posttrain.data.config import DataConfig, Wanted
from posttrain.data.dataset import Clips, open_split
from posttrain.data.latents import Latents
from posttrain.data.listing import choose, entries
from posttrain.data.views import read
from posttrain.judges.folder import find
from posttrain.models.base import ModelConfig
from posttrain.models.wan import loading as wan
from posttrain.reporting.gallery import LINE


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
    with pytest.raises(UserError, match=r"metadata\.csv: has no column of file names, but clip, text; call it"):
        entries(tmp_path, "train")
    table(tmp_path / "metadata.csv", [{"video": "", "text": "x"}])
    with pytest.raises(UserError, match=r"metadata\.csv:2: names no video"):
        entries(tmp_path, "train")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet: is neither a folder nor"):
        entries(tmp_path / "a.parquet", "train")


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "link.mp4"])
def test_a_list_may_not_lead_out_of_its_folder(tmp_path, name) -> None:
    write(tmp_path / "a.mp4", steady(5, 8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "a.mp4")
    table(tmp_path / "in" / "metadata.csv", [{"video": name, "prompt": "x"}])
    for _ in range(2):
        with pytest.raises(UserError) as error:
            entries(tmp_path / "in", "train")
        assert error.value.code == "outside"
        (tmp_path / "in" / "metadata.csv").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_path,caption\nv/a.mp4,it falls\n"),
        ("metadata.csv", "Media_Path,Text\nv/a.mp4,it falls\n"),
        ("metadata.csv", " videopath , Prompt\nv/a.mp4,it falls\n"),
        ("metadata.csv", "File Name;Caption\nv/a.mp4;it falls\n"),
        ("metadata.csv", "\ufefffile_name\tcaption\r\nv/a.mp4\tit falls\r\n"),
        ("metadata.tsv", "file_name\tcaption\nv/a.mp4\tit falls\n"),
        ("metadata.csv", 'file_name,caption\nv/a.mp4,"it falls"\n\n'),
        ("metadata.jsonl", '\ufeff{"file_name": "v/a.mp4", "caption": "it falls"}\n'),
        ("metadata.jsonl", '{"File-Name": "v/a.mp4", "TEXT": "it falls"}\n'),
        ("metadata.json", '\ufeff{"data": [{"video": "v/a.mp4", "caption": ["it falls", "it drops"]}]}'),
    ],
)
def test_lists_are_read_as_people_write_them(tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    (entry,) = entries(tmp_path, "train")
    assert (entry.name, entry.caption) == ("v/a.mp4", "it falls")


def test_a_line_of_json_ends_by_a_line_feed_alone(tmp_path) -> None:
    texts = ["one\u2028two", "three\u2029four\x85five\x0bsix", "seven"]
    rows = [json.dumps({"video": f"{i}.mp4", "caption": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(rows), encoding="utf-8", newline="")
    assert [entry.caption for entry in entries(tmp_path, "train")] == texts


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("metadata.csv", "video,caption\na.mp4,it falls\nv1.mp4,A red ball, dropped from 1 m, falls\n", 3),
        ("metadata.csv", 'video,caption\na.mp4,"it falls\nb.mp4,it drops\n', 2),
        ("metadata.csv", 'video,caption\na.mp4,"it falls\nb.mp4,it drops\nc.mp4,"it flies"\n', 2),
        ("metadata.csv", 'video,caption\na.mp4,"it falls\nb.mp4,it drops"\nc.mp4,it flies\n', 2),
        ("metadata.csv", f"video,caption\na.mp4,{'x' * 140_000}\n", 2),
        ("metadata.csv", "video,caption,start,end\na.mp4,it falls,3,2\n", 2),
        ("metadata.csv", "video,caption,start\na.mp4,it falls,soon\n", 2),
        ("metadata.csv", "video,caption,true_fps\na.mp4,it falls,nan\n", 2),
        ("metadata.jsonl", '{"video": "a.mp4"}\n{"video": "b.mp4", "caption": "it\n', 2),
        ("metadata.jsonl", '{"video": "a.mp4"}\n{"video": 3}\n', 2),
    ],
)
def test_a_list_that_would_be_cut_is_refused_by_line(tmp_path, name, content, line) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"metadata\.\w+:{line}: "):
        entries(tmp_path, "train")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.json", "videos.txt", "a.txt"])
def test_text_of_another_encoding_is_refused_in_one_line(tmp_path, name) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "prompts.txt").write_text("it falls")
    (tmp_path / name).write_bytes("fällt".encode("latin-1"))
    with pytest.raises(UserError, match=f"{name}:1: .*UTF-8") as error:
        entries(tmp_path, "train")
    assert error.value.code == "format"


def test_utf_16_is_read_by_its_mark(tmp_path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_bytes("video,caption\r\na.mp4,es fällt\r\n".encode("utf-16"))
    assert [entry.caption for entry in entries(tmp_path, "train")] == ["es fällt"]


def test_the_links_of_a_hub_snapshot_are_followed_and_no_others(tmp_path) -> None:
    repository = tmp_path / "datasets--her--drops"
    snapshot, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    (snapshot / "train").mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("a.mp4", "a.txt", "metadata.csv")):
        (blobs / f"{number:064}").touch()
        (snapshot / "train" / name).symlink_to(Path("../../../blobs") / f"{number:064}")
    (blobs / f"{2:064}").write_text("video,caption\na.mp4,it falls\n")
    write(tmp_path / "film.mp4", steady(5, 8)).rename(blobs / f"{0:064}")
    rows, views, _ = choose(entries(snapshot, "train"), Wanted(5, 8.0, (16, 16)), "leave_out")
    assert rows[0].caption == "it falls"
    assert shown(read(snapshot / "train" / "a.mp4", views[0])) == [0, 1, 2, 3, 4]
    (snapshot / "train" / "metadata.csv").unlink()
    assert [entry.name for entry in entries(snapshot, "train")] == ["a.mp4"]
    for target in (tmp_path / "film.mp4", repository / "snapshots", Path("/etc/hostname")):
        (snapshot / "train" / "b.mp4").unlink(missing_ok=True)
        (snapshot / "train" / "b.mp4").symlink_to(target)
        with pytest.raises(UserError) as error:
            entries(snapshot, "train")
        assert error.value.code == "outside"


def test_videos_of_every_known_kind_are_found_at_any_depth(tmp_path) -> None:
    names = [f"{i}{suffix}" for i, suffix in enumerate(sorted(listing.SUFFIXES))]
    for name in names:
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name).touch()
        path = tmp_path / "deep" / "cups" / name[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path.with_suffix(".txt").write_text("it falls")
    (tmp_path / "deep" / "test").mkdir()
    (tmp_path / "deep" / "test" / "z.mp4").touch()
    (tmp_path / "deep" / ".cache").mkdir()
    (tmp_path / "deep" / ".cache" / "y.mp4").touch()
    assert {".ogv", ".ts", ".mts", ".m2ts", ".3gp"} <= listing.SUFFIXES
    assert sorted(entry.name for entry in entries(tmp_path / "flat", "train")) == sorted(names)
    deep = entries(tmp_path / "deep", "train")
    assert sorted(entry.name for entry in deep) == sorted(f"cups/{name[0]}/{name}" for name in names)
    assert [entry.caption for entry in deep if entry.caption] == ["it falls"]


def test_samples_of_every_known_kind_are_scored(tmp_path) -> None:
    table(tmp_path / "clips" / "metadata.csv", [{"video": "a.mp4", "caption": "it falls"}])
    (tmp_path / "made").mkdir()
    for name in ("a-s0.mp4", "a-s1.webm", "a-s2.MOV", "a-s3.txt", "b-s0.webm"):
        (tmp_path / "made" / name).touch()
    found, _ = find(tmp_path / "made", tmp_path / "clips", "train")
    assert [(video.name, video.caption) for video in found] == [
        (name, "it falls") for name in ("a-s0.mp4", "a-s1.webm", "a-s2.MOV")
    ]


def test_each_folder_without_clips_gets_its_own_remedy(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for name in ("data/drops/test_seen", "data/empty", "data/words", "data/deep/cups"):
            Path(name).mkdir(parents=True)
        for name in ("data/drops/test_seen/metadata.jsonl", "data/words/a.zip", "data/deep/cups/metadata.csv"):
            Path(name).touch()
        for folder, said in (
            ("data/drosp", "did you mean data/drops"),
            ("data/drops", "has no split train, but test_seen; .* another split"),
            ("data/empty", "is empty; put videos there"),
            ("data/words", r"holds no videos \(but .zip\); name the folder"),
            ("data/deep", "has no split train, but cups; .* name such a folder"),
            ("her/drops", "hf download --repo-type dataset her/drops --local-dir data/drops"),
            ("hf://datasets/her/drops", "is not on this disk; `hf download --repo-type dataset her/drops"),
            ("elsewhere/in/vain", "does not exist; film the clips"),
        ):
            for config in (DataConfig(clips=folder), DataConfig(clips=folder, **WANTED)):
                with pytest.raises(UserError, match=said) as error:
                    Clips(config)
                assert error.value.code == "missing"


def test_one_file_gives_several_clips_and_slow_motion_its_true_rate(tmp_path) -> None:
    write(tmp_path / "a.mp4", steady(60, 8))
    (tmp_path / "metadata.csv").write_text(
        "video,caption,start,end,true_fps\n"
        "a.mp4,it falls,,,\n"
        "a.mp4,it falls,2,,\n"
        "a.mp4,it falls,3.1,4,\n"  # frame 24 is at 3 s, 25 at 3.125
        "a.mp4,it falls,2,2.25,\n"
        "a.mp4,it falls,9,,\n"
        "a.mp4,it falls,1,,32\n"  # filmed four times as fast as it is shown
        "a.mp4,it falls,2,,\n"
    )
    rows, views, video_notes = choose(entries(tmp_path, "train"), Wanted(5, 8.0, (32, 32)), "leave_out")
    assert len(rows) == 4
    pictures = [shown(read(tmp_path / "a.mp4", view)) for view in views]
    assert pictures == [[0, 1, 2, 3, 4], [16, 17, 18, 19, 20], [25, 26, 27, 28, 29], [8, 12, 16, 20, 24]]
    notes = [video.notes[0] for video in video_notes if video.notes]
    assert [note.partition(":")[0] for note in notes] == [*["cut"] * 3, *["too short"] * 2, "true rate", "double"]
    assert "true rate: 32 fps, shown at 8 fps" in notes


def test_what_is_left_out_is_told_with_the_reason(tmp_path) -> None:
    rows, views, video_notes = choose(entries(mine(tmp_path), "train"), Wanted(5, 8.0, (16, 16)), "leave_out")
    assert [(row.file_name, row.caption) for row in rows] == [
        ("same.mp4", "same falls"),
        ("wide.mp4", "wide falls"),
        ("same.mp4", "another caption"),
    ]
    assert len(views) == 3
    assert [(video.file, video.used, *video.notes) for video in video_notes] == [
        ("same.mp4", True),
        (
            "wide.mp4",
            True,
            "retimed: 30 fps to 8 fps",
            "cut: the first 0.50 of 0.67 s",
            "cropped: 16 x 34 to 16 x 16 pixels (height x width)",
        ),
        (
            "short.mp4",
            False,
            "too short: it lasts 0.38 s, 5 frames at 8 fps reach 0.50 s: 0.12 s are missing",
        ),
        ("damaged.mp4", False, "cannot be read: damaged or not a video"),
        ("text.mp4", False, "cannot be read: damaged or not a video"),
        ("mute.mp4", False, "no caption"),
        ("gone.mp4", False, "does not exist"),
        ("twin.mp4", False, "double: same.mp4 is the same video with the same caption"),
        ("same.mp4", True),
    ]
    lines = listing.summary(video_notes, 2)
    assert lines[0] == "3 of 9 videos are used (1 retimed, 1 cut, 1 cropped), 6 left out"
    assert lines[1].startswith("left out: short.mp4 (too short: ")
    assert lines[3] == "and 4 more"


def test_captions_may_be_empty_and_clips_few_if_the_recipe_says_so(tmp_path) -> None:
    found = entries(mine(tmp_path), "train")
    rows, _, _ = choose(found, Wanted(5, 8.0, (16, 16)), "empty")
    assert [row.caption for row in rows if row.file_name == "mute.mp4"] == [""]
    rows, _, video_notes = choose(found, Wanted(5, 8.0, (16, 16)), "leave_out", limit=1)
    assert len(rows) == 1
    assert video_notes[1].notes == ["over data.limit: 1 clips"]
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
    assert asked.splits[0].video_notes[0].notes == ["retimed: 16 fps to 8 fps", "scaled: 32 x 32 to 16 x 16 pixels"]
    same = Clips(DataConfig(clips=str(tmp_path / "drops"), frames=9, fps=16, size=(32, 32)), preload=False)
    assert same.key == plain.key != asked.key
    assert not same.splits[0].video_notes
    with pytest.raises(UserError, match=r"metadata\.jsonl: its clips are too short: "):
        Clips(DataConfig(clips=str(tmp_path / "drops"), frames=33, fps=16, size=(16, 16)))


def test_both_kinds_of_folder_go_together(tmp_path) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=9)
    both = Clips(DataConfig(clips=[str(tmp_path / "drops"), str(mine(tmp_path / "mine"))], **WANTED), preload=False)
    assert len(both) == 5
    assert both.load(range(5)).video_BCFHW.shape == (5, 3, 5, 16, 16)
    assert not both.annotated


def test_without_wanted_kind_any_videos_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"train/metadata\.jsonl: does not exist; .*mine holds videos") as error:
        Clips(DataConfig(clips=str(mine(tmp_path / "mine"))))
    assert (error.value.code, error.value.field) == ("missing", "data.frames")
    table(tmp_path / "hers" / "train" / "metadata.jsonl", [{"file_name": "a.mp4", "caption": "x"}])
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: fps: is missing; .* set data\.frames") as error:
        open_split(tmp_path / "hers", "train")
    assert (error.value.code, error.value.field) == ("format", "fps")


@pytest.mark.slow
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


@pytest.mark.slow
def test_any_videos_train_psft_and_are_listed_before(home) -> None:
    code, _, said = command(home, "run", "recipe.yaml")
    assert code == 0, said
    told, trained = said.index("mine: 3 of 9 videos are used"), said.index("training 2/2")
    assert told < trained
    assert "clips: all is listed in runs/mine/clips.jsonl; 3 of 3 as training sees them are in" in said[:trained]
    with Image.open(home / "runs" / "mine" / "clips.jpg") as sheet:
        assert sheet.size == (5 * 128, 3 * (128 + LINE))  # a row for each clip, 5 frames of 32 x 32 enlarged
        row = np.asarray(sheet)[128 + LINE : 2 * 128 + LINE]
        grey = [row[80, 64 + 128 * k].mean() / LEVEL for k in range(5)]
    assert grey == pytest.approx([0, 4, 7, 11, 15], abs=1)  # wide.mp4 is retimed
    listed = files.read_jsonl(home / "runs" / "mine" / "clips.jsonl")
    assert len(listed) == 9
    assert listed[2] == {
        "clips": "mine",
        "file": "short.mp4",
        "used": False,
        "notes": ["too short: it lasts 0.38 s, 5 frames at 8 fps reach 0.50 s: 0.12 s are missing"],
    }
    assert (home / "runs" / "mine" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    before = contents(home / "runs" / "mine" / "adapter")
    code, out, said = command(home, "run", "recipe.yaml")
    assert code == 0
    assert "latents: 3 of 3 are in" in out
    assert contents(home / "runs" / "mine" / "adapter") == before


@pytest.mark.slow
def test_clips_that_are_given_whole_are_refused_before_they_are_encoded(home) -> None:
    code, out, said = command(home, "train", "recipe.yaml", "run=single", "data.frames=1")
    assert code == 1
    assert "data.frames: with 1 frames " in said
    assert "latents:" not in out
    code, _, said = command(home, "train", "recipe.yaml", "run=pictures", "data.frames=1", "model.conditioning=text")
    assert code == 0, said


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
    assert said.splitlines()[-1].startswith("mine: has no masks, which ")


def test_half_a_wish_is_refused(home) -> None:
    code, _, said = command(home, "train", "recipe.yaml", "run=half", "data.fps=null")
    assert code == 1
    assert said.startswith("recipe.yaml:4: data: frames, fps and size set the clips' format together; give all three")


def test_test_clips_of_another_kind_are_still_refused(home) -> None:
    write_dataset(home / "drops", ["test_seen", "test_unseen"], clips=1, frames=5)
    code, _, said = command(home, "train", "recipe.yaml", "run=kinds", "eval={clips: drops}")
    assert code == 1
    assert said.splitlines()[-1].startswith("drops/test_seen/metadata.jsonl: fps is 16.0, but 8.0 in mine; ")
