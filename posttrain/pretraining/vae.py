"""Train a video autoencoder (Wan's or Open-Sora's, at pocket size) on clips of moving objects.

Loss, for pixels x in [-1, 1], their reconstruction y, and object weight w (1 on the background):

    L = mean[w (|y - x| + 2 (y - x)^2)] / mean[w] + g mean[|d(y - x)|] + k KL(q(z|x) || N(0, 1)),

where d are the differences to the right, lower and next-frame neighbours (edges and motion, which matter for a
small moving object). KL is averaged over latent values. Objects cover a few percent of a picture; without w they blur.

The first steps are on single pictures, which are learnt many times faster than clips; without them clips stay grey
(docs/log/pocket-model.md). The decoder is causal and runs chunk by chunk, so its errors grow along a clip unless it is
trained on long clips. Every later step draws a clip length, a time stride (which makes slow motion fast), mirrorings
and transpositions, and has about the same number of frames, whatever the length. Most of a clip does not move, and a
latent smears fast motion over its four frames, so bodies of other clips are pasted in and fly through the picture.
"""

import math

import torch
from torch import Tensor, nn

from posttrain.core.recipe import Strict
from posttrain.methods.base import pixels
from posttrain.nets import opensora_vae, vae
from posttrain.training.run import Run
from posttrain.types import Batch, Random

data = pixels
TRAINS = ("vae", "opensora_vae")  # networks of posttrain/nets


class Config(Strict):
    """`lengths`: numbers of frames (Wan: 4k + 1), drawn with `weights`; `frames`: about so many a process and step."""

    pictures: int = 1500  # the first so many steps are on single pictures
    lengths: tuple[int, ...] = (1, 5, 9, 17, 33)
    weights: tuple[float, ...] = (0.1, 0.25, 0.25, 0.25, 0.15)
    frames: int = 40
    max_stride: int = 6
    flying: int = 2  # so many other clips give bodies that fly through each clip
    max_speed: float = 10.0  # of flying bodies, pixels per frame
    object_weight: float = 8.0
    difference: float = 0.3
    kl: float = 1e-4


def crop(batch: Batch, config: Config, random: Random, still: bool) -> tuple[Tensor, Tensor]:
    """A training crop: video (B', C, F', H, W) in [-1, 1] and pixel weights (B', 1, F', H, W).

    One length (1 if `still`) and one stride are drawn for all processes; start, mirroring and transposition are drawn
    for each clip. Time runs back and forth over the clip, so a long crop can be fast too.
    """
    assert batch.video_BCFHW is not None
    assert batch.instances_BFHW is not None
    which, speed = random.shared(2).tolist()
    draws, flights = random.uniform(4), random.uniform(max(config.flying, 1), 4)
    cumulative = torch.tensor(config.weights).cumsum(0)
    length = 1 if still else config.lengths[int((which * cumulative[-1] >= cumulative).sum())]
    stride, last = 1 + int(speed * config.max_stride), batch.video_BCFHW.shape[2] - 1
    videos, weights = [], []
    for i in range(min(len(draws), max(config.frames // length, 1))):
        ticks = int(draws[i, 0] * 2 * last) + stride * torch.arange(length)
        frames = last - (ticks % (2 * last) - last).abs()
        video, objects = batch.video_BCFHW[i][:, frames], batch.instances_BFHW[i][frames] > 0
        for n in range(config.flying):
            j = (i + 1 + n) % len(draws)
            other, bodies = batch.video_BCFHW[j][:, frames], batch.instances_BFHW[j][frames] > 0
            video, objects = fly(video, objects, other, bodies, config.max_speed, flights[i, n])
        # pixels where an object was or will be have its weight too, else a ghost of the object remains
        near = torch.stack([objects[max(t - 4, 0) : t + 5].any(0) for t in range(length)])
        weight = 1 + (config.object_weight - 1) * near.to(video.dtype)[None]
        flips = [axis for axis, draw in ((-1, draws[i, 1]), (-2, draws[i, 2])) if draw < 0.5]
        axes = (-1, -2) if draws[i, 3] < 0.5 and video.shape[-1] == video.shape[-2] else (-1, -1)
        videos.append(video.flip(flips).transpose(*axes))
        weights.append(weight.flip(flips).transpose(*axes))
    return torch.stack(videos), torch.stack(weights)


def fly(
    video_CFHW: Tensor, objects_FHW: Tensor, other_CFHW: Tensor, bodies_FHW: Tensor, max_speed: float, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Paste the bodies of another clip, which move at constant velocity, rounded to whole pixels, and wrap around.

    Args:
        max_speed: pixels per frame.
        draws: four numbers in [0, 1): start down and right, direction, speed.

    Returns:
        The video (C, F, H, W) and the masks of all its objects, bool (F, H, W).
    """
    down, right, direction, speed = draws.tolist()
    angle, height, width = 2 * math.pi * direction, *objects_FHW.shape[1:]
    frames = []
    for t in range(len(objects_FHW)):
        way = speed * max_speed * t
        shift = (round(down * height + way * math.sin(angle)), round(right * width + way * math.cos(angle)))
        here = bodies_FHW[t].roll(shift, (0, 1))
        picture = torch.where(here, other_CFHW[:, t].roll(shift, (1, 2)), video_CFHW[:, t])
        frames.append((picture, objects_FHW[t] | here))
    pictures, objects = zip(*frames, strict=True)
    return torch.stack(pictures, 1), torch.stack(objects)


def vae_loss(
    module: nn.Module, x_BCFHW: Tensor, weight_B1FHW: Tensor, config: Config, random: Random
) -> tuple[Tensor, dict[str, float]]:
    """The loss above, a scalar, and its terms. `psnr` is in dB over all pixels."""
    y_BCFHW, mean, logvar = module(x_BCFHW, random.normal)
    error = y_BCFHW - x_BCFHW
    pixels = (weight_B1FHW * (error.abs() + 2 * error.square())).mean() / weight_B1FHW.mean()
    axes = [axis for axis in (2, 3, 4) if error.shape[axis] > 1]
    edges = torch.stack([error.diff(dim=axis).abs().mean() for axis in axes]).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    # a single picture does not use the convolutions' weights in time, but DDP needs a gradient for every weight
    nothing = 0 * sum(parameter.sum() for parameter in module.parameters())
    loss = pixels + config.difference * edges + config.kl * kl + nothing
    mse = error.detach().square().mean()
    return loss, {"pixels": pixels.item(), "kl": kl.item(), "psnr": float(10 * torch.log10(4 / mse))}


def train(run: Run, model: vae.Autoencoder | opensora_vae.Autoencoder, config: Config) -> None:
    """The loop; afterwards the mean and standard deviation of the latents are measured on training clips."""
    for batch in run.batches():
        x, weight = crop(batch, config, run.random, still=run.steps < config.pictures)
        loss, metrics = vae_loss(run.module, x, weight, config, run.random)
        run.step(loss, **metrics)
    run.finish()
    indices = range(0, len(run.data), max(len(run.data) // 256, 1))
    with torch.no_grad():
        device = run.accelerator.device
        videos = (torch.as_tensor(run.data.load([i]).video_BCFHW, device=device) for i in indices)
        z = [model.means(video).movedim(1, -1) for video in videos]
        model.set_statistics(torch.cat([part.flatten(0, -2) for part in z]))
