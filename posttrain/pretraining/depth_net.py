"""Train a Depth Anything (nets/depth.py) on the simulator's depth.

Loss, for the network's output q and the true inverse depth 1/z (0 in the sky), in 1 / metres:

    L = mean[w |q - 1/z|] + g mean[|d(q - 1/z)|],   w = 1 + b on bodies and 1 elsewhere, divided by its mean

where d are the differences to the right and lower neighbours (the edges of small bodies). The published model is
trained on relative depth, with a loss that does not depend on scale and shift. All the pocket's cameras have one focal
length, so metres can be learnt.

Frames are mirrored, recoloured and degraded, and a share of the clips is decoded by a video autoencoder.
"""

import torch
from torch import Tensor

from posttrain.methods.base import pixels
from posttrain.nets.depth import Model
from posttrain.pretraining import appearance
from posttrain.training.run import Metric, Run
from posttrain.types import Batch, Random

data = pixels
TRAINS = ("depth",)  # networks of posttrain/nets
depends = appearance.depends


class Config(appearance.AppearanceConfig):
    """`pictures`: frames drawn from each clip."""

    pictures: int = 2
    bodies: float = 8.0  # b
    difference: float = 1.0  # g


def truths(config: Config) -> tuple[str, ...]:
    return ("depth",)


def draw(
    batch: Batch, config: Config, random: Random, show: appearance.Show = appearance.unchanged
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, C, H, W) in [-1, 1], their true inverse depth (N, H, W), and masks of all bodies, bool (N, H, W)."""
    assert batch.video_BCFHW is not None
    assert batch.instances_BFHW is not None
    assert batch.depth_BFHW is not None
    total, size = batch.video_BCFHW.shape[2], batch.video_BCFHW.shape[3:]
    draws, colours = random.uniform(config.pictures, 4), random.uniform(config.pictures, 12)
    noise = random.normal(config.pictures, 3, *size)
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(len(draws)):
        video = show(batch.ids[i], batch.video_BCFHW[i])
        for k, (time, left, painted, worse) in enumerate(draws[i].tolist()):
            t = int(time * total)
            picture, bodies = video[:, t : t + 1], batch.instances_BFHW[i, t] > 0
            grain = noise[i, k, :, None]
            picture = appearance.altered(picture, bodies[None], painted, worse, colours[i, k], grain, config)
            seen = (picture[:, 0], 1 / batch.depth_BFHW[i, t], bodies)
            drawn.append((seen[0].flip(-1), seen[1].flip(-1), seen[2].flip(-1)) if left < 0.5 else seen)
    pictures, truths, masks = zip(*drawn, strict=True)
    return torch.stack(pictures), torch.stack(truths), torch.stack(masks)


def depth_loss(
    answer_NHW: Tensor, inverse_NHW: Tensor, bodies_NHW: Tensor, config: Config
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss above, a scalar, and what to log.

    Metrics:
        error: mean absolute error in 1 / metres.
        error_bodies: the same on bodies, as a pair (sum over their pixels, number of pixels); the log has the ratio.
    """
    w = 1 + config.bodies * bodies_NHW.to(inverse_NHW.dtype)
    error = answer_NHW - inverse_NHW
    edges = (error.diff(dim=1).abs().mean() + error.diff(dim=2).abs().mean()) / 2
    loss = (w * error.abs()).mean() / w.mean() + config.difference * edges
    size = error.detach().abs()
    return loss, {"error": size.mean(), "error_bodies": ((size * bodies_NHW).sum(), bodies_NHW.sum())}


def train(run: Run, model: Model, config: Config) -> None:
    """The loop."""
    show = appearance.shown(config.decoded, run.accelerator.device)
    for batch in run.batches():
        pictures, inverse, bodies = draw(batch, config, run.random, show)
        answer = run.module(pictures[:, :, None])[:, 0]
        loss, metrics = depth_loss(answer, inverse, bodies, config)
        run.step(loss, **metrics)
