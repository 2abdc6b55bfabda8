"""The pocket Open-Sora: how it is put together, its autoencoder in training, and three steps of each of its recipes."""

import math
from pathlib import Path

import pytest
import torch
from helpers.commands import command
from helpers.falling import write_dataset

from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.flow import shift_time
from posttrain.models.base import ModelConfig
from posttrain.models.opensora import loading
from posttrain.models.opensora.vae import OpenSoraVAE
from posttrain.nets import opensora_vae
from posttrain.pretraining.build_opensora import WHOLE, autoencoder, build
from posttrain.pretraining.vae import Config, vae_loss
from posttrain.types import Random

RECIPES = Path(__file__).parent.parent / "recipes" / "pocket-open-sora"
SMALL = ["model.path=model", "data.clips=drops", "data.make=null", "train.steps=3", "train.batch=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips and the pocket, with random weights."""
    home = tmp_path_factory.mktemp("home")
    write_dataset(home / "drops", ["train"], clips=4, frames=5)
    build(home / "model", captions=[home / "drops" / "train" / "metadata.jsonl"])
    return home


def of(home: Path, **changes: object) -> opensora_vae.Autoencoder:
    return opensora_vae.load(ModelConfig(family="opensora_vae", path=str(home / "model"), **changes))


def test_it_is_small_and_takes_the_clips_of_the_other_pocket(home: Path) -> None:
    assert sum(file.stat().st_size for file in (home / "model").rglob("*") if file.is_file()) < 10e6
    video = loading.load(ModelConfig(family="opensora", path=str(home / "model")))
    assert video.latent_shape(33, 64, 64) == (24, 9, 8, 8)
    with torch.no_grad():
        assert video.decode(video.encode(torch.zeros(1, 3, 33, 64, 64))).shape == (1, 3, 33, 64, 64)
    assert video.encode_text(["square 01 falls."]).shape == (1, 64, 64)


def test_its_folder_says_how_times_are_transformed(home: Path) -> None:
    """As a shift of 3, for the clips that it is made for."""
    video = loading.load(ModelConfig(family="opensora", path=str(home / "model")))
    video.latent_shape(33, 64, 64)
    scheduler = video.scheduler()
    scheduler.set_timesteps(6)
    even = torch.tensor([1 - i / 6 for i in range(6)])
    torch.testing.assert_close(scheduler.timesteps / 1000, shift_time(even, 3.0), rtol=1e-4, atol=1e-5)


def test_weights_are_kept_in_half_precision(home: Path) -> None:
    read, made = OpenSoraVAE.from_pretrained(home / "model" / "vae", torch_dtype=torch.float32), autoencoder()
    for name, tensor in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor if name in WHOLE else tensor.half().float())


def test_training_reconstructs_what_the_model_decodes(home: Path) -> None:
    """Without noise; with it, latents are off by the posterior's standard deviation."""
    model = of(home)
    model.set_statistics(torch.randn(1000, 24) * 3 + 1)
    x = torch.rand(1, 3, 33, 16, 16) * 2 - 1
    with torch.no_grad():
        y, mean, logvar = model.module(x, lambda *shape: torch.zeros(1, *shape))
        z = model.vae.encode(x, sample=False)
        torch.testing.assert_close(y, model.vae.decode(z, 33), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((mean - model.vae.shift) / model.vae.scale, z)
        noisy, _, _ = model.module(x, lambda *shape: torch.ones(1, *shape))
        moved = (mean + (0.5 * logvar).exp() - model.vae.shift) / model.vae.scale
        torch.testing.assert_close(noisy, model.vae.decode(moved, 33), rtol=1e-3, atol=1e-4)


def test_statistics_normalise_the_latents(home: Path, tmp_path: Path) -> None:
    model, x = of(home), torch.rand(4, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        model.set_statistics(model.means(x).movedim(1, -1).flatten(0, -2))
        model.save(tmp_path / "vae")
        z = OpenSoraVAE.from_pretrained(tmp_path / "vae").encode(x, sample=False).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(z.mean(0), torch.zeros(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std(0), torch.ones(24), rtol=1e-3, atol=0)


def test_it_starts_nearly_without_noise_and_every_weight_has_a_gradient(home: Path) -> None:
    """Also on pictures alone: other processes may see clips in the same step."""
    model, again = (of(home, init="random", seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), again.module.parameters(), strict=True))
    x = torch.rand(1, 3, 1, 16, 16)
    assert (0.5 * model.vae.moments(x)[1]).exp().max() < 0.1
    loss, _ = vae_loss(model.module, x, torch.ones_like(x[:, :1]), Config(), Random(0, 0, [0]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.module.parameters())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae/config\.json: does not exist") as raised:
        opensora_vae.load(ModelConfig(family="opensora_vae", path=str(tmp_path)))
    assert (raised.value.code, raised.value.field) == ("missing", "model.path")


@pytest.mark.slow
def test_each_recipe_trains_and_the_next_one_takes_its_result(home: Path) -> None:
    """The autoencoder, then the base in its latents, then an adapter by PSFT and ORO."""
    adapters = {name: home / "runs" / f"pocket-open-sora-{name}" / "adapter" for name in ("vae", "base")}
    sampler = "{steps: 2}"
    of_oro = ["eval=null", "tripwires=null", "method.frames=5", f"method.sampler={sampler}"]
    for recipe, changes in {
        "pretrain_vae": ["method.pictures=1", "method.frames=17"],
        "pretrain_base": [],
        "psft": ["eval=null"],
        "oro": of_oro,
    }.items():
        if recipe == "pretrain_base":
            build(home / "model", adapters["vae"])
        if recipe == "psft":
            build(home / "model", adapters["vae"], adapters["base"] / "transformer")
        code, _, said = command(home, "train", str(RECIPES / f"{recipe}.yaml"), *SMALL, *changes)
        assert code == 0, said
        run = home / "runs" / f"pocket-open-sora-{recipe.removeprefix('pretrain_')}"
        rows = [row for row in read_jsonl(run / "log.jsonl") if "loss" in row]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
