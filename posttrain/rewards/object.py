"""The scored object's shape and place together, from one look of SAM 2, which is most of what a reward costs:

    R = R_segmentation + `distance` R_trajectory

as the files of those names have them. A sum of the two in a recipe is the same, and runs SAM 2 twice.
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
    """As in segmentation.py, and the weight of the place beside the shape."""

    distance: PositiveFloat = 4.0  # at which an object that is half covered is pulled by both about alike


net = segmentation.net


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    look = segmentation.load_look(config, device)

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        seen, u_BF = look(video_BCFHW, batch), contrast(video_BCFHW, batch.video_BCFHW)
        return soft_iou(*seen) + config.distance * path_error(*seen, u_BF)

    return reward
