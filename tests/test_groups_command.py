"""The commands on groups: recipes that have some, what a trained model prefers, and samples that are made for them."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.falling import FPS, film, rows_of, write_dataset, write_groups
from helpers.group_samples import samples
from helpers.tiny import wan_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain import cli
from posttrain.commands.experiment import Recipe
from posttrain.core import recipe
from posttrain.core.codec import read_video
from posttrain.core.files import read_json, read_jsonl
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import Groups
from posttrain.evaluation.sample import write_video
from posttrain.flow import SamplerConfig
from posttrain.models.base import ModelConfig
from posttrain.models.wan.loading import load
from posttrain.studies import preferences

ROOT = Path(__file__).parent.parent

RECIPE: dict[str, Any] = {
    "run": "try",
    "model": {"path": "wan", "adapter": {"rank": 2}},
    "data": {"clips": "drops", "groups": {"losers": 3, "counterfactuals": True}},
    "method": {"name": "gdpo", "mode": "sum"},
    "train": {"steps": 2, "batch": 2, "lr": 0.01},
    "export": ["diffusers"],
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    write_groups(tmp_path / "drops")
    wan_folder(tmp_path / "wan")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with contextlib.chdir(tmp_path):
        yield tmp_path


@pytest.mark.slow
def test_a_recipe_runs(home: Path) -> None:
    assert cli.main(["run", "recipe.yaml"]) == 0
    rows = read_jsonl(home / "runs" / "try" / "log.jsonl")
    from posttrain.methods.gdpo import physics_weights

    _, gamma = physics_weights(torch.ones(3), torch.tensor([0.75, 0.5, 0.25]))
    assert rows[0]["loss"] == pytest.approx(gamma.sum().item() * np.log(2), rel=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]
    assert (home / "runs" / "try" / "adapter" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.groups=null"], "data.groups: is missing, and method gdpo needs it"),
        (["method={name: psft}"], "data.groups: is not for psft"),
        (["data.groups={losers: 3}"], "there are no rejected clips; set counterfactuals: true, or samples"),
        (["data.groups={counterfactuals: true, samples_each: 2}"], "set samples to their folder"),
        (["data.groups={lossers: 3}"], "unknown key, did you mean 'losers'?"),
        (["model.adapter=null"], "model.adapter: is missing"),
    ],
)
def test_recipes_that_do_not_go_together_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert cli.main(["train", "recipe.yaml", *overrides]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_resolved_recipe_reads_back(home: Path) -> None:
    plan = recipe.load(home / "recipe.yaml", [], Recipe)
    (home / "again.yaml").write_text(recipe.dump(plan))
    assert recipe.load(home / "again.yaml", [], Recipe) == plan


# ---------------------------------------------------------------- what a trained model prefers


def test_preferences_by_hand() -> None:
    """Two groups of two losers, one time: margins .5, .5 and -1, .5; of four losers three are liked less."""
    base = torch.zeros(2, 1, 3)
    tuned = torch.tensor([[[-0.25, 0.25, 0.25]], [[0.5, -0.5, 1.0]]])
    name, clips, accuracy, margin, winner, losers = preferences.row("try", "ab", tuned, base)
    assert (name, clips) == ("try", "2")
    assert [cell.split()[0] for cell in (accuracy, margin, winner, losers)] == ["0.750", "0.125", "0.125", "0.250"]
    assert winner == "0.125 [-0.250, 0.500]"
    thrice, again = torch.cat([tuned, tuned[1:], tuned[1:]]), torch.cat([base, base[1:], base[1:]])
    assert preferences.row("try", "abbb", thrice, again) == preferences.row("try", "ab", tuned, base)


@pytest.mark.slow
def test_preferences_of_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained with a large rate on these groups it prefers their winners; a base has the same errors as itself."""
    assert cli.main(["run", "recipe.yaml", "train.steps=12", "method.beta_T=10"]) == 0
    capsys.readouterr()
    data, config = DataConfig(clips="drops"), GroupsConfig(losers=3, counterfactuals=True)
    line = preferences.compare(["try"], "drops", "train", config, draws=4).splitlines()[-1]
    accuracy, margin = (float(cell.split()[0]) for cell in line.split("|")[3:5])
    assert accuracy > 0.6
    assert margin > 0
    wan = load(ModelConfig(path="wan"))
    groups = Groups(wan, Clips(data, violated=True), config, home / "cache")
    errors_GKN = preferences.group_errors(wan, groups, 4, "base")
    assert errors_GKN.shape == (2, 4, 4)
    assert torch.equal(errors_GKN, preferences.group_errors(wan, groups, 4, "base"))
    assert preferences.main(["try", "--clips", "nowhere", "--counterfactuals"]) == 1
    assert "nowhere" in capsys.readouterr().err


# ---------------------------------------------------------------- looked at, and sampled for


@pytest.mark.slow
def test_groups_are_sampled_for_and_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base makes what is missing and nothing twice; the samples have the shape of the true clips."""
    words = "model.conditioning=text"  # what the tiny autoencoder gives back is nothing like a first frame
    groups = "data.groups={losers: 2, samples: [made], samples_each: 2}"
    command = ["groups", "recipe.yaml", groups, "run=shown", words]
    assert cli.main(command) == 0, capsys.readouterr().err
    made = sorted(path.name for path in (home / "made").glob("*.mp4"))
    assert made == [f"0000{group}-0-s{seed}.mp4" for group in (0, 1) for seed in (0, 1)]
    assert "groups: 2 of 2 losers each" in capsys.readouterr().out
    sheet = Image.open(home / "runs" / "shown" / "groups.png")
    assert sheet.height == 2 * 3 * (128 + 14)  # of each group the true clip and two more, 32 pixels four times as high

    kept = {name: (home / "made" / name).stat().st_mtime_ns for name in made[1:]}
    before, other = (read_video(home / "made" / name).astype(int) for name in made[:2])
    (home / "made" / made[0]).unlink()
    assert cli.main(command) == 0
    again = read_video(home / "made" / made[0])
    assert np.abs(again - before).mean() < 4  # x264 does not write a noisy video twice the same
    assert np.abs(again - other).mean() > 10  # that of another seed
    assert {name: (home / "made" / name).stat().st_mtime_ns for name in made[1:]} == kept

    capsys.readouterr()
    judged = groups.removesuffix("}") + ", judge: simulator}"  # it compares clips that continue one first frame
    assert cli.main(["groups", "recipe.yaml", judged, "run=shown", words]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("[mismatch]")


@pytest.mark.slow
def test_samples_of_another_model_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = "data.groups={losers: 2, samples: [made], samples_each: 2}"
    command = ["groups", "recipe.yaml", groups, "run=shown", "model.conditioning=text"]
    assert cli.main(command) == 0
    assert cli.main([*command, "run=other", "model.revision=two"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("made/samples.json: ")
    assert "another model;" in said
    assert said.endswith("or delete made [mismatch]")


@pytest.mark.slow
def test_samples_of_another_model_are_refused_also_where_none_are_made(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However they were sampled; unless nobody knows whose they are."""
    groups = "data.groups={losers: 2, samples: [made], samples_each: 2, sampler: {steps: 1, guidance: 1}}"
    assert cli.main(["groups", "recipe.yaml", groups, "run=shown", "model.conditioning=text"]) == 0
    used = ["groups", "recipe.yaml", "data.groups={losers: 2, samples: [made]}", "run=used", "model.conditioning=text"]
    assert cli.main(used) == 0
    assert cli.main([*used, "model.revision=two"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "another model;" in said
    assert "or delete made/samples.json" in said
    assert said.endswith("[mismatch]")
    note = home / "made" / "samples.json"
    note.write_text(note.read_text().replace('"steps": 1', '"steps": 2'))
    assert cli.main(used) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("[damaged]")
    note.unlink()
    assert cli.main([*used, "model.revision=two"]) == 0
    assert not (home / "made" / "samples.json").exists()


def test_samples_of_a_transformer_that_changed_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "wan" / "transformer", home / "mine" / "transformer")
    groups = "data.groups={losers: 1, samples: [made], samples_each: 1, sampler: {steps: 1, guidance: 1}}"
    command = ["groups", "recipe.yaml", groups, "run=shown", "model.conditioning=text", "model.start=mine/transformer"]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    [path] = (home / "mine" / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors["proj_out.bias"] += 1
    save_file(tensors, path)
    assert cli.main(command) == 1
    assert "another weights;" in capsys.readouterr().err.splitlines()[-1]


def test_losers_are_sampled_as_is_usual_unless_the_recipe_says_otherwise(home: Path) -> None:
    def how(path: str, *overrides: str) -> SamplerConfig:
        plan = recipe.load("recipe.yaml", [f"model.path={path}", *overrides], Recipe)
        assert plan.data.groups is not None
        return plan.data.groups.sampler

    large = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert how("pocket") == SamplerConfig(steps=12, guidance=1)
    assert how(large) == SamplerConfig(steps=40, guidance=4, guidance_low=3)
    assert how(large, "data.groups.sampler={steps: 20}") == SamplerConfig(steps=20, guidance=4, guidance_low=3)
    assert how(large, "data.groups.sampler={guidance: 2}") == SamplerConfig(steps=40, guidance=2)
    for name in ("gdpo", "gdpo_table"):  # as the samples were made that their scores in docs/results.md come of
        wanted = recipe.load(ROOT / "recipes" / "pocket" / f"{name}.yaml", [], Recipe).data.groups
        assert wanted is not None
        assert (wanted.sampler, wanted.batch) == (SamplerConfig(steps=12, guidance=1), 10)


@pytest.mark.slow
def test_how_losers_are_sampled_is_not_how_the_run_is_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(home / "tests", ["test_unseen"], clips=1, frames=5)
    measured = "eval={clips: tests, splits: [test_unseen], sampler: {steps: 3}}"
    how = "sampler: {steps: 2, guidance: 2}, negative: melting, batch: 2"
    groups = f"data.groups={{losers: 2, samples: [made], samples_each: 2, {how}}}"
    command = ["groups", "recipe.yaml", "run=shown", "model.conditioning=text", measured, groups]
    assert cli.main(command) == 0
    noted = read_json(home / "made" / "samples.json")
    assert noted["sampler"] == {"steps": 2, "guidance": 2.0, "guidance_low": None}
    assert noted["negative"] == "melting"
    assert cli.main([*command, "eval.sampler.steps=4", "data.groups.batch=1"]) == 0
    for change, what in (("negative=shaking", "negative"), ("sampler.steps=3", "sampler")):
        assert cli.main([*command, f"data.groups.{change}"]) == 1
        assert f"another {what}; name" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_unwanted_counts_where_there_is_guidance_alone(home: Path) -> None:
    groups = "data.groups={losers: 1, samples: [made], samples_each: 1, sampler: {steps: 1, guidance: 1}}"
    command = ["groups", "recipe.yaml", "run=shown", "model.conditioning=text", groups]
    assert cli.main(command) == 0
    assert cli.main([*command, "data.groups.negative=melting"]) == 0


def test_missing_scores_are_said_before_anything_is_encoded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples(home / "made", scores=False)
    command = ["train", "recipe.yaml", "data.groups={losers: 2, samples: [made]}", "model.conditioning=text"]
    assert cli.main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("made/scores.jsonl: does not exist")
    assert "`posttrain score made " in said
    assert said.endswith("method.physics=null [missing]")
    assert not (home / "runs" / "cache" / "latents").exists()
    assert cli.main([*command, "method.physics=null"]) == 0


def test_clips_of_one_name_are_refused_before_anything_is_sampled(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, _ = film(rows_of(2, 5), 8, 200)
    for path in ("one/a.mp4", "one/a.mov", "two/a.mp4"):
        write_video(home / path, video, FPS)
        (home / path).with_suffix(".txt").write_text("a cup falls.")
    for clips, said in (
        ("one", "one/a.mp4: has the same name as one/a.mov"),
        ("[two, one]", "has the same name as two/a.mp4"),
    ):
        data = f"clips: {clips}, frames: 5, fps: 16, size: [32, 32]"
        groups = "groups: {losers: 1, samples: [made], samples_each: 1}"
        assert cli.main(["groups", "recipe.yaml", f"data={{{data}, {groups}}}", "model.conditioning=text"]) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (home / "made").exists()


def test_what_a_recipe_lacks_is_said_before_anything_is_sampled(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = "data.groups={losers: 2, samples: [made], samples_each: 2, judge: simulator}"
    assert cli.main(["run", "recipe.yaml", groups, "method={name: psft}"]) == 1
    assert "data.groups: is not for psft" in capsys.readouterr().err
    retimed = ["data.frames=5", "data.fps=16", "data.size=[32, 32]"]
    assert cli.main(["run", "recipe.yaml", groups, *retimed]) == 1
    assert "data.groups.judge: compares with the clips of one folder" in capsys.readouterr().err
    table = "table={rows: {first: {data.limit: 1}, last: {model.merge: [{path: nowhere}]}}}"
    assert cli.main(["run", "recipe.yaml", groups, table, "run=rows"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("model.merge.0.path: nowhere ")
    assert said.endswith("[missing]\n")
    assert not (home / "made").exists()


def test_groups_of_a_table_are_those_of_the_rows_that_have_some(home: Path) -> None:
    table = "table={rows: {plain: {data.groups: null, method: {name: psft}}, broken: {}}}"
    assert cli.main(["groups", "recipe.yaml", table, "run=rows"]) == 0
    assert [path.parent.parent.name for path in (home / "runs" / "rows").rglob("groups.png")] == ["broken"]


def test_counterfactuals_are_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["groups", "recipe.yaml"]) == 0
    assert "groups: 2 of 3 losers each" in capsys.readouterr().out
    assert Image.open(home / "runs" / "try" / "groups.png").height == 2 * 4 * (128 + 14)


@pytest.mark.slow
def test_videos_of_any_kind_win_against_samples(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Videos without masks or a metadata.jsonl, retimed and cropped; the base samples from the caption alone."""
    (home / "own").mkdir()
    for name in ("cup", "ball"):
        video, _ = film(rows_of(2, 20), 8, 200)
        write_video(home / "own" / f"{name}.mp4", video, 2 * FPS)
        (home / "own" / f"{name}.txt").write_text(f"a {name} falls.")
    overrides = [
        "data={clips: own, frames: 5, fps: 16, size: [32, 32], groups: {losers: 2, samples: [made], samples_each: 2}}",
        "model.conditioning=text",
        "method.physics=null",
        "run=own",
    ]
    assert cli.main(["train", "recipe.yaml", *overrides]) == 0
    assert read_jsonl(home / "runs" / "own" / "log.jsonl")[0]["loss"] == pytest.approx(2 * np.log(2), rel=1e-5)
    capsys.readouterr()
    assert preferences.main(["runs/own", "--clips", "own", "--samples", "made", "--losers", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| runs/own | 2 |")
