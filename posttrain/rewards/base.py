"""The protocol of rewards, and how a recipe names one or a weighted sum:

    rewards: [{name: segmentation, weight: 1.0}, {name: trajectory, weight: 2.0}]

A reward is a file of this folder: a `Config` (of RewardConfig), the truths that it needs (`TRUTHS`, fields of Batch
beside pictures, masks and the scored object), the kinds of violation whose severity lowers it (`RANKS`, of
sim/worlds/counterfactual.py), and `load(config, device)`, which returns a function of

    video_BCFHW  a generated clip in [-1, 1], frame 0 the given picture
    batch        the true clip: its pictures, masks, scored object, and what TRUTHS names

that returns each clip's reward, float32 (B,), larger is better, with a gradient to every picture after the first. Under
autocast and for a video in bf16, networks are computed in bf16 and all else in float32. If the reward has a network,
`net(config)` returns it, so a run can record the weights that it was trained with.
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
    """The field that every reward's Config has."""

    weight: float = 1.0  # in a sum of rewards


def truths(parts: Sequence[Plugin]) -> tuple[str, ...]:
    """The truths that batches must hold for these rewards, as data.dataset.Clips takes them."""
    return tuple(dict.fromkeys(truth for part in parts for truth in part.module.TRUTHS))


def load_all(parts: Sequence[Plugin], device: torch.device | str = "cpu") -> dict[str, tuple[float, Reward]]:
    """Weight and function, by name, of the rewards that a recipe names."""
    return {part.name: (part.config.weight, part.module.load(part.config, device)) for part in parts}


def total(rewards: Mapping[str, tuple[float, Reward]]) -> Total:
    """A function that returns the weighted sum of rewards, (B,), and each reward by name without its weight."""

    def reward(video_BCFHW: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        values = {name: each(video_BCFHW, batch) for name, (_, each) in rewards.items()}
        return torch.stack([weight * values[name] for name, (weight, _) in rewards.items()]).sum(0), values

    return reward


def with_fixed_weights(module: nn.Module) -> nn.Module:
    """The network in evaluation mode, its weights without gradients."""
    return module.eval().requires_grad_(False)


def true_masks(batch: Batch) -> Tensor:
    """The scored object's true masks, bool (B, F, H, W)."""
    assert batch.instances_BFHW is not None
    assert batch.target_B is not None
    return batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)


def contrast(video_BCFHW: Tensor, true_BCFHW: Tensor) -> Tensor:
    """min(1, 2 c / c_true) of each picture after frame 0, (B, F - 1): 0 for one colour, 1 from half of c_true on.

    c is the contrast: the standard deviation over pixels, then the mean over channels. In a picture of one colour a
    network outputs what was common in its training data, so rewards give such a picture their largest error. Pictures
    may differ in contrast without being wrong, so half of the true contrast is enough.
    """
    shown, true = (widened(video[:, :, 1:]).flatten(3).std(3).mean(1) for video in (video_BCFHW, true_BCFHW))
    return (2 * shown / true.clamp_min(1e-6)).clamp_max(1.0)
