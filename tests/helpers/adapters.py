"""A tiny Wan with an adapter."""

from pathlib import Path

import torch
from torch import Tensor

from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.loading import load
from posttrain.models.wan.model import Wan


def adapted(folder: Path, rank: int = 4, alpha: int | None = None, seed: int = 0) -> Wan:
    return load(ModelConfig(path=str(folder), adapter=AdapterConfig(rank=rank, alpha=alpha), seed=seed))


def disturb(wan: Wan, seed: int = 9) -> None:
    """Stand in for training: B is no longer zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)


def velocity(wan: Wan) -> Tensor:
    torch.manual_seed(0)
    z, text = torch.randn(2, 8, 3, 4, 4), wan.encode_text(["a red ball falls.", "a duck hovers."])
    return wan.velocity(z, torch.tensor([[0, 0.5, 0.5], [0, 0.9, 0.9]]), text)
