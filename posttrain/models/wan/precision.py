"""Keep Wan's time embedding in float32 under autocast, so that training and sampling compute the same.

diffusers keeps the weights of the time embedding in float32 and computes it in float32, as the original code does.
Autocast runs every linear layer in bfloat16, which moves the velocity by 0.3 to 0.9%.
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn


class Float32TimestepEmbedding(TimestepEmbedding):
    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample, condition)


class WeightRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight: torch has a fused kernel only for equal dtypes, and warns otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def keep_float32(transformer: nn.Module) -> None:
    """Keep the time embedding of `transformer` in float32 under autocast. Layer names and weights do not change."""
    for module in transformer.modules():
        if type(module) is TimestepEmbedding:
            module.__class__ = Float32TimestepEmbedding
        elif type(module) is nn.RMSNorm:
            module.__class__ = WeightRMSNorm
