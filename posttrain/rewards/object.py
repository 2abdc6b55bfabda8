"""The scored object's shape and position together:

    R = R_segmentation + `distance` R_trajectory

with the terms of segmentation.py and trajectory.py. SAM 2, the expensive part, runs once for both; listing the two
rewards in a recipe gives the same sum and runs it twice.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from posttrain.rewards import segmentation
from posttrain.rewards.base import Reward, contrast
from posttrain.rewards.segmentation import soft_iou
from posttrain.rewards.trajectory import path_error
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ()
RANKS: tuple[str, ...] = ("weak_gravity", "hover", "delay", "vanish", "slow_motion")


class Config(segmentation.Config):
    """The keys of segmentation.py, and `distance`: the weight of R_trajectory relative to R_segmentation."""

    distance: PositiveFloat = 4.0  # with this, both pull a half-covered object about equally


net = segmentation.net


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    look = segmentation.load_look(config, device)

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        seen, u_BF = look(video_BCFHW, batch), contrast(video_BCFHW, batch.video_BCFHW)
        return soft_iou(*seen) + config.distance * path_error(*seen, u_BF)

    return reward
