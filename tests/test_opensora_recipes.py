"""recipes/open-sora-v1.2 with a tiny Open-Sora: each trains three steps, is measured, handed out, and counted."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import command
from helpers.falling import write_dataset, write_groups
from helpers.tiny_opensora import opensora_folder, transformer
from safetensors.torch import load_file

from posttrain.commands.experiment import Recipe
from posttrain.core.files import read_json, read_jsonl
from posttrain.core.recipe import load
from posttrain.models import lora
from posttrain.models.opensora.rflow import time_ratio
from sim.cli import Recipe as Clips

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "open-sora-v1.2"
TWO = "sampler: {steps: 2, guidance: 2.0}"
ORO = {"segmentation": (1e-6, "depth"), "flow": (1e-5, "segmentation"), "depth": (1e-6, "segmentation")}
SMALL = ["model.path=model", "data.clips=drops", "data.make=null", "train.steps=3", "train.batch=2"]
LOOKS = ["eval.clips=drops", "eval.limit=1", "eval.every=3", "eval.tracker=pocket", "eval.sampler={steps: 2}"]
SMALLER = {
    "psft": ["train.accumulate=1"],
    "gdpo": ["data.clips=pairs", "data.groups={losers: 2, counterfactuals: true}"],
    "oro_depth": [*LOOKS, "tripwires=null", "method.rewards=[{name: depth}]"],
    **{
        f"oro_{name}": ["eval=null", "tripwires=null", f"method={{name: oro, rewards: [{{name: {name}}}], {TWO}}}"]
        for name in ("flow", "segmentation")
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder: clips with all that the rewards compare with, a tiny Open-Sora, and a run of psft.yaml."""
    home = tmp_path_factory.mktemp("home")
    write_dataset(home / "drops", ["train", "test_unseen"], clips=2, frames=5)
    for path in (home / "drops").rglob("*.npz"):
        with np.load(path) as arrays:
            instances = arrays["instances"]
        flow = np.zeros((*instances.shape, 2), np.float16)
        np.savez(path, instances=instances, flow=flow, depth=np.where(instances, 4, 6).astype(np.float16))
    write_groups(home / "pairs", losers=2)
    opensora_folder(home / "model", published=True)
    code, _, said = command(home, "run", *tiny("psft"))
    assert code == 0, said
    return home


def tiny(recipe: str) -> list[str]:
    """The recipe, and what makes it small."""
    return [str(RECIPES / f"{recipe}.yaml"), *SMALL, *SMALLER[recipe]]


def trained(run: Path) -> None:
    """Three steps were done, and each was one."""
    rows = read_jsonl(run / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows if "loss" in row)


@pytest.mark.slow
def test_psft_leaves_the_published_layout(home: Path) -> None:
    run = home / "runs" / "open-sora-v1.2-psft"
    trained(run)
    folder = run / "adapter" / "transformer"
    weights, before = load_file(folder / "model.safetensors"), transformer().state_dict()
    assert read_json(folder / "config.json")["model_type"] == "STDiT3"
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in before.items()}
    frozen = {name for name in weights if name.startswith("y_embedder.") or name == "rope.freqs"}
    assert {name for name in weights if torch.equal(weights[name], before[name])} == frozen
    code, out, said = command(home, "export", *tiny("psft"), "--check")
    assert code == 0, said
    assert "check:" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ORO)
def test_oro_goes_on_from_psft(home: Path, name: str) -> None:
    code, _, said = command(home, "run", *tiny(f"oro_{name}"))
    assert code == 0, said
    run = home / "runs" / f"open-sora-v1.2-oro-{name}"
    trained(run)
    if name == "depth":
        measured = {row["model"] for row in read_json(run / "report.json")["rows"]}
        assert measured == {"truth", "truth_vae", "frozen", "base", "oro"}
    psft, oro = (
        load_file(home / "runs" / folder / "adapter" / "transformer" / "model.safetensors")
        for folder in ("open-sora-v1.2-psft", run.name)
    )
    far = max(float((oro[key] - psft[key]).abs().max()) for key in psft)
    assert 0 < far <= 3.1 * ORO[name][0]  # AdamW moves a weight by the rate at most, about


@pytest.mark.slow
def test_gdpo_trains_self_attention(home: Path) -> None:
    code, _, said = command(home, "run", *tiny("gdpo"))
    assert code == 0, said
    run = home / "runs" / "open-sora-v1.2-gdpo"
    trained(run)
    weights = load_file(run / "adapter" / lora.FILE)
    layers = {key.removeprefix("transformer.").split(".lora_")[0] for key in weights}
    kinds = [f"{kind}_blocks.{i}.attn.{layer}" for kind in ("spatial", "temporal") for i in (0, 1)
             for layer in ("qkv", "proj")]  # fmt: skip
    assert layers == set(kinds)  # self-attention alone, in the published names
    code, out, said = command(home, "export", *tiny("gdpo"), "--check")
    assert code == 0, said
    assert "check:" in out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["psft", "oro_flow", "gdpo"])
def test_the_doctor_counts_a_step(home: Path, recipe: str) -> None:
    """Also of clips that are not filmed yet: their format is read from the recipe that would."""
    filmed = recipe == "oro_flow"
    make = [] if filmed else [f"data.make={ROOT / 'recipes' / 'sim' / 'pisa_32.yaml'}", "data.clips=nowhere"]
    code, out, said = command(home, "doctor", *tiny(recipe), *make)
    assert code in (0, 1), said
    (line,) = [line for line in out.splitlines() if " recipe " in line]
    assert ("5 x 32 x 32 (8 tokens each)" if filmed else "32 x 256 x 256 (2,304 tokens each)") in line
    assert ("without the rewards' networks" in line) == recipe.startswith("oro")


def test_settings_are_the_papers() -> None:
    clips = load(ROOT / "recipes" / "sim" / "pisa_32.yaml", (), Clips)
    world = clips.world.config
    assert (world.frames, world.fps, world.height, world.width) == (32, 16, 256, 256)
    ratio = time_ratio(*(torch.tensor([float(n)]) for n in (32, 256, 256)))
    for recipe in SMALLER:
        plan = load(RECIPES / f"{recipe}.yaml", (), Recipe)
        assert plan.run == f"open-sora-v1.2-{recipe.replace('_', '-')}"
        assert (plan.data.clips, plan.model.conditioning) == (str(clips.out), "image")
        assert (plan.train.precision, plan.train.clip, plan.train.block_checkpointing) == ("bf16", 1.0, True)
        if recipe in ("psft", "gdpo"):
            assert plan.method.config.shift == pytest.approx(float(ratio), abs=1e-3)
            assert plan.method.config.timesteps == "logit_normal"
    psft = load(RECIPES / "psft.yaml", (), Recipe).train
    assert load(RECIPES / "psft.yaml", (), Recipe).method.config.drop_caption == 0.1
    assert (psft.steps, psft.batch, psft.lr, psft.eps, psft.ema) == (5000, 128, 1e-4, 1e-15, 0.99)
    for name, (rate, watched) in ORO.items():
        plan = load(RECIPES / f"oro_{name}.yaml", (), Recipe)
        assert (plan.train.batch, plan.train.lr, plan.model.adapter) == (1, rate, None)
        assert (plan.method.config.grad, plan.method.config.frames) == ("all", None)
        assert plan.eval is not None
        assert plan.tripwires is not None
        assert plan.method.config.sampler == plan.eval.sampler
        assert plan.method.config.sampler.model_dump() == {"steps": 30, "guidance": 7.0, "guidance_low": None}
        assert ([part.name for part in plan.method.config.rewards], [part.name for part in plan.tripwires.watch]) == (
            [name],
            [watched],
        )
        assert plan.tripwires.split not in plan.eval.splits
