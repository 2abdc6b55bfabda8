"""Where the object is: the path of its soft mask's centre, whose gradient points downhill from any distance.

SAM 2 follows the scored object as in `segmentation`. With c the centre of its soft mask p, from which .05 is taken off,
and c* that of the true mask m, and D the picture's diagonal, all in pixels:

    R = -mean_t [ w |c - c*| / D + (1 - w) ],   w = u min(1, 2 sum p / sum m, 2 s*^2 / s^2),   t > 0 with m not empty

with s^2 the mean squared distance of that mask from its centre, s*^2 the larger one of the true masks now and in frame
0, and u 1 unless the picture has lost most of its contrast (rewards/base.py). So what has vanished, is smeared all over
a noisy picture, or is dreamt into a blank one, is as far off as anything can be; from half its area on, and up to about
twice of it in its shape, w is 1. In [-1, 0]; 0 where m is always empty. It is PISA's L2 (posttrain/metrics/pisa.py)
made differentiable.

What it does not see: shape and turning, and size within that factor; use it beside `segmentation`. For what has
vanished w has a gradient, but it seldom points towards the true pixels (17% of such clips, that of `object` 33%); a
step along it brought the object nearer in three clips of four, along `object`'s in two (docs/log).
"""

import math

import torch
from torch import Tensor

from posttrain.rewards import segmentation
from posttrain.rewards.base import Reward, contrast
from posttrain.types import Batch

FAINT = 0.05  # a background of so little, all over the picture, would outweigh a small object
TRUTHS: tuple[str, ...] = ()
RANKS: tuple[str, ...] = ("weak_gravity", "hover", "delay", "vanish", "slow_motion")


class Config(segmentation.Config):
    """As in segmentation.py."""


net = segmentation.net


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    look = segmentation.load_look(config, device)

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        return path_error(*look(video_BCFHW, batch), contrast(video_BCFHW, batch.video_BCFHW))

    return reward


def path_error(p_BFHW: Tensor, m_BFHW: Tensor, mask0_BHW: Tensor, u_BF: Tensor) -> Tensor:
    """The equation above, (B,); `mask0_BHW` is frame 0's mask, and frame 0 is not among the others."""
    p = p_BFHW.to(torch.promote_types(p_BFHW.dtype, torch.float32))
    m, mask0_BFHW = m_BFHW.to(p.dtype), mask0_BHW[:, None].to(p.dtype)
    (c, s2), (true_c, true_s2), (_, first_s2) = moments(p), moments(m), moments(mask0_BFHW)
    away = (c - true_c).norm(dim=2) / math.hypot(*m.shape[2:])
    found, true = p.sum((2, 3)), m.sum((2, 3))
    w = torch.minimum(2 * found / true.clamp_min(1), 2 * torch.maximum(true_s2, first_s2) / s2).clamp_max(1) * u_BF
    there = (true > 0).to(m.dtype)
    return -((w * away + 1 - w) * there).sum(1) / there.sum(1).clamp_min(1)


def moments(p_BFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of a soft mask's centre in pixels (B, F, 2), and the mean squared distance from it (B, F).

    What is below FAINT does not count. A pixel has an extent: alone its mean squared distance is 1/6. Without a mask
    the centre is 0.
    """
    clear = (p_BFHW - FAINT).clamp_min(0)
    mass = clear.sum((2, 3)).clamp_min(1e-6)
    centre, s2 = [], torch.full_like(mass, 1 / 6)
    for axis, side in ((3, p_BFHW.shape[2]), (2, p_BFHW.shape[3])):
        place, share = torch.arange(side).to(p_BFHW), clear.sum(axis) / mass[..., None]
        centre.append((share * place).sum(2))  # a matrix product would be rounded under autocast
        s2 = s2 + (share * (place - centre[-1][..., None]).square()).sum(2)
    return torch.stack(centre, 2), s2
