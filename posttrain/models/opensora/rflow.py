"""Rectified flow as Open-Sora v1.2 has it: its own time, 0 (data) to 1000 (noise), and its own sign, v = x - eps.

x_t = (1 - t / 1000) x + (t / 1000) eps, and sampling adds v (t_i - t_(i+1)) / 1000. model.py turns it into ours.

Shapes: B clips, C channels, T latent frames, H W cells. A mask (B, T) is True where a frame is noised and predicted.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

TIMES = 1000
TimeKind = Literal["uniform", "logit-normal", "discrete"]


def time_ratio(num_frames: Tensor, height: Tensor, width: Tensor, scale: float = 1.0) -> Tensor:
    """r = sqrt(h w / 512^2) sqrt(n) scale, for clips of so many pictures of h x w pixels.

    n = 1 if num_frames[0] is 1, else num_frames // 17 * 5, but at least 1: clips of 2 to 16 frames have n = 0 in the
    published code, which sends every time to 0 and t = 1000 to NaN.
    """
    n = torch.ones_like(num_frames) if num_frames.flatten()[0] == 1 else num_frames // 17 * 5
    return (height * width / 512**2).sqrt() * n.clamp(min=1).sqrt() * scale


def timestep_transform(t: Tensor, num_frames: Any, height: Any, width: Any, scale: float = 1.0) -> Tensor:
    """t' = 1000 r u / (1 + (r - 1) u), u = t / 1000: more time near noise for longer and larger clips.

    Args:
        t: (B,) in 0 .. 1000.
        num_frames, height, width: of the clips in pictures and pixels, numbers or (B,); see `time_ratio`.
    """

    def wide(v: Any) -> Tensor:
        v = torch.as_tensor(v, device=t.device)
        return v.to(torch.promote_types(v.dtype, torch.float32))

    r = time_ratio(wide(num_frames), wide(height), wide(width), scale)
    u = t / TIMES
    return r * u / (1 + (r - 1) * u) * TIMES


def draw_timesteps(kind: TimeKind, count: int, generator: torch.Generator | None = None) -> Tensor:
    """t (count,) in 0 .. 1000 before the transform: 1000 u, 1000 sigmoid(n), or a whole number below 1000."""
    match kind:
        case "uniform":
            return torch.rand(count, generator=generator) * TIMES
        case "logit-normal":
            return torch.sigmoid(torch.randn(count, generator=generator)) * TIMES
        case "discrete":
            return torch.randint(0, TIMES, (count,), generator=generator)


def add_noise(x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t / 1000) x + (t / 1000) eps."""
    u = (t_B.to(torch.promote_types(t_B.dtype, torch.float32)) / TIMES)[:, None, None, None, None]
    return (1 - u) * x + u * noise


def rflow_loss(
    model: Callable[..., Tensor], x: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None, **conditions: Any
) -> Tensor:
    """The loss of each clip, (B,): the mean of (v_model - (x - eps))^2 over C, H, W and the frames that are noised.

    Args:
        model: STDiT3, or what is called as it is; of what it answers, the first C channels are v.
        x, noise: (B, C, T, H, W).
        t: (B,) in 0 .. 1000, after the transform where one is wanted.
        mask: (B, T) bool; where False a frame stays clean, is told to the model as such and has no loss. None: all
            are noised. A clip without a True frame has the loss NaN.
        conditions: what else the model takes: y, mask of the text under the name `y_mask`, fps, height, width.
    """
    x_t = add_noise(x, noise, t)
    arguments = _arguments(conditions)
    if mask is not None:
        x_t = torch.where(mask[:, None, :, None, None], x_t, x)
        arguments["x_mask"] = mask
    v = model(x_t, t, **arguments)[:, : x.shape[1]]
    square_BT = (v - (x - noise)).square().mean(dim=(1, 3, 4))
    return square_BT.mean(1) if mask is None else (square_BT * mask).sum(1) / mask.sum(1)


def _arguments(conditions: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with: the text's mask is its `mask`, which is taken here."""
    return {"mask" if name == "y_mask" else name: value for name, value in conditions.items()}


def rflow_sample(
    model: Callable[..., Tensor],
    z: Tensor,
    steps: int = 30,
    guidance: float = 7.0,
    frame_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    transform: bool = True,
    discrete: bool = False,
    y_null: Tensor | None = None,
    **conditions: Any,
) -> Tensor:
    """Latents made of noise z (B, C, T, H, W) in so many Euler steps; differentiable.

    t_i = 1000 (1 - i / steps), transformed; each step asks the model once, for the clips with their text and again with
    the learned text that stands for none: v = v_null + guidance (v_text - v_null).

    With `frame_mask`, a frame of mask m takes part from the first t_i <= 1000 m on: it is then noised once to that time
    (frames of m = 1 are noise from the start). Before, it counts as clean and keeps its value. Noise is drawn at every
    step, used or not, as in the published code.

    Args:
        frame_mask: (B, T) in 0 .. 1. 1: generated; 0: kept as it is in z; between: how strongly it is edited.
        generator: of the noise for edited frames.
        transform: whether times are transformed; it takes `num_frames`, `height` and `width` of the conditions, and
            does nothing where they are not given.
        discrete: whether times are rounded to whole numbers before the transform.
        y_null: (L, D) or (B, 1, L, D), the text that stands for none; None: `model.y_embedder.y_embedding`.
        conditions: y (B, 1, L, D), its mask as `y_mask` or None, num_frames, fps, height, width.
    """
    arguments, batch = _arguments(conditions), len(z)
    y = arguments.pop("y", None)
    if y is not None:
        null: Any = model.y_embedder.y_embedding if y_null is None else y_null  # type: ignore[attr-defined]
        y = torch.cat([y, null[..., : y.shape[-2], :].to(y).expand_as(y)])
        arguments["y"] = y

    times = [(1 - i / steps) * TIMES for i in range(steps)]
    grid = [torch.full((batch,), float(round(t)) if discrete else t, device=z.device) for t in times]
    if transform and all(arguments.get(name) is not None for name in ("num_frames", "height", "width")):
        grid = [timestep_transform(t, *(arguments[name] for name in ("num_frames", "height", "width"))) for t in grid]

    started = torch.zeros(()) if frame_mask is None else frame_mask == 1
    for i, t_B in enumerate(grid):
        before, active = z, None
        if frame_mask is not None:
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            # m = 1 is always active: a transformed 1000 may be rounded to more
            active = (frame_mask * TIMES >= t_B[:, None]) | (frame_mask == 1)
            new = (active & ~started)[:, None, :, None, None]
            z = torch.where(new, add_noise(z, noise, t_B), z)
            started = active
            arguments["x_mask"] = active.repeat(2, 1)
        v = model(torch.cat([z, z]), torch.cat([t_B, t_B]), **arguments)[:, : z.shape[1]]
        v_text, v_null = v.chunk(2)
        v = v_null + guidance * (v_text - v_null)
        after = grid[i + 1] if i + 1 < steps else torch.zeros_like(t_B)
        z = z + v * ((t_B - after) / TIMES)[:, None, None, None, None]
        if active is not None:
            z = torch.where(active[:, None, :, None, None], z, before)
    return z
