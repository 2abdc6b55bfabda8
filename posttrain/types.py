"""Axes, units and ranges of all tensors. Every package follows these conventions.

Axes    B batch, C channels, F frames, H W pixels (or latent cells), L text tokens, D text width, N bodies, M losers.
Pixels  float in [-1, 1], (B, C, F, H, W). Latents (B, C, F, H, W), normalised channel by channel.
Masks   bool (B, F, H, W). Depth metres along the optical axis. Flow pixels (x right, y down) to the next frame.
Time    rectified flow: t = 0 is data, t = 1 is noise; z_t = (1 - t) z_0 + t eps; v = eps - z_0.
        A per-frame time t_BF carries the conditioning: a clean (given) frame has t = 0 and no loss.
World   metres, seconds, z up, floor at z = 0, gravity (0, 0, -9.81); poses with unit quaternions, w first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The data of a training step. Fields that a method does not ask for are None."""

    ids: tuple[str, ...]
    z0_BCFHW: Tensor | None = None  # latents of the true clip; frame 0 is the latent of the first frame
    text_BLD: Tensor | None = None
    video_BCFHW: Tensor | None = None  # pixels in [-1, 1]
    instances_BFHW: Tensor | None = None  # uint8, 0 background, i + 1 body i
    target_B: Tensor | None = None  # int64, the instance id (body index + 1) that metrics score
    losers_BMCFHW: Tensor | None = None  # latents of M clips that continue the same first frame and lose against z0
    semantic_adherence_BM: Tensor | None = None  # how well each of them follows the text, 0 to 1
    physical_commonsense_BM: Tensor | None = None  # how well it obeys physics, 0 to 1
    flow_BFCHW: Tensor | None = None  # pixels (x right, y down) to the next frame; the last frame's means nothing
    depth_BFHW: Tensor | None = None  # metres along the optical axis, inf in the sky
    condition: dict[str, Tensor] = field(default_factory=dict)  # from VideoModel.condition, of the first frame

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        tensors: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, condition={name: v.to(device) for name, v in self.condition.items()}, **tensors)

    def until(self, frames: int) -> "Batch":
        """The batch with pixels, masks, flow and depth of the first `frames` pictures only; latents stay whole."""
        truth = {name: v for name, v in vars(self).items() if isinstance(v, Tensor) and not name.startswith("z0_")}
        axes = {name: name.rpartition("_")[2].find("F") for name in truth}  # a name ends in its axes
        cut: dict[str, Any] = {n: v.narrow(axes[n], 0, frames) for n, v in truth.items() if axes[n] > 0}
        return replace(self, **cut)


SHARED, LAYERS = 1, 2  # what else draws in a step besides its samples: (seed, step) alone would be sample 0's


class Random:
    """Random numbers for one batch: every draw depends on (seed, step, global sample index) alone.

    So a resumed run, or one on another number of processes, draws the same numbers.
    """

    def __init__(self, seed: int, step: int, indices: Sequence[int]) -> None:
        states = [np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] for i in indices]
        self.generators = [torch.Generator().manual_seed(int(state >> 1)) for state in states]
        state = np.random.SeedSequence([seed, step], spawn_key=(SHARED,)).generate_state(1, np.uint64)[0]
        self._step = torch.Generator().manual_seed(int(state >> 1))

    def shared(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) that all samples of the step share, on every process; float32 on the CPU."""
        return torch.rand(shape, generator=self._step)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape), float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), float32 on the CPU."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators])
