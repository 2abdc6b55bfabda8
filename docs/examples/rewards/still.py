"""How still the background stays: R = -mean |x_t - x_0| over the pixels of t > 0 that no object covers, in [-2, 0].

The true clip's masks say which pixels those are. The reward does not depend on the objects.
"""

import torch
from torch import Tensor

from posttrain.rewards.base import Reward, RewardConfig
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ()  # what it needs of the true clip besides pictures and masks: "flow", "depth"
RANKS: tuple[str, ...] = ()  # kinds of violation whose severity lowers the reward


class Config(RewardConfig):
    """Its keys in a recipe, besides `weight`."""


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.instances_BFHW is not None
        empty_BFHW = (batch.instances_BFHW[:, 1:] == 0) & (batch.instances_BFHW[:, :1] == 0)
        error_BFHW = (video_BCFHW[:, :, 1:] - video_BCFHW[:, :, :1]).float().abs().mean(1)
        return -(error_BFHW * empty_BFHW).sum((1, 2, 3)) / empty_BFHW.sum((1, 2, 3)).clamp(min=1)

    return reward
