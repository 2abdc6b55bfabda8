"""Every published model at full size, without its weights: counts, shapes and gradients of a whole training step."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from falling import write_dataset
from tiny import FAMILIES, wan_folder
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain import cli
from posttrain.doctor import check_recipe
from posttrain.dry import Meter, Step, dry_step, needs
from posttrain.files import UserError
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.folders import read_configs
from posttrain.models.published import PUBLISHED
from posttrain.models.wan import load
from posttrain.run import TrainConfig

POCKET = Path(__file__).parent.parent / "recipes" / "pocket"
RANK = 32
COUNTS = {  # parameters of a transformer (an expert), tokens of a clip
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1_418_996_800, 32_760),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14_288_491_584, 32_760),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (16_394_878_784, 32_760),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (4_999_787_712, 27_280),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (14_288_491_584, 32_760),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (14_288_901_184, 32_760),
}


@cache
def step(transformer: str, vae: str, frames: int, size: tuple[int, int], recompute: bool) -> Step:
    """The text-to-video 14B and an expert of the A14B are one transformer: run once."""
    config = ModelConfig(path="published", dtype="bf16", adapter=AdapterConfig(rank=RANK))
    return dry_step(config, json.loads(transformer), json.loads(vae), frames, *size, block_checkpointing=recompute)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_each_published_model(name: str) -> None:
    """At its own size, with an adapter on every linear map of its blocks, all of which get gradients."""
    model = PUBLISHED[name]
    shape = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40} | model["transformer"]
    found = step(
        json.dumps(model["transformer"]), json.dumps(model["vae"]), model["frames"], model["size"], "1.3B" in name
    )
    assert (found.parameters, found.tokens) == COUNTS[name]
    width = 128 * shape["num_attention_heads"]
    assert found.trained == RANK * shape["num_layers"] * (8 * 2 * width + 2 * (width + shape["ffn_dim"]))
    assert found.weights * 2**30 == pytest.approx(2 * found.parameters + 4 * found.trained, rel=0.01)
    assert found.optimizer * 2**30 == pytest.approx(8 * found.trained)


def test_the_work_of_a_step_is_what_its_shapes_say() -> None:
    """1.3B at 480 x 832 x 81, TFLOP: forward 82.1 + 197.8 + 3.1 twice, back through the maps and 2.5 x attention."""
    model = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    found = step(json.dumps(model["transformer"]), json.dumps(model["vae"]), model["frames"], model["size"], True)
    expected = 2 * (82.1 + 197.8 + 3.1) + 82.1 + 2.5 * (197.8 + 3.1)
    assert found.teraflop == pytest.approx(expected, rel=0.02)
    inputs = 30 * 32_760 * 1536 * 2 / 2**30  # of the blocks, which are kept
    assert inputs < found.activations < 5 * inputs


def test_recomputing_blocks_costs_work_and_saves_memory() -> None:
    config = ModelConfig(path="x", adapter=AdapterConfig(rank=4))
    shape = {"num_attention_heads": 2, "num_layers": 6, "ffn_dim": 512}
    kept, again = (dry_step(config, shape, {}, 33, 128, 128, block_checkpointing=on) for on in (False, True))
    assert again.teraflop > 1.2 * kept.teraflop
    assert again.activations < 0.5 * kept.activations
    two = dry_step(config, shape, {}, 33, 128, 128, batch=2)
    assert two.teraflop == pytest.approx(2 * again.teraflop, rel=0.05)


def test_the_meter_counts_what_is_alive() -> None:
    """1000 floats; twice as many, and views of them; then the first half is dropped."""
    with FakeTensorMode(), Meter() as meter:
        a = torch.empty(1000)
        b = a * 2
        view = b.view(10, 100).t()
        assert meter.live == meter.peak == 8000
        del a
        assert meter.live == 4000
        c = view + 1
        c.add_(1)
        assert (meter.live, meter.peak, meter.flop) == (8000, 8000, 0)
        torch.empty(3, 4) @ torch.empty(4, 5)
        assert meter.flop == 2 * 3 * 4 * 5


@pytest.mark.parametrize("family", ["wan2.1-i2v", "wan2.2-ti2v"])
def test_a_folder_is_counted_as_it_loads(tmp_path: Path, family: str) -> None:
    folder = wan_folder(tmp_path / "wan", family)
    assert family in FAMILIES
    config = ModelConfig(path=str(folder), adapter=AdapterConfig(rank=2))
    found = dry_step(config, *read_configs(config.path), 9, 32, 48)
    wan = load(config)
    sizes = {trained: sum(p.numel() for p in wan.module.parameters() if p.requires_grad is trained)
             for trained in (True, False)}  # fmt: skip
    assert (found.parameters, found.trained) == (sizes[False], sizes[True])


@pytest.mark.parametrize(
    ("overrides", "clips"),
    [
        (["data.clips=nowhere", f"data.make={POCKET / 'drop.yaml'}"], "33 x 64 x 64 (144 tokens each)"),
        (["data.clips=drops", "data.make=null"], "5 x 32 x 32 (8 tokens each)"),
        (  # any videos
            ["data.clips=videos", "data.make=null", "data.frames=9", "data.fps=8", "data.size=[32,48]"],
            "9 x 32 x 48 (18 tokens each)",
        ),
    ],
)
def test_the_doctor_says_what_a_recipe_takes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    clips: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "drops", ["train"], clips=1, frames=5)
    assert cli.main(["doctor", str(POCKET / "psft.yaml"), "--processes", "1", *overrides]) in (0, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " recipe " in line]
    assert f"trained; 16 clips at once of {clips}" in line
    assert "GiB (weights 0.0" in line


def test_what_does_not_fit_is_refused() -> None:
    train = TrainConfig(steps=1, batch=12, lr=1.0, accumulate=2)
    with pytest.raises(UserError, match="32 frames of 256 x 256 do not fit the model"):
        needs(ModelConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), train, (32, 256, 256))
    with pytest.raises(UserError, match="only known for wan"):
        needs(ModelConfig(family="tracker", path="pocket"), train, (33, 64, 64))
    with pytest.raises(
        UserError, match=r"train.batch: 12 does not divide into 2 \(train.accumulate\) x 4 \(processes\)"
    ):
        needs(ModelConfig(path="pocket"), train, (33, 64, 64), 4)


def test_processes_share_the_batch(tmp_path: Path) -> None:
    config = ModelConfig(path=str(wan_folder(tmp_path / "wan")), adapter=AdapterConfig(rank=2))
    train = TrainConfig(steps=1, batch=8, lr=1.0, accumulate=2)
    (line, memory, teraflop), alone = needs(config, train, (9, 32, 48), 4), needs(config, train, (9, 32, 48))
    assert "trained; in each of 4 processes 1 clips at once of 9 x 32 x 48" in line
    assert "trained; 4 clips at once of 9 x 32 x 48" in alone[0]
    assert teraflop == pytest.approx(alone[2] / 4, rel=0.05)
    assert memory < 0.8 * alone[1]


def test_a_recipe_is_held_against_the_gpu() -> None:
    (small,), (large,) = check_recipe("pocket", 0.4, 0.1, None), check_recipe("1.3B", 10.0, 760.0, None)
    assert (small.state, small.remedy) == ("ok", "")
    assert (large.state, large.remedy) == ("bad", "no GPU here: take one with 12 GiB or more")
    (tight,), (fits,) = check_recipe("1.3B", 10.0, 760.0, 11.9), check_recipe("1.3B", 10.0, 760.0, 12.1)
    assert (tight.state, fits.state) == ("bad", "ok")
    assert "train.accumulate" in tight.remedy
