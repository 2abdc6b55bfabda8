"""A real Open-Sora at tiny size, shared by the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5EncoderModel

from posttrain.models.opensora.stdit import STDiT3, initialise
from posttrain.models.opensora.vae import SPATIAL, OpenSoraVAE
from posttrain.pretraining.build import tokenizer

TEXT_WIDTH, TEXT_TOKENS = 12, 20
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "caption_channels": TEXT_WIDTH,
    "model_max_length": TEXT_TOKENS,
}
VAE: dict[str, Any] = {
    "temporal": {"filters": 8, "num_res_blocks": 1, "channel_multipliers": [1, 2, 2, 2], "num_groups": 4},
    "spatial": SPATIAL | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
}


def transformer(seed: int = 2, **changes: Any) -> STDiT3:
    """A transformer in which no trainable weight is zero."""
    made = initialise(TRANSFORMER | changes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def opensora_folder(out: Path, published: bool = False) -> Path:
    """Write a folder with all parts of a model of a few thousand random weights; returns the folder.

    `published`: save transformer and VAE in the format of the published ones.
    """
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = OpenSoraVAE(**VAE)
        config = T5Config(vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=6, d_ff=16, num_layers=2, num_heads=2)
        T5EncoderModel(config).save_pretrained(out / "text_encoder")
    words.save_pretrained(out / "tokenizer")
    for part, name in ((vae, "vae"), (transformer(), "transformer")):
        (part.save_published if published else part.save_pretrained)(out / name)
    (out / "model_index.json").write_text(json.dumps({"fps": 8}))
    return out
