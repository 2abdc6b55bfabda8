"""ORO: its loss by hand, its gradient by finite differences, its memory, and a model that learns with it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from helpers.falling import write_dataset
from helpers.tiny import FAMILIES, wan_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.commands.experiment import Recipe
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.core.meter import Meter
from posttrain.core.recipe import Plugin
from posttrain.core.recipe import load as load_recipe
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Annotated, Latents
from posttrain.flow import Last, SamplerConfig
from posttrain.methods import oro
from posttrain.methods.base import fingerprints, given_latents
from posttrain.methods.oro import Config, Sampling, oro_loss
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.pocket import folder as embedded
from posttrain.rewards.base import RewardConfig, load_all, total
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

CAPTION = "a red ball falls."


def brightness(video_BCFHW: Tensor, batch: Batch) -> Tensor:
    return video_BCFHW.flatten(1).mean(1)


def energy(video_BCFHW: Tensor, batch: Batch) -> Tensor:
    return video_BCFHW.square().flatten(1).mean(1)


def contrast(video_BCFHW: Tensor, batch: Batch) -> Tensor:
    """Smooth, and another at each pixel."""
    weights = torch.linspace(-1, 1, video_BCFHW[0].numel(), dtype=video_BCFHW.dtype).view(video_BCFHW[0].shape)
    return (weights * video_BCFHW + video_BCFHW.square()).flatten(1).sum(1)


def clips(model: Wan, count: int = 1, size: tuple[int, int, int] = (9, 32, 32)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(count, *model.latent_shape(*size), generator=generator)
    video = torch.rand(count, 3, *size, generator=generator) * 2 - 1
    return Batch(("x",) * count, z0_BCFHW=z0, text_BLD=model.encode_text([CAPTION] * count), video_BCFHW=video)


class Drift:
    """A model whose pixels are its latents and whose velocity is a number: the clip is the noise minus that number."""

    n_cond_frames, boundary = 0, 0.0
    scheduler = FlowMatchEulerDiscreteScheduler

    def __init__(self, v: Tensor) -> None:
        self.v = v

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        return self.v.expand_as(z_BCFHW)

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        return z_BCFHW


def test_hand_value() -> None:
    """Brightness is mean(eps) - v, so L = -(2 (mean(eps) - v) - 0.5 mean((eps - v)^2)), dL/dv = 2 - mean(eps - v)."""
    v = torch.tensor(0.25, requires_grad=True)
    batch = Batch(("a", "b"), z0_BCFHW=torch.zeros(2, 3, 2, 2, 2), text_BLD=torch.zeros(2, 1, 1))
    rewards = total(
        {"bright": (2.0, brightness), "energy": (-0.5, lambda video, batch: video.square().flatten(1).mean(1))}
    )
    loss, metrics = oro_loss(Drift(v), batch, rewards, Sampling(sampler=SamplerConfig(steps=3)), Random(5, 0, [0, 1]))
    x = Random(5, 0, [0, 1]).normal(3, 2, 2, 2).double() - 0.25
    assert loss.item() == pytest.approx(float(-(2 * x.mean() - 0.5 * x.square().mean())), rel=1e-5)
    assert metrics["reward_bright"].item() == pytest.approx(float(x.mean()), rel=1e-5)
    assert metrics["reward_energy"].item() == pytest.approx(float(x.square().mean()), rel=1e-5)
    (dv,) = torch.autograd.grad(loss, v)
    assert dv.item() == pytest.approx(float(2 - x.mean()), rel=1e-5)


def test_what_is_rewarded_is_what_the_stock_pipeline_makes(wan: Wan, folder: Path) -> None:
    """The noise is Random's; steps, guidance and scheduler as asked; pixels in [-1, 1]."""
    seen: list[Tensor] = []

    def watch(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        seen.append(video_BCFHW.detach())
        return brightness(video_BCFHW, batch)

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    video = torch.cat([pixels, torch.zeros(1, 3, 8, 32, 32)], dim=2)
    batch = Batch(("x",), torch.zeros(1, 8, 3, 4, 4), wan.encode_text([CAPTION]), video)
    config = Sampling(sampler=SamplerConfig(steps=4, guidance=3.0))
    oro_loss(wan, batch, total({"watch": (1.0, watch)}), config, Random(3, 7, [0]), wan.encode_text([""]))
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=Image.fromarray(picture), prompt=CAPTION, negative_prompt="", height=32, width=32, num_frames=9,
        num_inference_steps=4, guidance_scale=3.0, latents=Random(3, 7, [0]).normal(8, 3, 4, 4), output_type="pt",
    ).frames  # fmt: skip
    torch.testing.assert_close(seen[0], theirs.transpose(1, 2) * 2 - 1, atol=5e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_derivative_is_that_of_finite_differences(tmp_path: Path, family: str) -> None:
    """Through sampler, guidance, decoder and reward in float64, along the gradient: its length, to 1e-3.

    Closer cannot be asked: diffusers rounds to float32 inside, so that small steps h drown and large ones bend.
    """
    experts = {"expert": "high"} if "a14b" in family else {}
    wan = load(ModelConfig(path=str(wan_folder(tmp_path / "wan", family)), **experts))
    batch, negative = clips(wan, size=(5, 32, 32)), wan.encode_text(["blurry"]).double()
    first = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = {name: value.double() for name, value in wan.condition(first, 5).items()}
    assert batch.z0_BCFHW is not None
    assert batch.text_BLD is not None
    batch = replace(batch, z0_BCFHW=batch.z0_BCFHW.double(), text_BLD=batch.text_BLD.double(), condition=condition)
    for module in (*wan.weights(), wan.vae):
        module.double()
    with torch.no_grad():
        wan.vae.decoder.conv_out.weight.mul_(0.2)  # no pixel leaves the range: the clamp has a gradient of its own
    wan.dtype = torch.float64
    parameters = [p for p in wan.transformer.parameters() if p.requires_grad]

    def loss() -> Tensor:
        config = Sampling(sampler=SamplerConfig(steps=4, guidance=1.5))
        value, metrics = oro_loss(wan, batch, total({"contrast": (1.0, contrast)}), config, Random(0, 0, [0]), negative)
        assert metrics["saturated"] == 0
        return value

    gradient = torch.autograd.grad(loss(), parameters)
    length = torch.stack([g.norm() for g in gradient]).norm()

    def quotient(h: float) -> float:
        values = {}
        for k in (-2, -1, 1, 2):
            for p, g in zip(parameters, gradient, strict=True):
                p.add_(k * h * g / length)
            values[k] = float(loss())
            for p, g in zip(parameters, gradient, strict=True):
                p.sub_(k * h * g / length)
        return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)

    with torch.no_grad():
        errors = [abs(quotient(h) / float(length) - 1) for h in (1e-3, 3e-4, 1e-4, 3e-5)]
    assert min(errors) < 1e-3


def test_the_first_pictures_alone(wan: Wan) -> None:
    """As many as are asked for are decoded and rewarded, beside as much of the truth; the others have no say."""
    seen: list[tuple[int, ...]] = []

    def watch(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.instances_BFHW is not None
        seen.append((video_BCFHW.shape[2], batch.instances_BFHW.shape[1]))
        return brightness(video_BCFHW, batch)

    def five(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        return brightness(video_BCFHW[:, :, :5], batch)

    batch = replace(clips(wan), instances_BFHW=torch.zeros(1, 9, 32, 32, dtype=torch.uint8))
    how = {"sampler": SamplerConfig(steps=2)}
    part, _ = oro_loss(wan, batch, total({"watch": (1.0, watch)}), Sampling(**how, frames=5), Random(0, 0, [0]))
    whole, _ = oro_loss(wan, batch, total({"five": (1.0, five)}), Sampling(**how), Random(0, 0, [0]))
    assert seen == [(5, 5)]
    assert torch.equal(part, whole)
    parameters = list(wan.transformer.parameters())
    for a, b in zip(torch.autograd.grad(part, parameters), torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(a, b)
    oro_loss(wan, batch, total({"watch": (1.0, watch)}), Sampling(**how, frames=6), Random(0, 0, [0]))
    assert seen[1] == (6, 6)
    with pytest.raises(UserError) as raised:
        oro_loss(wan, batch, total({"watch": (1.0, watch)}), Sampling(**how, frames=40), Random(0, 0, [0]))
    assert (raised.value.code, raised.value.field) == ("mismatch", "method.frames")


@pytest.mark.slow
def test_a_run_depends_on_the_weights_of_its_rewards(tmp_path: Path) -> None:
    """The same SAM 2 under any path, another one where a weight differs; a reward without a network adds nothing."""
    shutil.copytree(embedded("sam2"), tmp_path / "same")
    shutil.copytree(embedded("sam2"), tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(weights | {(name := sorted(weights)[0]): weights[name] + 1}, tmp_path / "other" / "model.safetensors")

    def told(path: str) -> dict[str, str]:
        return fingerprints(Config(rewards=[{"name": "segmentation", "path": path}]).rewards)

    assert list(told("pocket")) == ["method.rewards.segmentation"]
    assert told("pocket") == told(str(tmp_path / "same")) != told(str(tmp_path / "other"))


@pytest.mark.slow
def test_twenty_steps_cost_the_memory_of_two(wan: Wan) -> None:
    """Bytes alive at once in a whole ORO step, forward and backward; with everything kept it is more than twice."""
    batch, peaks = clips(wan, size=(9, 64, 64)), dict[tuple[str, ...], dict[int, int]]()
    for recompute in (("steps", "decoder"), ()):
        for steps in (2, 20):
            config = Sampling(sampler=SamplerConfig(steps=steps), recompute=recompute)
            with Meter() as meter:
                loss, _ = oro_loss(wan, batch, total({"bright": (1.0, brightness)}), config, Random(0, 0, [0]))
                loss.backward()
            wan.transformer.zero_grad()
            peaks.setdefault(recompute, {})[steps] = meter.peak
    two, twenty = (peaks["steps", "decoder"][steps] for steps in (2, 20))
    assert twenty <= 1.1 * two
    assert peaks[()][20] > 2 * peaks[()][2]
    assert two < 0.7 * peaks[()][2]


@pytest.mark.slow
def test_steps_of_an_expert_that_is_not_trained_are_refused(tmp_path: Path) -> None:
    family = "wan2.2-t2v-a14b"
    wan = load(ModelConfig(path=str(wan_folder(tmp_path / "wan", family)), expert="high"))
    config = Sampling(sampler=SamplerConfig(steps=6), grad=Last(last=1))
    with pytest.raises(UserError) as raised:
        oro_loss(wan, clips(wan, size=(5, 32, 32)), total({"bright": (1.0, brightness)}), config, Random(0, 0, [0]))
    assert (raised.value.code, raised.value.field) == ("conflict", "method.grad")


class Same:
    """One clip under several names."""

    ids, key = ("a", "b"), "same"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def load(self, indices: Sequence[int]) -> Batch:
        return replace(self.batch, ids=tuple(self.ids[index] for index in indices))


def part(reward: Callable[[Tensor, Batch], Tensor]) -> Plugin:
    """What a recipe makes of a file in rewards/: a module with `load`."""
    module = ModuleType(reward.__name__)
    vars(module)["load"] = lambda config, device: reward
    return Plugin(reward.__name__, module, RewardConfig())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(folder: Path, tmp_path: Path, precision: str) -> None:
    """The reward rises, on noise that was not trained on too, and the step is bit for bit one that keeps everything."""
    batch, config = clips(load(ModelConfig(path=str(folder))), 2, (5, 32, 32)), Sampling(sampler=SamplerConfig(steps=3))
    weights, rows = [], []
    for recompute in (("steps", "decoder"), ()):
        wan = load(ModelConfig(path=str(folder), adapter=AdapterConfig(rank=4)))
        train = TrainConfig(steps=12, batch=2, lr=2e-2, precision=precision)
        run = Run(tmp_path / f"run-{len(recompute)}", wan.module, Same(batch), train)
        wan.module = run.module
        before, _ = oro_loss(wan, batch, total({"bright": (1.0, brightness)}), config, Random(1, 0, [0, 1]))
        how = oro.Config.model_construct(rewards=(part(brightness),), sampler=config.sampler, recompute=recompute)
        oro.train(run, wan, how, load_all(how.rewards))
        after, _ = oro_loss(wan, batch, total({"bright": (1.0, brightness)}), config, Random(1, 0, [0, 1]))
        assert after < before - 0.01
        assert not run.module.training
        weights.append([p.detach() for p in wan.module.parameters() if p.requires_grad])
        rows.append([row["reward_brightness"] for row in read_jsonl(run.folder / "log.jsonl")])
    assert np.mean(rows[0][-3:]) > np.mean(rows[0][:3]) + 0.005
    assert rows[0] == rows[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_latents_and_truth_of_one_clip_come_together(wan: Wan, tmp_path: Path) -> None:
    write_dataset(tmp_path / "drops", ["train"], clips=3, frames=5)
    found = Clips(DataConfig(clips=str(tmp_path / "drops")))
    latents = Latents(wan, found, tmp_path / "cache")
    data = Annotated(latents, found)
    batch, plain, truth = data.load([2, 0]), latents.load([2, 0]), found.load([2, 0])
    assert batch.ids == truth.ids == plain.ids == (found.ids[2], found.ids[0])
    for name, expected in {
        "z0_BCFHW": plain.z0_BCFHW,
        "text_BLD": plain.text_BLD,
        "video_BCFHW": truth.video_BCFHW,
        "instances_BFHW": truth.instances_BFHW,
        "target_B": truth.target_B,
    }.items():
        assert expected is not None
        assert torch.equal(getattr(batch, name), expected)
    assert plain.z0_BCFHW is not None
    assert torch.equal(given_latents(wan, batch), plain.z0_BCFHW[:, :, :1])  # Wan's autoencoder is causal
    assert data.key not in (latents.key, found.key)
    assert len(data) == 3


RECIPE = {
    "run": "try",
    "model": {"path": "pocket", "adapter": {"rank": 2}},
    "data": {"clips": "drops"},
    "method": {"name": "oro", "rewards": [{"name": "none"}]},
    "train": {"steps": 1, "batch": 1, "lr": 1e-3},
}


def test_a_recipe_names_its_rewards_and_its_sampler(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    with pytest.raises(UserError, match=r"method\.rewards\.0: .*posttrain/rewards: has no 'none'"):
        load_recipe(path, [], Recipe)
    with pytest.raises(UserError, match=r"method\.rewards: .*at least 1 item"):
        load_recipe(path, ["method.rewards=[]"], Recipe)
    with pytest.raises(UserError, match=r"method\.sampler\.stepps: unknown key, did you mean 'steps'"):
        load_recipe(path, ["method.sampler.stepps=3"], Recipe)
