"""Real components at tiny size, shared by the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from posttrain.models.wan.loading import initialise
from posttrain.pretraining.build import TRANSFORMER, VAE, build

TINY_VAE = VAE | {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 8, "dim_mult": [1, 1, 1]}
TINY_VAE |= {"latents_mean": [0.1 * c for c in range(8)], "latents_std": [1 + 0.1 * c for c in range(8)]}
# the VAE of Wan 2.1 and of the A14B models: no patches, no shortcuts
TINY_VAE_21 = TINY_VAE | {"in_channels": 3, "out_channels": 3, "patch_size": None, "is_residual": False}
TINY_VAE_21 |= {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True], "decoder_base_dim": None}
TINY_TRANSFORMER = TRANSFORMER | {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "ffn_dim": 32,
    "num_layers": 2,
}
CLIP_WIDTH = 16
BESIDE = {"image_dim": CLIP_WIDTH, "added_kv_proj_dim": 24}
# The published models: their VAE, their transformer's changes of TINY_TRANSFORMER, and their pipeline's settings.
FAMILIES: dict[str, dict[str, Any]] = {
    "wan2.1-t2v": {"vae": TINY_VAE_21, "index": {"_class_name": "WanPipeline"}},
    "wan2.1-i2v": {"vae": TINY_VAE_21, "transformer": {"in_channels": 20, **BESIDE}},
    "wan2.2-ti2v": {"vae": TINY_VAE, "index": {"_class_name": "WanPipeline", "expand_timesteps": True}},
    "wan2.2-t2v-a14b": {"vae": TINY_VAE_21, "index": {"_class_name": "WanPipeline", "boundary_ratio": 0.875}},
    "wan2.2-i2v-a14b": {"vae": TINY_VAE_21, "transformer": {"in_channels": 20}, "index": {"boundary_ratio": 0.9}},
}


def wan_folder(out: Path, family: str | None = None) -> Path:
    """Write a diffusers folder of a few thousand random weights, whose transformers' output is not zero.

    `family` None: a TI2V model in WanImageToVideoPipeline, like the pocket. Returns `out`.
    """
    model = FAMILIES[family] if family else {"vae": TINY_VAE, "index": {"expand_timesteps": True}}
    parts = out.parent / f"parts-{family}"
    shape = TINY_TRANSFORMER | model.get("transformer", {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoencoderKLWan.from_config(model["vae"]).save_pretrained(parts / "vae")
        _transformer(shape, 2).save_pretrained(parts / "transformer")
        build(out, parts / "vae", parts / "transformer")
        index = {"expand_timesteps": False, **model.get("index", {})}
        if "boundary_ratio" in index:
            _transformer(shape, 3).half().save_pretrained(out / "transformer_2")
            index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
        if "image_dim" in shape:
            config = CLIPVisionConfig(
                hidden_size=CLIP_WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                image_size=16, patch_size=8,
            )  # fmt: skip
            CLIPVisionModel(config).save_pretrained(out / "image_encoder")
            size = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}}
            CLIPImageProcessor(**size).save_pretrained(out / "image_processor")
            index["image_encoder"] = ["transformers", "CLIPVisionModel"]
            index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    path = out / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return out


def _transformer(shape: dict[str, Any], seed: int) -> torch.nn.Module:
    transformer = initialise(shape, seed)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    return transformer
