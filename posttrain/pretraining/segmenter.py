"""Train a segmenter (nets/tracker.py, nets/sam2.py) to follow any object of a clip from its mask in frame 0.

Loss, for mask logits l and true masks m, over the frames after the first:

    L = b mean[BCE(l, m)] + mean_{clip, frame}[1 - (2 sum p m + 1) / (sum p + sum m + 1)],   p = sigmoid(l)

Every step draws a window length. Every clip draws a start, a time stride (which makes slow motion fast), a direction of
time, mirrorings, colours, noise and blur, and the visible body to follow. The other bodies, or a copy of the followed
one, distract. A fixed share of the clips is decoded by a video autoencoder, as generated clips are. With probability
`teacher` the segmenter's memory gets true masks instead of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.methods.base import pixels
from posttrain.metrics import masks
from posttrain.nets import sam2, tracker
from posttrain.pretraining import appearance
from posttrain.training.run import Run
from posttrain.types import Batch, Random

data = pixels
TRAINS = ("tracker", "sam2")  # networks of posttrain/nets
depends = appearance.depends


class Config(appearance.AppearanceConfig):
    """`lengths` of windows in frames, one drawn per step; `crowded`, `teacher` and `twin` are probabilities."""

    lengths: tuple[int, ...] = (2, 4, 7)
    max_stride: int = 2
    min_pixels: int = 12  # a followed body has at least so many in the window's first frame
    tries: int = 4  # at most so many windows and bodies are drawn per clip, and one is taken
    crowded: float = (
        0.0  # that the try is taken in which the body touches others most; else the one in which it moves farthest
    )
    teacher: float = 0.3
    twin: float = 0.3  # that a copy of the body is put elsewhere in the picture
    recolour: float = 0.3
    noise: float = 0.15
    bce: float = 4.0


def windows(
    batch: Batch, config: Config, random: Random, show: appearance.Show = appearance.unchanged
) -> tuple[Tensor, Tensor]:
    """Training windows: video (B, C, F', H, W) in [-1, 1] and the followed body's masks (B, F', H, W), bool."""
    assert batch.video_BCFHW is not None
    assert batch.instances_BFHW is not None
    total, size = batch.video_BCFHW.shape[2], batch.video_BCFHW.shape[3:]
    draws, tries, colours = random.uniform(9), random.uniform(config.tries, 2), random.uniform(12)
    shifts = random.uniform(2)
    length = min(config.lengths[int(random.shared().item() * len(config.lengths))], total)
    longest_stride = min(config.max_stride, (total - 1) // (length - 1))
    noise = random.normal(3, length, *size)
    videos, followed = [], []
    for i, (speed, reverse, count, near, left, down, doubled, painted, worse) in enumerate(draws.tolist()):
        instances = batch.instances_BFHW[i]
        offsets = (1 + int(speed * longest_stride)) * torch.arange(length)
        # most bodies lie still most of the time, so the body that moves farthest among a few draws is taken
        candidates = []
        for where, which in tries[i, : 1 + int(count * config.tries)].tolist():
            frames = int(where * (total - int(offsets[-1]))) + offsets
            frames = frames.flip(0) if reverse < 0.5 else frames
            mask = follow(instances[frames], which, config.min_pixels)
            crowded = near < config.crowded
            candidates.append((touching(mask, instances[frames]) if crowded else distance(mask), frames, mask))
        _, frames, mask = max(candidates, key=lambda candidate: candidate[0])
        video = show(batch.ids[i], batch.video_BCFHW[i])[:, frames]
        if doubled < config.twin:
            video = twin(video, mask, shifts[i])
        video = appearance.altered(video, mask, painted, worse, colours[i], noise[i], config)
        flips = [axis for axis, draw in ((-1, left), (-2, down)) if draw < 0.5]
        videos.append(video.flip(flips))
        followed.append(mask.flip(flips))
    return torch.stack(videos), torch.stack(followed)


def follow(instances_FHW: Tensor, draw: float, min_pixels: int) -> Tensor:
    """Masks, bool (F, H, W), of one body with at least `min_pixels` in the first frame, else of the largest body.

    `draw` in [0, 1) chooses the body. Without bodies all masks are empty.
    """
    first = instances_FHW[0]
    bodies, pixels = first[first > 0].unique(return_counts=True)
    if not len(bodies):
        return torch.zeros_like(instances_FHW, dtype=torch.bool)
    bodies = bodies[pixels >= min(min_pixels, int(pixels.max()))]
    return instances_FHW == bodies[int(draw * len(bodies))]


def distance(mask_FHW: Tensor) -> float:
    """Pixels between the mask's centres in the first and the last frame; 0 if one of the two is empty."""
    ends = [mask.nonzero().float() for mask in (mask_FHW[0], mask_FHW[-1])]
    return float((ends[0].mean(0) - ends[1].mean(0)).norm()) if all(map(len, ends)) else 0.0


def touching(mask_FHW: Tensor, instances_FHW: Tensor) -> float:
    """The number of pixels of other bodies that touch the mask, mean over frames."""
    around = F.max_pool2d(mask_FHW[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    return float((around & ~mask_FHW & (instances_FHW > 0)).sum() / len(mask_FHW))


def twin(video_CFHW: Tensor, mask_FHW: Tensor, draws: Tensor) -> Tensor:
    """The clip (C, F, H, W) with a copy of the body, so that the body cannot be followed by its appearance alone.

    The copy is shifted by `draws` (2,), in [0, 1), times height and width, wraps around the edges, and lies behind the
    body.
    """
    shift = tuple((draws * torch.tensor(mask_FHW.shape[1:])).int().tolist())
    behind = mask_FHW.roll(shift, (1, 2)) & ~mask_FHW
    return torch.where(behind, video_CFHW.roll(shift, (2, 3)), video_CFHW)


def segmenter_loss(
    module: nn.Module, video_BCFHW: Tensor, mask_BFHW: Tensor, config: Config, teacher: bool
) -> tuple[Tensor, dict[str, float]]:
    """The loss above, a scalar, and the mean IoU of the thresholded masks."""
    logits = module(video_BCFHW, mask_BFHW[:, 0], mask_BFHW if teacher else None)[:, 1:]
    m = mask_BFHW[:, 1:].to(logits.dtype)
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, m)
    dice = (1 - (2 * (p * m).sum((2, 3)) + 1) / (p.sum((2, 3)) + m.sum((2, 3)) + 1)).mean()
    thresholded = (logits > 0).flatten(0, 1).cpu().numpy()
    overlap = masks.iou(thresholded, mask_BFHW[:, 1:].flatten(0, 1).cpu().numpy()).mean()
    return config.bce * bce + dice, {"bce": bce.item(), "dice": dice.item(), "iou": float(overlap)}


def train(run: Run, model: tracker.Model | sam2.Model, config: Config) -> None:
    """The loop."""
    show = appearance.shown(config.decoded, run.accelerator.device)
    for batch in run.batches():
        video, mask = windows(batch, config, run.random, show)
        teacher = bool(run.random.shared() < config.teacher)
        loss, metrics = segmenter_loss(run.module, video, mask, config, teacher)
        run.step(loss, **metrics)
