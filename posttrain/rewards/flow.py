"""RAFT's optical flow against the true one (PISA, arXiv 2503.09595, section 4.4).

f is RAFT's flow from each frame to the next, f* the simulator's, in pixels, and W the clip's width:

    R = -mean_{t, pixels of the region, x and y} [ u |f - f*| + (1 - u) W ]

where u is 1 unless the later picture has lost most of its contrast (rewards/base.py): the flow of a blank picture means
nothing, and without u a blank clip would have the reward of a static one.

Caution: over the whole image, an object that moves in the wrong position counts twice, where it is and where it should
be, but one that does not move counts once. So a hovering object scores better than an almost correct fall (a disc in 64
x 64 pixels: static -0.0167, one frame late -0.0190, falling at 0.7 g -0.0221). In `region: objects`, the default, only
those pixels count in which the true clip has a body in one of the two pictures. Then only a clip that moves the wrong
way is worse than a static one. Neither region shows where an object is while it lies still, and vanishing after landing
costs little: use this reward together with `segmentation` and `trajectory`.

Departures from the paper: the truth is the simulator's flow, not RAFT's of the true clip; the region; u; the whole
gradient (nets/raft.py: `see`).
"""

from typing import Literal

import torch
from torch import Tensor

from posttrain.models.base import ModelConfig
from posttrain.nets import raft
from posttrain.rewards.base import Reward, RewardConfig, contrast, with_fixed_weights
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ("flow",)
RANKS: tuple[str, ...] = ("hover",)


class Config(RewardConfig):
    """`path`: as in nets/raft.py: "pocket", raft_large, raft_small, a folder or a file (raft-things.pth)."""

    path: str = "pocket"
    region: Literal["image", "objects"] = "objects"


def net(config: Config, device: torch.device | str = "cpu") -> raft.Flow:
    """The RAFT. Raises UserError if there is none."""
    return raft.load(ModelConfig(family="raft", path=config.path), str(device)).flow


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    flow = net(config, device)
    with_fixed_weights(flow)

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        assert batch.flow_BFCHW is not None
        assert batch.instances_BFHW is not None
        bodies = batch.instances_BFHW > 0
        region = bodies[:, :-1] | bodies[:, 1:]
        if config.region == "image":
            region = torch.ones_like(region)
        seen = contrast(video_BCFHW, batch.video_BCFHW)
        return flow_error(flow.see(video_BCFHW), batch.flow_BFCHW[:, :-1], region, seen)

    return reward


def flow_error(f_BFCHW: Tensor, true_BFCHW: Tensor, region_BFHW: Tensor, u_BF: Tensor) -> Tensor:
    """The equation above, (B,), of F - 1 pairs of pictures."""
    u = u_BF[:, :, None, None]
    charged = u * (f_BFCHW - true_BFCHW).abs().mean(2) + (1 - u) * f_BFCHW.shape[-1]
    return -(charged * region_BFHW).sum((1, 2, 3)) / region_BFHW.sum((1, 2, 3)).clamp_min(1)
