"""What is handed out works in a stock pipeline, and the card says what it is. Videos are files that browsers play."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from helpers.tiny import wan_folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import posttrain.commands.export
from posttrain.commands.export import check, export
from posttrain.core.errors import UserError
from posttrain.evaluation.sample import sample_clips, write_video
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan

ROW = {"caption": "a duck falls.", "frames": 9, "fps": 16}
REPORT = {
    "rows": [
        {
            "model": "base",
            "split": "unseen",
            "l2": {"mean": 0.14, "low": 0.12, "high": 0.16, "n": 30},
            "released": {"l2": 1},
        },
        {
            "model": "psft",
            "split": "unseen",
            "l2": {"mean": 0.034, "low": 0.03, "high": 0.04, "n": 30},
            "released": {"l2": 1},
        },
    ]
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run (adapter, alpha != rank) of a tiny local model."""
    folder = wan_folder(tmp_path / "wan")
    config = ModelConfig(path=str(folder), adapter=AdapterConfig(rank=4, alpha=8))
    wan = load(config)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    clips = tmp_path / "clips"
    (clips / "train").mkdir(parents=True)
    (clips / "train" / "metadata.jsonl").write_text(json.dumps(ROW) + "\n")
    recipe = {
        "run": "tiny-psft",
        "model": config.model_dump(mode="json"),
        "data": {"clips": str(clips), "split": "train"},
        "method": {"name": "psft", "timesteps": "logit_normal", "shift": 3.0},
    }
    run = tmp_path / "run"
    wan.save(run / "adapter")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def stock(pipe: WanImageToVideoPipeline, picture: np.ndarray) -> np.ndarray:
    return pipe(
        image=Image.fromarray(picture),
        prompt="a duck falls.",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]


def test_an_exported_adapter_makes_our_video_in_a_stock_pipeline(run: Path) -> None:
    config = ModelConfig(**yaml.safe_load((run / "recipe.yaml").read_text())["model"])
    weights, card = export(run)
    assert (weights, card) == (run / "adapter" / lora.FILE, run / "adapter" / "README.md")

    ours = load(config)
    ours.restore(run / "adapter")
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pipe = WanImageToVideoPipeline.from_pretrained(config.path, expand_timesteps=True)
    pipe.load_lora_weights(run / "adapter")
    clip = sample_clips(ours, picture[None], ["a duck falls."], [3], frames=9, steps=4)[0]
    assert np.abs(clip / 255 - stock(pipe, picture)).max() < 0.5 / 255 + 1e-4  # ours is rounded to whole grey levels


def test_exported_whole_weights_make_our_video_in_a_stock_pipeline(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"adapter": None}
    wan = load(ModelConfig(**recipe["model"]))
    with torch.no_grad():
        wan.module.proj_out.bias += 0.1
    shutil.rmtree(run / "adapter")
    wan.save(run / "adapter")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    weights, card = export(run)
    assert weights == run / "adapter" / "transformer"
    assert "All weights of the transformer" in card.read_text()

    transformer = WanTransformer3DModel.from_pretrained(run / "adapter", subfolder="transformer")
    pipe = WanImageToVideoPipeline.from_pretrained(recipe["model"]["path"], transformer=transformer)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    clip = sample_clips(wan, picture[None], ["a duck falls."], [3], frames=9, steps=4)[0]
    assert np.abs(clip / 255 - stock(pipe, picture)).max() < 0.5 / 255 + 1e-4


def exported(run: Path, *formats: str) -> tuple[list[Path], ModelConfig]:
    """What `posttrain export` writes, but for the card."""
    config = ModelConfig(**yaml.safe_load((run / "recipe.yaml").read_text())["model"])
    return export(run, formats, config)[:-1], config


def checked(files: list[Path], run: Path, config: ModelConfig) -> list[str]:
    ours = load(config)
    ours.restore(run / "adapter")
    lines = list(check(files, ours, config))
    assert not ours._parts.held  # text encoder and VAE are not beside the transformers
    return lines


@pytest.mark.slow
def test_every_format_gives_the_velocity_that_was_trained(run: Path) -> None:
    """alpha is twice the rank here, so that a file which forgets it is far off."""
    files, config = exported(run, "diffusers", "comfyui", "merged")
    lora_file, comfyui, merged = files
    assert [file.relative_to(run).as_posix() for file in files] == [
        "adapter/pytorch_lora_weights.safetensors",
        "adapter/run_comfyui.safetensors",
        "merged/transformer",
    ]
    assert [line.split(": ")[0] for line in checked(files, run, config)] == [str(file) for file in files]
    with safe_open(comfyui, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert sorted(tensors.keys())[0] == "diffusion_model.blocks.0.cross_attn.k.lora_A.weight"
        originals = {name.split(".", 3)[3].split(".lora_")[0] for name in tensors.keys()}
    attention = {f"{attn}.{letter}" for attn in ("self_attn", "cross_attn") for letter in "qkvo"}
    assert originals == attention | {"ffn.0", "ffn.2"}
    card = (run / "adapter" / "README.md").read_text()
    assert "- `adapter/run_comfyui.safetensors`: the same adapter for ComfyUI" in card
    assert "- `merged/transformer`: the whole transformer" in card

    weights = load_file(comfyui)
    wrong = {name: w / 2 if ".lora_B." in name else w for name, w in weights.items()}  # as if without alpha
    save_file(wrong, comfyui, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"run_comfyui.safetensors: largest error .* is wrong: delete it and export again"
    ):
        checked([comfyui], run, config)
    shutil.copytree(Path(config.path) / "transformer", merged, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"merged/transformer: largest error .* is wrong"):
        checked([merged], run, config)
    assert len(checked([lora_file], run, config)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_a_file_without_the_adapter_is_refused_in_coarse_numbers(run: Path, strength: float) -> None:
    """Also where all that the adapter changes is less than bfloat16 rounds the velocity by."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["dtype"] = "bf16"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    trained = load_file(run / "adapter" / lora.FILE)
    with safe_open(run / "adapter" / lora.FILE, "pt") as tensors:
        metadata = tensors.metadata()
    weak = {name: w * strength if ".lora_B." in name else w for name, w in trained.items()}
    save_file(weak, run / "adapter" / lora.FILE, metadata)
    files, config = exported(run, "diffusers", "comfyui")
    lines = checked(files, run, config)
    assert ["; 100.0% of it in the weights" in line for line in lines] == [True, True]
    for part in (0.0, 0.5):
        scaled = {name: w * part if ".lora_B." in name else w for name, w in load_file(files[1]).items()}
        save_file(scaled, run / "wrong.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"{part:.1%} of it in the weights" if strength < 1 else "is wrong|in the"):
            checked([run / "wrong.safetensors"], run, config)


@pytest.mark.slow
def test_what_the_stock_pipeline_cannot_load_is_one_line(tmp_path: Path) -> None:
    """diffusers reads ComfyUI's k_img beside v_img alone; its own layout is fine."""
    model = {"path": str(wan_folder(tmp_path / "wan", "wan2.1-i2v"))}
    model |= {"adapter": {"rank": 2, "targets": ["attn2.add_k_proj"]}}
    trained(model).save(tmp_path / "run" / "adapter")
    recipe = {"run": "r", "model": model, "data": {"clips": "none"}, "method": {"name": "psft"}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    files, config = exported(tmp_path / "run", "diffusers", "comfyui")
    assert len(checked(files[:1], tmp_path / "run", config)) == 1
    with pytest.raises(UserError, match="comfyui") as error:
        checked(files[1:], tmp_path / "run", config)
    assert (error.value.code, error.value.field) == ("unsupported", "export")
    assert "\n" not in str(error.value)


def test_merged_weights_keep_the_dtype_of_the_base(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    base = Path(recipe["model"]["path"]) / "transformer"
    WanTransformer3DModel.from_pretrained(base, torch_dtype=torch.bfloat16).save_pretrained(base)
    files, config = exported(run, "merged")
    stored = load_file(files[1] / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert len(checked(files, run, config)) == 2


def test_whole_weights_have_one_format(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"adapter": None}
    wan = load(ModelConfig(**recipe["model"]))
    shutil.rmtree(run / "adapter")
    wan.save(run / "adapter")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="export: comfyui is made from an adapter"):
        exported(run, "diffusers", "comfyui")
    files, config = exported(run, "diffusers")
    assert len(checked(files, run, config)) == 1


@pytest.mark.slow
def test_one_file_per_expert(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"expert": "low", "path": str(wan_folder(run.parent / "two" / "wan", "wan2.2-t2v-a14b"))}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    files, config = exported(run, "comfyui", "merged")
    assert [path.name for path in files[1:]] == ["run_low_noise_comfyui.safetensors", "transformer_2"]
    assert len(checked(files, run, config)) == 3


@pytest.mark.slow
def test_the_snippet_of_a_run_on_merged_adapters_gives_what_was_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    shutil.copytree(run / "adapter", run.parent / "first")
    recipe["model"] |= {"merge": [{"path": str(run.parent / "first" / lora.FILE), "scale": 0.5}]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = ModelConfig(**recipe["model"])
    ours = load(config)
    ours.restore(run / "adapter")
    text = export(run)[-1].read_text()
    assert "first/pytorch_lora_weights.safetensors` (times 0.5) merged into it, trained with" in text

    monkeypatch.chdir(run)
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    here = snippet.replace("num_inference_steps=12", "num_inference_steps=1").replace('.to("cuda")', "")
    Path("snippet.py").write_text(here)
    Image.new("RGB", (32, 32), "red").save("first_picture.png")
    ours_v, pipe = probe(ours), runpy.run_path("snippet.py")["pipe"]
    ours.transformer = pipe.transformer
    assert (probe(ours) - ours_v).abs().max() < 1e-4
    pipe.set_adapters(["trained"], [1.0])
    assert (probe(ours) - ours_v).abs().max() > 1e-2


SNIPPETS: list[tuple[str, dict[str, Any]]] = [
    ("wan2.1-t2v", {}),
    ("wan2.1-t2v", {"conditioning": "text"}),
    ("wan2.1-i2v", {}),
    ("wan2.2-ti2v", {}),
    ("wan2.2-t2v-a14b", {"expert": "low", "conditioning": "text"}),
    ("wan2.2-i2v-a14b", {"expert": "high"}),
    ("wan2.2-i2v-a14b", {"expert": "low", "other_adapter": "high", "merge": [{"path": "high", "scale": 0.5}]}),
    ("wan2.2-i2v-a14b", {"expert": "low", "adapter": None}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), SNIPPETS)
def test_the_snippet_makes_our_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    """Of every family, as the card has it but for the seed: pipeline, picture, expert and sampler are right."""
    monkeypatch.chdir(tmp_path)
    wan_folder(Path("wan"), family)
    if "merge" in changes:
        trained({"path": "wan", "expert": "high", "adapter": {"rank": 2, "alpha": 6}}).save(Path("high"))
        changes = changes | {"merge": [{"path": f"high/{lora.FILE}", "scale": 0.5}]}
    model = {"path": "wan", "adapter": {"rank": 2, "alpha": 6}, **changes}
    ours = trained(model)
    ours.save(Path("adapter"))
    sampler = {"steps": 6, "guidance": 3.0} | ({"guidance_low": 1.5} if "expert" in changes else {})
    data = {"clips": "none", "frames": 5, "fps": 8, "size": [32, 32]}
    recipe = {"run": "r", "model": model, "data": data, "method": {"name": "psft"}, "eval": {"sampler": sampler}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    (snippet,) = re.findall(r"```python\n(.*?)```", export(Path())[-1].read_text(), re.DOTALL)
    seeded = snippet.replace("steps=6,", "steps=6, generator=torch.Generator().manual_seed(3),")
    assert '.to("cuda")\n' in seeded
    Path("snippet.py").write_text("import torch\n" + seeded.replace('.to("cuda")', ""))
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save("first_picture.png")
    theirs = runpy.run_path("snippet.py")["clip"].frames[0]
    low = sampler.get("guidance_low")
    clip = sample_clips(ours, picture[None], ["a ball falls."], [3], 5, 6, 3.0, guidance_low=low)[0]
    assert np.abs(clip / 255 - theirs).max() < 0.5 / 255 + 1e-3
    plain = sample_clips(load(ModelConfig(path="wan", **{k: v for k, v in changes.items() if k == "conditioning"})),
                         picture[None], ["a ball falls."], [3], 5, 6, 3.0, guidance_low=low)[0]  # fmt: skip
    assert np.abs(plain / 255 - theirs).max() > 0.01


@pytest.mark.parametrize(
    ("path", "expected"),
    [("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (50, 5.0, 24)), ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (40, 5.0, 16))],
)
def test_the_card_of_a_run_that_was_not_measured_has_the_models_own_sampler(
    run: Path, path: str, expected: tuple[int, float, int]
) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = path
    recipe["data"] = {"clips": "none"}
    recipe.pop("eval", None)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = export(run)[-1].read_text()
    for line in ("num_inference_steps={}", "guidance_scale={}", "fps={}"):
        assert line.format(expected[("num", "gui", "fps").index(line[:3])]) in text


def trained(model: dict[str, Any]) -> Wan:
    wan = load(ModelConfig(**model))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name or (parameter.requires_grad and name == "proj_out.bias"):
                parameter.normal_(std=0.3)
    return wan


def test_guidance_of_the_second_expert_alone_has_no_stock_pipeline(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "conditioning": "text", "expert": "low"}
    for guidance, none in ((1.0, True), (3.0, False)):
        recipe["eval"] = {"sampler": {"steps": 2, "guidance": guidance, "guidance_low": 3.0}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert ("No stock pipeline" in export(run)[-1].read_text()) == none


def test_an_image_to_video_model_without_pictures_has_no_stock_pipeline(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"path": "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "conditioning": "text"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = export(run)[-1].read_text()
    assert "`posttrain sample` does" in text
    assert "```python" not in text


@torch.no_grad()
def probe(wan: Wan) -> torch.Tensor:
    z = torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return wan.velocity(z, torch.full((1, 3), 0.7), wan.encode_text(["a duck falls."]))


@pytest.mark.slow
def test_the_readmes_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Use the adapter", with one step in place of twelve, on the embedded model."""
    wan = load(ModelConfig(path="pocket", adapter=AdapterConfig(rank=2)))
    wan.save(tmp_path / "runs" / "pocket-psft" / "adapter")
    (tmp_path / "posttrain").symlink_to(Path(posttrain.commands.export.__file__).parents[1])
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (snippet,) = re.findall(r"## Use the adapter\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert "num_inference_steps=12" in snippet
    monkeypatch.chdir(tmp_path)
    Path("snippet.py").write_text(snippet.replace("num_inference_steps=12", "num_inference_steps=1"))
    Image.new("RGB", (64, 64), "red").save("first_frame.png")
    runpy.run_path("snippet.py")
    with av.open("fall.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width, stream.average_rate) == (33, 64, 64, 16)


def test_the_card(run: Path) -> None:
    text = export(run)[1].read_text()
    assert "LoRA adapter (rank 4, alpha 8) for `wan`, trained with `psft`" in text
    assert "## Results" not in text
    (run / "report.json").write_text(json.dumps(REPORT))
    text = export(run)[1].read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "diffusers"
    assert "base_model" not in header  # a folder on this machine means nothing elsewhere
    assert "| model | split | l2 |\n|---|---|---|" in text
    assert "| psft | unseen | 0.034 [0.030, 0.040] |" in text
    assert "num_frames=9" in text
    assert "fps=16" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(snippet, "card", "exec")


def test_a_hub_base_is_named_in_the_card(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = path = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = export(run)[1].read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == path
    assert f"base = '{path}'\n" in text
    assert 'pipe = WanImageToVideoPipeline.from_pretrained(base).to("cuda")\n' in text


def test_the_card_says_what_the_run_was(run: Path) -> None:
    """Simulated clips or others, pictures or text alone, float32 on the CPU or bfloat16 on a GPU."""

    def card(**changes: dict[str, Any]) -> str:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        for part, values in changes.items():
            recipe[part] |= values
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return export(run)[-1].read_text()

    own = card()
    assert "trained with `psft` on the clips that the recipe below names." in own
    assert yaml.safe_load(own.split("---")[1])["pipeline_tag"] == "image-to-video"
    metadata = run.parent / "clips" / "train" / "metadata.jsonl"
    metadata.write_text(json.dumps(ROW | {"annotations": "0.npz"}) + "\n")
    assert "on simulated clips so that" in card()
    two = {"clips": [str(run.parent / "clips"), "mine"]}
    assert "on simulated clips so that" not in card(data=two)
    assert "on simulated clips so that" in card(data={"make": "drop.yaml"})
    text = card(model={"conditioning": "text", "dtype": "bf16"})
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "text-to-video"
    assert "import torch\nfrom diffusers import WanPipeline\n" in text
    assert '(base, torch_dtype={"vae": torch.float32, "default": torch.bfloat16}).to("cuda")\n' in text
    pocket = card(model={"path": "pocket", "conditioning": "image", "dtype": "fp32"})
    assert "cuda" not in pocket
    assert "bfloat16" not in pocket


def test_unfinished_and_damaged_runs_are_refused(run: Path) -> None:
    file = run / "adapter" / lora.FILE
    weights = load_file(file)
    first = next(iter(weights))
    save_file(weights | {first: torch.full_like(weights[first], float("nan"))}, file)
    with pytest.raises(UserError, match="is not finite"):
        export(run)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{lora.FILE}: is damaged"):
        export(run)
    file.unlink()
    with pytest.raises(UserError, match="has no weights; finish the run first"):
        export(run)


def test_videos_play_in_browsers(tmp_path: Path) -> None:
    """H.264 in yuv420p at the given rate, its index first, and close to the pixels."""
    y, x = np.mgrid[:64, :64]
    ramp = np.stack([np.stack([x * 3, y * 3, x + y], -1) + t for t in range(9)]).clip(0, 255).astype(np.uint8)
    write_video(tmp_path / "clip.mp4", ramp, 16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == ramp.shape
    assert np.abs(frames.astype(float) - ramp).mean() < 4
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_clip_depends_on_its_own_seed_alone(run: Path) -> None:
    wan = load(ModelConfig(path=str(run.parent / "wan")))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    captions = ["a duck falls.", "a red ball and a wooden box fall."]
    both = sample_clips(wan, pictures, captions, [3, 4], frames=5, steps=3)
    alone = sample_clips(wan, pictures[1:], captions[1:], [4], frames=5, steps=3)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    other = sample_clips(wan, pictures[1:], captions[1:], [5], frames=5, steps=3)
    assert np.abs(other[0].astype(int) - alone[0]).max() > 1
