"""Arithmetic that libraries do not round, for derivatives that are compared with finite differences."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Unrounded(TorchDispatchMode):
    """Inside, forward and backward, whoever asks for float32 or less gets float64; nothing else is different.

    diffusers' Wan and transformers' SAM 2 compute softmax, norms and rotations in float32, and SAM 2 remembers in bf16,
    whatever their weights are. For small steps that is a staircase, which has no slope.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
