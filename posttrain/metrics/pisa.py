"""PISA's metrics: how far a generated fall is from the true one (PISA, arXiv 2503.09595, appendix B, equations 6-8).

Masks follow the one object that drops, as arrays (frames, H, W) of 0/1, bool or 0/255. Positions are pixel indices.
Distances are divided by sqrt(2) H, the diagonal of a square picture, so that they need no unit.

    L2  = mean_i |c_i^gen - c_i^true|                                                     (6)
    CD  = mean_i ( mean_{p in P_i} min_{q in Q_i} |p - q| + mean_{q in Q_i} min_{p in P_i} |q - p| )
    IoU = mean_i |M_i^gen and M_i^true| / |M_i^gen or M_i^true|                           (7)

There are two conventions, because the authors' released code differs from their paper:

                      paper (the headline)                     released (to compare with the paper's Table 1)
    L2 of a frame     Euclidean                                mean of |dx| and |dy|
    true frame of i   floor(i f_true / f_gen + 1/2)            int(i f_true / f_gen)
    object vanished   L2 1, CD 2 (their maxima), IoU 0         the frame leaves L2 and CD, IoU 0
    no true object    scored by IoU alone                      the frame leaves L2 and CD, scored by IoU
    mask values       anything but 0 is the object             1 is the object: 0/255 masks look empty

In both, IoU is 1 where both masks are empty, and frames beyond the end of the shorter clip are not compared.
"""

import math
from typing import Literal

import numpy as np
from scipy.ndimage import distance_transform_edt

from posttrain.metrics.masks import iou

Convention = Literal["paper", "released"]

# `contact_time`, calibrated on falling discs and on true clips
AFTER = 3  # frames after the contact that are fitted
MISFIT = 0.02  # share of the picture's height: the error of a frame at which leaving it out costs the same
FALL = 0.03  # share of the picture's height that a body must fall
SLOWER = 0.5  # share of the falling velocity that must not remain after a contact


def true_frames(generated: int, true: int, fps_generated: float, fps_true: float, convention: Convention) -> np.ndarray:
    """The frame of the true clip (`true` frames long) with which each generated frame is compared; int64.

    Shorter than `generated` where the true clip ends earlier.
    """
    i = np.arange(generated)
    if convention == "paper":
        j = np.floor(i * fps_true / fps_generated + 0.5)
    else:
        j = np.trunc(i * fps_true / fps_generated)
    return j[j < true].astype(np.int64)


def centroids(masks_FHW: np.ndarray) -> np.ndarray:
    """Centres (F, 2) of the masks in pixels, x right, y down; NaN where a mask is empty."""
    masks = masks_FHW.astype(np.float64)
    area = masks.sum((1, 2))
    rows, columns = (np.arange(size, dtype=float) for size in masks.shape[1:])
    moments = np.stack([masks.sum(1) @ columns, masks.sum(2) @ rows], axis=1)
    return np.divide(moments, area[:, None], out=np.full_like(moments, np.nan), where=area[:, None] > 0)


def chamfer(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Sum of the two mean distances (pixels) from a mask's pixels to the other's nearest; NaN if one is empty."""
    if not (a_HW.any() and b_HW.any()):
        return math.nan
    return float(distance_transform_edt(~b_HW)[a_HW].mean() + distance_transform_edt(~a_HW)[b_HW].mean())


def score(
    generated_masks: np.ndarray,
    true_masks: np.ndarray,
    fps_generated: float,
    fps_true: float,
    convention: Convention = "paper",
) -> dict[str, float]:
    """Compare one generated clip with the true one.

    Args:
        generated_masks: (frames, H, W) of the object in the generated clip: bool, 0/1 or 0/255.
        true_masks: (frames, H, W) of the same object in the true clip; its number of frames may differ.
        fps_generated: frames per second of the generated clip.
        fps_true: frames per second of the true clip.
        convention: "paper" or "released", see the module's docstring.

    Returns:
        l2, chamfer: in units of sqrt(2) H, smaller is better; NaN if no frame has a true mask (released: both masks).
        iou: in [0, 1].
        vanished: share of the compared frames with a true mask in which the generated mask is empty.

    Raises:
        ValueError: the arrays are not (frames, H, W) of one picture size, hold other values than a mask, or have no
            frame to compare; a frame rate is not positive; the convention is unknown.
    """
    if convention not in ("paper", "released"):
        raise ValueError(f"convention is {convention!r}; choose 'paper' or 'released'")
    if not (0 < fps_generated < math.inf and 0 < fps_true < math.inf):
        raise ValueError(f"frame rates must be positive, got {fps_generated} and {fps_true}")
    generated = _binary(generated_masks, "generated_masks", convention)
    true = _binary(true_masks, "true_masks", convention)
    if generated.shape[1:] != true.shape[1:]:
        raise ValueError(f"picture sizes differ: {generated.shape[1:]} and {true.shape[1:]}")
    frames = true_frames(len(generated), len(true), fps_generated, fps_true, convention)
    generated, true = generated[: len(frames)], true[frames]
    height, width = true.shape[1:]
    unit = math.sqrt(2) * height

    here, there = generated.any((1, 2)), true.any((1, 2))
    offset = np.abs(centroids(generated) - centroids(true))
    l2 = (np.hypot(*offset.T) if convention == "paper" else offset.mean(1)) / unit
    cd = np.array([chamfer(a, b) for a, b in zip(generated, true, strict=True)]) / unit
    if convention == "paper":
        # A vanished object is as far away as the picture allows: no other mask can score worse.
        farthest = max(1.0, math.hypot(height, width) / unit)
        l2[there & ~here], cd[there & ~here] = farthest, 2 * farthest
    scored = there if convention == "paper" else there & here
    return {
        "l2": _mean(l2[scored]),
        "chamfer": _mean(cd[scored]),
        "iou": _mean(iou(generated, true)),
        "vanished": float((there & ~here).sum() / max(there.sum(), 1)),
    }


def drop_time(drop_height: float, gravity: float = 9.81) -> float:
    """t_drop = sqrt(2 Y0 / g) in seconds, Y0 in metres.

    Y0 belongs to the moment of first contact, Y0 = g t_c^2 / 2: the height of the lowest point above what lies below it
    is wrong where a body lands off the centre of a pile.
    """
    return math.sqrt(2 * drop_height / gravity)


def first_frame_after(contact_time: float, fps: float) -> int:
    """The impact frame F of a known contact: the first frame at or after it, at least 1, so F - 1 and F enclose it."""
    return max(1, math.ceil(contact_time * fps - 1e-9))


def impact_frame(masks_FHW: np.ndarray, fps: float) -> int | None:
    """The impact frame of a clip without contact events: the first frame after the fall ends; None if it does not end.

    See `contact_time`. The paper takes the first frame whose centroid moves upwards, but bodies that do not bounce have
    none.
    """
    contact = contact_time(masks_FHW, fps)
    return None if contact is None else first_frame_after(contact, fps)


def contact_time(masks_FHW: np.ndarray, fps: float) -> float | None:
    """Seconds at which the masks' fall ends; None if the object does not fall or its fall does not end.

    A change point tau joins a free fall and what follows, of which the first frames count:
        y(t) = y0 + v t + a t^2 / 2              for t <= tau   (a > 0, v >= 0)
        y(t) = y(tau) + w (t - tau)              for tau < t <= tau + AFTER frames,  w < SLOWER * (v + a tau)
    The tau with the least squared error wins. A frame that is left out costs a fixed misfit, so a tau that explains
    more of the clip is preferred.
    """
    y = centroids(_binary(masks_FHW, "masks_FHW", "paper"))[:, 1]
    t = np.flatnonzero(np.isfinite(y)).astype(float)
    y = y[np.isfinite(y)]
    height = masks_FHW.shape[1]
    if len(t) < 4:
        return None
    misfit = (MISFIT * height) ** 2
    smooth = np.polynomial.Polynomial.fit(t, y, 2)
    best, contact = float(((smooth(t) - y) ** 2).sum()), None  # no contact: one parabola of either sign
    for tau in np.arange(1.0, t[-1], 0.1):
        used = t <= tau + AFTER
        error, fallen, before, after = _fall(t[used], y[used], tau)
        cost = error + misfit * (~used).sum()
        if cost < best and fallen > FALL * height and after < SLOWER * before:
            best, contact = cost, float(tau) / fps
    return contact


def _fall(t: np.ndarray, y: np.ndarray, tau: float) -> tuple[float, float, float, float]:
    """Least squares of the model in `contact_time`: squared error, pixels fallen, velocities before and after tau."""
    s = np.minimum(t, tau)
    design = np.stack([np.ones_like(t), s, s**2 / 2, t - s], 1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    if solution[1] < 0 or solution[2] <= 0:  # a fall starts at rest unless the fit says otherwise
        design = np.delete(design, 1, axis=1)
        rest = np.linalg.lstsq(design, y, rcond=None)[0]
        solution = np.insert(rest, 1, 0.0)
        error = y - design @ rest
    else:
        error = y - design @ solution
    _, v, a, w = solution
    by_acceleration = a * tau**2 / 2 - max(v * tau, 0)  # steady motion is no fall
    return float((error**2).sum()), float(by_acceleration), float(v + a * tau), float(w)


def time_error(
    generated_masks: np.ndarray, fps: float, drop_height: float, gravity: float = 9.81
) -> dict[str, float | int | None]:
    """How wrong the moment of impact is (equation 8).

    E_time = 0 if t_drop lies between frames F - 1 and F, else min(|(F - 1) / fps - t_drop|, |F / fps - t_drop|).

    Args:
        generated_masks: (frames, H, W) of the object in the generated clip.
        fps: its frames per second.
        drop_height: Y0 in metres of the true clip, see `drop_time`.
        gravity: metres per second squared.

    Returns:
        time_error: seconds, None if nothing lands.
        impact_frame: F, None if nothing lands.
        no_contact: 1 if nothing lands, else 0. Average it beside the error: it is an outcome, not a missing value.
        t_drop: seconds.
    """
    t_drop = drop_time(drop_height, gravity)
    frame = impact_frame(generated_masks, fps)
    return {
        "time_error": None if frame is None else frame_time_error(frame, t_drop, fps),
        "impact_frame": frame,
        "no_contact": int(frame is None),
        "t_drop": t_drop,
    }


def frame_time_error(frame: int, t_drop: float, fps: float) -> float:
    """E_time in seconds of impact frame F = `frame` (equation 8)."""
    before, after = (frame - 1) / fps, frame / fps
    return 0.0 if before <= t_drop <= after else min(abs(before - t_drop), abs(after - t_drop))


def _binary(masks: np.ndarray, name: str, convention: Convention) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"{name} has shape {masks.shape}; expected (frames, H, W)")
    if not ((masks == 0) | (masks == 1) | (masks == 255)).all():
        raise ValueError(f"{name} holds other values than 0/1, bool or 0/255; threshold it first")
    return masks != 0 if convention == "paper" else masks == 1


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
