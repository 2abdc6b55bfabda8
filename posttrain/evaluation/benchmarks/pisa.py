"""PisaBench on simulated clips: let a model continue the first picture, follow the object, compare with the truth.

PISA, arXiv 2503.09595, section 3 and appendix B. For every clip and seed
    1. a row of the table makes a video of the clip's first picture and caption,
    2. a tracker follows the object that drops, from its true mask in frame 0,
    3. posttrain.metrics.pisa compares the masks with the simulator's,
and the seeds of a clip are averaged before clips are.

Departures from the paper: masks come from a tracker that no reward is computed with, where the paper uses SAM 2 for
both; the truth is the simulator's mask, not a tracked one.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from posttrain.data.dataset import to_float
from posttrain.evaluation.benchmarks.distribution import lifted
from posttrain.metrics import physics, pisa
from posttrain.metrics.masks import Track, segment
from posttrain.types import Batch

METRICS = ("l2", "chamfer", "iou", "vanished", "time_error", "no_contact")


def clip_seed(seed: int, clip: str) -> int:
    """The seed of a clip's noise: a function of (seed, clip id) alone, whatever batch the clip is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip}".encode()).digest()[:8], "big") >> 1


def score_videos(
    videos_BFHWC: np.ndarray, batch: Batch, truths: Sequence[dict[str, Any]], track: Track, fps: float
) -> list[dict[str, Any]]:
    """Score one generated video per clip of `batch`.

    Args:
        videos_BFHWC: uint8, the generated videos; the first picture is the clip's.
        batch: the true clips with `instances_BFHW` and `target_B`.
        truths: the clips' metadata rows (fps, drop_height, gravity, camera, distance).
        track: the segmenter; it sees the video and the true mask of frame 0, on the batch's device.
        fps: frames per second of the generated videos.

    Returns:
        One dict per clip: METRICS in the paper's convention (time_error in seconds, None where nothing lands),
        "released" with l2, chamfer, iou, vanished in the other one, and "path": the object's centre [x, y] in pixels
        per frame, None where it is lost; "true_path" is the simulator's; "physics" the scorecard, [value, sigma] by
        quantity (of what is sideways the magnitude), empty where camera and distance are not known; "impact_frame",
        None where nothing lands; "lifted" in an ambiguous set, see `distribution.lifted`. A number that does not exist
        is None.
    """
    assert batch.instances_BFHW is not None
    assert batch.target_B is not None
    true_BFHW = batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)
    video_BCFHW = torch.stack([to_float(video) for video in videos_BFHWC]).to(true_BFHW.device)
    masks_BFHW = segment(track, video_BCFHW, true_BFHW[:, 0])
    scores = []
    for masks, true, row in zip(masks_BFHW.cpu().numpy(), true_BFHW.cpu().numpy(), truths, strict=True):
        numbers: dict[str, Any] = dict(pisa.score(masks, true, fps, row["fps"]))
        timing: dict[str, Any] = {}
        if row.get("drop_height") and row.get("gravity"):  # the true object is known to land within the clip
            timing = pisa.time_error(masks, fps, row["drop_height"], math.hypot(*row["gravity"]))
        numbers |= {key: timing.get(key) for key in ("time_error", "no_contact", "impact_frame")}
        numbers["released"] = finite(pisa.score(masks, true, fps, row["fps"], "released"))
        told = {"path": path(masks), "true_path": path(true), "physics": card(masks, fps, row)}
        scores.append(finite(numbers) | told | ({"lifted": lifted(masks, fps, row)} if "beta" in row else {}))
    return scores


def card(masks_FHW: np.ndarray, fps: float, row: dict[str, Any]) -> dict[str, list[float] | None]:
    """The scorecard of a video of the clip of a metadata row: [value, sigma] by quantity, as JSON has it."""
    gravity = math.hypot(*(row.get("gravity") or (0.0,)))
    if not (row.get("camera") and row.get("distance") and gravity):
        return {}
    focal = row["camera"]["intrinsics"][0][0] * masks_FHW.shape[1] / row["size"][0]
    found = physics.scorecard(masks_FHW, fps, focal, row["distance"], row.get("drop_height") or None, gravity)
    numbers = {name: measure and [round(measure.value, 6), round(measure.sigma, 6)] for name, measure in found.items()}
    for name in physics.SIDEWAYS:
        if (pair := numbers[name]) is not None:
            pair[0] = abs(pair[0])  # or left and right of two seeds would make none
    return numbers


def average(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of a clip's seeds, number by number, over the seeds that have it.

    "paths", "impact_frames" and "lifted" keep what each seed has.
    """
    means: dict[str, Any] = {key: mean([score[key] for score in scores]) for key in METRICS}
    means["released"] = {key: mean([score["released"][key] for score in scores]) for key in scores[0]["released"]}
    means["physics"] = {name: pooled([score["physics"][name] for score in scores]) for name in scores[0]["physics"]}
    means |= {"true_path": scores[0]["true_path"], "paths": [score["path"] for score in scores]}
    means["impact_frames"] = [score["impact_frame"] for score in scores]
    return means | ({"lifted": [score["lifted"] for score in scores]} if "lifted" in scores[0] else {})


def pooled(measures: Sequence[list[float] | None]) -> list[float] | None:
    """[value, sigma] of the mean of the measures that exist."""
    present = np.array([measure for measure in measures if measure is not None])
    if not len(present):
        return None
    return [float(present[:, 0].mean()), float(np.sqrt((present[:, 1] ** 2).sum()) / len(present))]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that exist."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, NaN as None, which JSON can say."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in numbers.items()}


def path(masks_FHW: np.ndarray) -> list[list[float] | None]:
    """Centres of the masks [x, y] in pixels, None where a mask is empty."""
    return [None if np.isnan(c).any() else [round(float(v), 2) for v in c] for c in pisa.centroids(masks_FHW)]
