"""`posttrain eval` on PisaBench: through SAM 2, with videos that a model or a run makes, and what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from helpers.commands import command
from helpers.falling import SIZE, Oracle, RedTracker, rows_of, write_dataset
from helpers.pisabench import LINE, ClickTracker, open_real, square, write_real, write_sim, write_video
from helpers.tiny import wan_folder
from transformers import Sam2VideoConfig

from posttrain.core import files
from posttrain.data.views import centred
from posttrain.evaluation import score
from posttrain.evaluation.benchmarks.pisabench import open_benchmark
from posttrain.nets import sam2
from posttrain.pocket import folder as pocket


@pytest.mark.slow
def test_the_command_scores_real_clips_through_sam2(tmp_path) -> None:
    """From clicks and videos to tables and report, with a random Sam2VideoModel of the embedded architecture."""
    write_real(tmp_path / "bench" / "real", [LINE[:8]])
    for name in ("kling", "sora"):
        write_video(tmp_path / name / "0000.mp4", square([0, 7])[0])
    settings = Sam2VideoConfig.from_pretrained(pocket("sam2"))
    settings.multimask_output_in_sam = True
    sam2.Model(sam2.new(settings)).save(tmp_path / "sam2")
    arguments = ("eval", "bench/real", "--clips", "kling", "s=sora", "--tracker", "sam2")
    code, out, said = command(tmp_path, *arguments)
    assert code == 0, said
    assert out.count("kling") == out.count(" real ") / 2 == 3  # of 80 columns two tables, and the published code's
    assert "as the published code counts" in out
    report = files.read_json(tmp_path / "runs" / "eval-real" / "report.json")
    assert {(row["model"], row["split"]) for row in report["rows"]} == {("kling", "real"), ("s", "real")}
    assert report["rows"][0]["l2"]["n"] == 1
    assert 0 <= report["rows"][0]["released"]["iou"]["mean"] <= 1
    assert (tmp_path / "runs" / "eval-real" / "report.html").stat().st_size > 10_000
    assert len(list((tmp_path / "runs" / "cache" / "masks").glob("*.npz"))) == 1
    code, _, said = command(tmp_path, *arguments)
    assert code == 0
    assert "kling on real clips: reused from" in said


def test_a_model_continues_the_pictures_of_the_benchmark(tmp_path) -> None:
    benchmark = open_benchmark(write_sim(tmp_path / "sim"))
    films = {
        f"Square {i} falls.": np.stack([score.padded(picture, (32, 48)) for picture in square(rows_of(2 + i, 9))[0]])
        for i in (0, 1)
    }
    model, asked = Oracle(films), []

    @contextmanager
    def ready() -> Iterator[Any]:
        asked.append(1)
        yield model

    kind = {"frames": 9, "fps": 16, "size": [32, 48]}
    (tmp_path / "out" / "seen").mkdir(parents=True)
    score.sample_missing(ready, benchmark, tmp_path / "out", kind, 2, 3, 2, 1.0)
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.mp4"))
    assert names == [f"{split}/{i:02d}-s{seed}.mp4" for split in ("seen", "unseen") for i in (0, 1) for seed in (0, 1)]
    (tmp_path / "out" / names[2]).unlink()
    score.sample_missing(ready, benchmark, tmp_path / "out", kind, 2, 3, 2, 1.0)
    score.sample_missing(ready, benchmark, tmp_path / "out", kind, 2, 3, 2, 1.0)
    assert len(asked) == 2
    records = score.score(tmp_path / "run", benchmark, {"oracle": tmp_path / "out"}, RedTracker())
    for record in records:
        assert all(clip.numbers["l2"] < 0.01 for clip in record.clips)  # colours are stored at half resolution
        assert all(clip.numbers["iou"] > 0.6 for clip in record.clips)


def test_models_are_told_of_real_clips_what_the_paper_tells_them(tmp_path) -> None:
    real = open_real(write_real(tmp_path / "real", [LINE]), ClickTracker(), tmp_path / "cache")
    sim = open_benchmark(write_sim(tmp_path / "sim", 1) / "seen")
    told = {"real": "A red square 0 falls. A video that conforms to the laws of physics.", "seen": "Square 0 falls."}
    kind = {"frames": 9, "fps": 16, "size": [SIZE, SIZE]}
    for benchmark in (real, sim):
        (split,) = benchmark
        model = Oracle({told[split]: square(rows_of(2, 9))[0]})  # it knows no other words
        score.sample_missing(partial(nullcontext, model), benchmark, tmp_path / "out", kind, 1, 3, 2, 1.0)
        assert (tmp_path / "out" / split).is_dir()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (33, 57)])
def test_what_is_padded_is_what_scoring_cuts_off(size) -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    top, left, height, width = centred(size, (32, 32))
    out = score.padded(picture, size)
    assert out.shape == (*size, 3)
    assert height == width == min(size)
    assert out[top : top + height, left : left + width].min() == 255
    assert (out > 0).sum() == 3 * min(size) ** 2


@contextmanager
def calls() -> Iterator[list[str]]:
    """Inside, every transformer's calls are noted."""
    noted: list[str] = []

    def note(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, WanTransformer3DModel):
            noted.append("velocity")

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield noted
    finally:
        hook.remove()


@pytest.mark.slow
def test_the_command_lets_a_run_make_the_videos(tmp_path) -> None:
    wan_folder(tmp_path / "wan")
    write_dataset(tmp_path / "drops", ["train"], clips=1, frames=5)
    write_sim(tmp_path / "sim", 1)
    recipe = {
        "run": "try",
        "model": {"path": "wan", "adapter": {"rank": 2}},
        "data": {"clips": "drops"},
        "method": {"name": "psft"},
        "train": {"steps": 1, "batch": 1, "lr": 0.01},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, said = command(tmp_path, "eval", "sim", "--run", "recipe.yaml")
    assert code == 1
    assert "runs/try/adapter: " in said
    assert command(tmp_path, "train", "recipe.yaml")[0] == 0
    with calls() as usual:
        code, _, said = command(tmp_path, "eval", "sim", "--run", "try", "--out", "usual", "--tracker", "pocket")
    assert code == 0, said
    made = 2 * 2  # base and tuned, of two splits
    assert len(usual) == made * 50  # there is no `eval` in the recipe: 50 steps, guidance in the same call
    options = ("--steps", "2", "--guidance", "3", "--seeds", "2", "--out", "asked")
    with calls() as asked:
        assert command(tmp_path, "eval", "sim", "--run", "try", *options)[0] == 0
    assert len(asked) == made * 2 * 2
    assert len(list((tmp_path / "asked" / "videos").rglob("00-s1.mp4"))) == 4
    with calls() as plain:
        code, _, said = command(tmp_path, "eval", "sim", "--run", "try", "--steps", "2", "--guidance", "1")
    assert code == 0, said
    assert len(plain) == made * 2
    rows = files.read_json(tmp_path / "runs" / "eval-sim" / "report.json")
    assert {(row["model"], row["split"]) for row in rows["rows"]} == {
        (model, split) for model in ("base", "psft") for split in ("seen", "unseen")
    }
    assert {row["against"] for row in rows["differences"]} == {"base"}
    assert len(list((tmp_path / "runs" / "eval-sim" / "videos").rglob("00-s0.mp4"))) == 4


def test_the_command_refuses_in_one_line(tmp_path) -> None:
    write_dataset(tmp_path / "drops", clips=1, frames=17)
    write_video(tmp_path / "v" / "x.mp4", square([2] * 9)[0])
    for arguments, expected in (
        (("drops", "--clips", "nowhere"), "nowhere: does not exist; --clips names folders of videos\n"),
        (
            ("drops", "--clips", "v", "a/v"),
            "a/v: does not exist; --clips names folders of videos",
        ),
        (
            ("drops", "--clips", "v", "v"),
            "--clips: two rows of the table have the same name; give names, as in kling",
        ),
        (
            ("drops", "--clips", "v", "--steps", "2"),
            "--steps: is only for the videos that --run makes; leave it out [conflict]\n",
        ),
        (
            ("drops", "a=1", "--clips", "v"),
            "a=1: --clips uses no recipe, so there is nothing to override; leave it out [conflict]\n",
        ),
        (
            ("nodrops", "--clips", "v"),
            "nodrops: holds no clips to compare with; name PisaBench's real or sim, or a data",
        ),
        (
            ("drops", "--clips", "v", "--tracker", "no"),
            "no/config.json: does not exist; name the folder of a Sam2VideoModel",
        ),
        (("drops", "--clips", "v"), "v: has no video of any clip; name them by the clips, as in test_seen/00000.mp4\n"),
    ):
        code, _, said = command(tmp_path, "eval", *arguments)
        assert code == 1
        assert said.splitlines()[-1].startswith(expected.rstrip("\n")), said
