"""Adapters: nothing at the start, the base when switched off, and merged into the weights what they were attached."""

from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from helpers.adapters import adapted, disturb, velocity
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, Merged, ModelConfig
from posttrain.models.wan.adapters import TARGETS
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan


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
    assert {name.removeprefix("blocks.0.").split(".lora_")[0] for name in names} == set(TARGETS)
    linear = [
        n
        for n, m in load(ModelConfig(path=str(folder))).module.blocks[0].named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    assert set(linear) == set(TARGETS)


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


def test_a_target_that_names_no_layer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.adapter.targets: no linear layer ends in 'attn3.to_q'"):
        load(ModelConfig(path=str(folder), adapter=AdapterConfig(targets=("attn1.to_q", "attn3.to_q"))))


@pytest.mark.slow
def test_merged_is_what_attached_was(folder: Path, tmp_path: Path) -> None:
    """Merged into the weights with a scale, several of them as diffusers stacks them; and all weights train then."""
    files = []
    for seed, alpha in ((9, 8), (10, 2)):
        wan = adapted(folder, rank=4, alpha=alpha)
        disturb(wan, seed)
        files += wan.save(tmp_path / str(seed))
    both = tuple(Merged(path=str(file), scale=scale) for file, scale in zip(files, (1.0, 0.5), strict=True))
    merged = load(ModelConfig(path=str(folder), merge=both))
    assert not lora.attached(merged.module)
    assert all(p.requires_grad for p in merged.module.parameters())

    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    stacked = load(ModelConfig(path=str(folder)))
    before = velocity(stacked)
    stacked.module = pipe.transformer
    assert (velocity(merged) - velocity(stacked)).abs().max() < 1e-5
    assert (velocity(merged) - before).abs().max() > 1e-2

    fresh = load(ModelConfig(path=str(folder), merge=both, adapter=AdapterConfig(rank=2)))
    assert torch.equal(velocity(fresh), velocity(merged))
    assert {n for n, p in fresh.module.named_parameters() if p.requires_grad and ".lora_" not in n} == set()


@pytest.mark.slow
def test_training_proceeds_from_an_adapter_like_its_own_alone(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder, rank=4, alpha=8)
    disturb(wan)
    file = str(wan.save(tmp_path)[0])

    def start(**adapter: object) -> Wan:
        return load(ModelConfig(path=str(folder), start=file, adapter=AdapterConfig(**adapter)))

    again = start(rank=4, alpha=8)
    assert torch.equal(velocity(again), velocity(wan))
    trained = {name for name, p in again.module.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in wan.module.named_parameters() if p.requires_grad}
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / lora.FILE).read_bytes() == Path(file).read_bytes()
    for alpha in (4, 2):  # trained with another alpha than the file's, from the same velocity
        other = start(rank=4, alpha=alpha)
        assert torch.equal(velocity(other), velocity(wan))
        assert {layer.scaling[lora.NAME] for layer in lora.adapted_layers(other.module)} == {alpha / 4}
    with pytest.raises(UserError) as error:
        start(rank=8)
    assert (error.value.code, error.value.field) == ("mismatch", "model.adapter.rank")
    with pytest.raises(UserError) as error:
        start(rank=4, alpha=8, targets=("attn1.to_q",))
    assert (error.value.code, error.value.field) == ("mismatch", "model.adapter.targets")
    with pytest.raises(UserError, match=r"is an adapter; set model.adapter, or name it in model.merge"):
        load(ModelConfig(path=str(folder), start=file))


def test_the_scale_of_an_adapter(folder: Path, tmp_path: Path) -> None:
    wan = adapted(folder, rank=4, alpha=4)
    disturb(wan)
    full, half = velocity(wan), adapted(folder, rank=4, alpha=2)
    disturb(half)
    for scale, expected in ((0.5, velocity(half)), (0.0, velocity(load(ModelConfig(path=str(folder))))), (1.0, full)):
        lora.rescale(wan.module, scale)
        assert (velocity(wan) - expected).abs().max() < 1e-5


def test_an_adapter_on_coarse_weights_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    """float32 beside bfloat16 weights, bit for bit."""
    wan = adapted(folder)
    disturb(wan)
    (file,) = wan.save(tmp_path / "a")
    coarse = load(ModelConfig(path=str(folder), dtype="bf16"))
    coarse.restore(tmp_path / "a")
    assert coarse.save(tmp_path / "b")[0].read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_merge_that_rounds_an_adapter_away_is_refused(folder: Path, tmp_path: Path) -> None:
    """Weights of bfloat16 have steps of 2^-8 of their size; a change of less than half of one is lost."""
    wan = adapted(folder)
    disturb(wan)
    strong = {name: w.clone() for name, w in wan.module.state_dict().items() if ".lora_B." in name}
    shares = {}
    for strength in (1.0, 3e-3):
        with torch.no_grad():
            for name, weight in strong.items():
                wan.module.state_dict()[name].copy_(weight * strength)
        (file,) = wan.save(tmp_path / str(strength))
        for dtype in ("fp32", "bf16"):
            bare = load(ModelConfig(path=str(folder), dtype=dtype)).module
            lora.load(bare, file)
            shares[strength, dtype] = lora.fuse(bare)
    assert [round(shares[strength, "fp32"], 4) for strength in (1.0, 3e-3)] == [1, 1]
    assert shares[1.0, "bf16"] > 0.99
    assert 0.05 < shares[3e-3, "bf16"] < 0.95
    with pytest.raises(UserError, match=f"{shares[3e-3, 'bf16']:.1%} of it is left") as error:
        load(ModelConfig(path=str(folder), dtype="bf16", merge=(Merged(path=str(file)),)))
    assert (error.value.code, error.value.field) == ("mismatch", "model.merge")
    load(ModelConfig(path=str(folder), dtype="fp32", merge=(Merged(path=str(file)),)))


def test_an_adapter_of_zeros_is_merged_with_a_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for strength, lines in ((0.0, 1), (1.0, 0)):
        wan = adapted(folder)
        if strength:
            disturb(wan)
        load(ModelConfig(path=str(folder), merge=(Merged(path=str(wan.save(tmp_path)[0])),)))
        assert capsys.readouterr().err.count("changes nothing") == lines


def test_an_adapter_of_several_ranks_can_only_be_merged(folder: Path, tmp_path: Path) -> None:
    weights = load_file(adapted(folder).save(tmp_path)[0])
    first = {name: w for name, w in weights.items() if name.startswith("transformer.blocks.0.attn1.to_q.")}
    cut = {name: w[:2] if "lora_A" in name else w[:, :2].contiguous() for name, w in first.items()}
    save_file(weights | cut, tmp_path / "ranks.safetensors")
    config = ModelConfig(path=str(folder), adapter=AdapterConfig(rank=4), start=str(tmp_path / "ranks.safetensors"))
    with pytest.raises(UserError, match=r"\(2, 4\).* model\.merge") as error:
        load(config)
    assert error.value.field == "model.adapter.rank"
    load(ModelConfig(path=str(folder), merge=(Merged(path=str(tmp_path / "ranks.safetensors")),)))
