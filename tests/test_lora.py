"""Adapters: nothing at the start, the base when switched off, and the same video in a stock pipeline."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors import safe_open
from tiny import wan_folder
from torch import Tensor

from posttrain.files import UserError
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan import Wan, load
from posttrain.sample import sample_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_folder(tmp_path_factory.mktemp("tiny") / "wan")


def adapted(folder: Path, rank: int = 4, alpha: int | None = None, seed: int = 0) -> Wan:
    return load(ModelConfig(path=str(folder), adapter=AdapterConfig(rank=rank, alpha=alpha), seed=seed))


def disturb(wan: Wan) -> None:
    """Stand in for training: B is no longer zero."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)


def velocity(wan: Wan) -> Tensor:
    torch.manual_seed(0)
    z, text = torch.randn(2, 8, 3, 4, 4), wan.encode_text(["a red ball falls.", "a duck hovers."])
    return wan.velocity(z, torch.tensor([[0, 0.5, 0.5], [0, 0.9, 0.9]]), text)


def test_a_new_adapter_changes_no_bit(folder: Path) -> None:
    base, wan = load(ModelConfig(path=str(folder))), adapted(folder)
    assert torch.equal(velocity(wan), velocity(base))
    wan.transformer.enable_gradient_checkpointing()
    assert torch.equal(velocity(wan), velocity(base))
    disturb(wan)
    assert not torch.allclose(velocity(wan), velocity(base), atol=1e-2)


def test_the_default_targets_are_every_linear_map_of_a_block(folder: Path) -> None:
    names = {
        name for name, p in adapted(folder).module.named_parameters() if p.requires_grad and name.startswith("blocks.0")
    }
    assert {name.removeprefix("blocks.0.").split(".lora_")[0] for name in names} == set(lora.TARGETS)
    linear = [
        n
        for n, m in load(ModelConfig(path=str(folder))).module.blocks[0].named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    assert set(linear) == set(lora.TARGETS)


def test_the_seed_draws_the_adapter(folder: Path) -> None:
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(100 + seed * 7)  # the surrounding state does not matter
        return [p for p in adapted(folder, seed=seed).module.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_switched_off_it_is_the_base_bit_for_bit(folder: Path, checkpointing: bool) -> None:
    """Also between a forward and its backward pass, whose gradients are not touched by it."""
    base, wan = load(ModelConfig(path=str(folder))), adapted(folder)
    disturb(wan)
    if checkpointing:
        wan.transformer.enable_gradient_checkpointing()
    trained = [p for p in wan.module.parameters() if p.requires_grad]
    undisturbed = torch.autograd.grad(velocity(wan).square().mean(), trained)

    loss = velocity(wan).square().mean()
    with torch.no_grad(), lora.disabled(wan.transformer):
        assert torch.equal(velocity(wan), velocity(base))
    gradients = torch.autograd.grad(loss, trained)
    assert all(torch.equal(a, b) for a, b in zip(gradients, undisturbed, strict=True))
    assert all(p.requires_grad for p in trained)


def test_it_is_switched_on_again_after_an_error(folder: Path) -> None:
    wan = adapted(folder)
    disturb(wan)
    before = velocity(wan)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(wan.transformer):
        raise RuntimeError("inside")
    assert torch.equal(velocity(wan), before)


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 8), (2, 1)])
def test_the_saved_file_gives_the_same_video_in_a_stock_pipeline(
    folder: Path, tmp_path: Path, rank: int, alpha: int | None
) -> None:
    wan = adapted(folder, rank, alpha)
    disturb(wan)
    assert wan.save(tmp_path) == [tmp_path / lora.FILE]

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    options = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}

    def stock() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return pipe(Image.fromarray(picture), "a red ball falls.", generator=generator, **options).frames[0]

    before = stock()
    pipe.load_lora_weights(tmp_path)
    after = stock()
    torch.manual_seed(0)
    ours = exact_video(wan, picture)
    assert np.abs(ours - after).max() < 1e-4
    assert np.abs(before - after).max() > 1e-2  # the adapter matters


def exact_video(wan: Wan, picture: np.ndarray) -> np.ndarray:
    """What sample_clips gives, before it is rounded to whole grey levels."""
    from posttrain.flow import sample

    noise = torch.randn(wan.latent_shape(9, 32, 32), generator=torch.Generator().manual_seed(3))[None]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        z0 = sample(wan, wan.scheduler(), noise, wan.encode_text(["a red ball falls."]), wan.encode(pixels), 4)
        video = wan.decode(z0)[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    rounded = sample_clips(wan, picture[None], ["a red ball falls."], [3], frames=9, steps=4)[0]
    assert np.abs(video - rounded / 255).max() <= 0.5 / 255 + 1e-6
    return video


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    """Onto a bare base and in place of another adapter; the loaded one trains on."""
    wan = adapted(folder, rank=4, alpha=6)
    disturb(wan)
    wan.save(tmp_path)
    for again in (load(ModelConfig(path=str(folder))), adapted(folder, rank=2, seed=5)):
        again.restore(tmp_path)
        assert torch.equal(velocity(again), velocity(wan))
        assert [n for n, p in again.module.named_parameters() if p.requires_grad and "lora" not in n] == []
        assert any(p.requires_grad for p in again.module.parameters())


def test_the_file_is_the_same_bytes_for_the_same_weights(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder, rank=4, alpha=8)
    first, second = wan.save(tmp_path / "a")[0], wan.save(tmp_path / "b")[0]
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("transformer.blocks.") for name in file.keys())
    assert metadata == {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.target_modules": sorted(lora.TARGETS),
    }


def test_files_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    wan = load(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=f"{lora.FILE}: does not exist"):
        wan.restore(tmp_path)
    adapted(folder).save(tmp_path)
    with pytest.raises(UserError, match="does not fit the model"):
        load(ModelConfig(path="pocket")).restore(tmp_path)
    whole = (tmp_path / lora.FILE).read_bytes()
    (tmp_path / lora.FILE).write_bytes(whole[:-100])
    with pytest.raises(UserError, match="does not fit the model"):
        wan.restore(tmp_path)


def test_a_target_that_names_no_layer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.adapter.targets: no linear layer ends in 'attn3.to_q'"):
        load(ModelConfig(path=str(folder), adapter=AdapterConfig(targets=("attn1.to_q", "attn3.to_q"))))
