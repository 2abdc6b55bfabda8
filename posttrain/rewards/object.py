"""The scored object's shape and position together, from one run of SAM 2, the expensive part of a reward:

    R = R_segmentation + `distance` R_trajectory

as in segmentation.py and trajectory.py. A sum of the two in a recipe gives the same and runs SAM 2 twice.
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
    """As in segmentation.py, and the weight of the position relative to the shape."""

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
