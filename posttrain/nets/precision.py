"""Coordinates, flow and resized pictures stay in float32, even under autocast."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32; unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
