"""Keep libraries from rounding to float32 or bf16, so that derivatives can be compared with finite differences."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Unrounded(TorchDispatchMode):
    """Context in which every conversion to a float type, in forward and backward, gives float64.

    diffusers' Wan and transformers' SAM 2 compute softmax, norms and rotations in float32, and SAM 2 stores memories in
    bf16, whatever the type of their weights. For small steps such a function is piecewise constant.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
