"""PISA's evaluation on simulated clips: a model continues the first frame, a tracker follows the object, compare masks.

PISA, arXiv 2503.09595, section 3 and appendix B. For every clip and seed
    1. a row of the table makes a video of the clip's first frame and caption,
    2. a tracker follows the object that drops, from its true mask in frame 0,
    3. posttrain.metrics.pisa compares the masks with the simulator's,
and the seeds of a clip are averaged before clips are.

Departures from the paper: masks come from a tracker that no reward uses, while the paper uses SAM 2 for both; the truth
is the simulator's mask, not a tracked one.

Besides the splits there may be two more sets. The grid is shown in the table as two splits: `id`, with depths and
heights as in training, and `ood`, with others. The falls test p(t|y); of the references, only `truth` is measured on
them; see distribution.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from posttrain.core.recipe import Strict
from posttrain.data.dataset import to_float
from posttrain.data.schema import ClipRow
from posttrain.evaluation.benchmarks import distribution
from posttrain.evaluation.benchmarks.base import TRUTH, Benchmark, ClipScore, Metric, Pair, TestSet, Trace
from posttrain.metrics import masks as masks_module
from posttrain.metrics import motions, physics, pisa, retimed
from posttrain.metrics.masks import Track, segment
from posttrain.metrics.retimed import Pictures
from posttrain.types import Batch

GRID, FALLS = "grid", "falls"  # test sets beside the splits


class FallsConfig(Strict):
    """The test of p(t|y): an ambiguous set (sim/worlds/ambiguous.py), and the number of samples of each clip."""

    clips: str
    seeds: int = Field(6, ge=1)


class Config(Strict):
    """`grid` is a dataset with depths and heights inside and outside the training range (sim/worlds/grid.py).

    The split test_unseen of `grid` and of `falls` is measured.
    """

    grid: str | None = None
    falls: FallsConfig | None = None


METRICS = (
    Metric("l2", "L2", headline="trajectory error L2"),
    Metric("chamfer", "Chamfer"),
    Metric("iou", "IoU", better="more", headline="IoU with the true object"),
    Metric("vanished", "Vanished", hint="share of frames", headline="of frames without the object", share=True),
    Metric("time_error", "Time error", "s", hint="seconds, of what lands", wire=False),
    Metric("time_offset", "Late by", "ms", "zero", 0, "ms, of what lands", wire=False),
    Metric("no_contact", "Never lands", hint="share of clips", decimals=2, share=True, wire=False),
    Metric("span", "Compared", better="more", decimals=2, hint="share of the true clip", share=True, wire=False),
)
SCORECARD = (  # quantities of metrics/physics.py and motions.py; a report shows those that its clips have
    Metric("g", "g", "m/s²", "truth", 2),
    Metric("release", "Let go", "s", "truth"),
    Metric("contact", "Lands", "s", "truth"),
    Metric("restitution", "Bounce", "of the speed", "truth", 2),
    Metric("penetration", "Sinks in", "m", "truth"),
    Metric("energy_fall", "Energy won falling", "J/kg", "truth", 2),
    Metric("energy_contact", "Energy won at the contact", "J/kg", "truth", 2),
    Metric("drift", "Drift", "m/s", "truth"),
    Metric("jump", "Jump", "m", "truth"),
    Metric("permanence", "Seen", "of the frames", "truth"),
    Metric("size", "Growth", "1/s", "truth"),
    Metric("vx", "Thrown sideways", "m/s", "truth", 2),
    Metric("vz", "Thrown up", "m/s", "truth", 2),
    Metric("sideways", "Pushed sideways in flight", "m/s²", "truth", 2),
    Metric("acceleration", "Speeds up", "m/s²", "truth", 2),
    Metric("share", "Speeds up", "of g sin s", "truth"),
    Metric("friction", "Friction", "", "truth"),
    Metric("angle", "Off the slope by", "°", "truth", 1),
    Metric("lift", "Leaves the slope by", "m", "truth"),
    Metric("period", "Period", "s", "truth"),
    Metric("amplitude", "Released at", "°", "truth", 1),
    Metric("gain", "Swings grow by", "1/s", "truth"),
    Metric("arm", "Arm", "m", "truth"),
    Metric("stretch", "Arm grows by", "m/s", "truth"),
    Metric("fallen", "Top box falls by", "m", "truth"),
)
NOTE = (
    "L2 and Chamfer: how far the generated object is from the simulated one, in units of the picture's diagonal. What "
    "a video lacks of the true clip counts as vanished."
)


def tests(config: Config, seeds: int) -> dict[str, TestSet]:
    """The test sets of the grid and the falls."""
    found: dict[str, TestSet] = {}
    if config.grid:
        found[GRID] = TestSet(config.grid, "test_unseen", seeds, facts=("id",), needed=("id",), world="grid")
    if config.falls:
        needed = ("group", "beta", "depths", "gravity", "camera")
        facts = (*needed, "contact_time", "fps")
        folder, each = config.falls.clips, config.falls.seeds
        found[FALLS] = TestSet(folder, "test_unseen", each, (TRUTH,), facts, needed, "ambiguous")
    return found


def split(name: str, clip: ClipScore) -> str | None:
    """The table's split of a clip: the grid gives two splits; the falls are not in the table."""
    if name == GRID:
        return "id" if clip.truth["id"] else "ood"
    return None if name == FALLS else name


def score(
    videos_BFHWC: np.ndarray,
    batch: Batch,
    rows: Sequence[ClipRow],
    times_F: np.ndarray,
    tracker: Track,
    pictures: Pictures | None = None,
) -> list[ClipScore]:
    """Score one generated video per clip of `batch`.

    Args:
        videos_BFHWC: uint8, the generated videos; the first frame is the clip's.
        batch: the true clips with `instances_BFHW` and `target_B`.
        rows: of them fps, drop_height, gravity, camera and distance.
        times_F: seconds at which the generated videos' frames are shown, ascending from 0.
        tracker: the segmenter; it sees the video and the true mask of frame 0, on the batch's device.
        pictures: of films that may have been re-timed (metrics/retimed.py): what is measured in seconds is measured at
            their times, or not at all where they have none. None: each frame is true when it is shown.

    Returns:
        For each clip METRICS in the paper's convention (time_error in seconds and time_offset in milliseconds, None if
        nothing lands); `released`: l2, chamfer, iou, vanished, span in the convention of the released code; the
        scorecard, with magnitudes of sideways quantities, empty if camera and distance are not known; `lifted` for an
        ambiguous set. A number that does not exist is None.
    """
    assert batch.instances_BFHW is not None
    assert batch.target_B is not None
    true_BFHW = batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)
    video_BCFHW = torch.stack([to_float(video) for video in videos_BFHWC]).to(true_BFHW.device)
    masks_BFHW = segment(tracker, video_BCFHW, true_BFHW[:, 0])
    shown = pictures or Pictures(np.arange(len(times_F)), times_F, None)
    scores = []
    for masks, true, row in zip(masks_BFHW.cpu().numpy(), true_BFHW.cpu().numpy(), rows, strict=True):
        timing: dict[str, Any] = {}
        distinct, at = masks[shown.frames], shown.times
        if at is not None and row.drop_height and row.gravity:  # the true object is known to land within the clip
            timing = pisa.time_error(distinct, at, row.drop_height, math.hypot(*row.gravity))
            if (impact := timing["impact_frame"]) is not None:
                timing["impact_frame"] = int(shown.frames[int(impact)])
        landing = {key: timing.get(key) for key in ("time_error", "time_offset", "no_contact")}
        found = pisa.score(masks, true, times_F, row.fps)
        if at is not None:
            scorecard = card(distinct, at, row, found["span"])
        else:
            scorecard = {
                name: pair if name == "permanence" else None
                for name, pair in card(masks, times_F, row, found["span"]).items()
            }
        scores.append(
            ClipScore(
                numbers=finite({metric.key: (found | landing)[metric.key] for metric in METRICS}),
                released=finite(pisa.score(masks, true, times_F, row.fps, "released")),
                physics=scorecard,
                true_path=path(true),
                paths=[path(masks)],
                impact_frames=[timing.get("impact_frame")],
                lifted=None if row.beta is None else [None if at is None else distribution.lifted(distinct, at, row)],
            )
        )
    return scores


def card(masks_FHW: np.ndarray, times_F: np.ndarray, row: ClipRow, span: float = 1.0) -> dict[str, Pair | None]:
    """The scorecard of a video that continues the clip of a row: [value, sigma] by quantity.

    If the video covers only a share `span` of the true clip, the object counts as not visible in the rest.
    """
    gravity = math.hypot(*(row.gravity or (0.0,)))
    if not (row.camera and row.distance and gravity):
        return {}
    focal = row.camera.intrinsics[0][0] * masks_FHW.shape[1] / row.size[0]
    found: motions.Card
    if row.law and row.motion:
        found = motions.scorecard(row.motion, row.law, masks_FHW, times_F, focal, row.distance, row.camera.position)
        if not found:
            return {}
    else:
        found = physics.scorecard(masks_FHW, times_F, focal, row.distance, row.drop_height or None, gravity)
    numbers = {name: measure and [round(measure.value, 6), round(measure.sigma, 6)] for name, measure in found.items()}
    if (seen := numbers["permanence"]) is not None:
        seen[0] = round(seen[0] * span, 6)
    for name in (*physics.SIDEWAYS, *motions.MIRRORED):
        if (pair := numbers.get(name)) is not None:
            pair[0] = abs(pair[0])  # or left and right of two seeds would make none
    return numbers


def finite(numbers: dict[str, Any]) -> dict[str, float | None]:
    """The same numbers with None instead of NaN, which JSON does not have."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in numbers.items()}


def path(masks_FHW: np.ndarray) -> Trace:
    """Centres of the masks [x, y] in pixels, None where a mask is empty."""
    return [None if np.isnan(c).any() else [round(float(v), 2) for v in c] for c in pisa.centroids(masks_FHW)]


BENCHMARK = Benchmark(
    METRICS,
    score,
    "Does it fall as it should?",
    NOTE,
    SCORECARD,
    sources=(pisa, physics, retimed, masks_module, distribution),
    tests=tests,
    split=split,
)
