"""What a reward is, and how a recipe names one or a weighted sum:

    rewards: [{name: segmentation, weight: 1.0}, {name: trajectory, weight: 2.0}]

A reward is a file of this folder: a `Config` (of RewardConfig), what it must be told (`TRUTHS`, fields of Batch beside
pictures, masks and the scored object), the kinds of violation that it puts in order (`RANKS`, of
sim/worlds/counterfactual.py), and `load(config, device)`, which returns a function of

    video_BCFHW  a generated clip in [-1, 1], frame 0 the given picture
    batch        the true clip: its pictures, masks, scored object, and what TRUTHS names

that gives each clip's reward, float32 (B,), the more the better, with a gradient to every picture after the first; also
under autocast and of a video in bf16, where networks are computed in bf16 and all else in float32. Where
a network is asked, `net(config)` returns it, so that a run knows by which weights it was trained.
Truths come from the simulator and are never estimated. Weights of networks get no gradient.

Shape letters: B batch, C channels, F frames, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from posttrain.core.recipe import Plugin, Strict
from posttrain.nets.precision import widened
from posttrain.types import Batch

PROTOCOL = ("Config", "TRUTHS", "RANKS", "load")
Reward = Callable[[Tensor, Batch], Tensor]
Total = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]


class RewardConfig(Strict):
    """What every reward's Config has."""

    weight: float = 1.0  # in a sum of rewards


def truths(parts: Sequence[Plugin]) -> tuple[str, ...]:
    """What batches must hold for these rewards, as data.clips.Clips takes it."""
    return tuple(dict.fromkeys(truth for part in parts for truth in part.module.TRUTHS))


def load_all(parts: Sequence[Plugin], device: torch.device | str = "cpu") -> dict[str, tuple[float, Reward]]:
    """Weight and function of the rewards that a recipe names."""
    return {part.name: (part.config.weight, part.module.load(part.config, device)) for part in parts}


def total(rewards: Mapping[str, tuple[float, Reward]]) -> Total:
    """The weighted sum of rewards, (B,), and each of them by name without its weight."""

    def reward(video_BCFHW: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = {name: each(video_BCFHW, batch) for name, (_, each) in rewards.items()}
        return torch.stack([weight * found[name] for name, (weight, _) in rewards.items()]).sum(0), found

    return reward


def frozen(module: nn.Module) -> nn.Module:
    """A network that only looks: in evaluation mode, its weights without gradients."""
    return module.eval().requires_grad_(False)


def true_masks(batch: Batch) -> Tensor:
    """The scored object's true masks, bool (B, F, H, W)."""
    assert batch.instances_BFHW is not None
    assert batch.target_B is not None
    return batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)


def contrast(video_BCFHW: Tensor, true_BCFHW: Tensor) -> Tensor:
    """Whether these pictures have the contrast of the true ones, (B, F - 1), after frame 0: 1 from half of it on, 0
    where there is none. Contrast is the standard deviation over pixels, mean over channels.

    What a network sees in a flat picture is what it was used to see: rewards charge such a picture with their largest
    error. Nothing is asked from half on, where clips differ in what they show.
    """
    shown, true = (widened(video[:, :, 1:]).flatten(3).std(3).mean(1) for video in (video_BCFHW, true_BCFHW))
    return (2 * shown / true.clamp_min(1e-6)).clamp_max(1.0)
