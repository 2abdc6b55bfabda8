"""Adapters' files: the same video in a stock pipeline, what other programs write, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from helpers.adapters import adapted, disturb, velocity
from helpers.tiny import TINY_TRANSFORMER
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.evaluation.sample import sample_clips
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, Merged, ModelConfig
from posttrain.models.wan.adapters import TARGETS, original_name
from posttrain.models.wan.loading import initialise, load
from posttrain.models.wan.model import Wan


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
        assert (velocity(again) - velocity(wan)).abs().max() < 2e-6  # 6 / 4 is multiplied into B
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
        "transformer.lora_alpha": 4,  # the scale of 2 is in B
        "transformer.target_modules": sorted(TARGETS),
    }


@pytest.mark.slow
def test_files_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    wan = load(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=f"{lora.FILE}: does not exist"):
        wan.restore(tmp_path)
    adapted(folder).save(tmp_path)
    with pytest.raises(UserError, match="does not fit the model"):
        load(ModelConfig(path="pocket")).restore(tmp_path)
    whole = (tmp_path / lora.FILE).read_bytes()
    (tmp_path / lora.FILE).write_bytes(whole[:-100])
    with pytest.raises(UserError, match=lora.FILE) as error:
        wan.restore(tmp_path)
    assert error.value.code == "damaged"


def test_an_adapter_of_another_depth_or_width_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where only some of its layers have no place, or some of the model's have no adapter in the file."""
    for name, change in {"two": {"num_layers": 2}, "three": {"num_layers": 3}, "wide": {"ffn_dim": 48}}.items():
        transformer = initialise(TINY_TRANSFORMER | change, seed=0)
        lora.attach(transformer, 2, 4, TARGETS, seed=0)
        lora.save(transformer, tmp_path / name)
    weights = load_file(tmp_path / "two" / lora.FILE)
    save_file({k: v for k, v in weights.items() if "blocks.1.ffn.net.2.lora_B" not in k}, tmp_path / "half.safetensors")

    def refused(layers: int, file: str) -> str:
        with pytest.raises(UserError) as caught:
            lora.load(initialise(TINY_TRANSFORMER | {"num_layers": layers}, seed=0), tmp_path / file)
        return str(caught.value)

    first = "blocks.2.attn1.to_k"
    use = "; use the base that it was trained on"
    assert refused(2, "three").endswith(f"does not fit the model (the model has no {first}.lora_A.weight){use}")
    assert refused(3, "two").endswith(f"does not fit the model (the file has no {first}){use}")
    assert "does not fit the model (size mismatch for blocks.0.ffn.net.0.proj" in refused(2, "wide")
    assert "(the file has no blocks.1.ffn.net.2.lora_B.weight)" in refused(2, "half.safetensors")
    assert all("\n" not in refused(*case) for case in ((2, "three"), (3, "two"), (2, "wide")))
    assert capfd.readouterr().err == ""  # no library has the word besides


def test_a_layer_without_an_original_name_is_not_written_for_comfyui(folder: Path, tmp_path: Path) -> None:
    config = AdapterConfig(rank=2, targets=("attn1.to_q", "proj_out", "patch"))
    transformer = initialise(TINY_TRANSFORMER, seed=0)
    transformer.patch = torch.nn.Linear(2, 2)
    lora.attach(transformer, config.rank, config.alpha, config.targets or (), seed=0)
    with pytest.raises(UserError, match="ComfyUI has no name for patch; leave `comfyui` out of export:"):
        lora.save_comfyui(lora.save(transformer, tmp_path), tmp_path / "comfyui.safetensors", original_name)
    assert not (tmp_path / "comfyui.safetensors").exists()


def written(file: Path, **header: object) -> Path:
    """The weights of `file` with a peft configuration in the header, as diffusers' own training scripts write it."""
    metadata = {f"transformer.{key}": value for key, value in header.items()}
    other = file.with_name("other.safetensors")
    save_file(load_file(file), other, {"lora_adapter_metadata": json.dumps(metadata)})
    return other


@pytest.mark.slow
def test_every_way_of_loading_gives_one_adapter(folder: Path, tmp_path: Path) -> None:
    """Rank 4, alpha 8: the weights alone have the same strength as the file; an old file, with alpha in its header."""
    wan = adapted(folder, rank=4, alpha=8)
    disturb(wan)
    (file,) = wan.save(tmp_path)
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.load_lora_weights(load_file(file))
    stock = load(ModelConfig(path=str(folder)))
    stock.module = pipe.transformer
    assert (velocity(stock) - velocity(wan)).abs().max() < 1e-5

    halved = {name: w / 2 if ".lora_B." in name else w for name, w in load_file(file).items()}
    save_file(halved, tmp_path / "half.safetensors")
    old = written(tmp_path / "half.safetensors", r=4, lora_alpha=8, target_modules=list(TARGETS))
    again = load(ModelConfig(path=str(folder)))
    lora.load(again.module, old)
    assert torch.equal(velocity(again), velocity(wan))


@pytest.mark.slow
def test_an_rslora_keeps_its_strength_from_start_to_file(folder: Path, tmp_path: Path) -> None:
    """Rank 16, alpha 16: alpha / sqrt(rank) = 4, not 1."""
    wan = adapted(folder, rank=16)
    disturb(wan)
    with torch.no_grad():
        for layer in lora.adapted_layers(wan.module):
            layer.lora_B[lora.NAME].weight.mul_(0.1)
    (plain,) = wan.save(tmp_path)
    rs = written(plain, r=16, lora_alpha=16, use_rslora=True, target_modules=list(TARGETS))
    lora.rescale(wan.module, 4.0)
    started = load(ModelConfig(path=str(folder), start=str(rs), adapter=AdapterConfig(rank=16)))
    assert (velocity(started) - velocity(wan)).abs().max() < 1e-5
    started.save(tmp_path / "saved")
    again = load(ModelConfig(path=str(folder)))
    again.restore(tmp_path / "saved")
    assert (velocity(again) - velocity(wan)).abs().max() < 1e-5
    lora.rescale(wan.module, 1.0)
    assert (velocity(again) - velocity(wan)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "header",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["proj_out"]},
        {"layer_replication": [[0, 1]]},
    ],
)
def test_headers_that_ask_for_more_are_refused_by_name(folder: Path, tmp_path: Path, header: dict[str, object]) -> None:
    (plain,) = adapted(folder).save(tmp_path)
    file = written(plain, r=4, lora_alpha=4, target_modules=list(TARGETS), **header)
    for config in (
        ModelConfig(path=str(folder), start=str(file), adapter=AdapterConfig(rank=4)),
        ModelConfig(path=str(folder), merge=(Merged(path=str(file)),)),
    ):
        with pytest.raises(UserError, match=next(iter(header))) as error:
            load(config)
        assert error.value.code == "unsupported"


def test_what_diffusers_writes_is_read_whatever_its_dropout_was(folder: Path, tmp_path: Path) -> None:
    """Its header holds all of peft's configuration; a dropout of training does not act afterwards."""
    from peft import LoraConfig

    wan = adapted(folder)
    disturb(wan)
    (plain,) = wan.save(tmp_path)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=sorted(TARGETS), lora_dropout=0.5).to_dict()
    file = written(plain, **config | {"target_modules": sorted(TARGETS), "init_lora_weights": "gaussian"})
    again = load(ModelConfig(path=str(folder)))
    again.module.eval()
    lora.load(again.module, file)
    assert torch.equal(velocity(again), velocity(wan))


@pytest.mark.slow
def test_parts_of_a_file_that_would_not_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    """diffusers drops changes to norms, time_projection's bias and dora_scale; zeros among them change nothing."""
    wan = adapted(folder)
    disturb(wan)
    lora.save_comfyui(wan.save(tmp_path)[0], tmp_path / "comfyui.safetensors", original_name)
    plain = load_file(tmp_path / "comfyui.safetensors")
    prefix = "diffusion_model."

    def put(**more: Tensor) -> Wan:
        weights = plain | {prefix + name.replace("__", "."): tensor for name, tensor in more.items()}
        save_file(weights, tmp_path / "more.safetensors")
        again = load(ModelConfig(path=str(folder)))
        again.module.eval()
        again.restore(tmp_path / "more.safetensors")
        return again

    for name in ("blocks__0__self_attn__norm_q__diff", "blocks__1__norm3__diff_b", "time_projection__1__diff_b"):
        assert torch.equal(velocity(put(**{name: torch.zeros(24)})), velocity(wan))
        with pytest.raises(UserError, match=name.replace("__", ".")) as error:
            put(**{name: torch.ones(24)})
        assert error.value.code == "unsupported"
    # a bias is used, and so is an alpha
    bias = put(blocks__0__ffn__0__diff_b=torch.ones(32))
    assert (velocity(bias) - velocity(wan)).abs().max() > 1e-3
    alphas = {f"blocks__{n}__ffn__0__alpha": torch.tensor(2.0) for n in (0, 1)}
    assert (velocity(put(**alphas)) - velocity(wan)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("renamed", "what"),
    [
        (lambda name: name.replace("transformer.", "base_model.model."), "peft's own file"),
        (lambda name: name.removeprefix("transformer.").replace("lora_A.", "lora_A.default."), "DiffSynth"),
        (lambda name: name.replace("lora_A.weight", "lokr_w1").replace("lora_B.weight", "lokr_w2"), "LoKr"),
        (lambda name: name.replace("lora_A.weight", "dora_scale"), "DoRA"),
        (lambda name: name.replace(".lora_", ".layer_"), "a model's own weights"),
    ],
)
def test_files_of_other_programs_are_named(
    folder: Path, tmp_path: Path, renamed: Callable[[str], str], what: str
) -> None:
    weights = load_file(adapted(folder).save(tmp_path)[0])
    save_file({renamed(name): w for name, w in weights.items()}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=what) as error:
        load(ModelConfig(path=str(folder), merge=(Merged(path=str(tmp_path / "theirs.safetensors")),)))
    assert error.value.code in ("unsupported", "format")
    assert "the base that it was trained on" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda name, w: (name, w.fill_(float("nan"))), "damaged", "not finite"),
        (lambda name, w: (name, w.to(torch.int8)), "unsupported", "quantised .*I8"),
        (lambda name, w: (name.removeprefix("transformer."), w), "unsupported", "do not begin with transformer."),
        (lambda name, w: (name.replace("transformer.", "transformer_2."), w), "unsupported", "do not begin with"),
        (lambda name, w: (name.replace("lora_A", "lora_down"), w), "unsupported", "lora_down.weight, which diffusers'"),
        (
            lambda name, w: (
                "lora_unet_"
                + str(original_name(name.removeprefix("transformer.").rsplit(".lora_", 1)[0])).replace(".", "_")
                + (".lora_down.weight" if "lora_A" in name else ".lora_up.weight"),
                w,
            ),
            "format",
            "lacks lora_unet_blocks_0_.*alpha",
        ),
    ],
)
def test_a_file_that_would_be_read_wrongly_is_refused_by_what_is_wrong(
    folder: Path, tmp_path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]], code: str, said: str
) -> None:
    """Values that are not finite or not numbers of their own, and names or alphas that diffusers leaves out."""
    weights = load_file(adapted(folder).save(tmp_path)[0])
    save_file(dict(change(name, w) for name, w in weights.items()), tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=said) as error:
        load(ModelConfig(path=str(folder), merge=(Merged(path=str(tmp_path / "theirs.safetensors")),)))
    assert error.value.code == code
    assert "the base that it was trained on" not in str(error.value)
