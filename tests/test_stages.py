"""The whole command: every stage once, again without work, cut off, and refused."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from helpers.commands import command, contents
from helpers.falling import write_dataset
from helpers.forked import launch
from helpers.optional import events, needs
from helpers.tiny import wan_folder
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import posttrain
from posttrain import cli
from posttrain.commands import stages
from posttrain.commands.experiment import Recipe, members, open_run
from posttrain.commands.status import status
from posttrain.core import files, recipe
from posttrain.core.errors import Code, UserError
from posttrain.pocket import folder as pocket

RECIPE: dict[str, Any] = {
    "run": "try",
    "model": {"path": "wan", "adapter": {"rank": 2, "alpha": 4}},
    "data": {"clips": "drops"},
    "method": {"name": "psft", "shift": 2.0},
    "train": {"steps": 12, "batch": 2, "lr": 0.01, "schedule": "cosine", "ema": 0.9, "checkpoint_every": 2},
    "eval": {"clips": "drops", "seeds": 1, "every": 6, "sampler": {"steps": 2, "guidance": 1.0}},
    "export": ["diffusers"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a few clips and a recipe."""
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    write_dataset(path / "drops", ["train", "test_seen", "test_unseen"], clips=3, frames=5)
    (path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


def refused(home: Path, *arguments: str) -> str:
    """The one line with which a command is refused, without its code."""
    status, _, said = command(home, *arguments)
    message, _, code = said.rpartition(" [")
    assert status == 1
    assert said.count("\n") == 1
    assert code.removesuffix("]\n") in get_args(Code)
    return message + "\n"


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    """The folder of a run of all stages."""
    code, _, said = command(home, "run", "recipe.yaml")
    assert code == 0, said
    return home / "runs" / "try"


def test_a_run_leaves_what_the_recipe_lists(finished):
    for name in ("recipe.yaml", "log.jsonl", "adapter/pytorch_lora_weights.safetensors", "report.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    rows = files.read_jsonl(finished / "log.jsonl")
    assert [row["step"] for row in rows if "val_l2" in row] == [6, 12]
    measured = {(row["model"], row["split"]) for row in files.read_json(finished / "report.json")["rows"]}
    models = ("truth", "truth_vae", "frozen", "base", "psft")
    assert measured == {(model, split) for model in models for split in ("seen", "unseen")}


def test_what_a_recipe_leaves_out_of_the_sampler_is_as_usual_for_the_model(home):
    paths = {"pocket": (12, 1.0, None), "mine": (50, 5.0, None), "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (40, 4.0, 3.0)}
    for path, (steps, guidance, low) in paths.items():
        words = [f"model.path={path}", "eval={clips: drops}"]
        plan = recipe.load(home / "recipe.yaml", words, Recipe)
        assert plan.eval is not None
        assert plan.eval.sampler.model_dump() == {"steps": steps, "guidance": guidance, "guidance_low": low}
        plan = recipe.load(home / "recipe.yaml", [*words, "eval.sampler={steps: 3}"], Recipe)
        assert plan.eval is not None
        assert (plan.eval.sampler.steps, plan.eval.sampler.guidance) == (3, guidance)
        files.write_text(home / "again.yaml", recipe.dump(plan))
        assert recipe.load(home / "again.yaml", (), Recipe) == plan
    with pytest.raises(UserError, match=r"eval\.sampler\.stps: unknown key, did you mean 'steps'"):
        recipe.load(home / "recipe.yaml", ["eval.sampler.stps=3"], Recipe)
    with pytest.raises(UserError, match=r"eval\.sampler: should be a mapping"):
        recipe.load(home / "recipe.yaml", ["eval.sampler=3"], Recipe)


@pytest.mark.slow
def test_again_it_says_what_it_reuses_and_changes_no_weight(home, finished):
    before = {k: v for k, v in contents(finished).items() if not k.startswith("report")}
    code, out, said = command(home, "run", "recipe.yaml")
    assert code == 0
    assert "latents: 3 of 3 are in runs/cache/latents" in out
    assert "training: runs/try/adapter is complete" in said
    assert "psft on unseen clips: reused from" in said
    assert before == {k: v for k, v in contents(finished).items() if not k.startswith("report")}


def test_a_finished_run_needs_no_checkpoints(home, finished):
    shutil.copytree(finished, home / "runs" / "bare")
    shutil.rmtree(home / "runs" / "bare" / "checkpoints")
    code, _, said = command(home, "train", "bare")
    assert code == 0
    assert "training: runs/bare/adapter is complete" in said
    for part in ("adapter", "log.jsonl"):
        assert contents(home / "runs" / "bare" / part) == contents(finished / part)


def test_an_adapter_of_another_base_is_not_measured(home, finished):
    shutil.copytree(finished, home / "runs" / "older")
    trained = home / "runs" / "older" / "trained.json"
    files.write_json(trained, files.read_json(trained) | {"model": "weights that were replaced"})
    code, _, said = command(home, "eval", "older")
    assert code == 1
    assert said.splitlines()[-1].startswith("runs/older/adapter: was trained on other weights than model.path wan has")


@pytest.mark.slow
def test_the_table_shows_one_evaluation(home, finished):
    shutil.copytree(finished, home / "runs" / "fewer")
    path = home / "runs" / "fewer" / "evaluation" / "psft-test_unseen.json"
    record = files.read_json(path)
    files.write_sealed(path, record | {"settings": record["settings"] | {"seeds": 7}})
    assert "an evaluation with other settings was cut off" in refused(home, "report", "fewer")
    assert command(home, "eval", "recipe.yaml", "run=fewer", "eval.splits=[test_seen]")[0] == 0
    assert command(home, "report", "fewer")[0] == 0
    rows = files.read_json(home / "runs" / "fewer" / "report.json")["rows"]
    assert {row["split"] for row in rows} == {"seen"}


@pytest.mark.slow
@needs("tensorboard")
def test_a_tracker_shows_the_log_and_the_videos_and_changes_nothing(home, finished):
    arguments = ("train", "recipe.yaml", "run=shown", "train.trackers=[tensorboard]")
    assert command(home, *arguments)[0] == 0
    shown = home / "runs" / "shown"
    assert contents(shown / "adapter") == {k: v for k, v in contents(finished / "adapter").items() if k != "README.md"}
    reader = events(shown / "tensorboard" / "posttrain")
    expected = {row["step"]: row["val_l2"] for row in files.read_jsonl(shown / "log.jsonl") if "val_l2" in row}
    assert {event.step: event.value for event in reader.Scalars("val_l2")} == pytest.approx(expected)
    assert [event.step for event in reader.Images("validation/00002")] == [6, 12]
    assert command(home, *arguments[:-1])[0] == 0  # and without it, the run is the same one


@pytest.mark.slow
def test_status_of_a_run_that_is_measured_one_that_trains_and_one_that_is_missing(home, finished):
    before = contents(home / "runs")
    code, said, _ = command(home, "status", "recipe.yaml")
    assert code == 0
    assert said.startswith("runs/try: measured\n")
    assert "psft on unseen clips, 3 of 3" in said
    cut = home / "cut"
    shutil.copytree(finished, cut, ignore=shutil.ignore_patterns("trained.json", "evaluation"))
    rows = [row | {"seconds": 2.0} for row in files.read_jsonl(finished / "log.jsonl")[:7]]
    files.write_text(cut / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with files.alone(cut, "works"):
        now = status(cut)
    assert (now.stage, now.step, now.steps, now.left, now.measured) == ("training", 7, 12, 10.0, [])
    assert (now.pid, now.values["loss"], now.values["val_l2"]) == (os.getpid(), rows[6]["loss"], rows[5]["val_l2"])
    assert now.memory is not None
    assert now.memory > 1e8  # torch alone takes more
    assert status(cut).pid is None
    assert contents(home / "runs") == before
    assert "does not exist" in refused(home, "status", "none")


def test_another_recipe_in_the_same_folder_is_refused(home, finished):
    said = refused(home, "run", "recipe.yaml", "train.lr=0.02", "model.adapter.rank=4")
    assert said.startswith("runs/try/recipe.yaml: differs from recipe.yaml in model.adapter.rank (2, now 4), train.lr ")
    assert "choose another run=... or delete runs/try" in said
    assert command(home, "train", "recipe.yaml", "train.checkpoint_every=5", "eval.seeds=2")[0] == 0
    assert command(home, "train", "recipe.yaml")[0] == 0  # and the folder keeps the last word


@pytest.mark.slow
def test_other_clips_under_a_finished_run_are_refused(home, finished):
    metadata = home / "drops" / "train" / "metadata.jsonl"
    before = metadata.read_text()
    metadata.write_text(before.replace("square 01 falls.", "a square falls."))
    try:
        code, _, said = command(home, "train", "try")
        assert code == 1
        assert said.splitlines()[-1].startswith("runs/try/checkpoints/step-000012: was made with another data;")
        code, _, said = command(home, "train", "bare")
        assert code == 1
        assert said.splitlines()[-1].startswith("runs/bare/adapter: ")
    finally:
        metadata.write_text(before)


def test_what_is_missing_is_named(home, finished):
    assert refused(home, "eval", "nothing") == "nothing: does not exist, name a recipe\n"
    assert refused(home, "eval", "recipe.yaml", "run=new") == (
        "runs/new/adapter: is missing or incomplete; run `posttrain train` to its end first\n"
    )
    assert "runs/new2/evaluation: " in refused(home, "report", "recipe.yaml", "run=new2")
    assert "nowhere/wan does not exist" in refused(home, "run", "recipe.yaml", "run=new3", "model.path=./nowhere/wan")
    assert "xx: does not exist" in refused(home, "run", "recipe.yaml", "run=n", "data.clips=xx")


def test_test_clips_of_another_kind_are_refused_before_training(home):
    write_dataset(home / "longer", ["test_seen", "test_unseen"], clips=1, frames=9)
    said = refused(home, "run", "recipe.yaml", "run=kinds", "eval.clips=longer")
    assert said.startswith("longer/test_seen/metadata.jsonl: frames is 9, but 5 in drops/train; ")
    assert not (home / "runs" / "kinds" / "checkpoints").exists()


@pytest.mark.slow
def test_the_embedded_tracker_takes_no_large_clips(home, finished):
    shutil.copytree(home / "drops", home / "large")
    for path in (home / "large").glob("*/metadata.jsonl"):
        files.write_jsonl(path, [row | {"size": [96, 96]} for row in files.read_jsonl(path)])
    expected = (
        "eval.tracker: the embedded tracker was made for 64 x 64 pixels, and the clips in large/test_seen have "
        "96 x 96; name a SAM 2, as facebook/sam2.1-hiera-large\n"
    )
    words = ("recipe.yaml", "run=large", "data.clips=large", "eval.clips=large")
    assert refused(home, "run", *words) == refused(home, "eval", "try", "eval.clips=large") == expected
    shutil.copytree(pocket("tracker"), home / "tracker")
    code, _, said = command(home, "eval", "recipe.yaml", "eval.tracker=tracker")
    assert code == 0, said
    assert said.count("reused from") == 10  # the same weights, another name
    assert "nowhere/config.json: does not exist" in refused(home, "eval", "recipe.yaml", "eval.tracker=nowhere")
    assert "--tracker: is only for --clips and --run" in refused(home, "eval", "try", "--tracker", "tracker")
    assert command(home, "eval", "recipe.yaml")[0] == 0  # and the folder keeps the last word


def test_clips_that_do_not_fit_the_model_are_refused(home):
    write_dataset(home / "six", ["train"], clips=1, frames=6)
    said = refused(home, "run", "recipe.yaml", "run=six", "data.clips=six", "eval=null")
    assert said.startswith("data.clips: 6 frames of 32 x 32 do not fit the model; make clips of 4k + 1 frames")


def test_a_damaged_clip_stops_before_training(home):
    write_dataset(home / "damaged", ["train"], clips=2, frames=5)
    os.truncate(home / "damaged" / "train" / "00001.mp4", 300)
    code, _, said = command(home, "run", "recipe.yaml", "run=damaged", "data.clips=damaged", "eval=null")
    assert code == 1
    assert said.splitlines()[-1].startswith("damaged/train/00001.mp4: is damaged")


@pytest.mark.slow
def test_clips_that_cannot_be_made_are_said(home):
    said = refused(home, "run", "recipe.yaml", "run=made", "data.make=nowhere.yaml")
    assert said == "nowhere.yaml: its clips could not be made (the line above says why)\n"


@pytest.mark.slow
def test_a_full_gpu_is_one_line_with_its_remedy(home, finished):
    """What CUDA raises comes out of the transformer here; what else may come out of it stays as it is."""
    shutil.copytree(finished, home / "runs" / "measured")
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")

    def full(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, WanTransformer3DModel):
            raise error

    start = "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.);"
    train = ("train", "recipe.yaml", "run=full", "eval=null")
    handle = register_module_forward_pre_hook(full)
    try:
        for arguments, expected in (
            (train, f"training: {start} raise train.accumulate, set train.block_checkpointing=true, or take smaller"),
            (("eval", "measured", "eval.seeds=2"), f"evaluation: {start} lower eval.batch, or measure smaller"),
            (("sample", "try", "--image", "first.png", "--prompt", "x"), f"sampling: {start} ask for fewer pixels"),
            (("eval", "drops", "--run", "try", "--steps", "3"), f"sampling: {start} lower eval.batch in the run's"),
        ):
            if arguments[0] == "sample":
                Image.new("RGB", (32, 32)).save(home / "first.png")
            code, _, said = command(home, *arguments)
            assert (code, said.splitlines()[-1][: len(expected)]) == (1, expected)
        plan, folder = open_run(str(home / "runs" / "full"))
        with contextlib.chdir(home), pytest.raises(UserError) as caught:
            stages.train(plan, folder)
        assert caught.value.__cause__ is error
        error = RuntimeError("a shape is wrong")
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            command(home, *train)
    finally:
        handle.remove()


def test_an_unwritable_run_folder_is_named(home):
    (home / "file").write_text("")
    (home / "runs").mkdir(exist_ok=True)
    (home / "runs" / "file").symlink_to(home / "file")
    said = refused(home, "run", "recipe.yaml", "run=file/x")
    assert said.startswith("runs/file/x")
    assert "(a folder on the way is a file)" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_continues_to_the_same_end(home, finished, small_disk):
    (home / "runs" / "small").symlink_to(small_disk)
    arguments = ("train", "recipe.yaml", "run=small/run", "eval=null")
    code, _, said = command(home, *arguments)
    assert code == 1
    assert said.splitlines()[-1].startswith("runs/small/run/")
    assert said.endswith("[disk_full]\n")
    assert list((small_disk / "run" / "checkpoints").glob("step-*"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    code, _, said = command(home, *arguments)
    assert code == 0
    assert "continues from step" in said
    assert contents(small_disk / "run" / "adapter") == {
        k: v for k, v in contents(finished / "adapter").items() if k != "README.md"
    }


def child(home: Path, run: str) -> None:
    os.chdir(home)
    os.dup2(os.open(f"{run}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    raise SystemExit(cli.main(["train", "recipe.yaml", f"run={run}"]))


@pytest.mark.slow
def test_killed_and_started_again_the_adapter_is_the_same_to_the_bit(home, finished):
    log, moments, kills = home / "runs" / "killed" / "log.jsonl", random.Random(0), 0
    while True:
        process = launch(child, home, "killed")
        reached = log.read_text().count("\n") if log.exists() else 0
        while process.is_alive() and (not log.exists() or log.read_text().count("\n") < reached + 3):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    expected = {k: v for k, v in contents(finished / "adapter").items() if k != "README.md"}
    assert contents(home / "runs" / "killed" / "adapter") == expected


@pytest.mark.slow
def test_a_sweep_is_a_run_for_each_value_and_one_report(home):
    base = ("recipe.yaml", "run=sizes", "train.steps=2", "eval.every=0", "eval.splits=[test_unseen]", "export=[]")
    code, out, said = command(home, "run", *base, "sweep={data.limit: [3, 1]}")
    assert code == 0, said
    folder = home / "runs" / "sizes"
    for value in (3, 1):
        plan = yaml.safe_load((folder / str(value) / "recipe.yaml").read_text())
        assert (plan["run"], plan["data"]["limit"], plan["sweep"]) == (f"sizes/{value}", value, None)
    report = files.read_json(folder / "report.json")
    assert [row["model"] for row in report["rows"]] == ["truth", "truth_vae", "frozen", "base", "psft 3", "psft 1"]
    assert [row["model"] for row in report["differences"]] == ["psft 3", "psft 1"]
    with contextlib.chdir(home):
        assert posttrain.evaluate("sizes") == report["rows"]  # nothing is measured again
    alone = [files.read_json(folder / str(value) / "report.json")["rows"][-1] for value in (3, 1)]
    assert [row["l2"] for row in report["rows"][-2:]] == [row["l2"] for row in alone]
    assert contents(folder / "3" / "adapter") != contents(folder / "1" / "adapter")
    page = (folder / "report.html").read_text()
    (figures,) = re.findall(r'<section id="sweep"><h2>Over data.limit</h2>(.*?)</section>', page, re.S)
    assert re.findall(r'<text class="x[^>]*>(\d+)</text>', figures) == ["3", "1"] * 2
    assert "report: runs/sizes/report.html" in out.splitlines()[-1]

    code, out, said = command(home, "compare", "sizes/3", "sizes/1")
    assert code == 0, said
    table, _, gaps = out.partition("Minus psft sizes/3")
    rows = ("truth", "truth_vae", "frozen", "base", "psft sizes/3", "psft sizes/1")
    assert [line.partition(" unseen ")[0].strip() for line in table.splitlines()[1 : 1 + len(rows)]] == list(rows)
    label, _, gap = gaps.splitlines()[1].partition(" unseen ")
    gap = gap.split()
    assert label.strip() == "psft sizes/1"
    clips = [files.read_json(folder / str(value) / "evaluation" / "psft-test_unseen.json")["clips"] for value in (3, 1)]
    for at, key in ((0, "l2"), (3, "iou")):  # the mean of the differences, and two ends
        mean = sum(b[key] - a[key] for a, b in zip(*clips, strict=True)) / len(clips[0])
        assert float(gap[at]) == pytest.approx(mean, abs=6e-4)
    command(home, "run", *base, "run=alike", "data.limit=2", "eval.seeds=2")
    assert "other eval.seeds or eval.sampler" in refused(home, "compare", "sizes/3", "alike")
    (home / "runs" / "alike" / "evaluation" / "psft-test_unseen.json").unlink()
    assert "no split on which all of them were measured" in refused(home, "compare", "sizes/3", "alike")
    assert refused(home, "compare", "sizes/3", "runs/sizes/3") == "runs/sizes/3: is named twice; name each run once\n"
    write_dataset(home / "elsewhere", ["test_unseen"], clips=2, frames=5)
    command(home, "run", *base, "run=strangers", "eval.clips=elsewhere")
    assert "was measured on other clips" in refused(home, "compare", "sizes/3", "strangers")

    weights = contents(folder / "3" / "adapter")
    code, _, said = command(home, "run", *base, "sweep={data.limit: [3]}")  # one that is there
    assert code == 0
    assert "training: runs/sizes/3/adapter is complete" in said
    assert contents(folder / "3" / "adapter") == weights
    said = refused(home, "train", *base, "train.lr=0.02", "sweep={data.limit: [3]}")
    assert said.startswith("runs/sizes/3/recipe.yaml: differs from runs/sizes/recipe.yaml in train.lr (0.01, now 0.02)")
    said = refused(home, "run", *base, "sweep={data.limt: [3]}")
    assert said == "data.limt=3: data.limt: unknown key, did you mean 'limit'?\n"
    assert "sweep: dictionary should have at most 1 item" in refused(home, "run", *base, "sweep={a: [1], b: [2]}")


@pytest.mark.slow
def test_a_table_is_a_run_for_each_row_and_seed_and_one_report(home):
    base = ("recipe.yaml", "run=rows", "train.steps=1", "eval.every=0", "eval.splits=[test_unseen]", "export=[]")
    table = "table={rows: {few: {data.limit: 1}, fast: {train.lr: 0.5, train.steps: 2}}, seeds: [0, 3]}"
    code, out, said = command(home, "run", *base, table)
    assert code == 0, said
    folder = home / "runs" / "rows"
    for row, seed, limit, steps in (("few", 0, 1, 1), ("few", 3, 1, 1), ("fast", 0, None, 2), ("fast", 3, None, 2)):
        plan = yaml.safe_load((folder / row / str(seed) / "recipe.yaml").read_text())
        assert (plan["run"], plan["table"], plan["train"]["seed"]) == (f"rows/{row}/{seed}", None, seed)
        assert (plan["data"]["limit"], plan["train"]["steps"]) == (limit, steps)
    report = files.read_json(folder / "report.json")
    assert [row["model"] for row in report["rows"]] == ["truth", "truth_vae", "frozen", "base", "psft few", "psft fast"]
    alone = [files.read_json(folder / "fast" / seed / "report.json")["rows"][-1]["l2"]["mean"] for seed in ("0", "3")]
    assert report["rows"][-1]["l2"]["mean"] == pytest.approx(sum(alone) / 2)
    assert "Minus psft few" in out
    told = "A row each for few, fast: the means of seeds 0, 3, as far as they were run, clip by clip."
    assert told in (folder / "report.html").read_text()
    with contextlib.chdir(home):  # a part of a table has all rows
        runs = members(recipe.load(folder / "recipe.yaml", [], Recipe), folder)
    assert [str(place.relative_to(folder)) for _, place in runs] == ["few/0", "fast/0", "few/3", "fast/3"]
    said = refused(home, "run", *base, table, "sweep={data.limit: [3]}")
    assert "table: cannot be used together with sweep; keep one" in said
    said = refused(home, "run", *base, "table={rows: {few: {eval.seeds: 7}}}")
    assert said == (
        "runs/rows/recipe.yaml: table.rows.few: changes eval, but all rows must be measured in the same way; "
        "leave it out\n"
    )
    for row in ("a/b: {}", "..: {}", "few: {train.seed: 3}"):
        assert "table.rows" in refused(home, "run", *base, f"table={{rows: {{{row}}}}}")
    shutil.rmtree(folder / "fast" / "3" / "evaluation")
    code, out, said = command(home, "report", *base, table)
    assert code == 0, said
    assert "runs/rows/fast/3: is left out because it was not measured" in said
    said = refused(home, "run", *base, "table={rows: {few: {data.limt: 1}}}")
    assert said == "data.limt=1: data.limt: unknown key, did you mean 'limit'?\n"
