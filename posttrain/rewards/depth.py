"""Depth Anything's depth against the true one (PISA, arXiv 2503.09595, section 4.4).

q is the inverse depth from Depth Anything V2, z the simulator's depth in metres, and r the range of 1/z over the true
clip:

    R = -mean_{t > 0, pixels} [ u |s q + o - 1/z| / r + (1 - u) ],   s, o = argmin sum (s q*_0 + o - 1/z_0)^2

The scale s and the shift o are fitted once, to the true first frame, which is the model's condition. They do not depend
on the generated clip, so the model cannot change them. One scale for all pictures also keeps the change of depth over
time, which the paper's normalisation by each picture's range removes. u is the contrast (rewards/base.py).

Caution: an object in the wrong position counts twice, where it is and where it should be, whatever the distance; a
missing object counts once. So a clip without the object has a better reward than one in which it hovers: use this
reward together with `segmentation` and `trajectory`.
"""

import torch
from torch import Tensor, nn

from posttrain.models.base import ModelConfig
from posttrain.nets import depth
from posttrain.rewards.base import Reward, RewardConfig, contrast, with_fixed_weights
from posttrain.types import Batch

TRUTHS: tuple[str, ...] = ("depth",)
RANKS: tuple[str, ...] = ("hover", "delay", "slow_motion")


class Config(RewardConfig):
    """`path`: "pocket", a local folder, or a hub id such as depth-anything/Depth-Anything-V2-Small-hf."""

    path: str = "pocket"


def net(config: Config, device: torch.device | str = "cpu") -> nn.Module:
    """The Depth Anything. Raises UserError if there is none."""
    return depth.load(ModelConfig(family="depth", path=config.path), str(device)).module


def load(config: Config, device: torch.device | str = "cpu") -> Reward:
    """The reward above."""
    see = with_fixed_weights(net(config, device))

    def reward(video_BCFHW: Tensor, batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        assert batch.depth_BFHW is not None
        inverse = 1 / batch.depth_BFHW
        with torch.no_grad():
            s_B, o_B = fit(see(batch.video_BCFHW[:, :, :1])[:, 0], inverse[:, 0])
        scaled = s_B.view(-1, 1, 1, 1) * see(video_BCFHW[:, :, 1:]) + o_B.view(-1, 1, 1, 1)
        return depth_error(scaled, inverse[:, 1:], contrast(video_BCFHW, batch.video_BCFHW))

    return reward


def fit(q_BHW: Tensor, inverse_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (B,) of the least squares fit of q to the truth; 0 and the truth's mean if q is constant."""
    q, true = q_BHW.flatten(1), inverse_BHW.flatten(1)
    spread = q - q.mean(1, keepdim=True)
    s = (spread * true).mean(1) / spread.square().mean(1).clamp_min(1e-8)
    return s, true.mean(1) - s * q.mean(1)


def depth_error(inverse_BFHW: Tensor, true_BFHW: Tensor, u_BF: Tensor) -> Tensor:
    """The equation above, (B,), of frames after the first."""
    flat = true_BFHW.flatten(1)
    reach = (flat.amax(1) - flat.amin(1)).clamp_min(1e-6)[:, None]
    error = (inverse_BFHW - true_BFHW).abs().mean((2, 3)) / reach
    return -(u_BF * error + 1 - u_BF).mean(1)
