"""What a measured run says about p(t|y), about 3D, and about depths and heights unseen (PISA, sections 5.1 and 5.2).

From impact frames and masks to numbers; the laws are in posttrain/metrics/distribution.py. Of the true clips the rows
of metadata.jsonl tell what is needed: `beta` and `camera` in the ambiguous set (sim/ambiguous.py), `id` in the grid
(sim/grid.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.benchmarks.pisa import METRICS, mean
from posttrain.metrics import distribution, pisa

LEVEL = 0.05  # p-values up to here reject


def calibrate(masks: Sequence[np.ndarray], truths: Sequence[Mapping[str, Any]]) -> distribution.Errors:
    """The errors of `pisa.impact_frame` on the true clips' masks, each (F, H, W), for `fall_times`."""
    landing = [(m, row) for m, row in zip(masks, truths, strict=True) if row["contact_time"] is not None]
    found = [pisa.impact_frame(masks_FHW, row["fps"]) for masks_FHW, row in landing]
    known = [pisa.first_frame_after(row["contact_time"], row["fps"]) for _, row in landing]
    return distribution.estimator_errors(found, known)


def fall_times(
    impact_frames: Sequence[Sequence[int | None]],
    truths: Sequence[Mapping[str, Any]],
    frames: int,
    fps: float,
    rng: np.random.Generator,
    depth: tuple[float, float] = distribution.DEPTH,
    errors: distribution.Errors | None = None,
) -> dict[str, Any]:
    """Test p(t|y) on each first picture; the paper takes 50 of them and 128 videos of each.

    Args:
        impact_frames: for each first picture those of its videos, None where nothing lands.
        truths: for each first picture the row of one of its true clips.
        frames: of a generated video.
        fps: its frames per second.
        rng: draws the samples behind the p-values.
        depth: metres, between which the training clips' depths are uniform.
        errors: of the measured frames, see `calibrate`.

    Returns:
        pictures: for each beta, the pmf (K,) and the measured shares (K,), last of no contact, and `ks_test`'s numbers.
        rejected: share of the pictures with a p-value up to LEVEL, which a perfect model has, too.
    """
    pictures = []
    for found, row in zip(impact_frames, truths, strict=True):
        heights = distribution.drop_heights(row["beta"], row["camera"]["position"][2], depth)
        pmf_K = distribution.frame_pmf(heights, fps, frames, math.hypot(*row["gravity"]), errors)
        test = distribution.ks_test(found, pmf_K, rng)
        counts_K = np.bincount([frames if k is None else k for k in found], minlength=frames + 1)
        shares = {"pmf": pmf_K.tolist(), "measured": (counts_K / len(found)).tolist()}
        pictures.append({"beta": row["beta"], **shares, **test})
    return {"pictures": pictures, "rejected": float(np.mean([p["p_value"] <= LEVEL for p in pictures]))}


def lifted(masks_FHW: np.ndarray, fps: float, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A clip's fall in three dimensions; None if nothing lands or its start is level with the camera.

    Returns:
        t_drop: seconds.
        depth: Z in metres, implied by t_drop and the row below the object in frame 0.
        heights: of the object's bottom in metres, frame by frame until t_drop, None where it is lost.
        fall_error: metres, how far these heights are from a free fall that ends at t_drop.
    """
    t_drop = pisa.contact_time(masks_FHW, fps)
    if t_drop is None:
        return None
    gravity, camera_height = math.hypot(*row["gravity"]), row["camera"]["position"][2]
    focal = row["camera"]["intrinsics"][1][1] * masks_FHW.shape[1] / row["size"][0]
    betas_F = distribution.slope(distribution.bottoms(masks_FHW), masks_FHW.shape[1], focal)
    depth, heights_F = distribution.lift(betas_F, t_drop, camera_height, gravity)
    if math.isnan(depth):
        return None
    until = math.floor(t_drop * fps) + 1
    heights = [None if math.isnan(y) else y for y in heights_F[:until].tolist()]
    error = distribution.fall_error(heights_F, fps, t_drop, gravity)
    return {"t_drop": t_drop, "depth": depth, "heights": heights, "fall_error": error}


def unseen(
    scores: Sequence[Mapping[str, Any]], truths: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | int | None]]:
    """The paper's table 2: `clips` and the mean of each of METRICS, `id` in distribution and `ood` out of it.

    Args:
        scores: one per clip, from `pisa.score_videos` or `pisa.average`.
        truths: the clips' rows, which tell `id`.
    """
    table: dict[str, dict[str, float | int | None]] = {}
    for name, wanted in (("id", True), ("ood", False)):
        chosen = [score for score, row in zip(scores, truths, strict=True) if row["id"] == wanted]
        table[name] = {"clips": len(chosen)} | {key: mean([score[key] for score in chosen]) for key in METRICS}
    return table
