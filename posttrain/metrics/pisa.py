"""PISA's metrics: how far a generated fall is from the true one (PISA, arXiv 2503.09595, appendix B, equations 6-8).

Masks of the one object that drops are arrays (frames, H, W) of 0/1, bool or 0/255. Positions are pixel indices.
Distances are divided by sqrt(2) H, the diagonal of a square picture, so they have no unit.

    L2  = mean_i |c_i^gen - c_i^true|                                                     (6)
    CD  = mean_i ( mean_{p in P_i} min_{q in Q_i} |p - q| + mean_{q in Q_i} min_{p in P_i} |q - p| )
    IoU = mean_i |M_i^gen and M_i^true| / |M_i^gen or M_i^true|                           (7)

There are two conventions, because the authors' released code differs from their paper:

                      paper (the headline)                     released (to compare with the paper's Table 1)
    L2 of a frame     Euclidean                                mean of |dx| and |dy|
    true frame at t   floor(t f_true + 1/2), the nearest       int(t f_true)
    weight of a frame its duration                             equal
    object vanished   L2 1, CD 2 (their maxima), IoU 0         the frame leaves L2 and CD, IoU 0
    no true object    scored by IoU alone                      the frame leaves L2 and CD, scored by IoU
    video too short   its missing frames: object vanished      cut: the rest of the true clip is not compared
    mask values       anything but 0 is the object             1 is the object: 0/255 masks look empty

In both, each frame has its own time t, IoU is 1 if both masks are empty, and frames after the end of the true clip are
not compared. Missing frames are those that would continue a short video at its mean step until the last true frame. If
only one frame is missing, the video does not count as short: its last frame is compared instead of the missing one.

Shape letters: F frames of the video, H W pixels.
"""

import math
from typing import Literal

import numpy as np
from scipy.ndimage import distance_transform_edt

from posttrain.metrics.masks import iou

Convention = Literal["paper", "released"]

# constants of `contact_time`, chosen on falling discs and on true clips
AFTER = 3  # frames after the contact that are fitted; above RATE, the time that so many frames take at RATE
RATE = 16.0  # frames per second
MISFIT = 0.02  # share of the picture's height: leaving a frame out costs as much as fitting it with this error
FALL = 0.03  # share of the picture's height that a body must fall
SLOWER = 0.5  # after a contact, the downward velocity is less than this share of the velocity before
GRAIN = 1e-3  # seconds: a file may round its times to these


def even_times(frames: int, fps: float) -> np.ndarray:
    """Times (frames,) in seconds of the frames of a clip with a constant rate."""
    return np.arange(frames) / fps


def frame_step(times_F: np.ndarray) -> float:
    """Seconds between two frames, on average."""
    return float((times_F[-1] - times_F[0]) / (len(times_F) - 1))


def true_frames(times_F: np.ndarray, true: int, fps_true: float, convention: Convention = "paper") -> np.ndarray:
    """For each frame of a video, the index of the true frame to compare with (the true clip has `true` frames); int64.

    Shorter than `times_F` if the true clip ends earlier.
    """
    at = times_F * fps_true
    j = np.floor(at + 0.5 + 1e-9) if convention == "paper" else np.trunc(at + GRAIN / 2 * fps_true)
    return j[j < true].astype(np.int64)


def missing_times(times_F: np.ndarray, true: int, fps_true: float) -> np.ndarray:
    """Times of the frames that a video lacks until the last true frame, at the video's mean step."""
    step, end = frame_step(times_F) if len(times_F) > 1 else 1 / fps_true, (true - 1) / fps_true
    return times_F[-1] + step * np.arange(1, math.floor((end + GRAIN - times_F[-1]) / step) + 1)


def durations(times_F: np.ndarray) -> np.ndarray:
    """The duration (F,) of each frame, from halfway to the previous one to halfway to the next, in mean steps."""
    if len(times_F) < 2:
        return np.ones(1)
    step, between = frame_step(times_F), (times_F[1:] + times_F[:-1]) / 2
    return np.diff([times_F[0] - step / 2, *between, times_F[-1] + step / 2]) / step


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
    times_F: np.ndarray,
    fps_true: float,
    convention: Convention = "paper",
) -> dict[str, float]:
    """Compare one generated clip with the true one.

    Args:
        generated_masks: (F, H, W) of the object in the generated clip: bool, 0/1 or 0/255.
        true_masks: (frames, H, W) of the same object in the true clip; its number of frames may differ.
        times_F: seconds at which the generated clip's frames are shown, ascending from 0.
        fps_true: frames per second of the true clip.
        convention: "paper" or "released", see the module's docstring.

    Returns:
        l2, chamfer: in units of sqrt(2) H, smaller is better; NaN if no frame has a true mask (released: both masks).
        iou: in [0, 1].
        vanished: share of the frames with a true mask in which the generated mask is empty; missing frames count as
            empty.
        span: share of the true clip that was compared, 1 unless the generated one is too short.

    Raises:
        ValueError: the arrays are not (frames, H, W) of one picture size, hold other values than a mask, or have no
            frame to compare; the times do not fit or ascend; the frame rate is not positive; the convention is unknown.
    """
    if convention not in ("paper", "released"):
        raise ValueError(f"convention is {convention!r}; choose 'paper' or 'released'")
    if not 0 < fps_true < math.inf:
        raise ValueError(f"the frame rate must be positive, got {fps_true}")
    generated = _binary(generated_masks, "generated_masks", convention)
    true = _binary(true_masks, "true_masks", convention)
    if generated.shape[1:] != true.shape[1:]:
        raise ValueError(f"picture sizes differ: {generated.shape[1:]} and {true.shape[1:]}")
    times_F = ascending(times_F, len(generated))
    lacking = missing_times(times_F, len(true), fps_true)
    held = len(lacking) == 1
    whole = np.append(times_F, lacking)
    frames = true_frames(whole, len(true), fps_true, convention)
    weights = durations(whole)[: len(frames)]
    span = float(weights[: len(generated) + held].sum() / weights.sum())
    if convention == "paper":
        rest = generated[-1:] if held else np.zeros((len(lacking), *generated.shape[1:]), bool)
        generated = np.append(generated, rest, 0)
    else:
        frames, weights = frames[: len(generated)], np.ones(len(generated))
    generated, true, weights = generated[: len(frames)], true[frames], weights[: len(frames)]
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
        "l2": _mean(l2[scored], weights[scored]),
        "chamfer": _mean(cd[scored], weights[scored]),
        "iou": _mean(iou(generated, true), weights),
        "vanished": float(weights @ (there & ~here) / weights[there].sum()) if there.any() else 0.0,
        "span": span,
    }


def drop_time(drop_height: float, gravity: float = 9.81) -> float:
    """t_drop = sqrt(2 Y0 / g) in seconds, Y0 in metres.

    Y0 is defined by the first contact, Y0 = g t_c^2 / 2. The height of the lowest point above the pile would be wrong
    if a body does not land on the pile's centre.
    """
    return math.sqrt(2 * drop_height / gravity)


def first_frame_after(contact_time: float, fps: float) -> int:
    """The impact frame F of a known contact: the first frame at or after it, at least 1, so F - 1 and F enclose it."""
    return max(1, math.ceil(contact_time * fps - 1e-9))


def impact_frame(masks_FHW: np.ndarray, times_F: np.ndarray) -> int | None:
    """The impact frame of a clip without contact events: the first frame after the fall ends; None if it does not end.

    See `contact_time`. The paper takes the first frame whose centroid moves upwards, but there is no such frame if the
    body does not bounce.
    """
    return _impact(contact_time(masks_FHW, times_F), times_F)


def _impact(contact: float | None, times_F: np.ndarray) -> int | None:
    """As `first_frame_after`, for frames at any times."""
    return None if contact is None else max(1, int(np.searchsorted(times_F, contact - 1e-9)))


def contact_time(masks_FHW: np.ndarray, times_F: np.ndarray) -> float | None:
    """Seconds at which the masks' fall ends; None if the object does not fall or its fall does not end.

    The fit has a free fall until the change point tau, and a constant velocity in the first frames after it:
        y(t) = y0 + v t + a t^2 / 2              for t <= tau   (a > 0, v >= 0)
        y(t) = y(tau) + w (t - tau)              for tau < t <= tau + AFTER frames,  w < SLOWER * (v + a tau)
    The tau with the least squared error is taken. A frame that is left out costs a fixed misfit, so a tau that fits
    more of the clip is preferred.

    Args:
        masks_FHW: bool, 0/1 or 0/255.
        times_F: seconds at which the frames are shown.
    """
    masks = _binary(masks_FHW, "masks_FHW", "paper")
    times_F = ascending(times_F, len(masks))
    y = centroids(masks)[:, 1]
    seen = np.isfinite(y)
    height = masks.shape[1]
    if seen.sum() < 4:
        return None
    step = frame_step(times_F)
    t, y, last = times_F[seen] / step, y[seen], after_contact(step) / step  # in frames
    misfit = (MISFIT * height) ** 2
    smooth = np.polynomial.Polynomial.fit(t, y, 2)
    best, contact = float(((smooth(t) - y) ** 2).sum()), None  # no contact: one parabola of either sign
    for tau in np.arange(1.0, t[-1], last / (10 * AFTER)):
        used = t <= tau + last
        error, fallen, before, after = _fall(t[used], y[used], tau)
        cost = error + misfit * (~used).sum()
        if cost < best and fallen > FALL * height and after < SLOWER * before:
            best, contact = cost, float(tau) * step
    return contact


def after_contact(step: float) -> float:
    """How long after the contact the fit uses frames, in seconds; `step` is the time between two frames. See AFTER."""
    return AFTER * max(step, 1 / RATE)


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
    generated_masks: np.ndarray, times_F: np.ndarray, drop_height: float, gravity: float = 9.81
) -> dict[str, float | int | None]:
    """The error of the impact's time (equation 8).

    E_time = 0 if t_drop lies between frames F - 1 and F, else the distance to the nearer one, |t_(F-1) - t_drop| or
    |t_F - t_drop|. Errors below a frame give 0; time_offset shows them too.

    Args:
        generated_masks: (F, H, W) of the object in the generated clip.
        times_F: seconds at which its frames are shown.
        drop_height: Y0 in metres of the true clip, see `drop_time`.
        gravity: metres per second squared.

    Returns:
        time_error: seconds, None if nothing lands.
        time_offset: milliseconds by which the contact is late, below 0 if it is early; None if nothing lands.
        impact_frame: F, None if nothing lands.
        no_contact: 1 if nothing lands, else 0. Report its mean together with the error.
        t_drop: seconds.
    """
    t_drop = drop_time(drop_height, gravity)
    contact = contact_time(generated_masks, times_F)
    frame = _impact(contact, times_F)
    return {
        "time_error": None if frame is None else frame_time_error(frame, t_drop, times_F),
        "time_offset": None if contact is None else 1000 * (contact - t_drop),
        "impact_frame": frame,
        "no_contact": int(frame is None),
        "t_drop": t_drop,
    }


def frame_time_error(frame: int, t_drop: float, times_F: np.ndarray) -> float:
    """E_time in seconds of impact frame F = `frame` (equation 8)."""
    before, after = float(times_F[frame - 1]), float(times_F[frame])
    return 0.0 if before <= t_drop <= after else min(abs(before - t_drop), abs(after - t_drop))


def ascending(times_F: np.ndarray, frames: int) -> np.ndarray:
    """The times, checked: as many as there are frames, ascending from 0; ValueError otherwise."""
    times_F = np.asarray(times_F, dtype=float)
    if times_F.shape != (frames,):
        raise ValueError(f"there are {frames} frames, but times of shape {times_F.shape}")
    if not np.isfinite(times_F).all() or (np.diff(times_F) <= 0).any() or times_F[0] != 0:
        raise ValueError("times must ascend from 0")
    return times_F


def _binary(masks: np.ndarray, name: str, convention: Convention) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"{name} has shape {masks.shape}; expected (frames, H, W)")
    if not ((masks == 0) | (masks == 1) | (masks == 255)).all():
        raise ValueError(f"{name} holds other values than 0/1, bool or 0/255; threshold it first")
    return masks != 0 if convention == "paper" else masks == 1


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights)) if len(values) else math.nan
