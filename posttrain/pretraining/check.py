"""Measure the pocket's parts on clips that they were not trained on; prints Markdown for posttrain/pocket/README.md.

    python -m posttrain.pretraining.check segmenter --family tracker --clips data/pocket-drop data/pocket-motion
    python -m posttrain.pretraining.check vae --clips data/pocket-drop
    python -m posttrain.pretraining.check base --clips data/pocket-motion
    python -m posttrain.pretraining.check flow --clips data/pocket-drop data/pocket-company-motion
    python -m posttrain.pretraining.check depth --clips data/pocket-drop data/pocket-company-motion

segmenter  IoU after frame 0, by the object's size, by motion, and by whether other bodies are in view; on true clips
           and on true clips decoded by the VAE.
vae        IoU of the tracker's masks on true clips decoded by the VAE, and the PSNR of these clips.
base       PISA's scores of samples of the base model and of static videos.
flow       RAFT's endpoint error in pixels, everywhere and where a body moves by half a pixel or more; there also the
           error of zero flow.
depth      Depth Anything's error as a share of the true depth, everywhere except the sky, and on bodies.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.core.progress import markdown
from posttrain.core.progress import track as progress
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.evaluation.benchmarks import pisa as benchmark
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.sample import clip_seed, sample_clips
from posttrain.metrics import masks, pisa
from posttrain.models.base import ModelConfig, VideoModel
from posttrain.models.base import family as video_family
from posttrain.nets import depth, raft, sam2, tracker
from posttrain.pocket import FAMILY
from posttrain.types import Batch

SIZES = (6, 8, 11, 15)  # pixels, root of the object's area in frame 0
BATCH = 8
MOVING = 0.5  # pixels a frame
FARTHEST = 0.02  # 1 / metres; a smaller inverse depth is clamped to this
Row = dict[str, Any]
Show = Callable[[Batch], Tensor]  # the pictures to measure, video_BCFHW in [-1, 1]


def through(model: VideoModel) -> Show:
    """True clips after the model's autoencoder, rounded to bytes."""

    @torch.no_grad()
    def show(batch: Batch) -> Tensor:
        assert batch.video_BCFHW is not None
        return ((model.decode(model.encode(batch.video_BCFHW)) + 1) * 127.5).round() / 127.5 - 1

    return show


def truth(batch: Batch) -> Tensor:
    assert batch.video_BCFHW is not None
    return batch.video_BCFHW


def measure(track: masks.Track, clips: Clips, show: Show) -> list[Row]:
    """One row per clip: size, motion, company (other bodies in view or not), and the segmenter's scores.

    iou is a mean over the frames after the first, l2 and vanished (PISA's) over all frames; psnr and object_psnr are
    in dB.
    """
    rows: list[Row] = []
    starts = range(0, len(clips), BATCH)
    for first in progress(starts, "measuring", len(starts)):
        indices = range(first, min(first + BATCH, len(clips)))
        batch = clips.load(indices)
        video_BCFHW = show(batch)
        assert batch.video_BCFHW is not None
        assert batch.instances_BFHW is not None
        assert batch.target_B is not None
        true_BFHW = batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)
        followed_BFHW = masks.segment(track, video_BCFHW, true_BFHW[:, 0])
        for i, index in enumerate(indices):
            true, mask, row = true_BFHW[i].numpy(), followed_BFHW[i].numpy(), clips.row(index)
            score = pisa.score(mask, true, pisa.even_times(len(mask), row.fps), row.fps)
            error = (video_BCFHW[i] - batch.video_BCFHW[i]).square().mean(0)
            rows.append(
                {
                    "size": size_bin(true[0].sum() ** 0.5),
                    "motion": row.motion,
                    "company": "alone" if len(row.bodies) == 1 else "others in view",
                    "iou": float(masks.iou(mask, true)[1:].mean()),
                    "l2": score["l2"],
                    "vanished": score["vanished"],
                    "psnr": decibel(error.mean()),
                    "object_psnr": decibel(error[true_BFHW[i]].mean()),
                }
            )
    return rows


def size_bin(pixels: float) -> str:
    edges = (0, *SIZES, 64)
    n = int(np.searchsorted(SIZES, pixels, side="right"))
    return f"{edges[n]:2d} to {edges[n + 1]} px"


def decibel(mse: Tensor) -> float:
    """PSNR in dB of pixels in [-1, 1] with mean squared error `mse`."""
    return float(10 * torch.log10(4 / mse.clamp_min(1e-10)))


def check_segmenter(track: masks.Track, data: Sequence[Clips], shows: dict[str, Show]) -> str:
    """A line per group of clips, a column per entry of `shows`: mean IoU and the share of clips with at least 0.85."""
    columns = {name: [row for clips in data for row in measure(track, clips, show)] for name, show in shows.items()}
    rows = next(iter(columns.values()))
    selections = [(key, value) for key in ("company", "motion", "size") for value in sorted({row[key] for row in rows})]

    def line(name: str, chosen: Sequence[int]) -> list[str]:
        values = [np.array([column[i]["iou"] for i in chosen]) for column in columns.values()]
        return [name, str(len(chosen)), *(f"{v.mean():.3f} ({(v >= 0.85).mean():.0%})" for v in values)]

    lines = [line("all", range(len(rows)))]
    lines += [line(value.strip(), [i for i, row in enumerate(rows) if row[key] == value]) for key, value in selections]
    return markdown(["clips", "n", *columns], lines)


def check_vae(track: masks.Track, data: Sequence[Clips], show: Show) -> str:
    """Means of `measure` over the clips of each dataset, on true clips and on clips decoded by the VAE."""
    names = ("iou", "l2", "vanished", "psnr", "object_psnr")
    lines = []
    for clips in data:
        for shown_as, pictures in (("true", truth), ("through the VAE", show)):
            rows = measure(track, clips, pictures)
            means = [f"{np.mean([row[name] for row in rows]):.3f}" for name in names[: 3 if pictures is truth else 5]]
            lines.append([clips.splits[0].folder.parent.name, shown_as, *means, *[""] * (len(names) - len(means))])
    return markdown(["clips", "pictures", "IoU", "L2", "vanished", "PSNR", "in the object"], lines)


def check_base(model: VideoModel, track: masks.Track, data: Sequence[Clips], steps: int) -> str:
    """PISA's scores of the base model (one sample per clip) and of static videos, means over each dataset's clips."""
    lines = []
    for clips in data:
        scores: dict[str, list[ClipScore]] = {"base": [], "frozen": []}
        starts = range(0, len(clips), BATCH)
        for first in progress(starts, "sampling", len(starts)):
            indices = range(first, min(first + BATCH, len(clips)))
            rows = [clips.row(i) for i in indices]
            videos = np.stack([clips.read(i)[0] for i in indices])
            seeds = [clip_seed(0, clips.ids[i]) for i in indices]
            captions = [row.caption for row in rows]
            made = sample_clips(model, videos[:, 0], captions, seeds, videos.shape[1], steps)
            held = np.repeat(videos[:, :1], videos.shape[1], axis=1)
            times_F = pisa.even_times(videos.shape[1], rows[0].fps)
            for name, pictures in (("base", made), ("frozen", held)):
                scores[name] += benchmark.score(pictures, clips.load(indices), rows, times_F, track)
        for name, own_scores in scores.items():
            means = [
                f"{np.mean([s.numbers[key] for s in own_scores]):.4f}" for key in ("l2", "chamfer", "iou", "vanished")
            ]
            lines.append([clips.splits[0].folder.parent.name, name, *means])
    return markdown(["clips", "row", "L2", "chamfer", "IoU", "vanished"], lines)


@torch.no_grad()
def check_flow(net: raft.Model, data: Sequence[Clips], shows: dict[str, Show]) -> str:
    """A line per dataset and entry of `shows`: endpoint errors in pixels, means over pixels."""
    lines = []
    for clips in data:
        for shown_as, show in shows.items():
            sums = np.zeros(5)
            for index in progress(range(len(clips)), "measuring", len(clips)):
                batch = clips.load([index])
                assert batch.flow_BFCHW is not None
                true = batch.flow_BFCHW[:, :-1]
                error, speed = (net(show(batch)) - true).norm(dim=2), true.norm(dim=2)
                moving = speed >= MOVING
                sums += [t.sum().item() for t in (error, error[moving], speed[moving], moving, torch.ones_like(error))]
            everywhere, on_moving, zero, moving_pixels, pixels = sums
            errors = (everywhere / pixels, on_moving / moving_pixels, zero / moving_pixels)
            lines.append([clips.splits[0].folder.parent.name, shown_as, str(len(clips)), *(f"{e:.3f}" for e in errors)])
    return markdown(["clips", "pictures", "n", "everywhere", "moving", "moving, zero flow"], lines)


@torch.no_grad()
def check_depth(net: depth.Model, data: Sequence[Clips], shows: dict[str, Show]) -> str:
    """A line per dataset and entry of `shows`: |z - z*| / z*, means over pixels."""
    lines = []
    for clips in data:
        for shown_as, show in shows.items():
            sums = np.zeros(4)
            for index in progress(range(len(clips)), "measuring", len(clips)):
                batch = clips.load([index])
                assert batch.depth_BFHW is not None
                assert batch.instances_BFHW is not None
                true, bodies = batch.depth_BFHW, batch.instances_BFHW > 0
                known = true.isfinite()
                error = (1 / net(show(batch)).clamp_min(FARTHEST) - true).abs() / true
                sums += [t.sum().item() for t in (error[known], error[bodies], known, bodies)]
            shares = (sums[0] / sums[2], sums[1] / sums[3])
            lines.append([clips.splits[0].folder.parent.name, shown_as, str(len(clips)), *(f"{e:.3f}" for e in shares)])
    return markdown(["clips", "pictures", "n", "everywhere", "bodies"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the pocket's parts")
    parser.add_argument("part", choices=["segmenter", "vae", "base", "flow", "depth"])
    parser.add_argument("--clips", nargs="+", required=True, help="dataset folders")
    parser.add_argument("--split", default="test_unseen")
    parser.add_argument("--limit", type=int, help="largest number of clips of each folder")
    parser.add_argument("--model", default="pocket", help="the diffusers folder of VAE and transformer")
    parser.add_argument("--base", default=FAMILY, help="the family of VAE and transformer")
    parser.add_argument("--family", choices=["tracker", "sam2"], default="tracker", help="the segmenter")
    parser.add_argument("--segmenter", default="pocket", help="the segmenter's folder")
    parser.add_argument("--net", default="pocket", help="the folder of the network for flow or depth")
    parser.add_argument("--steps", type=int, default=12, help="sampler steps")
    options = parser.parse_args(arguments)
    try:
        family = {"tracker": tracker, "sam2": sam2}[options.family]
        track = family.load(ModelConfig(family=options.family, path=options.segmenter))
        truths = [options.part] if options.part in ("flow", "depth") else []
        configs = [DataConfig(clips=c, split=options.split, limit=options.limit) for c in options.clips]
        data = [Clips(config, truths=truths) for config in configs]
        model = video_family(options.base).load(ModelConfig(family=options.base, path=options.model))
        if options.part == "segmenter":
            print(check_segmenter(track, data, {"true": truth, "through the VAE": through(model)}))
        elif options.part == "flow":
            net = raft.load(ModelConfig(family="raft", path=options.net))
            print(check_flow(net, data, {"true": truth, "through the VAE": through(model)}))
        elif options.part == "depth":
            depth_net = depth.load(ModelConfig(family="depth", path=options.net))
            print(check_depth(depth_net, data, {"true": truth, "through the VAE": through(model)}))
        elif options.part == "vae":
            print(check_vae(track, data, through(model)))
        else:
            print(check_base(model, track, data, options.steps))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
