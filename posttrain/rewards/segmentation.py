"""SAM 2's soft masks against the true ones (PISA, arXiv 2503.09595, section 4.4), aware of absence.

SAM 2 follows the scored object from its true mask in frame 0. With p its sigmoid mask, m the true one, and a the area
of the true mask in frame 0, in pixels:

    R = mean_{t > 0} (sum p m + a e) / (sum (p + m - p m) + a e),   e = 1 where m is empty, else 0

which is a soft IoU where the object is in the picture. Where it is not (hidden, or out of sight), it is 1 for an empty
mask and falls with what p covers. In [0, 1].

Departure from the paper's code: there, where SAM 2 takes the object for gone, its logits are a constant, and what has
vanished gets no gradient. Here it is never taken for gone (nets/sam2.py: `always_there`).

What it does not see: how far a mask is off, once it and the true one are disjoint. From a clip that hovers there is
then no way downhill; add `trajectory`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.models.base import ModelConfig
from posttrain.nets import sam2
from posttrain.rewards.base import Reward, RewardConfig, frozen, true_masks
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ()
RANKS: tuple[str, ...] = ("weak_gravity", "hover", "delay", "vanish", "melt", "slow_motion")


class Config(RewardConfig):
    """`path`: "pocket", a local folder, or a hub id as facebook/sam2.1-hiera-tiny."""

    path: str = "pocket"


def net(config: Config, device: torch.device | str = "cpu") -> sam2.Sam2Tracker:
    """The SAM 2. Raises UserError where there is none."""
    return sam2.load(ModelConfig(family="sam2", path=config.path), str(device)).tracker


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    look = load_look(config, device)
    return lambda video_BCFHW, batch: soft_iou(*look(video_BCFHW, batch))


def load_look(config: Config, device: torch.device | str) -> Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor]]:
    """One look of SAM 2 at a video in [-1, 1]: its soft masks and the true ones after frame 0, both (B, F - 1, H, W),
    and the true ones of frame 0, (B, H, W), from which it starts."""
    follow = frozen(sam2.always_there(net(config, device)))

    def look(video_BCFHW: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        m = true_masks(batch)
        return follow(video_BCFHW, m[:, 0]).sigmoid()[:, 1:], m[:, 1:], m[:, 0]

    return look


def soft_iou(p_BFHW: Tensor, m_BFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
    """The equation above, (B,); `mask0_BHW` is frame 0's mask, and frame 0 is not among the others."""
    m = m_BFHW.to(p_BFHW.dtype)
    both, either = (p_BFHW * m).sum((2, 3)), (p_BFHW + m - p_BFHW * m).sum((2, 3))
    absent = (m.sum((2, 3)) == 0) * mask0_BHW.sum((1, 2))[:, None].to(p_BFHW.dtype)
    return ((both + absent) / (either + absent).clamp_min(1e-6)).mean(1)
