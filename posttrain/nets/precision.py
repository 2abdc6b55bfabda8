"""Keep coordinates, flow and pictures that are resized out of bf16, even under autocast."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32; unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
