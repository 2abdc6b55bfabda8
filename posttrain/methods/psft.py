"""PSFT: physics supervised fine-tuning, the rectified-flow loss on simulated clips.

Paper: PISA (Li et al. 2025), section 4; the flow objective is that of Liu et al. 2022, "Flow Straight and Fast":

    L = E_{z_0, eps, t} || v(z_t, t, text) - (eps - z_0) ||^2,    z_t = (1 - t) z_0 + t eps.

The first `model.n_cond_frames` latent frames are the condition: they stay clean, have time 0 and are not in the loss.
The mean is over the elements of the other frames of each clip, then over clips. For models without a first frame, or
with another kind of conditioning, all frames are noisy and in the loss. An expert for a range of times (`model.times`)
is trained on this range only.

With probability p (`drop_caption`, 0 unless the recipe says) a clip is trained without its caption, so that the model
learns the velocity from which classifier-free guidance (Ho & Salimans 2022) leads away:

    text = none if u < p else caption,    u ~ U(0, 1).

`none` is the family's own: in Open-Sora, where p = 0.1, the learned text; in Wan the encoded "".

Departures from the paper: Wan's time runs from data to noise, so the target has the opposite sign of Open-Sora's;
the recipe sets the distribution of times (Open-Sora's is close to logit_normal). Trains an adapter or all weights,
from pretrained or random ones, as `model:` in the recipe says.
"""

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from posttrain.core.recipe import Strict
from posttrain.flow import TimeDistribution, frame_times, interpolate, sample_time, target
from posttrain.models.base import VideoModel
from posttrain.training.run import Metric, Run
from posttrain.types import Batch, Random


class Config(Strict):
    timesteps: TimeDistribution = "logit_normal"
    shift: PositiveFloat = 3.0  # > 1: more training near noise, where the motion is decided
    drop_caption: float = Field(0.0, ge=0, le=1)  # the probability that a clip is trained without its caption


def psft_loss(
    model: VideoModel, batch: Batch, config: Config, random: Random, empty_1LD: Tensor | None = None
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss of one batch (scalar, float32), and the metrics to log.

    Args:
        empty_1LD: text embedding of ""; needed if captions are dropped.

    Metrics:
        explained: 1 - loss / mean square of the target; 0 for a model that always predicts 0, 1 for a perfect one. It
            is a pair (mean square of the target - loss, mean square of the target). The log divides their means, since
            a mean of ratios would depend on how the batch is split.
    """
    assert batch.z0_BCFHW is not None
    assert batch.text_BLD is not None
    z0_BCFHW = batch.z0_BCFHW
    t_B = sample_time(random, config.timesteps, config.shift, *model.times).to(z0_BCFHW.device)
    eps_BCFHW = random.normal(*z0_BCFHW.shape[1:]).to(z0_BCFHW.device)
    t_BF = frame_times(t_B, frames=z0_BCFHW.shape[2], n_cond_frames=model.n_cond_frames)
    text_BLD = batch.text_BLD
    if config.drop_caption:
        assert empty_1LD is not None
        dropped_B = random.uniform().to(text_BLD.device) < config.drop_caption
        text_BLD = torch.where(dropped_B[:, None, None], model.without_caption(text_BLD, empty_1LD), text_BLD)

    v_BCFHW = model.velocity(interpolate(z0_BCFHW, eps_BCFHW, t_BF), t_BF, text_BLD, batch.condition)
    target_BCFHW = target(z0_BCFHW, eps_BCFHW)
    error_BCFHW = (v_BCFHW - target_BCFHW)[:, :, model.n_cond_frames :].square()
    loss = error_BCFHW.flatten(1).mean(1).mean()
    power = target_BCFHW[:, :, model.n_cond_frames :].square().mean()
    return loss, {"explained": (power - loss.detach(), power)}


def train(run: Run, model: VideoModel, config: Config) -> None:
    empty_1LD = None
    if config.drop_caption:
        empty_1LD = model.encode_text([""])
        model.unload()
    for batch in run.batches():
        loss, metrics = psft_loss(model, batch, config, run.random, empty_1LD)
        run.step(loss, **metrics)
