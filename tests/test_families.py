"""Every Wan family at tiny size: our sampler is the stock pipeline's, each trains, and two experts share the times."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from helpers.falling import write_dataset
from helpers.tiny import FAMILIES, wan_folder
from PIL import Image
from safetensors.torch import load_file

from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Latents
from posttrain.evaluation.sample import sample_clips
from posttrain.flow import sample
from posttrain.methods import psft
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch, Random

CASES = [(family, conditioning) for family in FAMILIES for conditioning in ("image", "text")]
STOCK = [case for case in CASES if case[1] == "image" or "i2v" not in case[0] or "ti2v" in case[0]]
EXPERTS = [family for family in FAMILIES if "a14b" in family]
CAPTION, UNWANTED, STEPS = "a red ball falls.", "blurry", 6  # six steps lie on both sides of 0.875 and of 0.9
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: wan_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def drops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drops") / "drops"
    write_dataset(path, ["train"], clips=2, frames=5)
    return path


def model(folder: Path, family: str, **changes: Any) -> Wan:
    if family in EXPERTS and "adapter" in changes:
        changes.setdefault("expert", "high")
    return load(ModelConfig(path=str(folder), **changes))


def pipeline(folder: Path, family: str, conditioning: str) -> Any:
    if conditioning == "text":
        pipe = WanPipeline.from_pretrained(folder)
    else:
        pipe = WanImageToVideoPipeline.from_pretrained(folder, expand_timesteps="transformer" not in FAMILIES[family])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(pipe: Any, family: str, conditioning: str, **options: Any) -> Any:
    if conditioning == "image":
        options["image"] = Image.fromarray(PICTURE)
    if family in EXPERTS:
        options.setdefault("guidance_scale_2", 1.5)
    settings = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    return pipe(**(settings | {"prompt": CAPTION, "negative_prompt": UNWANTED} | options)).frames


def ours(wan: Wan, noise: torch.Tensor) -> torch.Tensor:
    """Latents, as `sample_clips` makes them."""
    first = torch.from_numpy(PICTURE).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        text, negative = wan.encode_text([CAPTION]), wan.encode_text([UNWANTED])
        clean, condition = wan.encode(first) if wan.n_cond_frames else None, wan.condition(first, 9)
        low = 1.5 if wan.boundary else 3.0

        def guidance(t: float) -> float:
            return 3.0 if t >= wan.boundary else low

        return sample(wan, wan.scheduler(), noise, text, clean, STEPS, guidance, negative, condition)


def noise_for(wan: Wan) -> torch.Tensor:
    return torch.randn(wan.latent_shape(9, 32, 48), generator=torch.Generator().manual_seed(5))[None]


@pytest.mark.parametrize(("family", "conditioning"), STOCK)
def test_the_sampler_equals_the_stock_pipeline(folders: dict[str, Path], family: str, conditioning: str) -> None:
    wan = model(folders[family], family, conditioning=conditioning)
    noise = noise_for(wan)
    pipe = pipeline(folders[family], family, conditioning)
    theirs = stock(pipe, family, conditioning, latents=noise, output_type="latent")
    found = ours(wan, noise)
    assert (found - theirs).abs().max() < 2e-4
    assert (found[:, :, 1:] - noise[:, :, 1:]).abs().max() > 0.1


def test_clips_equal_those_of_the_stock_pipeline(folders: dict[str, Path]) -> None:
    """All that I2V adds in one: the picture in channels, two experts, and guidance for each."""
    family = "wan2.2-i2v-a14b"
    wan, pipe = model(folders[family], family), pipeline(folders[family], family, "image")
    clip = sample_clips(wan, PICTURE[None], [CAPTION], [3], 9, STEPS, 3.0, UNWANTED, 1.5)[0]
    video = stock(pipe, family, "image", generator=torch.Generator().manual_seed(3))[0]
    assert np.abs(clip / 255 - video).max() < 0.5 / 255 + 1e-4  # ours is rounded to whole grey levels


@pytest.mark.parametrize("family", [family for family in FAMILIES if "transformer" in FAMILIES[family]])
def test_without_a_picture_the_mask_is_empty(folders: dict[str, Path], family: str) -> None:
    """An image-to-video model that is conditioned on text sees no trace of the picture."""
    wan = model(folders[family], family, conditioning="text")
    pictures = [torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    one, two = (wan.condition(picture, 5) for picture in pictures)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["channels"].shape == (1, 12, 2, 4, 4)
    assert one["channels"][:, :4].abs().max() == 0
    torch.testing.assert_close(one["channels"][:, 4:], wan.encode(torch.zeros(1, 3, 5, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "conditioning"), CASES)
def test_each_trains(folders: dict[str, Path], drops: Path, tmp_path: Path, family: str, conditioning: str) -> None:
    """From clips to an adapter, with the conditions from the cache; the saved adapter restores the model."""
    wan = model(folders[family], family, conditioning=conditioning, adapter=AdapterConfig(rank=2))
    data = Latents(wan, Clips(DataConfig(clips=str(drops)), preload=False), tmp_path / "cache")
    batch = data.load([1])
    pixels = Clips(DataConfig(clips=str(drops))).load([1]).video_BCFHW
    assert pixels is not None
    expected = wan.condition(pixels[:, :, :1], 5)
    assert batch.condition.keys() == expected.keys()
    assert set(expected) == ({"channels", "image"} if family == "wan2.1-i2v" else {"channels"} if "i2v" in family
                             and "ti2v" not in family else set())  # fmt: skip
    assert all(torch.equal(batch.condition[name], expected[name]) for name in expected)

    run = Run(tmp_path / "run", wan.module, data, TrainConfig(steps=2, batch=2, lr=1e-2, block_checkpointing=True))
    wan.module = run.module
    psft.train(run, wan, psft.Config())
    wan.module = run.finish()
    (file,) = wan.save(tmp_path / "adapter")
    weights = load_file(file)
    moved = [weight.abs().max() > 0 for name, weight in weights.items() if ".lora_B." in name]
    assert len(moved) == 20
    assert all(moved)

    again = model(folders[family], family, conditioning=conditioning, adapter=AdapterConfig(rank=2))
    again.restore(tmp_path / "adapter")
    text, z = data.load([0]).text_BLD, torch.randn(1, *wan.latent_shape(5, 32, 32))
    assert text is not None
    t_BF = torch.full((1, 2), 0.95)
    with torch.no_grad():
        v = [m.velocity(z, t_BF, text, expected) for m in (wan, again, model(folders[family], family))]
    torch.testing.assert_close(v[0], v[1])
    assert (v[0] - v[2]).abs().max() > 1e-3


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_trained_on_its_times_alone(folders: dict[str, Path], family: str, expert: str) -> None:
    """And the other one is not even read."""
    wan = model(folders[family], family, adapter=AdapterConfig(rank=2), expert=expert)
    boundary = FAMILIES[family]["index"]["boundary_ratio"]
    assert wan.times == {"high": (boundary, 1.0), "low": (0.0, boundary)}[expert]
    seen: list[torch.Tensor] = []
    wan.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    first = torch.zeros(1, 3, 1, 32, 32)
    condition = {name: value.expand(64, *value.shape[1:]) for name, value in wan.condition(first, 1).items()}
    z0 = torch.zeros(64, *wan.latent_shape(1, 32, 32))
    wan.n_cond_frames = 0  # a single latent frame, to be quick
    batch = Batch(("x",) * 64, z0_BCFHW=z0, text_BLD=torch.zeros(64, 512, 64), condition=condition)
    with torch.no_grad():
        psft.psft_loss(wan, batch, psft.Config(shift=5.0), Random(0, 0, range(64)))
    timestep = seen[0] / 1000
    assert ((timestep >= boundary - 1e-6) if expert == "high" else (timestep < boundary)).all()
    assert timestep.std() > 0.01
    assert "other" not in vars(wan)


def test_times_on_both_sides_are_refused_in_one_batch(folders: dict[str, Path]) -> None:
    wan = model(folders["wan2.2-t2v-a14b"], "wan2.2-t2v-a14b")
    z = torch.zeros(2, 8, 1, 4, 4)
    with pytest.raises(ValueError, match=r"both sides of 0\.875"):
        wan.velocity(z, torch.tensor([[0.875], [0.874]]), torch.zeros(2, 512, 64))


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_each_expert_is_sampled_with_its_own_adapter(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Two runs, one per expert, alpha != rank; together they make what the stock pipeline makes of the two files."""
    for expert in ("high", "low"):
        wan = model(folders[family], family, adapter=AdapterConfig(rank=2, alpha=6), expert=expert)
        torch.manual_seed(ord(expert[0]))
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
        wan.save(tmp_path / expert)
    pipe = pipeline(folders[family], family, "image")
    base = model(folders[family], family)
    noise = noise_for(base)
    plain = ours(base, noise)
    pipe.load_lora_weights(tmp_path / "high")
    pipe.load_lora_weights(tmp_path / "low", load_into_transformer_2=True)
    theirs = stock(pipe, family, "image", latents=noise, output_type="latent")
    assert (theirs - plain).abs().max() > 0.05
    for expert, other in (("high", "low"), ("low", "high")):
        wan = model(
            folders[family], family, adapter=AdapterConfig(rank=2, alpha=6), expert=expert,
            other_adapter=str(tmp_path / other),
        )  # fmt: skip
        wan.restore(tmp_path / expert)
        assert (ours(wan, noise) - theirs).abs().max() < 2e-4
        assert not any(p.requires_grad for p in wan.other.parameters())
        assert [module is wan.transformer for module in wan.weights()] == [expert == "high", expert == "low"]
    wan = model(folders[family], family, adapter=AdapterConfig(rank=2, alpha=6), expert="high")
    wan.restore(tmp_path / "high")
    assert (ours(wan, noise) - theirs).abs().max() > 0.01  # the low expert's adapter was left out


@pytest.mark.slow
def test_the_key_follows_the_conditions(folders: dict[str, Path]) -> None:
    """Where a picture is a clean latent, conditioning changes no cached number; where it is channels, it does."""
    keys = {case: model(folders[case[0]], case[0], conditioning=case[1]).cache_key() for case in CASES}
    for family in FAMILIES:
        same = keys[family, "image"] == keys[family, "text"]
        assert same == ("transformer" not in FAMILIES[family])
    assert keys["wan2.1-t2v", "image"] == keys["wan2.2-t2v-a14b", "image"]
    assert keys["wan2.1-t2v", "image"] != keys["wan2.2-i2v-a14b", "image"] != keys["wan2.1-i2v", "image"]
    wan = model(folders["wan2.1-i2v"], "wan2.1-i2v")
    assert wan.image_encoder is not None
    with torch.no_grad():
        next(wan.image_encoder.parameters()).add_(1)
    assert wan.cache_key() != keys["wan2.1-i2v", "image"]
    wan = model(folders["wan2.1-i2v"], "wan2.1-i2v")
    wan.image_processor.do_center_crop = False
    assert wan.cache_key() != keys["wan2.1-i2v", "image"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("wan2.2-i2v-a14b", {"adapter": AdapterConfig()}, "model.expert: is missing; .* high or low"),
        ("wan2.1-t2v", {"expert": "low"}, "model.expert: is for models of two experts"),
        ("wan2.1-t2v", {"other_adapter": "x"}, "model.other_adapter: is for models of two experts"),
        ("wan2.2-t2v-a14b", {"expert": "low", "other_adapter": "x"}, f"model.other_adapter: x/{lora.FILE} does not"),
        ("wan2.1-t2v", {"init": "random", "dtype": "bf16"}, "model.dtype: with init=random all weights are trained"),
        ("wan2.1-t2v", {"revision": "main"}, "model.revision: main is for hub ids"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    folders: dict[str, Path], family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(ModelConfig(path=str(folders[family]), **changes))


def test_guidance_for_a_second_expert_is_refused_where_there_is_none(folders: dict[str, Path]) -> None:
    wan = model(folders["wan2.1-t2v"], "wan2.1-t2v")
    with pytest.raises(UserError, match=r"guidance_low: is only for a model with two experts"):
        sample_clips(wan, PICTURE[None], [CAPTION], [3], 9, 2, guidance_low=2.0)
