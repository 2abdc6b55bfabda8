"""What the worst messages of an attack have become: each has its code and field, and says what is so.

Others of them: a NaN (test_run.py), U+2028 in JSON lines (test_files.py), redirects of a judge (test_judge_models.py),
too little memory (test_hostile.py).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.falling import write_dataset
from PIL import Image

from posttrain import cli
from posttrain.commands import scoring, stages
from posttrain.commands.experiment import Recipe
from posttrain.core import codec, files, recipe
from posttrain.core.errors import UserError
from posttrain.data import dataset, listing
from posttrain.data.config import Wanted
from posttrain.evaluation.records import read_records
from sim.dataset import Job

PSFT = Path(__file__).parents[1] / "recipes" / "pocket" / "psft.yaml"


def load(*overrides: str) -> Recipe:
    return recipe.load(PSFT, overrides, Recipe)


REFUSED: dict[str, tuple[Callable[[Path], object], str, str, str]] = {  # what is done; code, field, and words of it
    "no whole number": (lambda _: load("train.steps=ten"), "value", "train.steps", "whole number"),
    "no list": (lambda _: load("export=merged"), "value", "export", "[merged]"),
    "seed below 0": (lambda _: load("train.seed=-1"), "value", "train.seed", "0"),
    "seed above": (lambda _: load("train.seed=9223372036854775808"), "format", "train.seed", "64 bits"),
    "seed of the model": (lambda _: load("model.seed=-1"), "value", "model.seed", "0"),
    "eval is missing": (lambda at: stages.report(load("eval=null"), at), "required", "eval", "eval.clips="),
    "not measured": (read_records, "unfinished", "", "posttrain eval"),
    "no arrays": (lambda at: dataset.read_annotations(at / "a.npz"), "damaged", "", "sim make"),
    "nowhere to write": (lambda _: files.write_text("/proc/none/a", ""), "not_writable", "", "cannot be created there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, name: str) -> None:
    act, code, field, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        act(tmp_path)
    assert (error.value.code, error.value.field) == (code, field)
    assert words in str(error.value)


def test_seeds_of_clips_have_a_range() -> None:
    world = {"name": "drop", "width": 64, "height": 64, "frames": 33}
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed"):
            Job(world=world, seed=seed)


def test_a_damaged_video_without_a_list_is_not_said_to_be_in_one(tmp_path: Path) -> None:
    content = codec.lossless(np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8), 16)
    (tmp_path / "a.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "a.txt").write_text("It falls.")
    with pytest.raises(UserError) as error:
        listing.choose(listing.entries(tmp_path, "train"), Wanted(5, 16, (64, 64)), "leave_out")
    assert error.value.code == "no_clips"
    said = str(error.value).replace(str(tmp_path), "")
    assert "list" not in said
    assert "manifest" not in said


def test_torn_lines_of_a_log_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo\n\xff\n[]\n{"step": 4}\n{"st')
    assert files.read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 4}]
    assert "log.jsonl:2: " in capsys.readouterr().err


def test_folders_that_are_written_are_held(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `posttrain sample`, `score` and `eval --clips`, as runs hold theirs."""
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(codec.lossless(np.zeros((5, 64, 64, 3), np.uint8), 16))
    (videos / "a.txt").write_text("It falls.")
    Image.new("RGB", (64, 64)).save("first.png")
    with files.alone(videos, "works"):
        sample = ["sample", "pocket", "--image", "first.png", "--prompt", "It falls.", "--output", "videos"]
        assert cli.main(sample) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("[busy]")
        assert cli.main(["score", "videos", "--judge", "vlm", "--model", "none"]) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("[busy]")
    write_dataset(tmp_path / "data", frames=9)
    with files.alone(tmp_path / "out", "works"), pytest.raises(UserError) as error:
        scoring.evaluate_videos("data", [("other", Path("videos"))], out="out")
    assert (error.value.code, error.value.field) == ("busy", "--out")
