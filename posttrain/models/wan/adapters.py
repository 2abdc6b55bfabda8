"""Wan's layers by name: which get an adapter, what the original code calls them, and files of adapters."""

import re
from pathlib import Path

from safetensors import safe_open
from torch import nn

from posttrain.core.errors import UserError
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
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
} | {
    f"{ours}.{proj}": f"{theirs}.{letter}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for proj, letter in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
}
OURS = {theirs: ours for ours, theirs in ORIGINAL.items()}
COMFYUI = "diffusion_model."  # before each name in a file of ComfyUI


def original_name(layer: str) -> str | None:
    """The name in the original Wan code of a layer of diffusers' transformer; None if it has none."""
    block = re.match(r"blocks\.\d+\.", layer)
    prefix = block.group() if block else ""
    original = ORIGINAL.get(layer.removeprefix(prefix))
    return original and prefix + original


def read(file: Path) -> Weights:
    """An adapter in diffusers', ComfyUI's or musubi's names: its weights in diffusers', and its metadata.

    Raises:
        UserError: diffusers would ignore a part of it that is not zero, such as a change of a norm.
    """
    from diffusers.loaders import WanLoraLoaderMixin

    weights, metadata = WanLoraLoaderMixin.lora_state_dict(
        str(file), return_lora_metadata=True, use_safetensors=True, local_files_only=True
    )
    with safe_open(file, "pt") as tensors:
        names = [name for name in sorted(tensors.keys()) if name.startswith(COMFYUI)]
        unused = [name for name in names if _converted(name) not in weights and tensors.get_tensor(name).any()]
    if unused:
        raise UserError(
            f"{file}: {unused[0]} and {len(unused) - 1} more would not be used; only low-rank matrices and biases of "
            "linear layers are; merge the file into the base with the program that made it",
            "unsupported",
        )
    return weights, metadata or {}


def _converted(name: str) -> str:
    """Diffusers' name for a tensor called `name` in ComfyUI's names, if there is one; alpha is multiplied into A."""
    layer, _, part = name.removeprefix(COMFYUI).partition(".lora_")
    if part:
        matrix = {"A": "A", "down": "A", "B": "B", "up": "B"}.get(part.removesuffix(".weight"), part) + ".weight"
    else:
        layer, _, part = layer.rpartition(".")
        matrix = {"alpha": "A.weight", "diff": "A.weight", "diff_b": "B.bias"}.get(part, part)
        if part == "diff" and layer != "head.head":
            return ""
    block = re.match(r"blocks\.\d+\.", layer)
    prefix = block.group() if block else ""
    return f"transformer.{prefix}{OURS.get(layer.removeprefix(prefix))}.lora_{matrix}"


def load_stock_adapter(transformer: nn.Module, file: Path) -> None:
    """Put the adapter in `file` onto `transformer` with the stock pipeline."""
    from diffusers import WanPipeline

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    WanPipeline(transformer=transformer, **parts).load_lora_weights(str(file))
