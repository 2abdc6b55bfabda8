"""`posttrain bench`: seconds that each stage takes on this machine, some of them relative to another stage."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from posttrain import flow
from posttrain.core.progress import track
from posttrain.methods import psft
from posttrain.metrics.masks import Track
from posttrain.models.base import VideoModel
from posttrain.types import Batch, Random


class Timing(NamedTuple):
    """Median seconds of one call on `clips` clips; `ratio` is that over the time of another stage, `compared_with`."""

    stage: str
    seconds: float
    clips: int
    ratio: float | None = None
    compared_with: str = ""


def bench(
    model: VideoModel,
    tracker: Track,
    render: Callable[[], Any] | None = None,
    size: tuple[int, int, int] = (33, 64, 64),
    batch: int = 8,
    steps: int = 12,
    repeats: int = 5,
) -> list[Timing]:
    """Time every stage.

    Args:
        model: with the adapter (or the weights) that PSFT would train.
        render: films one clip; None: the renderer is not timed.
        size: frames, height, width.
        batch: clips per call.
        steps: of the sampler.
        repeats: calls whose median is taken, after one that is not counted.
    """
    random = Random(0, 0, range(batch))
    shape = model.latent_shape(*size)
    z_BCFHW, noise_BCFHW = random.normal(*shape).to(model.device), random.normal(*shape).to(model.device)
    video_BCFHW = (random.uniform(3, *size) * 2 - 1).to(model.device)
    mask_BHW = torch.zeros(batch, *size[1:], dtype=torch.bool, device=model.device)
    mask_BHW[:, : size[1] // 4, : size[2] // 4] = True
    text_BLD = model.encode_text(["a red ball falls."] * batch)
    t_BF = flow.frame_times(torch.full((batch,), 0.5, device=model.device), shape[1], n_cond_frames=model.n_cond_frames)

    def step() -> None:
        loss, _ = psft.psft_loss(model, Batch(ids=(), z0_BCFHW=z_BCFHW, text_BLD=text_BLD), psft.Config(), random)
        loss.backward()
        model.transformer.zero_grad()

    stages: dict[str, tuple[Callable[[], Any], int]] = {
        "transformer, forward": (free(lambda: model.velocity(z_BCFHW, t_BF, text_BLD)), batch),
        "PSFT, forward and backward": (step, batch),
        f"sampler, {steps} steps": (
            free(lambda: flow.sample(model, model.scheduler(), noise_BCFHW, text_BLD, z_BCFHW[:, :, :1], steps)),
            batch,
        ),
        "autoencoder, encode": (free(lambda: model.encode(video_BCFHW)), batch),
        "autoencoder, decode": (free(lambda: model.decode(z_BCFHW)), batch),
        "tracker": (free(lambda: tracker(video_BCFHW, mask_BHW)), batch),
    }
    if render is not None:
        stages["renderer"] = (render, 1)
    seconds = {
        name: median(call, repeats, model.device) for name, (call, _) in track(stages.items(), "timing", len(stages))
    }
    forward, encode = seconds["transformer, forward"], seconds["autoencoder, encode"]
    compared = {
        "PSFT, forward and backward": (forward, "of a forward; 2 to 3 is ideal"),
        f"sampler, {steps} steps": (steps * forward, f"of {steps} forwards; 1 is ideal"),
        "autoencoder, decode": (encode, "of encoding"),
    }
    return [
        Timing(
            name,
            seconds[name],
            clips,
            *((seconds[name] / compared[name][0], compared[name][1]) if name in compared else ()),
        )
        for name, (_, clips) in stages.items()
    ]


def free(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call without gradients."""
    return torch.no_grad()(call)


def median(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median wall-clock seconds of `repeats` calls after a first one."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def print_timings(timings: list[Timing], console: Console | None = None) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("Stage", "Clips", "Seconds", "ms per clip", "Ratio"):
        table.add_column(heading, justify="left" if heading in ("Stage", "Ratio") else "right")
    for row in timings:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} {row.compared_with}"
        per_clip = f"{1000 * row.seconds / row.clips:.1f}"
        table.add_row(row.stage, str(row.clips), f"{row.seconds:.3f}", per_clip, ratio)
    (console or Console()).print(table)
