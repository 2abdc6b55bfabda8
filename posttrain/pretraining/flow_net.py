"""Train a RAFT (nets/raft.py) on the simulator's optical flow.

Loss (RAFT, arXiv 2003.12039, eq. 7), for the estimates f_1 ... f_N after each of N updates and the true flow f:

    L = sum_i 0.8^(N - i) mean[w |f_i - f|_1],   w = 1 + b on bodies of either picture, else 1, divided by its mean

in pixels of the clip. Bodies cover few pixels and seldom move, so zero flow would have a small loss. Therefore there is
w, and the pair with most motion among several is taken. In a share of the pairs the whole second picture is shifted, so
every pixel has to be matched. Departures: w, no limit on the flow, and the L1 error is on the clip's own pixels, not on
the enlarged pictures that the network sees.

Pairs are mirrored, recoloured, and degraded by noise and blur, and a share of the clips is decoded by a video
autoencoder, as generated clips are.
"""

import torch
from torch import Tensor

from posttrain.methods.base import pixels
from posttrain.nets.raft import Model
from posttrain.pretraining import appearance
from posttrain.training.run import Metric, Run
from posttrain.types import Batch, Random

data = pixels
TRAINS = ("raft",)  # networks of posttrain/nets
depends = appearance.depends
DECAY = 0.8


class Config(appearance.AppearanceConfig):
    """`pairs`: pairs of neighbouring frames per clip; each is the one with most motion among up to `tries` draws."""

    pairs: int = 2
    tries: int = 4
    bodies: float = 8.0  # b
    shifted: float = 0.5  # the share of the pairs whose second picture is shifted
    max_shift: int = 8  # pixels, in each axis


def truths(config: Config) -> tuple[str, ...]:
    return ("flow",)


def draw(
    batch: Batch, config: Config, random: Random, show: appearance.Show = appearance.unchanged
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (N, C, 2, H, W) in [-1, 1], true flow (N, 2, H, W), and masks of bodies in either picture (N, H, W)."""
    assert batch.video_BCFHW is not None
    assert batch.instances_BFHW is not None
    assert batch.flow_BFCHW is not None
    total, size = batch.video_BCFHW.shape[2], batch.video_BCFHW.shape[3:]
    tries, draws = random.uniform(config.pairs, 1 + config.tries), random.uniform(config.pairs, 7)
    colours, noise = random.uniform(config.pairs, 12), random.normal(config.pairs, 3, 2, *size)
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(len(draws)):
        video, flow = show(batch.ids[i], batch.video_BCFHW[i]), batch.flow_BFCHW[i]
        instances = batch.instances_BFHW[i]
        for k, (left, down, painted, worse, shifted, *way) in enumerate(draws[i].tolist()):
            count, *times = tries[i, k].tolist()
            starts = [int(time * (total - 1)) for time in times[: 1 + int(count * config.tries)]]
            t = max(starts, key=lambda start: float(flow[start].abs().sum()))
            true, bodies = flow[t], instances[t : t + 2] > 0
            pair = appearance.altered(video[:, t : t + 2], bodies, painted, worse, colours[i, k], noise[i, k], config)
            bodies = bodies.any(0)
            if shifted < config.shifted:
                x, y = (round((2 * part - 1) * config.max_shift) for part in way)
                pair, true = shift(pair, true, x, y)
            if left < 0.5:
                pair, true, bodies = (
                    pair.flip(-1),
                    true.flip(-1) * true.new_tensor([-1, 1]).view(2, 1, 1),
                    bodies.flip(-1),
                )
            if down < 0.5:
                pair, true, bodies = (
                    pair.flip(-2),
                    true.flip(-2) * true.new_tensor([1, -1]).view(2, 1, 1),
                    bodies.flip(-2),
                )
            drawn.append((pair, true, bodies))
    pairs, flows, masks = zip(*drawn, strict=True)
    return torch.stack(pairs), torch.stack(flows), torch.stack(masks)


def shift(pair_C2HW: Tensor, flow_2HW: Tensor, x: int, y: int) -> tuple[Tensor, Tensor]:
    """The pair with its second picture moved by (x, y) pixels (edge pixels are repeated), and the flow plus (x, y)."""
    height, width = flow_2HW.shape[1:]
    rows = (torch.arange(height) - y).clamp(0, height - 1)
    columns = (torch.arange(width) - x).clamp(0, width - 1)
    moved = pair_C2HW[:, 1][:, rows][:, :, columns]
    return torch.stack([pair_C2HW[:, 0], moved], 1), flow_2HW + flow_2HW.new_tensor([x, y]).view(2, 1, 1)


def flow_loss(
    estimates: list[Tensor], flow_NCHW: Tensor, bodies_NHW: Tensor, weight: float
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss above, a scalar, and what to log.

    Metrics:
        epe: mean endpoint error of the last estimate in pixels.
        epe_bodies: the same on bodies, as a pair (sum over their pixels, number of pixels); the log has the ratio.
    """
    w = 1 + weight * bodies_NHW[:, None].to(flow_NCHW.dtype)
    w = w / w.mean()
    errors = torch.stack([(w * (estimate - flow_NCHW).abs()).mean() for estimate in estimates])
    decay = DECAY ** torch.arange(len(errors) - 1, -1, -1, device=errors.device)
    epe = (estimates[-1].detach() - flow_NCHW).norm(dim=1)
    return (decay * errors).sum(), {"epe": epe.mean(), "epe_bodies": ((epe * bodies_NHW).sum(), bodies_NHW.sum())}


def train(run: Run, model: Model, config: Config) -> None:
    """The loop."""
    show = appearance.shown(config.decoded, run.accelerator.device)
    for batch in run.batches():
        pair, flow, bodies = draw(batch, config, run.random, show)
        estimates = [estimate[:, 0] for estimate in run.module(pair)]
        loss, metrics = flow_loss(estimates, flow, bodies, config.bodies)
        run.step(loss, **metrics)
