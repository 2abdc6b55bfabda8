"""SAM 2's soft masks against the true ones (PISA, arXiv 2503.09595, section 4.4), also if the object is absent.

SAM 2 follows the scored object from its true mask in frame 0. p is its sigmoid mask, m the true mask, and a the area of
the true mask in frame 0, in pixels:

    R = mean_{t > 0} (sum p m + a e) / (sum (p + m - p m) + a e),   e = 1 where m is empty, else 0

which is a soft IoU while the object is in the picture. While it is not (hidden or out of view), the term is 1 for an
empty mask and falls with the area of p. R is in [0, 1].

Departure from the paper's code: there, if SAM 2 decides that the object is gone, its logits are constant, and a
vanished object gets no gradient. Here it never decides that (nets/sam2.py: `always_there`).

Not measured: the distance between masks that do not overlap. In a clip in which the object hovers there is then no
gradient towards the truth; add `trajectory`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.models.base import ModelConfig
from posttrain.nets import sam2
from posttrain.rewards.base import Reward, RewardConfig, true_masks, with_fixed_weights
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ()
RANKS: tuple[str, ...] = ("weak_gravity", "hover", "delay", "vanish", "melt", "slow_motion")


class Config(RewardConfig):
    """`path`: "pocket", a local folder, or a hub id such as facebook/sam2.1-hiera-tiny."""

    path: str = "pocket"


def net(config: Config, device: torch.device | str = "cpu") -> sam2.Sam2Tracker:
    """The SAM 2. Raises UserError if there is none."""
    return sam2.load(ModelConfig(family="sam2", path=config.path), str(device)).tracker


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    look = load_look(config, device)
    return lambda video_BCFHW, batch: soft_iou(*look(video_BCFHW, batch))


def load_look(config: Config, device: torch.device | str) -> Callable[[Tensor, Batch], tuple[Tensor, Tensor, Tensor]]:
    """A function of a video in [-1, 1] that runs SAM 2 once. It returns the soft masks and the true ones after frame 0,
    both (B, F - 1, H, W), and the true ones of frame 0, (B, H, W), from which SAM 2 starts."""
    follow = with_fixed_weights(sam2.always_there(net(config, device)))

    def look(video_BCFHW: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        m = true_masks(batch)
        return follow(video_BCFHW, m[:, 0]).sigmoid()[:, 1:], m[:, 1:], m[:, 0]

    return look


def soft_iou(p_BFHW: Tensor, m_BFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
    """The equation above, (B,); `mask0_BHW` is frame 0's mask; the others are of frames after it."""
    m = m_BFHW.to(p_BFHW.dtype)
    both, either = (p_BFHW * m).sum((2, 3)), (p_BFHW + m - p_BFHW * m).sum((2, 3))
    absent = (m.sum((2, 3)) == 0) * mask0_BHW.sum((1, 2))[:, None].to(p_BFHW.dtype)
    return ((both + absent) / (either + absent).clamp_min(1e-6)).mean(1)
