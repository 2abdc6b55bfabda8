"""What networks must not compute in bf16, whatever autocast says: coordinates, flow, and pictures that are resized."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32; in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
