"""Every published model at full size, without its weights: counts, shapes and gradients of a whole training step."""

import contextlib
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from helpers.falling import write_dataset
from helpers.tiny import FAMILIES, TINY_TRANSFORMER, TINY_VAE, wan_folder
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain import cli
from posttrain.commands.doctor import check_recipe
from posttrain.commands.dry import Step, brightness, dry_step, needs, whole_step
from posttrain.core.errors import UserError
from posttrain.core.meter import Meter
from posttrain.core.recipe import Plugin
from posttrain.flow import Last, SamplerConfig, frame_times
from posttrain.methods import gdpo, oro, psft
from posttrain.models import lora, wan
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.adapters import TARGETS
from posttrain.models.wan.decode import cache_bytes
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.models.wan.published import PUBLISHED
from posttrain.models.wan.shapes import of_configs
from posttrain.pretraining.build import SCHEDULER
from posttrain.rewards.base import total
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

POCKET = Path(__file__).parent.parent / "recipes" / "pocket"
RANK = 32
PSFT = Plugin("psft", psft, psft.Config())
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
    """Of the same configs once."""
    config = ModelConfig(path="published", dtype="bf16", adapter=AdapterConfig(rank=RANK))
    outline = partial(of_configs, config, json.loads(transformer), json.loads(vae))
    return dry_step(outline, frames, *size, PSFT, block_checkpointing=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_each_published_model(name: str) -> None:
    """At its own size, with an adapter on every linear map of its blocks, all of which get gradients.

    The blocks are alike, so one and two of them give what 40 would; the 1.3B is run whole.
    """
    model = PUBLISHED[name]
    shape = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40} | model.transformer
    size = json.dumps(model.vae), model.defaults.frames, model.defaults.size, "1.3B" in name
    if "1.3B" in name:
        found = step(json.dumps(model.transformer), *size)
    else:
        one, two = (step(json.dumps(model.transformer | {"num_layers": n}), *size) for n in (1, 2))
        more = shape["num_layers"] - 1
        found = one._replace(**{part: a + more * (b - a) for part, a, b in zip(Step._fields, one, two, strict=True)})
        assert two.tokens == one.tokens
    assert (found.parameters, found.tokens) == COUNTS[name]
    width = 128 * shape["num_attention_heads"]
    assert found.trained == RANK * shape["num_layers"] * (8 * 2 * width + 2 * (width + shape["ffn_dim"]))
    assert found.weights * 2**30 == pytest.approx(2 * found.parameters + 4 * found.trained, rel=0.01)
    assert found.optimizer * 2**30 == pytest.approx(8 * found.trained)


@pytest.mark.slow
def test_the_work_of_a_step_is_what_its_shapes_say() -> None:
    """1.3B at 480 x 832 x 81, TFLOP: forward 82.1 + 197.8 + 3.1 twice, back through the maps and 2.5 x attention."""
    model = PUBLISHED["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    found = step(json.dumps(model.transformer), json.dumps(model.vae), model.defaults.frames, model.defaults.size, True)
    expected = 2 * (82.1 + 197.8 + 3.1) + 82.1 + 2.5 * (197.8 + 3.1)
    assert found.teraflop == pytest.approx(expected, rel=0.02)
    inputs = 30 * 32_760 * 1536 * 2 / 2**30  # of the blocks, which are kept
    assert inputs < found.activations < 5 * inputs


@pytest.mark.slow
def test_recomputing_blocks_costs_work_and_saves_memory() -> None:
    config = ModelConfig(path="x", adapter=AdapterConfig(rank=4))
    shape = {"num_attention_heads": 2, "num_layers": 4, "ffn_dim": 512}
    outline = partial(of_configs, config, shape, {})
    kept, again = (dry_step(outline, 33, 128, 128, PSFT, block_checkpointing=on) for on in (False, True))
    assert again.teraflop > 1.2 * kept.teraflop
    assert again.activations < 0.5 * kept.activations
    two = dry_step(outline, 33, 128, 128, PSFT, batch=2)
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan2.1-i2v", "wan2.2-ti2v"])
def test_a_folder_is_counted_as_it_loads(tmp_path: Path, family: str) -> None:
    folder = wan_folder(tmp_path / "wan", family)
    assert family in FAMILIES
    config = ModelConfig(path=str(folder), adapter=AdapterConfig(rank=2))
    found = dry_step(partial(wan.outline, config), 9, 32, 48, PSFT)
    model = load(config)
    sizes = {trained: sum(p.numel() for p in model.module.parameters() if p.requires_grad is trained)
             for trained in (True, False)}  # fmt: skip
    assert (found.parameters, found.trained) == (sizes[False], sizes[True])


@pytest.mark.slow
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], clips: str
) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=1, frames=5)
    with contextlib.chdir(tmp_path):
        assert cli.main(["doctor", str(POCKET / "psft.yaml"), "--processes", "1", *overrides]) in (0, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " recipe " in line]
    assert f"trained; 8 clips at once of {clips}" in line
    assert "GiB (weights 0.0" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gdpo", " trained; 8 groups of 2 clips at once of 33 x 64 x 64 (144 tokens each)"),
        ("oro", " TFLOP a step, without the rewards' networks"),
    ],
)
def test_the_doctor_knows_the_other_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    overrides = ["data.clips=nowhere", f"data.make={POCKET / 'drop.yaml'}"]
    overrides += ["method.frames=1", "eval.sampler.steps=1"] if name == "oro" else []
    with contextlib.chdir(tmp_path):
        assert cli.main(["doctor", str(POCKET / f"{name}.yaml"), *overrides]) in (0, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " recipe " in line]
    assert told in line


# ---------------------------------------------------------------- gdpo and oro at tiny size

SIZE = 9, 64, 64
ONE_BLOCK = TINY_TRANSFORMER | {"num_layers": 1}


@cache
def small(method: Plugin = PSFT, adapter: bool = True, size: tuple[int, int, int] = SIZE, **more: Any) -> Step:
    config = ModelConfig(path="x", adapter=AdapterConfig(rank=2) if adapter else None)
    how = {"precision": "fp32", "block_checkpointing": False} | more
    return dry_step(partial(of_configs, config, ONE_BLOCK, TINY_VAE), *size, method=method, **how)


def real() -> Wan:
    """The same model with weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = WanTransformer3DModel.from_config(ONE_BLOCK)
        eyes = AutoencoderKLWan.from_config(TINY_VAE).requires_grad_(False)
    lora.attach(body, 2, None, TARGETS, 0)
    return Wan(body, eyes.config, {"vae": lambda: eyes}, None, UniPCMultistepScheduler(**SCHEDULER))


def preference(**more: Any) -> Plugin:
    return Plugin("gdpo", gdpo, gdpo.Config(physics=None, **more))


def reward(steps: int, guidance: float = 1.0, **more: Any) -> Plugin:
    sampler = SamplerConfig(steps=steps, guidance=guidance)
    return Plugin("oro", oro, oro.Config(rewards=[{"name": "object"}], sampler=sampler, **more))


class Some:
    """Groups of noise, of one true clip and three losers each."""

    ids, key = ("a", "b"), "some"

    def __init__(self, model: Wan) -> None:
        self.shape, self.text_dim = model.latent_shape(*SIZE), model.config.text_dim

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: Sequence[int]) -> Batch:
        count = len(indices)
        z0_BCFHW, losers_BMCFHW = torch.randn(count, *self.shape), torch.randn(count, 3, *self.shape)
        text_BLD = torch.randn(count, 512, self.text_dim)
        return Batch(tuple(self.ids[i] for i in indices), z0_BCFHW, text_BLD, losers_BMCFHW=losers_BMCFHW)


def seen(meter: Meter, model: Wan) -> None:
    """What was there before the meter."""
    for part in (model.transformer, model.vae):
        for tensor in (*part.parameters(), *part.buffers()):
            meter.see(tensor)


def forward(model: Wan) -> int:
    """Operations of one clip's velocity."""
    batch = Some(model).load([0])
    assert batch.z0_BCFHW is not None
    assert batch.text_BLD is not None
    with torch.no_grad(), Meter() as meter:
        model.velocity(batch.z0_BCFHW, frame_times(torch.ones(1), 3, n_cond_frames=1), batch.text_BLD)
    return meter.flop


@pytest.mark.slow
@pytest.mark.parametrize("block_checkpointing", [False, True])
def test_the_work_of_preference_is_that_of_its_members(block_checkpointing: bool) -> None:
    """Forward and backward of each as in PSFT, and each once more for the reference; in turn, each once more again."""
    model, take = real(), partial(small, block_checkpointing=block_checkpointing, losers=3)
    once = forward(model)
    with lora.disabled(model.transformer):
        bare = forward(model)
    clip = take().teraflop * 1e12
    work = {
        name: take(preference(**how)).teraflop * 1e12
        for name, how in {
            "pair": {},
            "in turn": {"backward": "in_turn"},
            "sum": {"mode": "sum"},
            "exact": {"mode": "exact", "backward": "in_turn"},
            "copy": {"reference": "full_copy"},
            "cached": {"cached_draws": 4},
        }.items()
    }
    assert bare < once
    assert work == pytest.approx(
        {
            "pair": 2 * clip + 2 * bare,
            "in turn": 2 * clip + 2 * bare + 2 * once,
            "sum": 4 * clip + 4 * bare,
            "exact": 4 * clip + 4 * bare + 4 * once,
            "copy": 2 * clip + 2 * once,  # it has the adapter as it was
            "cached": 2 * clip + 2 * bare,
        },
        rel=1e-9,
    )


@pytest.mark.slow
def test_in_turn_needs_the_memory_of_one() -> None:
    clip, pair, turn = small(), small(preference()), small(preference(backward="in_turn"))
    assert pair.activations > 1.8 * clip.activations
    assert turn.activations < 1.2 * clip.activations
    all_four = small(preference(mode="sum", backward="in_turn"), losers=3)
    assert all_four.activations < 1.3 * clip.activations


@pytest.mark.slow
def test_a_copy_is_weights() -> None:
    lean, copied = small(preference()), small(preference(reference="full_copy"))
    assert copied.weights == pytest.approx(2 * lean.weights)
    assert copied.activations == pytest.approx(lean.activations, rel=0.01)
    with pytest.raises(UserError) as raised:
        small(preference(), adapter=False)
    assert (raised.value.code, raised.value.field) == ("required", "model.adapter")


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"backward": "in_turn"}, {"mode": "sum"}, {"reference": "full_copy"}])
def test_a_dry_step_of_gdpo_is_one_of_its_training(tmp_path: Path, how: dict[str, Any]) -> None:
    """Of real tensors in `gdpo.train`: the same operations, and the same bytes to 3%."""
    model, method = real(), preference(**how)
    settings = TrainConfig(steps=1, batch=2, lr=1e-3)
    base = gdpo.inputs(model, method.config)["base"]
    run = Run(tmp_path, model.module, Some(model), settings)
    model.module = run.module
    with Meter() as meter:
        seen(meter, model)
        for tensor in base.parameters() if base else ():
            meter.see(tensor)
        gdpo.train(run, model, method.config, base)
    found = small(method, batch=2, losers=3)
    assert meter.flop == pytest.approx(found.teraflop * 1e12)
    bytes_of_eyes = sum(p.nbytes for p in model.vae.parameters())
    assert meter.peak - bytes_of_eyes == pytest.approx((found.weights + found.activations) * 2**30, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{}, {"guidance": 2.0}, {"recompute": ()}, {"recompute": ("decoder",), "frames": 5}, {"grad": Last(last=1)}],
)
def test_a_dry_step_of_oro_is_one_of_its_training(how: dict[str, Any]) -> None:
    """Of real tensors in `oro_loss`: the same operations, and the same bytes to 3%."""
    model, method = real(), reward(3, **how)
    with Meter() as meter:
        seen(meter, model)
        batch = Some(model).load([0, 1])
        told = {"video_BCFHW": torch.zeros(2, 3, *SIZE), "instances_BFHW": torch.zeros(2, *SIZE, dtype=torch.uint8)}
        batch = Batch(batch.ids, batch.z0_BCFHW, batch.text_BLD, **told)
        bright = total({"": (1.0, brightness)})
        loss, _ = oro.oro_loss(model, batch, bright, method.config, Random(0, 0, [0, 1]), torch.zeros(1, 512, 64))
        loss.backward()
    found = small(method, batch=2)
    assert meter.flop == pytest.approx(found.teraflop * 1e12)
    assert meter.peak == pytest.approx((found.weights + found.activations) * 2**30, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "adapter"), [(("steps",), True), (("steps",), False), ((), False)])
def test_a_long_sampler_is_told_by_short_ones(recompute: tuple[Any, ...], adapter: bool) -> None:
    """Six steps run, and six told by two and three: to 3% of the memory where all weights are trained."""
    six = reward(6, recompute=recompute, frames=1)
    told, run = whole_step(partial(small, adapter=adapter), six), small(six, adapter)
    assert told._replace(activations=0.0) == pytest.approx(run._replace(activations=0.0))
    assert told.activations == pytest.approx(run.activations, rel=1e-4 if adapter else 0.03)
    assert told.activations >= run.activations


@pytest.mark.slow
def test_each_step_of_the_sampler_is_work() -> None:
    """Guidance asks for two clips; a step that is not differentiated for a forward pass alone."""

    def more(**how: Any) -> float:
        two, three = (small(reward(steps, frames=1, **how)).teraflop for steps in (2, 3))
        return (three - two) * 1e12

    assert more(guidance=2.0, recompute=()) == pytest.approx(2 * more(recompute=()), rel=1e-3)
    once = forward(real())
    assert more(grad=Last(last=1)) == pytest.approx(once, rel=1e-3)
    assert more(recompute=("steps",)) == pytest.approx(more(recompute=()) + once, rel=0.01)


@pytest.mark.slow
def test_what_is_offloaded_is_in_main_memory() -> None:
    """The caches, and the latents that are decoded."""
    plain, moved = (small(reward(1, offload=on), size=(17, 128, 128)) for on in (False, True))
    caches = sum(cache_bytes(TINY_VAE, (1, 8, 5, 16, 16)))
    assert plain.offloaded == 0
    assert moved.offloaded * 2**30 == pytest.approx(caches, rel=0.05)
    assert 0.3 * caches < (plain.activations - moved.activations) * 2**30 < caches
    assert moved.teraflop == plain.teraflop


@pytest.mark.slow
def test_gradients_of_the_micro_batch_before_lie_beside_the_decode() -> None:
    first, later = (small(reward(2), adapter=False, accumulates=on) for on in (False, True))
    assert (later.activations - first.activations) * 2**30 == pytest.approx(4 * first.trained)


def test_what_does_not_fit_is_refused() -> None:
    train = TrainConfig(steps=1, batch=12, lr=1.0, accumulate=2)
    with pytest.raises(UserError, match="32 frames of 256 x 256 do not fit the model"):
        needs(ModelConfig(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), train, PSFT, (32, 256, 256))
    with pytest.raises(UserError) as raised:
        needs(ModelConfig(family="tracker", path="pocket"), train, PSFT, (33, 64, 64))
    assert (raised.value.code, raised.value.field) == ("unsupported", "model.family")
    experts = ModelConfig(path="Wan-AI/Wan2.2-T2V-A14B-Diffusers", expert="high")
    with pytest.raises(UserError) as raised:
        needs(experts, train, reward(2), (33, 64, 64))
    assert (raised.value.code, raised.value.field) == ("unsupported", "model.expert")
    with pytest.raises(UserError) as raised:
        needs(ModelConfig(path="pocket"), train, PSFT, (33, 64, 64), 4)
    assert (raised.value.code, raised.value.field) == ("mismatch", "train.batch")


@pytest.mark.slow
def test_processes_share_the_batch(tmp_path: Path) -> None:
    config = ModelConfig(path=str(wan_folder(tmp_path / "wan")), adapter=AdapterConfig(rank=2))
    train = TrainConfig(steps=1, batch=8, lr=1.0, accumulate=2)
    alone = needs(config, train, PSFT, (9, 32, 48))
    line, memory, teraflop = needs(config, train, PSFT, (9, 32, 48), 4)
    assert "trained; in each of 4 processes 1 clips at once of 9 x 32 x 48" in line
    assert "trained; 4 clips at once of 9 x 32 x 48" in alone[0]
    assert teraflop == pytest.approx(alone[2] / 4, rel=0.05)
    assert memory < 0.8 * alone[1]


def test_a_recipe_is_held_against_the_gpu() -> None:
    (small,), (large,) = check_recipe("pocket", 0.4, 0.1, None), check_recipe("1.3B", 10.0, 760.0, None)
    assert (small.state, small.remedy) == ("ok", "")
    assert (large.state, large.remedy) == ("note", "no GPU here: it needs one with 12 GiB or more")
    (tight,), (fits,) = check_recipe("1.3B", 10.0, 760.0, 11.9), check_recipe("1.3B", 10.0, 760.0, 12.1)
    assert (tight.state, fits.state) == ("bad", "ok")
    assert "train.accumulate" in tight.remedy
