"""ORO: object reward optimisation, the gradient of rewards through the decoder and the sampler into the weights.

Paper: PISA (Li et al. 2025), section 4.3 and appendix C, eq. 9. x_0 is a simulated clip. From its first frame, its
caption and noise eps, the sampler makes latents z_0', and the decoder D makes the clip x_0' = D(z_0'):

    J = E_{x_0, eps} [ R(x_0', x_0) ],    dJ / dtheta = E sum_t (dR / dz_t) (dz_t / dtheta),    L = -J,

where R = sum_k w_k R_k compares the generated clip with the true masks, flow and depth of x_0.

Departures from the paper's code: training samples as evaluation does, with the scheduler of the model's folder and the
same steps and guidance, from the latent of the first picture alone; there is no dropout, pixels are always in [-1, 1],
and the decoder is frozen. The gradient goes through every step and every frame (`grad` and `frames` can reduce this).
It needs the memory of one step and one latent frame, because the backward pass recomputes them (flow.py,
models/wan/decode.py). A pixel outside the range keeps the gradient that moves it back.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, PluginFrom, Strict
from posttrain.flow import Grad, SamplerConfig, sample
from posttrain.methods.base import Dry, annotated_latents, given_latents
from posttrain.models.base import VideoModel
from posttrain.rewards import base
from posttrain.training.run import Run
from posttrain.types import Batch, Random

data = annotated_latents


class Sampling(Strict):
    """How a clip is sampled, and through which steps and frames the gradient goes."""

    sampler: SamplerConfig = SamplerConfig()  # what a recipe leaves out is as in its eval.sampler
    grad: Grad = "all"  # or {last: 2}, or {active: [0, 5, 11]}: the steps that are differentiated
    frames: PositiveInt | None = None  # the first so many pictures are decoded and rewarded; None: all
    recompute: tuple[Literal["steps", "decoder"], ...] = ("steps", "decoder")  # what is not in it is kept: quicker
    offload: bool = False  # what the decoder keeps for the backward pass waits in main memory


class Config(Sampling):
    rewards: Annotated[tuple[Annotated[Plugin, PluginFrom("rewards")], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _once(self) -> "Config":
        if len({part.name for part in self.rewards}) < len(self.rewards):
            raise PydanticCustomError("part", "rewards has a reward twice; keep one")
        return self


def rewards(config: Config) -> tuple[Plugin, ...]:
    return config.rewards


def oro_loss(
    model: VideoModel,
    batch: Batch,
    reward: base.Total,
    config: Sampling,
    random: Random,
    negative_1LD: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch (scalar), and the metrics to log.

    Args:
        reward: function that returns the clips' rewards (B,) and their summands (rewards/base.py).
        negative_1LD: text embedding of the negative prompt; needed if the sampler has guidance.

    Metrics:
        saturated: the share of pixel values at -1 or 1.
        reward_*: the mean of each reward, without its weight.
    """
    assert batch.z0_BCFHW is not None
    assert batch.text_BLD is not None
    truth_BCFHW, sampler, first_BCFHW = batch.z0_BCFHW, config.sampler, given_latents(model, batch)
    if config.frames and model.latent_frames(config.frames) > truth_BCFHW.shape[2]:
        raise UserError(
            f"method.frames: is {config.frames}, more than the clips have; lower it, or leave it out for all",
            "mismatch",
            "method.frames",
        )
    z0_BCFHW = sample(
        model,
        model.scheduler(),
        random.normal(*truth_BCFHW.shape[1:]).to(truth_BCFHW),
        batch.text_BLD,
        None if first_BCFHW is None else first_BCFHW.to(truth_BCFHW),
        sampler.steps,
        sampler.weight(model.boundary),
        None if negative_1LD is None else negative_1LD.expand_as(batch.text_BLD),
        batch.condition,
        config.grad,
        "steps" in config.recompute,
    )
    if torch.is_grad_enabled() and not z0_BCFHW.requires_grad:
        raise UserError(
            "method.grad: only the other expert runs at these steps, so there is no gradient; name earlier steps for "
            "model.expert=high, later ones for low",
            "conflict",
            "method.grad",
        )
    if config.frames is not None:
        z0_BCFHW, batch = z0_BCFHW[:, :, : model.latent_frames(config.frames)], batch.until(config.frames)
    video_BCFHW = model.decode(z0_BCFHW, "decoder" in config.recompute, config.offload)[:, :, : config.frames]
    reward_B, summands = reward(video_BCFHW, batch)
    saturated = (video_BCFHW.detach().abs() == 1).float().mean()
    metrics = {f"reward_{name}": each_B.detach().mean() for name, each_B in summands.items()}
    return -reward_B.mean(), {"saturated": saturated} | metrics


def train(run: Run, model: VideoModel, config: Config, rewards: Mapping[str, tuple[float, base.Reward]]) -> None:
    """The training loop; `rewards` are the recipe's, loaded."""
    reward = base.total(rewards)
    negative_1LD = model.encode_text([""]) if config.sampler.guided else None
    model.unload()
    run.module.eval()
    for batch in run.batches():
        loss, metrics = oro_loss(model, batch, reward, config, run.random, negative_1LD)
        run.step(loss, **metrics)


def dry_batch(batch: Batch, config: Config, losers: int, clip: tuple[int, int, int]) -> Batch:
    """`batch` with tensors for the true pictures, masks, flow and depth: no values, for a dry run (commands/dry.py)."""
    count, (frames, height, width), known = len(batch.ids), clip, base.truths(config.rewards)
    return replace(
        batch,
        video_BCFHW=torch.empty(count, 3, frames, height, width),
        instances_BFHW=torch.empty(count, frames, height, width, dtype=torch.uint8),
        flow_BFCHW=torch.empty(count, frames, 2, height, width) if "flow" in known else None,
        depth_BFHW=torch.empty(count, frames, height, width) if "depth" in known else None,
    )


def shorter(config: Config, steps: int) -> Config | None:
    """The config with fewer sampler steps, if the gradient goes through all of them."""
    if config.grad != "all" or config.sampler.steps <= steps:
        return None
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"steps": steps})})


DRY = Dry(batch=dry_batch, shorter=shorter, decodes=True)
