"""A run's results for p(t|y) and for falls in 3D (PISA, section 5.2), from impact frames and masks.

A helper of pisa.py. The formulas are in posttrain/metrics/distribution.py. In an ambiguous set
(sim/worlds/ambiguous.py), rows say which clips have the same first frame (`group`), along which ray the object is
(`beta`), and between which `depths`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.data.schema import ClipRow
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import Record
from posttrain.metrics import distribution, pisa

LEVEL = 0.05  # a p-value up to this rejects


def falls(record: Record, truth: Record | None, rng: np.random.Generator) -> dict[str, Any]:
    """Test p(t|y) on the videos of a model, for each first frame. The paper has 128 videos for each of 50 first frames.

    Args:
        record: with `impact_frames`, `lifted` and `truth` of each clip.
        truth: the record of the true clips, from which the measurement errors are estimated; None: no errors.
        rng: draws the samples behind the p-values.

    Returns:
        pictures: for each first frame its beta, number of videos, the pmf (K,) and the measured shares (K,), whose last
            entry is "no contact", and the results of `ks_test`.
        rejected: share of the first frames with a p-value of at most LEVEL; a perfect model has LEVEL.
        never: share of the videos in which nothing lands.
        lifted: number of falls that can be lifted to 3D.
        fall_error: median over these falls, metres.
        inside: share of these falls with a depth in the range of the training clips.
    """
    errors = None if truth is None else calibrate(truth.clips)
    groups: dict[int, list[ClipScore]] = {}
    for clip in record.clips:
        groups.setdefault(clip.truth["group"], []).append(clip)
    pictures = []
    assert record.frames is not None
    assert record.fps is not None
    for clips in groups.values():
        impact_frames = [frame for clip in clips for frame in clip.impact_frames]
        pictures.append(fall_times(impact_frames, clips[0].truth, record.frames, record.fps, rng, errors))
    frames = [frame for clip in record.clips for frame in clip.impact_frames]
    lifts = [(lift, clip.truth) for clip in record.clips for lift in clip.lifted or () if lift is not None]
    within = [low <= lift["depth"] <= high for lift, facts in lifts for low, high in [depths(facts)]]
    off = [lift["fall_error"] for lift, _ in lifts if lift["fall_error"] is not None]
    return {
        "model": record.row,
        "pictures": pictures,
        "rejected": float(np.mean([picture["p_value"] <= LEVEL for picture in pictures])),
        "never": float(np.mean([frame is None for frame in frames])),
        "lifted": len(lifts),
        "fall_error": float(np.median(off)) if off else None,
        "inside": float(np.mean(within)) if within else None,
    }


def calibrate(clips: Sequence[ClipScore]) -> dict[int | None, float]:
    """The errors of impact frames, measured on true clips, see `distribution.estimator_errors`."""
    landing = [clip for clip in clips if clip.truth["contact_time"] is not None]
    known = [pisa.first_frame_after(clip.truth["contact_time"], clip.truth["fps"]) for clip in landing]
    return distribution.estimator_errors([clip.impact_frames[0] for clip in landing], known)


def fall_times(
    impact_frames: Sequence[int | None],
    facts: Mapping[str, Any],
    frames: int,
    fps: float,
    rng: np.random.Generator,
    errors: distribution.Errors | None = None,
) -> dict[str, Any]:
    """Test p(t|y) on the videos of one first frame.

    Args:
        impact_frames: of the videos; None if nothing lands.
        facts: beta, camera, depths and gravity of one of the true clips.
        frames: number of frames of a generated video.
        fps: its frames per second.
        errors: measurement errors of impact frames, see `calibrate`.
    """
    heights = distribution.drop_heights(facts["beta"], facts["camera"]["position"][2], depths(facts))
    pmf_K = distribution.frame_pmf(heights, fps, frames, math.hypot(*facts["gravity"]), errors)
    counts_K = np.bincount([frames if k is None else k for k in impact_frames], minlength=frames + 1)
    shares = {"pmf": pmf_K.tolist(), "measured": (counts_K / len(impact_frames)).tolist()}
    counts = {"beta": facts["beta"], "videos": len(impact_frames)}
    return counts | shares | distribution.ks_test(impact_frames, pmf_K, rng)


def depths(facts: Mapping[str, Any]) -> tuple[float, float]:
    """The range, in metres, in which the depths of the ambiguous set are uniform."""
    low, high = facts["depths"]
    return low, high


def lifted(masks_FHW: np.ndarray, times_F: np.ndarray, row: ClipRow) -> dict[str, Any] | None:
    """A clip's fall in three dimensions; None if nothing lands or the object starts at the camera's height.

    Args:
        times_F: seconds at which the frames are shown.

    Returns:
        t_drop: seconds.
        depth: Z in metres, implied by t_drop and the row below the object in frame 0.
        heights: of the object's bottom in metres, frame by frame until t_drop, None where it is lost.
        fall_error: metres, how far these heights are from a free fall that ends at t_drop; None if all are lost.
    """
    t_drop = pisa.contact_time(masks_FHW, times_F)
    if t_drop is None:
        return None
    assert row.gravity is not None
    assert row.camera is not None
    gravity, camera_height = math.hypot(*row.gravity), row.camera.position[2]
    focal = row.camera.intrinsics[1][1] * masks_FHW.shape[1] / row.size[0]
    betas_F = distribution.slope(distribution.bottoms(masks_FHW), masks_FHW.shape[1], focal)
    depth, heights_F = distribution.lift(betas_F, t_drop, camera_height, gravity)
    if math.isnan(depth):
        return None
    until = int(np.searchsorted(times_F, t_drop, side="right"))
    heights = [None if math.isnan(y) else round(y, 4) for y in heights_F[:until].tolist()]
    error = distribution.fall_error(heights_F, times_F, t_drop, gravity)
    return {"t_drop": t_drop, "depth": depth, "heights": heights, "fall_error": None if math.isnan(error) else error}
