"""Real components at tiny size, shared by the tests."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from posttrain.models.wan import initialise
from posttrain.pocket.build import TRANSFORMER, VAE, build

TINY_VAE = VAE | {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 8, "dim_mult": [1, 1, 1]}
TINY_VAE |= {"latents_mean": [0.1 * c for c in range(8)], "latents_std": [1 + 0.1 * c for c in range(8)]}
TINY_TRANSFORMER = TRANSFORMER | {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "ffn_dim": 32,
    "num_layers": 2,
}


def wan_folder(out: Path) -> Path:
    """A diffusers folder of a few thousand random weights, whose transformer does not answer zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKLWan.from_config(TINY_VAE)
        transformer = initialise(TINY_TRANSFORMER, seed=2)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    vae.save_pretrained(out.parent / "parts" / "vae")
    transformer.save_pretrained(out.parent / "parts" / "transformer")
    return build(out, out.parent / "parts" / "vae", out.parent / "parts" / "transformer")
