"""What is handed out works in a stock pipeline, and the card says what it is. Videos are files that browsers play."""

import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import wan_folder

from posttrain.export import export
from posttrain.files import UserError
from posttrain.models import lora
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan import load
from posttrain.sample import sample_clips, write_video

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
    recipe["model"]["path"] = "Some-One/Wan-Model"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = export(run)[1].read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Some-One/Wan-Model"
    assert "base = 'Some-One/Wan-Model'" in text


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
