"""Rectified flow: the path between data and noise, how times are drawn, and the sampler.

Time runs from data (t = 0) to noise (t = 1). Every function takes per-frame times t_BF, so that a clean
(given) frame is simply one whose time is 0. Shapes: B batch, C channels, F latent frames, H W cells, L D text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.core.errors import UserError
from posttrain.core.recipe import Strict
from posttrain.types import Random

TimeDistribution = Literal["uniform", "logit_normal"]


class SamplerConfig(Strict):
    """How a model is sampled, by the scheduler of its folder."""

    steps: int = Field(12, ge=1)
    guidance: float = Field(1.0, ge=1)
    guidance_low: float | None = Field(None, ge=1)  # of the expert for low noise; None: the same

    def weight(self, boundary: float) -> Callable[[float], float]:
        """The guidance as a function of t, for a model whose second expert is used below `boundary` (0: no second)."""
        if self.guidance_low is not None and not boundary:
            raise UserError(
                "sampler.guidance_low: is only for a model with two experts; leave it out",
                "conflict",
                "sampler.guidance_low",
            )
        low = self.guidance if self.guidance_low is None else self.guidance_low
        return lambda t: self.guidance if t >= boundary else low

    @property
    def guided(self) -> bool:
        """Whether sampling needs the negative prompt."""
        return max(self.guidance, self.guidance_low or 1.0) > 1


class Last(Strict):
    """The last `last` steps."""

    last: PositiveInt


class Active(Strict):
    """The steps with these numbers; 0 is the first, at noise."""

    active: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


Grad = Literal["all"] | Last | Active


class Velocity(Protocol):
    """The part of a video model that the sampler needs."""

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor: ...


class Scheduler(Protocol):
    """The times at which a clip is sampled, and the step from one to the next; as diffusers' flow schedulers."""

    config: Any  # its num_train_timesteps is t = 1 in the scheduler's own unit: 1000 in diffusers, or 1
    timesteps: Any  # scalar tensors from noise to data, in that unit; there after set_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Set `timesteps` to so many times."""

    def step(self, v_BCFHW: Tensor, timestep: Tensor, z_BCFHW: Tensor, return_dict: bool) -> tuple[Tensor, ...]:
        """(z_BCFHW at the next time,) from the velocity at this one; called once per timestep, in order."""


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


def sample_time(
    random: Random, distribution: TimeDistribution, shift: float = 1.0, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw one training time per clip, t_B in [0, 1], float32.

    "uniform": u ~ U(0, 1). "logit_normal": u = sigmoid(n), n ~ N(0, 1). Then t = shift_time(u, shift).
    With `low` or `high`, the same distribution truncated to low <= t < high, as rejection sampling would give. Each
    clip takes one draw: with F the distribution function of u, its u becomes the quantile F(low) + F(u) (F(high) -
    F(low)).
    """
    u_B = random.uniform() if distribution == "uniform" else torch.sigmoid(random.normal())
    if (low, high) == (0.0, 1.0):
        return shift_time(u_B, shift)

    def share(u: Tensor) -> Tensor:
        return u if distribution == "uniform" else torch.special.ndtr(torch.logit(u))

    below, above = share(shift_time(torch.tensor([low, high], dtype=torch.float64), 1 / shift).clamp(0, 1))
    q_B = below + share(u_B.double()) * (above - below)
    u_B = q_B if distribution == "uniform" else torch.sigmoid(torch.special.ndtri(q_B))
    first, end = torch.tensor([low, high])  # in float32: a rounded t must not leave the range
    return shift_time(u_B, shift).float().clamp(first, torch.nextafter(end, first))


def frame_times(t_B: Tensor, frames: int, n_cond_frames: int) -> Tensor:
    """t_BF: each clip's time on every latent frame, and 0 on the first `n_cond_frames`, which are clean."""
    noisy_F = torch.arange(frames, device=t_B.device) >= n_cond_frames
    return t_B[:, None] * noisy_F


def active_steps(grad: Grad, steps: int) -> frozenset[int]:
    """The numbers of the steps that carry gradient, for a sampler of `steps` steps.

    Raises:
        UserError: the sampler has no such step.
    """
    match grad:
        case Last(last=last):
            if last > steps:
                raise UserError(
                    f"method.grad: last: {last} is more than the sampler's {steps} steps; ask for fewer",
                    "value",
                    "method.grad",
                )
            active = frozenset(range(steps - last, steps))
        case Active(active=numbers):
            active = frozenset(numbers)
        case _:
            active = frozenset(range(steps))
    if wrong := [number for number in sorted(active) if not 0 <= number < steps]:
        raise UserError(
            f"method.grad: names step {wrong[0]}, but the steps are 0 to {steps - 1}; name fewer, or sample more steps",
            "value",
            "method.grad",
        )
    return active


def sample(
    model: Velocity,
    scheduler: Scheduler,
    noise_BCFHW: Tensor,
    text_BLD: Tensor,
    first_BC1HW: Tensor | None,
    steps: int,
    guidance: float | Callable[[float], float] = 1.0,
    negative_text: Tensor | None = None,
    condition: Mapping[str, Tensor] | None = None,
    grad: Grad = "all",
    recompute: bool = True,
) -> Tensor:
    """Solve dz = v dt from noise (t = 1) to data (t = 0); differentiable.

    Times and updates are those of `scheduler`, a fresh one of the model folder, so the result is what the stock
    pipeline makes from the same noise.

    With gradients, a step keeps only its z_t and is computed again in the backward pass. The gradient is the same bit
    for bit as if everything were kept, and needs the memory of one step.

    Args:
        noise_BCFHW: standard normal latents; float32, and they stay so.
        first_BC1HW: the clean latent of the first frame, or None for text alone.
        guidance: w in v = v_negative + w (v_text - v_negative), or a function t -> w. One call of the model on the
            doubled batch gives both velocities; for w = 1 only v_text is computed.
        negative_text: text_BLD of the unwanted prompt; needed when guidance > 1.
        condition: further inputs from the first frame (`VideoModel.condition`).
        grad: which steps are differentiated. At the others v is a constant, so gradients pass them only through the
            scheduler's own update (for `last`: not at all). "all" is exact.
        recompute: False keeps everything: saves a forward pass, but memory grows with the number of steps.

    Returns:
        z0_BCFHW, with the given frame unchanged.

    Raises:
        UserError: `grad` names a step that does not exist.
    """
    batch, _, frames = noise_BCFHW.shape[:3]
    n_cond_frames = 0 if first_BC1HW is None else first_BC1HW.shape[2]
    condition, device = condition or {}, noise_BCFHW.device
    active = active_steps(grad, steps)

    def given(z_BCFHW: Tensor) -> Tensor:
        return z_BCFHW if first_BC1HW is None else torch.cat([first_BC1HW, z_BCFHW[:, :, n_cond_frames:]], dim=2)

    def velocity(z_BCFHW: Tensor, t_BF: Tensor, w: float) -> Tensor:
        if w <= 1:
            return model.velocity(given(z_BCFHW), t_BF, text_BLD, condition)
        if negative_text is None:
            raise ValueError(f"guidance {w} needs negative_text")
        twice = {name: torch.cat([value, value]) for name, value in condition.items()}
        texts = torch.cat([negative_text, text_BLD])
        v_BCFHW = model.velocity(given(z_BCFHW).repeat(2, 1, 1, 1, 1), t_BF.repeat(2, 1), texts, twice)
        v_negative, v_text = v_BCFHW.chunk(2)
        return v_negative + w * (v_text - v_negative)

    scheduler.set_timesteps(steps, device=device)
    z_BCFHW = noise_BCFHW
    # autocast would keep a weight that was cast in a step without gradients, and later steps would get none
    with torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type), cache_enabled=False):
        for number, timestep in enumerate(scheduler.timesteps):
            # float64, so that a whole timestep of 1000 is the same whole number inside the model
            t_B = timestep.double().expand(batch) / scheduler.config.num_train_timesteps
            t_BF = frame_times(t_B, frames, n_cond_frames)
            w = guidance(float(timestep) / scheduler.config.num_train_timesteps) if callable(guidance) else guidance
            if torch.is_grad_enabled() and number in active:
                again = partial(checkpoint, velocity, use_reentrant=False) if recompute else velocity
                v_BCFHW = again(z_BCFHW, t_BF, w)
            else:
                with torch.no_grad():
                    v_BCFHW = velocity(z_BCFHW, t_BF, w)
            z_BCFHW = scheduler.step(v_BCFHW, timestep, z_BCFHW, return_dict=False)[0]
    return given(z_BCFHW)
