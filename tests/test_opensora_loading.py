"""Open-Sora's weights in every layout, its text, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_opensora import TEXT_TOKENS, TRANSFORMER, opensora_folder, transformer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from posttrain.commands.experiment import resolved
from posttrain.core.errors import UserError
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, Merged, ModelConfig
from posttrain.models.opensora import TARGETS, outline, text
from posttrain.models.opensora.loading import MODEL, bare, load, save_merged
from posttrain.models.opensora.stdit import NULL, STDiT3, rope_frequencies
from posttrain.models.opensora.vae import SCALE, OpenSoraVAE
from posttrain.models.opensora.weights import read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opensora_folder(tmp_path_factory.mktemp("tiny") / "model", published=True)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def config(path: Path, **changes: Any) -> ModelConfig:
    adapter = changes.pop("adapter", None)
    return ModelConfig(path=str(path), adapter=adapter and AdapterConfig(targets=TARGETS, **adapter), **changes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shards(weights: dict[str, Tensor], folder: Path, ending: str) -> None:
    """Two files and an index, as safetensors or pickled."""
    folder.mkdir(parents=True, exist_ok=True)
    names, places = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = {"safetensors": "model", "bin": "pytorch_model"}[ending] + f"-{number:05}-of-00002.{ending}"
        tensors = {key: weights[key].clone() for key in part}
        save_file(tensors, folder / name) if ending == "safetensors" else torch.save(tensors, folder / name)
        places |= dict.fromkeys(part, name)
    stem = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[ending]
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# ------------------------------------------------------------------------------------------------ layouts


def test_published_files_hold_the_published_names(folder: Path) -> None:
    told = json.loads((folder / "transformer" / "config.json").read_text())
    assert told["model_type"] == "STDiT3"
    assert told["depth"] == 2
    assert same(load_file(folder / "transformer" / "model.safetensors"), transformer().state_dict())
    assert {"scale", "shift", "spatial_vae.module.encoder.conv_in.weight"} <= read(folder / "vae").keys()


@pytest.mark.parametrize("layout", ["sharded", "bin", "checkpoint", "ema", "diffusers"])
def test_every_layout_is_read(copy: Path, layout: str) -> None:
    place = copy / "transformer"
    weights = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    match layout:
        case "sharded":
            shards(weights, place, "safetensors")
        case "bin":
            shards(weights, place, "bin")
        case "checkpoint":
            shards(weights, place / "model", "bin")
            torch.save({name: tensor + 1 for name, tensor in weights.items()}, place / "ema.pt")
        case "ema":
            torch.save(weights, place / "ema.pt")
        case "diffusers":
            save_file(weights, place / "diffusion_pytorch_model.safetensors")
    assert same(bare(config(copy)).state_dict(), weights)


def test_a_whole_training_checkpoint(copy: Path) -> None:
    """As ColossalAI leaves it, with more than weights, and without a config, which means the published shape."""
    weights = load_file(copy / "transformer" / "model.safetensors")
    shutil.rmtree(copy / "transformer")
    shards(weights, copy / "model", "bin")
    shards({"0": torch.zeros(3), "1": torch.zeros(3)}, copy / "optimizer", "bin")
    torch.save({"step": 7}, copy / "lr_scheduler")
    (copy / "running_states.json").write_text('{"epoch": 0, "step": 7}')
    averaged = {name: tensor + 1 for name, tensor in weights.items() if name != NULL}
    torch.save(averaged, copy / "ema.pt")
    with pytest.raises(UserError, match=r"spatial_blocks\.10") as error:  # it has 28 pairs of blocks
        load(config(copy))
    assert error.value.code == "damaged"

    (copy / "config.json").write_text(json.dumps(TRANSFORMER))  # now it says so
    model = load(config(copy))
    assert same(model.transformer.state_dict(), weights)
    chosen = resolved(config(copy, start=str(copy / "ema.pt")))
    assert same(load(chosen).transformer.state_dict(), averaged | {NULL: weights[NULL]})
    with pytest.raises(UserError) as error:
        load(config(copy / "ema.pt"))
    assert (error.value.code, error.value.field) == ("format", "model.path")


def test_a_folder_of_the_transformer_alone(folder: Path) -> None:
    """STDiT3 and the VAE are read from the published folders as they are, unknown keys of the config ignored."""
    assert same(STDiT3.from_pretrained(folder / "transformer").state_dict(), transformer().state_dict())
    assert same(STDiT3.from_pretrained(folder, subfolder="transformer").state_dict(), transformer().state_dict())
    with pytest.raises(UserError) as error:
        load(config(folder / "nowhere"))
    assert (error.value.code, error.value.field) == ("missing", "model.path")


def test_unknown_keys_of_a_config_are_ignored(copy: Path) -> None:
    path = copy / "transformer" / "config.json"
    more = {"architectures": ["STDiT3"], "auto_map": {}, "input_size": [None] * 3, "enable_flash_attn": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert bare(config(copy)).config.depth == 2


def test_optional_tensors_may_lack(copy: Path) -> None:
    place = copy / "transformer" / "model.safetensors"
    weights = load_file(place)
    del weights["rope.freqs"], weights[NULL]
    save_file(weights, place)
    made = bare(config(copy))
    assert torch.equal(made.rope.freqs, rope_frequencies(16))
    assert not made.y_embedder.y_embedding.any()
    assert not made.rope.freqs.requires_grad

    place = copy / "vae" / "model.safetensors"
    weights = load_file(place)
    del weights["scale"], weights["shift"]
    save_file(weights, place)
    vae = OpenSoraVAE.from_pretrained(copy / "vae")
    assert vae.scale.flatten().tolist() == pytest.approx(SCALE)


def test_what_is_refused(copy: Path, tmp_path: Path) -> None:
    place = copy / "transformer" / "model.safetensors"
    weights = load_file(place)

    def refused(**changed: Any) -> tuple[str, str]:
        kept = {name: tensor for name, tensor in (weights | changed).items() if tensor is not None}
        save_file(kept, place)
        with pytest.raises(UserError) as error:
            bare(config(copy))
        return error.value.code, str(error.value)

    bias = "x_embedder.proj.bias"
    code, message = refused(**{bias: None})
    assert code == "damaged"
    assert bias in message
    code, message = refused(pos_embed=torch.zeros(1))
    assert code == "mismatch"
    assert "pos_embed" in message
    code, message = refused(**{bias: torch.zeros(3)})
    assert code == "mismatch"
    assert bias in message

    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "damaged"
    place.unlink()
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "missing"
    torch.save({"step": 1}, copy / "transformer" / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "format"
    torch.save({"weights": Path("x")}, copy / "transformer" / "pytorch_model.bin")  # what unpickling would have to run
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "format"


def test_a_missing_shard_and_a_shard_elsewhere(copy: Path) -> None:
    place = copy / "transformer"
    shards(load_file(place / "model.safetensors"), place, "safetensors")
    (place / "model.safetensors").unlink()
    (place / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "missing"
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(UserError) as error:
        bare(config(copy))
    assert error.value.code == "outside"


def test_parts_that_do_not_belong_together(copy: Path) -> None:
    transformer(caption_channels=24).save_published(copy / "transformer")
    with pytest.raises(UserError) as error:
        load(config(copy))
    assert error.value.code == "mismatch"
    for field, value in (("expert", "high"), ("other_adapter", "x")):
        with pytest.raises(UserError) as error:
            load(config(copy, **{field: value}))
        assert (error.value.code, error.value.field) == ("conflict", f"model.{field}")


# ------------------------------------------------------------------------------------------ what training starts from


@pytest.mark.slow
def test_what_is_trained(folder: Path) -> None:
    def trained(model: Any) -> set[str]:
        return {name for name, parameter in model.transformer.named_parameters() if parameter.requires_grad}

    everything = trained(load(config(folder)))
    frozen = {name for name, _ in transformer().named_parameters()} - everything
    assert frozen == {"rope.freqs", *(f"y_embedder.y_proj.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias"))}
    assert not trained(load(config(folder, dtype="bf16")))
    adapted = trained(load(config(folder, adapter={"rank": 2}, dtype="bf16")))
    assert len(adapted) == 2 * len(TARGETS) * 4
    assert all(".lora_" in name for name in adapted)


def test_random_weights(folder: Path) -> None:
    one, again, other = (load(config(folder, init="random", seed=seed)).transformer.state_dict() for seed in (0, 0, 1))
    assert same(one, again)
    assert not torch.equal(one["x_embedder.proj.weight"], other["x_embedder.proj.weight"])
    with pytest.raises(UserError) as error:
        load(config(folder, init="random", dtype="bf16"))
    assert error.value.field == "model.dtype"


@pytest.mark.slow
def test_start_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """As PISA's are published: no config, the learned text as the base has it where they lack it."""
    weights = transformer(seed=7).state_dict()
    null = weights.pop(NULL)
    shards(weights, tmp_path / "checkpoint" / "model", "bin")
    torch.save(weights, tmp_path / "ema.pt")
    for start in ("checkpoint", "ema.pt"):
        made = bare(config(folder, start=str(tmp_path / start))).state_dict()
        assert torch.equal(made.pop(NULL), transformer().state_dict()[NULL])
        assert same(made, weights)
    weights[NULL] = null
    shards(weights, tmp_path / "checkpoint" / "model", "bin")
    assert same(bare(config(folder, start=str(tmp_path / "checkpoint"))).state_dict(), weights)

    other = transformer(depth=1)
    other.save_published(tmp_path / "other")
    with pytest.raises(UserError) as error:
        bare(config(folder, start=str(tmp_path / "other")))
    assert (error.value.code, error.value.field) == ("mismatch", "model.start")


@pytest.mark.slow
def test_adapters_are_saved_merged_and_continued(folder: Path, tmp_path: Path) -> None:
    model = load(config(folder, adapter={"rank": 2, "alpha": 4}))
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    (file,) = model.save(tmp_path / "adapter")
    layer = "temporal_blocks.1.mlp.fc2"
    saved = load_file(file)
    a, b = (saved[f"transformer.{layer}.lora_{m}.weight"] for m in "AB")
    merged = transformer().state_dict()[f"{layer}.weight"] + b @ a  # alpha / rank is in B

    assert same(load(config(folder, adapter={"rank": 2, "alpha": 4}, start=str(file))).transformer.state_dict(),
                model.transformer.state_dict())  # fmt: skip
    torch.testing.assert_close(
        bare(config(folder, merge=(Merged(path=str(file)),))).state_dict()[f"{layer}.weight"], merged
    )
    save_merged(config(folder), file.parent, tmp_path / "merged")
    again = load_file(tmp_path / "merged" / "model.safetensors")
    assert again.keys() == transformer().state_dict().keys()
    torch.testing.assert_close(again[f"{layer}.weight"], merged)
    assert torch.equal(again["rope.freqs"], transformer().rope.freqs)

    fresh = load(config(folder, adapter={"rank": 2, "alpha": 4}))
    fresh.restore(tmp_path / "adapter")
    (copied,) = fresh.save(tmp_path / "again")
    assert same(load_file(copied), saved)
    with pytest.raises(UserError) as error:
        load(config(folder, start=str(file)))
    assert (error.value.code, error.value.field) == ("conflict", "model.start")


def test_merged_weights_keep_the_dtype_of_their_files(folder: Path, copy: Path, tmp_path: Path) -> None:
    model = load(config(folder, adapter={"rank": 2}))
    model.save(tmp_path / "adapter")
    half = {name: tensor.bfloat16() for name, tensor in transformer().state_dict().items()}
    save_file(half, copy / "transformer" / "model.safetensors")
    save_merged(config(copy), tmp_path / "adapter", tmp_path / "merged")
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), half)


def test_whole_weights_are_saved_and_restored(folder: Path, tmp_path: Path) -> None:
    model = load(config(folder))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1.5)
    (path,) = model.save(tmp_path)
    fresh = load(config(folder))
    fresh.restore(tmp_path)
    assert same(fresh.transformer.state_dict(), model.transformer.state_dict())
    assert {n for n, p in fresh.transformer.named_parameters() if p.requires_grad} == {
        n for n, p in model.transformer.named_parameters() if p.requires_grad
    }
    assert same(bare(config(folder, start=str(path))).state_dict(), model.transformer.state_dict())
    with pytest.raises(UserError):
        fresh.restore(tmp_path / "nowhere")
    assert lora.unwrap(fresh.transformer) is fresh.transformer


def test_the_published_model_as_shapes(folder: Path) -> None:
    """Without the hub; what of it is trained."""
    shapes = outline(config(Path(MODEL)), 32, 256, 256)
    tensors = shapes.model.transformer.state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == 1_208_872_772
    assert all(tensor.is_meta for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in shapes.decoder.state_dict().values()) == 393_341_015
    assert shapes.tokens == 9 * 16 * 16
    trained = sum(p.numel() for p in shapes.model.transformer.parameters() if p.requires_grad)
    assert trained == 1_208_872_772 - 300 * 4096 - 36 - (4096 + 1) * 1152 - (1152 + 1) * 1152
    small = outline(config(folder, adapter={"rank": 2}, dtype="bf16"), 9, 40, 32)
    assert small.tokens == 3 * 3 * 2  # an odd number of cells is padded
    assert small.model.transformer.x_embedder.proj.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ text


def test_scores_are_appended_once_and_in_order() -> None:
    assert text.with_scores("a ball", 6.5, 2.0, "pan") == (
        "a ball aesthetic score: 6.5. motion score: 2.0. camera motion: pan."
    )
    assert text.with_scores("a ball aesthetic score: 5.0.", 6.5) == "a ball aesthetic score: 5.0."
    assert text.with_scores("a ball") == "a ball"


def test_prompts_are_cleaned_as_pixart_does_it() -> None:
    asked = "A <b>Ball</b> falls &amp; BOUNCES https://example.com/x.jpg 落下 #123456 \u201cslowly\u201d (NEW)..."
    assert text.clean(asked) == 'a ball falls bounces "slowly" new'
    assert text.prompt("A Ball") == "a ball aesthetic score: 6.5."
    assert text.prompt("A Ball", None, 3.25) == "a ball motion score: 3.2."


def test_text_encoder(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    captions = ["a ball falls", "A video of an object dropping", "ball " * 40]
    states, mask = text.encode(tokenizer, encoder, captions, TEXT_TOKENS)
    assert states.shape == (3, TEXT_TOKENS, TRANSFORMER["caption_channels"])
    assert mask[0].sum() == 4  # three words and the end
    assert mask[2].sum() == TEXT_TOKENS
    with torch.no_grad():
        alone = encoder(tokenizer(captions[0], return_tensors="pt").input_ids).last_hidden_state
    torch.testing.assert_close(states[0, :4], alone[0], rtol=1e-4, atol=1e-5)
    lower, _ = text.encode(tokenizer, encoder, [captions[1].lower()], TEXT_TOKENS)
    assert not torch.equal(lower[0], states[1])  # captions are not cleaned here
