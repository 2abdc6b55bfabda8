"""The object's position: the path of its soft mask's centre, with a useful gradient from any distance.

SAM 2 follows the scored object as in `segmentation`. With c the centre of its soft mask p, less 0.05, c* the centre of
the true mask m, and D the picture's diagonal, all in pixels:

    R = -mean_t [ w |c - c*| / D + (1 - w) ],   w = u min(1, 2 sum p / sum m, 2 s*^2 / s^2),   t > 0 with m not empty

with s^2 the mean squared distance of that mask's pixels from its centre, s*^2 the larger of the same of the true masks
now and in frame 0, and u = 1 unless the picture has lost most of its contrast (rewards/base.py). So an object that has
vanished, is smeared over a noisy frame, or is detected in a blank one, has the largest possible distance. w is 1 from
half of the true area on, up to about twice its extent. R is in [-1, 0]; 0 if m is always empty. In square pictures
it is a differentiable form of PISA's L2 (posttrain/metrics/pisa.py).

Not measured: shape and rotation, and size within that factor; use it together with `segmentation`. For a vanished
object w has a gradient, but it points to the true pixels in only 17% of such clips (the gradient of `object` in 33%). A
step along it brought the object nearer in three clips of four, along `object`'s in two (docs/log).
"""

import math

import torch
from torch import Tensor

from posttrain.rewards import segmentation
from posttrain.rewards.base import Reward, contrast
from posttrain.types import Batch

FAINT = 0.05  # subtracted from masks: a faint background over the whole picture would outweigh a small object
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
    """The equation above, (B,); `mask0_BHW` is frame 0's mask; the others are of frames after it."""
    p = p_BFHW.to(torch.promote_types(p_BFHW.dtype, torch.float32))
    m, mask0_BFHW = m_BFHW.to(p.dtype), mask0_BHW[:, None].to(p.dtype)
    (c, s2), (true_c, true_s2), (_, first_s2) = moments(p), moments(m), moments(mask0_BFHW)
    away = (c - true_c).norm(dim=2) / math.hypot(*m.shape[2:])
    soft_area, true_area = p.sum((2, 3)), m.sum((2, 3))
    w = (
        torch.minimum(2 * soft_area / true_area.clamp_min(1), 2 * torch.maximum(true_s2, first_s2) / s2).clamp_max(1)
        * u_BF
    )
    there = (true_area > 0).to(m.dtype)
    return -((w * away + 1 - w) * there).sum(1) / there.sum(1).clamp_min(1)


def moments(p_BFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of a soft mask's centre in pixels (B, F, 2), and the mean squared distance from it (B, F).

    Values below FAINT count as 0. A pixel has an extent: a single one has a mean squared distance of 1/6. The centre of
    an empty mask is 0.
    """
    clear = (p_BFHW - FAINT).clamp_min(0)
    mass = clear.sum((2, 3)).clamp_min(1e-6)
    centre, s2 = [], torch.full_like(mass, 1 / 6)
    for axis, side in ((3, p_BFHW.shape[2]), (2, p_BFHW.shape[3])):
        position, share = torch.arange(side).to(p_BFHW), clear.sum(axis) / mass[..., None]
        centre.append((share * position).sum(2))  # a matrix product would be rounded under autocast
        s2 = s2 + (share * (position - centre[-1][..., None]).square()).sum(2)
    return torch.stack(centre, 2), s2
