"""Clamp decoded pixels to [-1, 1], with a gradient that moves outside pixels back into the range."""

from typing import Any

import torch
from torch import Tensor


class _Clamp(torch.autograd.Function):
    """x clamped to [-1, 1]. The gradient is passed on, except where a descent step would push x further outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient.masked_fill((x.abs() > 1) & (x * gradient < 0), 0)


def clamp(x: Tensor) -> Tensor:
    """x clamped to [-1, 1], for a loss that is minimised.

    The gradient dL/dx is dL/dy, but 0 where |x| > 1 and -dL/dy points outwards: there a step changes nothing that is
    seen, and x would only drift. Where -dL/dy points inwards, a step is what brings the pixel back.
    """
    return _Clamp.apply(x)
