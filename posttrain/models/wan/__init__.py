"""Wan 2.1 and 2.2: the family that a recipe names as `model.family: wan` (see `Family` in posttrain/models/base.py).

loading.py and shapes.py are imported when a model is loaded: they need diffusers and transformers, which take seconds
to import. Reading a recipe needs neither.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.models.wan.adapters import TARGETS as TARGETS
from posttrain.models.wan.adapters import load_stock_adapter as load_stock_adapter
from posttrain.models.wan.adapters import original_name as original_name
from posttrain.models.wan.card import pipeline_code as pipeline_code
from posttrain.models.wan.published import defaults as defaults
from posttrain.models.wan.published import needs_picture as needs_picture

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain.models.base import ModelConfig, Outline
    from posttrain.models.wan.model import Wan

SIDE = 32  # the VAE's 8 or 16 pixels times the transformer's 2 latent cells
FRAMES = 9  # 4k + 1


def load(config: "ModelConfig", device: "str | torch.device" = "cpu") -> "Wan":
    from posttrain.models.wan import loading

    return loading.load(config, device)


def bare(config: "ModelConfig") -> "nn.Module":
    from posttrain.models.wan import loading

    return loading.bare(config)


def save_merged(config: "ModelConfig", adapter: Path, path: Path) -> None:
    from posttrain.models.wan import loading

    loading.save_merged(config, adapter, path)


def outline(config: "ModelConfig", frames: int, height: int, width: int) -> "Outline":
    from posttrain.models.wan import shapes

    return shapes.outline(config, frames, height, width)
