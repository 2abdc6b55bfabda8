"""Rectified flow: the path between data and noise, how times are drawn, and the sampler.

Time runs from data (t = 0) to noise (t = 1). Every function takes per-frame times t_BF, so that a clean
(given) frame is simply one whose time is 0. Shapes: B batch, C channels, F latent frames, H W cells, L D text.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from posttrain.types import Random

TimeKind = Literal["uniform", "logit_normal"]


class Velocity(Protocol):
    """The part of a video model that the sampler needs."""

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor: ...


def interpolate(z0_BCFHW: Tensor, eps_BCFHW: Tensor, t_BF: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps, frame by frame."""
    t = t_BF[:, None, :, None, None]
    return (1 - t) * z0_BCFHW + t * eps_BCFHW


def target(z0_BCFHW: Tensor, eps_BCFHW: Tensor) -> Tensor:
    """v = d z_t / d t = eps - z_0, the velocity along the straight path."""
    return eps_BCFHW - z0_BCFHW


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): more time near noise for s > 1, none for s = 1; inverted by 1 / s.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_time(random: Random, kind: TimeKind, shift: float = 1.0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw one training time per clip, t_B in [0, 1], float32.

    "uniform": u ~ U(0, 1). "logit_normal": u = sigmoid(n), n ~ N(0, 1). Then t = shift_time(u, shift).
    With `low` or `high`, the same law given low <= t < high, which rejection would give too. Each clip still takes
    one draw: with F the distribution function of u, it becomes the quantile of F(low) + F(u) (F(high) - F(low)).
    """
    u_B = random.uniform() if kind == "uniform" else torch.sigmoid(random.normal())
    if (low, high) == (0.0, 1.0):
        return shift_time(u_B, shift)

    def share(u: Tensor) -> Tensor:
        return u if kind == "uniform" else torch.special.ndtr(torch.logit(u))

    below, above = share(shift_time(torch.tensor([low, high], dtype=torch.float64), 1 / shift).clamp(0, 1))
    q_B = below + share(u_B.double()) * (above - below)
    u_B = q_B if kind == "uniform" else torch.sigmoid(torch.special.ndtri(q_B))
    first, end = torch.tensor([low, high])  # as float32 has them: a rounded t must not leave the range
    return shift_time(u_B, shift).float().clamp(first, torch.nextafter(end, first))


def frame_times(t_B: Tensor, frames: int, clean: int) -> Tensor:
    """t_BF: each clip's time on every latent frame, and 0 on the first `clean` ones, which are given."""
    noisy_F = torch.arange(frames, device=t_B.device) >= clean
    return t_B[:, None] * noisy_F


def sample(
    model: Velocity,
    scheduler: Any,
    noise_BCFHW: Tensor,
    text_BLD: Tensor,
    first_BC1HW: Tensor | None,
    steps: int,
    guidance: float | Callable[[float], float] = 1.0,
    negative_text: Tensor | None = None,
    condition: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Solve dz = v dt from noise (t = 1) to data (t = 0); gradients flow through every step.

    The grid and the update are those of `scheduler`, a fresh diffusers scheduler of the model folder, so the
    result is what the stock pipeline makes of the same noise.

    Args:
        noise_BCFHW: standard normal latents; float32, and they stay so.
        first_BC1HW: the clean latent of the first picture, or None for text alone.
        guidance: w in v = v_negative + w (v_text - v_negative), or a function t -> w; where it is 1, the model is
            asked once.
        negative_text: text_BLD of the unwanted prompt; needed when guidance > 1.
        condition: what the model made of the first picture besides (`VideoModel.condition`).

    Returns:
        z0_BCFHW, with the given frame unchanged.
    """
    batch, _, frames = noise_BCFHW.shape[:3]
    clean = 0 if first_BC1HW is None else first_BC1HW.shape[2]

    def given(z_BCFHW: Tensor) -> Tensor:
        return z_BCFHW if first_BC1HW is None else torch.cat([first_BC1HW, z_BCFHW[:, :, clean:]], dim=2)

    scheduler.set_timesteps(steps, device=noise_BCFHW.device)
    z_BCFHW = noise_BCFHW
    for timestep in scheduler.timesteps:
        # float64, so that a whole timestep of 1000 is the same whole number again inside the model
        t_B = timestep.double().expand(batch) / scheduler.config.num_train_timesteps
        t_BF = frame_times(t_B, frames, clean)
        w = guidance(float(t_B[0])) if callable(guidance) else guidance
        v_BCFHW = model.velocity(given(z_BCFHW), t_BF, text_BLD, condition)
        if w > 1:
            if negative_text is None:
                raise ValueError(f"guidance {w} needs negative_text")
            v_negative = model.velocity(given(z_BCFHW), t_BF, negative_text, condition)
            v_BCFHW = v_negative + w * (v_BCFHW - v_negative)
        z_BCFHW = scheduler.step(v_BCFHW, timestep, z_BCFHW, return_dict=False)[0]
    return given(z_BCFHW)
