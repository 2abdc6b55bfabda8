"""Wan's layers by name: which get an adapter, what the original code calls them, and files of adapters."""

import re
from pathlib import Path

from diffusers import WanPipeline
from diffusers.loaders import WanLoraLoaderMixin
from torch import nn

from posttrain.models.lora import Weights

# Every linear map of a Wan block: attn1 is self-attention, attn2 attends to the text.
TARGETS = (
    *(f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
)
# What the original Wan code, and with it ComfyUI, calls the layers of diffusers' transformer.
ORIGINAL = {
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
} | {
    f"{ours}.{proj}": f"{theirs}.{letter}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for proj, letter in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
}


def original_name(layer: str) -> str | None:
    """What the original Wan code calls a layer of diffusers' transformer, None where it has no name for it."""
    block = re.match(r"blocks\.\d+\.", layer)
    prefix = block.group() if block else ""
    original = ORIGINAL.get(layer.removeprefix(prefix))
    return original and prefix + original


def read(file: Path) -> Weights:
    """An adapter in diffusers', ComfyUI's or musubi's names: its weights in diffusers', and its metadata."""
    weights, metadata = WanLoraLoaderMixin.lora_state_dict(
        str(file), return_lora_metadata=True, use_safetensors=True, local_files_only=True
    )
    return weights, metadata or {}


def load_stock_adapter(transformer: nn.Module, file: Path) -> None:
    """Put the adapter in `file` onto `transformer` with the stock pipeline."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    WanPipeline(transformer=transformer, **parts).load_lora_weights(str(file))
