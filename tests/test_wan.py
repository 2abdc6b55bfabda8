"""The Wan adapter: equal to the stock parts, and clear about folders that are not whole."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.embeddings import TimestepEmbedding
from helpers.tiny import wan_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan
from posttrain.pocket import folder as embedded
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run

CAPTIONS = ["a red ball falls.", "  A  duck &amp; a wooden box\nfall. ", "", "ball " * 600]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "wan"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_text_equals_the_stock_pipeline(wan: Wan, folder: Path) -> None:
    """Cleaned the same way, 512 tokens, zero after the last one; one caption is empty and one too long."""
    text_BLD = wan.encode_text(CAPTIONS)
    stock, _ = WanImageToVideoPipeline.from_pretrained(folder).encode_prompt(CAPTIONS, max_sequence_length=512)
    assert text_BLD.shape == (4, 512, 64)
    torch.testing.assert_close(text_BLD, stock, atol=2e-5, rtol=0)
    assert (text_BLD != 0).any(-1).sum(1).tolist()[2:] == [1, 512]


def test_known_words_are_one_token_and_others_are_spelt(wan: Wan) -> None:
    assert wan.tokenizer.tokenize("a red ball falls.") == ["▁a", "▁red", "▁ball", "▁falls", "."]
    assert wan.tokenizer.unk_token not in wan.tokenizer.tokenize("Xylophone #7 zaps!")


def test_the_first_latent_is_that_of_the_first_picture_alone(wan: Wan) -> None:
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = wan.encode(video)
    assert z.shape[1:] == wan.latent_shape(9, 32, 32) == (8, 3, 4, 4)
    torch.testing.assert_close(z[:, :, :1], wan.encode(video[:, :, :1]), atol=1e-5, rtol=0)


def test_latents_are_normalised_and_decode_undoes_it(wan: Wan) -> None:
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (wan.vae.config.latents_mean, wan.vae.config.latents_std))
    raw = wan.vae.encode(video).latent_dist.mode()
    torch.testing.assert_close(wan.encode(video), (raw - mean) / std)
    torch.testing.assert_close(wan.decode(wan.encode(video)), wan.vae.decode(raw).sample, atol=1e-5, rtol=0)


def test_decode_carries_gradients(wan: Wan) -> None:
    z = torch.zeros(1, 8, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(wan.decode(z).sum(), z)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("size", [(10, 32, 32), (9, 40, 32), (9, 32, 24)])
def test_sizes_that_do_not_fit_are_refused(wan: Wan, size: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"4k \+ 1 frames with sides in multiples of 16 x 16"):
        wan.latent_shape(*size)


def test_each_frame_has_its_own_time(wan: Wan, folder: Path) -> None:
    """Tokens are frame-major: 2 x 3 cells per frame get 1000 t of that frame."""
    torch.manual_seed(0)
    z, text = torch.randn(2, 8, 3, 4, 6), wan.encode_text(CAPTIONS[:2])
    t_BF = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.25, 0.75]])
    stock = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    tokens = torch.stack([torch.tensor(row).mul(1000).repeat_interleave(6) for row in t_BF.tolist()])
    torch.testing.assert_close(wan.velocity(z, t_BF, text), stock(z, tokens, text).sample, atol=1e-5, rtol=0)
    swapped = wan.velocity(z, t_BF[:, [0, 2, 1]], text)
    assert torch.allclose(swapped[0], wan.velocity(z, t_BF, text)[0], atol=1e-6)
    assert not torch.allclose(swapped[1], wan.velocity(z, t_BF, text)[1], atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("captions", [CAPTIONS[:2], CAPTIONS[:1], CAPTIONS])
def test_folded_padding_equals_the_stock_attention(folder: Path, captions: list[str], checkpointing: bool) -> None:
    """Values and all gradients, with captions of different lengths in one batch, two forward passes per backward."""
    wan = load(ModelConfig(path=str(folder)))
    stock = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    text, count = wan.encode_text(captions), len(captions)
    if checkpointing:
        wan.transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    z, t = torch.randn(count, 8, 3, 4, 4), torch.full((count, 12), 500.0)

    def both(transformer: torch.nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        v = transformer(z, t, text, return_dict=False)[0]
        v = v + transformer(v, t, text.flip(0), return_dict=False)[0]
        return v.detach(), torch.autograd.grad(v.square().mean(), list(transformer.parameters()))

    (v, gradients), (v_stock, gradients_stock) = both(wan.transformer), both(stock)
    torch.testing.assert_close(v, v_stock, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients, gradients_stock, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_latents_stay_float32_under_bfloat16(wan: Wan) -> None:
    z, text = torch.randn(1, 8, 2, 4, 4), wan.encode_text(CAPTIONS[:1])
    t_BF = torch.tensor([[0.0, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        v = wan.velocity(z, t_BF, text)
    assert v.dtype == torch.float32
    exact = wan.velocity(z, t_BF, text)
    assert 0 < (v - exact).norm() / exact.norm() < 0.05


@torch.no_grad()
def test_training_and_sampling_have_one_velocity(folder: Path) -> None:
    """bf16 weights under the autocast of training, and without it as sampling has them: the same bits.

    An adapter is float32, and its sums are rounded at other moments; both are as far from float32's velocity.
    """
    t_BF = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.9, 0.9]])
    z_BCFHW = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(wan: Wan, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return wan.velocity(z_BCFHW, t_BF, text_BLD)

    base = load(ModelConfig(path=str(folder), dtype="bf16"))
    text_BLD = base.encode_text(["a ball falls.", "a duck hovers."])
    assert torch.equal(velocity(base, autocast=True), velocity(base, autocast=False))
    adapted = load(ModelConfig(path=str(folder), dtype="bf16", adapter=AdapterConfig(rank=2)))
    torch.manual_seed(1)
    for name, weight in adapted.module.named_parameters():
        if ".lora_B." in name:
            weight.normal_(std=0.05)
    sampled = velocity(adapted, autocast=False)
    assert (velocity(adapted, autocast=True) - sampled).norm() < 0.01 * sampled.norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_autocast_leaves_the_time_embedding_and_the_norms_alone(folder: Path, dtype: str) -> None:
    """The embedding has float32's bits, and no norm has to mix dtypes, of which torch would warn."""
    wan, seen = load(ModelConfig(path=str(folder), dtype=dtype)), []
    wan.module.condition_embedder.time_embedder.register_forward_hook(lambda _, inputs, out: seen.append((inputs, out)))
    text_BLD = wan.encode_text(["a ball falls."])
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(action="error"):
        wan.velocity(torch.zeros(1, 8, 3, 4, 4), torch.full((1, 3), 0.7), text_BLD)
    [((sample,), out)] = seen
    weights = {name: w.float() for name, w in wan.module.condition_embedder.time_embedder.state_dict().items()}
    plain = TimestepEmbedding(sample.shape[-1], out.shape[-1])
    plain.load_state_dict(weights)
    assert out.dtype == torch.float32
    assert torch.equal(out, plain(sample))


def test_random_weights_are_the_seeds_and_start_at_zero(folder: Path) -> None:
    first, again, other = (load(ModelConfig(path=str(folder), init="random", seed=s)).transformer for s in (3, 3, 4))
    state, other_state = first.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())
    assert not torch.equal(state["blocks.0.attn1.to_q.weight"], other_state["blocks.0.attn1.to_q.weight"])
    assert first(torch.randn(1, 8, 2, 4, 4), torch.zeros(1, 8), torch.ones(1, 512, 64)).sample.abs().max() == 0


def test_only_what_is_trained_has_gradients(folder: Path) -> None:
    full = load(ModelConfig(path=str(folder)))
    assert all(p.requires_grad for p in full.module.parameters())
    assert not any(p.requires_grad for part in (full.vae, full.text_encoder) for p in part.parameters())
    adapted = load(ModelConfig(path=str(folder), adapter=AdapterConfig(rank=2)))
    assert {name.split(".")[-3] for name, p in adapted.module.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_cache_key_follows_what_encodes(folder: Path, copy: Path) -> None:
    key = load(ModelConfig(path=str(folder))).cache_key()
    assert load(ModelConfig(path=str(copy), adapter=AdapterConfig())).cache_key() == key
    edit(copy / "vae" / "config.json", latents_std=[2.0] * 8)
    changed = load(ModelConfig(path=str(copy)))
    assert changed.cache_key() != key
    other = load(ModelConfig(path=str(copy)))
    with torch.no_grad():
        other.text_encoder.shared.weight[5] += 1
    assert other.cache_key() not in (key, changed.cache_key())


def test_all_weights_are_saved_and_restored(folder: Path, tmp_path: Path) -> None:
    wan = load(ModelConfig(path=str(folder)))
    with torch.no_grad():
        wan.transformer.proj_out.weight += 1
    assert wan.save(tmp_path) == [tmp_path / "transformer"]
    again = load(ModelConfig(path=str(folder)))
    again.restore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(wan.module.parameters(), again.module.parameters(), strict=True))
    pocket = load(ModelConfig(path="pocket"))
    with pytest.raises(UserError, match="was trained from another model"):
        pocket.restore(tmp_path)


def broken(folder: Path) -> Iterator[tuple[str, str]]:
    """Damage `folder` in one way after another; what the message must name."""
    shutil.move(folder / "vae", folder / "away")
    yield "vae", "does not exist"
    shutil.move(folder / "away", folder / "vae")

    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    yield f"transformer/{weights.name}", "is damaged"
    weights.write_bytes(whole)

    edit(folder / "transformer" / "config.json", num_layers=3)
    yield "transformer", "lacks blocks.2"
    edit(folder / "transformer" / "config.json", num_layers=2, ffn_dim=64)
    yield "transformer", "cannot be loaded"
    edit(folder / "transformer" / "config.json", ffn_dim=32)

    (folder / "text_encoder" / "config.json").write_text("{")
    yield "text_encoder", "cannot be loaded"


def test_broken_folders_are_named(copy: Path) -> None:
    for part, complaint in broken(copy):
        with pytest.raises(UserError) as error:
            load(ModelConfig(path=str(copy)))
        assert f"{copy / part}: " in str(error.value)
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)


def test_paths_that_name_something_else_are_told_apart(copy: Path) -> None:
    def refused(path: Path) -> tuple[str, str, str]:
        with pytest.raises(UserError) as error:
            load(ModelConfig(path=str(path)))
        assert "does not exist" not in str(error.value)
        return error.value.code, error.value.field, str(error.value)

    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    assert refused(weights)[:2] == ("format", "model.path")
    assert "model.start" in refused(copy / "transformer")[2]
    authors = copy.parent / "Wan2.1-T2V-1.3B"
    authors.mkdir()
    assert refused(authors)[:2] == ("format", "model.path")
    (authors / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    assert "-Diffusers" in refused(authors)[2]
    tensors = load_file(weights)
    save_file({name: w.to(torch.float8_e4m3fn) for name, w in tensors.items()}, weights)
    assert refused(copy)[:2] == ("unsupported", "model.path")
    save_file(tensors, weights)
    edit(copy / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "bitsandbytes" in refused(copy)[2]


@pytest.fixture
def sharded(copy: Path) -> Path:
    """The copy, its transformer in several files, as the published ones are."""
    transformer = WanTransformer3DModel.from_pretrained(copy, subfolder="transformer")
    shutil.rmtree(copy / "transformer")
    transformer.save_pretrained(copy / "transformer", max_shard_size="40KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 2
    return copy


def test_sharded_weights_are_read(sharded: Path, wan: Wan) -> None:
    again = load(ModelConfig(path=str(sharded)))
    for got, want in zip(again.transformer.parameters(), wan.transformer.parameters(), strict=True):
        assert torch.equal(got, want)


def test_a_missing_or_damaged_shard_is_named(sharded: Path) -> None:
    shard = sorted((sharded / "transformer").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{shard}: is damaged"):
        load(ModelConfig(path=str(sharded)))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard}: does not exist; get this file of the model again"):
        load(ModelConfig(path=str(sharded)))
    (sharded / "outside.safetensors").write_bytes(whole)
    index = next((sharded / "transformer").glob("*.index.json"))
    index.write_text(index.read_text().replace(shard.name, "../outside.safetensors"))
    with pytest.raises(UserError, match=r"lists '\.\./outside\.safetensors', which is not a file of this folder"):
        load(ModelConfig(path=str(sharded)))


def test_only_safe_weights_are_read(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match=f"{copy / 'vae'}: has no .safetensors file"):
        load(ModelConfig(path=str(copy)))


def test_a_second_expert_and_its_boundary_need_each_other(copy: Path) -> None:
    edit(copy / "model_index.json", boundary_ratio=0.9)
    with pytest.raises(UserError, match=r"model_index\.json: has only one of transformer_2 and boundary_ratio"):
        load(ModelConfig(path=str(copy)))
    edit(copy / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(UserError, match=f"{copy / 'transformer_2'}: does not exist"):
        load(ModelConfig(path=str(copy)))


def test_models_of_a_last_picture_are_refused(copy: Path) -> None:
    edit(copy / "transformer" / "config.json", pos_embed_seq_len=514)
    with pytest.raises(UserError, match=r"pos_embed_seq_len is 514, but models of a first and a last picture cannot"):
        load(ModelConfig(path=str(copy)))


COMMIT, NEWER = "a" * 40, "b" * 40


@pytest.fixture
def hub(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's own cache, offline, with two commits of some-one/wan in it, files linked to blobs as it does."""
    cache = tmp_path / "hub"
    repository = cache / "models--some-one--wan"
    for commit in (COMMIT, NEWER):
        for file in (path for path in copy.rglob("*") if path.is_file()):
            link = repository / "snapshots" / commit / file.relative_to(copy)
            blob = repository / "blobs" / f"{commit}-{file.parent.name}-{file.name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(blob)
    edit(repository / "snapshots" / COMMIT / "vae" / "config.json", latents_std=[2.0] * 8)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEWER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return "some-one/wan"


def test_a_hub_id_is_read_at_the_revision_that_is_asked(hub: str) -> None:
    newest, pinned = load(ModelConfig(path=hub)), load(ModelConfig(path=hub, revision=COMMIT))
    assert newest.vae.config.latents_std != pinned.vae.config.latents_std == [2.0] * 8
    with pytest.raises(UserError) as error:
        load(ModelConfig(path=hub, revision="c" * 40))
    assert f"model.path: {hub} at revision {'c' * 40} is no folder and cannot be downloaded from the hub" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_hub_id_that_cannot_be_got_is_named(hub: str) -> None:
    with pytest.raises(
        UserError, match=r"model\.path: no-one/nothing is no folder and cannot be downloaded from the hub"
    ):
        load(ModelConfig(path="no-one/nothing"))


def test_bfloat16_weights_carry_a_float32_adapter(folder: Path, wan: Wan, tmp_path: Path) -> None:
    """What diffusers keeps in float32 stays so; without autocast the answer is close to the float32 one's."""
    half = load(ModelConfig(path=str(folder), dtype="bf16", adapter=AdapterConfig(rank=2)))
    kinds = {name: parameter.dtype for name, parameter in half.transformer.named_parameters()}
    assert kinds["blocks.0.ffn.net.2.base_layer.weight"] == kinds["patch_embedding.weight"] == torch.bfloat16
    assert kinds["blocks.0.norm2.weight"] == kinds["scale_shift_table"] == torch.float32
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert next(half.text_encoder.parameters()).dtype == torch.bfloat16

    torch.manual_seed(0)
    z, t_BF, text = torch.randn(1, 8, 3, 4, 4), torch.tensor([[0.0, 0.5, 0.5]]), wan.encode_text(CAPTIONS[:1])
    v, exact = half.velocity(z, t_BF, text), wan.velocity(z, t_BF, text)
    assert v.dtype == torch.float32
    assert 0 < (v - exact).norm() / exact.norm() < 0.05
    v.square().mean().backward()
    assert all(p.grad is not None for p in half.transformer.parameters() if p.requires_grad)
    half.save(tmp_path)
    half.restore(tmp_path)
    assert {p.dtype for n, p in half.transformer.named_parameters() if ".lora_" in n} == {torch.float32}
    torch.testing.assert_close(half.velocity(z, t_BF, text), v)


def test_bfloat16_weights_themselves_are_not_trained(folder: Path, tmp_path: Path) -> None:
    half = load(ModelConfig(path=str(folder), dtype="bf16"))
    assert not any(p.requires_grad for p in half.transformer.parameters())
    points = type("Points", (), {"ids": ["a"], "key": "", "__len__": lambda self: 1})()
    with pytest.raises(UserError, match="none of its weights can be trained"):
        Run(tmp_path, half.module, points, TrainConfig(steps=1, batch=1, lr=1.0))


@pytest.mark.gpu
def test_parts_come_to_the_device_when_used_and_leave_when_released(folder: Path) -> None:
    wan = load(ModelConfig(path=str(folder)), "cuda")

    def places() -> list[str]:
        return [next(part.parameters()).device.type for part in (wan.transformer, wan.vae, wan.text_encoder)]

    assert places() == ["cpu", "cpu", "cpu"]
    text, z = wan.encode_text(CAPTIONS[:1]), wan.encode(torch.zeros(1, 3, 5, 32, 32))
    assert places() == ["cpu", "cuda", "cuda"]
    wan.velocity(z, torch.zeros(1, 2, device=wan.device), text)
    wan.release()
    assert places() == ["cuda", "cpu", "cpu"]
    wan.decode(z)
    assert places() == ["cuda", "cuda", "cpu"]


def test_parts_that_do_not_belong_together_are_refused(copy: Path) -> None:
    other = wan_folder(copy.parent / "other" / "wan")
    edit(other / "transformer" / "config.json", in_channels=24, out_channels=8)
    with pytest.raises(UserError, match="in_channels is 24, but the vae's z_dim is 8, which asks for 8 or 20"):
        load(ModelConfig(path=str(other), init="random"))


@pytest.mark.parametrize("values", [[0.5] * 7, None, "12345678", [0.5] * 7 + [None]])
def test_a_vae_without_a_number_for_each_channel_is_refused(copy: Path, values: Any) -> None:
    edit(copy / "vae" / "config.json", latents_mean=values)
    with pytest.raises(UserError, match="latents_mean") as error:
        load(ModelConfig(path=str(copy)))
    assert error.value.code == "damaged"


@pytest.mark.parametrize("path", ["/nowhere/wan", "./nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(UserError, match="does not exist; give 'pocket', a diffusers folder or a hub id"):
        load(ModelConfig(path=path))


def test_the_embedded_folder_loads_in_the_stock_pipeline() -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(embedded("wan"))
    assert pipe.config.expand_timesteps
    pipe.scheduler.set_timesteps(4)
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_loading_and_saving_say_nothing(tmp_path: Path) -> None:
    """In a process of its own: libraries warn at their first import."""
    lines = [
        "from pathlib import Path",
        "from posttrain.models.base import AdapterConfig, ModelConfig",
        "from posttrain.commands.loading import load_model",
        "load_model(ModelConfig(path='pocket', adapter=AdapterConfig(rank=2))).save(Path('adapter'))",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "adapter").is_dir()
