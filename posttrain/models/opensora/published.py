"""Functions of the family for recipes, reports and exports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from posttrain.models import lora
from posttrain.models.base import Defaults, ModelConfig

# size, length and rate of PISA's clips; steps and guidance of Open-Sora's sampling script
DEFAULTS = Defaults(frames=32, size=(256, 256), fps=16, steps=30, guidance=7.0)
POCKET = Defaults(frames=33, size=(64, 64), fps=16, steps=12, guidance=1.0)


def defaults(path: str) -> Defaults:
    """The same for every model of the family but the embedded one."""
    return POCKET if path == "pocket" else DEFAULTS


def needs_picture(path: str, revision: str | None = None) -> bool:
    """Never: the model can also sample from text alone."""
    return False


def original_name(layer: str) -> str | None:
    """None: ComfyUI has no Open-Sora. An adapter's file has the original names anyway, which are ours."""
    return None


def load_stock_adapter(transformer: nn.Module, file: Path) -> None:
    """Put the adapter in `file` onto `transformer` by diffusers alone."""
    weights, metadata = lora.read(file)
    loader: Any = transformer
    loader.load_lora_adapter(weights, prefix="transformer", metadata=metadata)


def pipeline_code(
    config: ModelConfig, adapter: bool, clip: Mapping[str, Any], sampler: Mapping[str, Any]
) -> str | None:
    """None: diffusers has no pipeline for it."""
    return None
