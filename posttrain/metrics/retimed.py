"""Find the distinct pictures of a video that was converted to a higher frame rate, and the time of each.

A converter turns 16 frames per second into 24 or 60 by repeating pictures. Then the time at which a frame is shown
differs from the time at which its picture was taken, by up to a frame, and a fit of g would be wrong. Repeated pictures
are recognised because they hardly change while things move before and after. If the source has the rate R, picture k
was taken at k / R, and the first frame that shows it is the first one at or after

    k / R + phase    phase in (-0.85 / R, 0.15 / R]: 0 if frames show the latest picture, -1 / (2 R) if the nearest

R is the rate at which pictures change when they should, and at no other time. If pictures are repeated at no steady
rate, their times are not known.

Dropped pictures cannot be recognised: a video of 16 frames per second converted to 12 looks like one filmed at 12.

Shape letters: F frames of the video, P distinct pictures, H W pixels, C colours.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BLOCKS = 16  # a frame is divided into so many by so many blocks; its change is that of the block which changes most
STILL = 4.0  # of 255: if no block changes by more, nothing moves
HELD = 0.4  # a frame whose change is less than this share of the changes nearby repeats a picture
RATES = np.array([*range(2, 121), 7.5, 12.5])  # source rates that are tried, frames per second
PHASES, MIDDLE = 40, -0.4  # number of phases tried, and the preferred one, in units of 1 / R
APART = 1.1  # if rates that fit equally well differ by a larger factor, the rate is not known
RIGHT = 0.95  # least share of all changes that must agree with a steady rate
UNSEEN = 0.3  # weight of a missing change in the misfit of a rate; an unexpected change has weight 1
STUCK = 0.1  # as HELD, for videos that fit no steady rate
LEAST = 2  # a video is converted only if pictures are repeated in at least so many places


class Pictures(NamedTuple):
    """The distinct pictures of a video.

    Attributes:
        frames: (P,) int64, the first frame that shows each picture.
        times: (P,) seconds at which each picture was taken, ascending from 0; None: not known.
        rate: the source's frames per second if pictures are repeated at a steady rate, else None.
    """

    frames: np.ndarray
    times: np.ndarray | None
    rate: float | None


def pictures(video_FHWC: np.ndarray, times_F: np.ndarray) -> Pictures:
    """The distinct pictures of a video. If none is repeated, these are all frames at their own times.

    Args:
        video_FHWC: uint8.
        times_F: seconds at which the frames are shown, ascending from 0.
    """
    all_F, frames = np.arange(len(video_FHWC)), len(video_FHWC)
    if frames < 2 * LEAST + 2:
        return Pictures(all_F, times_F, None)
    change = changes(video_FHWC)  # of frames 1, 2, ...
    step = float(times_F[-1] - times_F[0]) / (frames - 1)
    fits: list[tuple[float, float, float]] = []  # share that is wrong, rate, phase
    for rate in RATES[RATES * step < 0.97]:
        near = nearby(change, math.ceil(1 / (rate * step)))
        weight, held = np.where(near > STILL, near, 0), (near > STILL) & (change < HELD * near)
        if runs(held) < LEAST:
            continue
        for phase in (np.arange(PHASES) + 0.5) / PHASES - 0.85:
            new = np.diff(numbers(times_F, rate, phase)) > 0
            stray, unseen = (float(weight[part].sum() / weight.sum()) for part in (~new & ~held, new & held))
            if 1 - stray - unseen > RIGHT and runs(held & ~new) >= LEAST:
                fits.append((stray + UNSEEN * unseen, rate, phase))
    if fits:
        best = min(wrong for wrong, _, _ in fits) + 1e-9
        equal = sorted((rate, phase) for wrong, rate, phase in fits if wrong <= best)
        if equal[-1][0] > APART * equal[0][0]:
            return Pictures(all_F, None, None)
        rate = equal[len(equal) // 2][0]
        phase = min((phase for each, phase in equal if each == rate), key=lambda phase: abs(phase - MIDDLE))
        number_P, first_P = np.unique(numbers(times_F, rate, phase), return_index=True)
        return Pictures(first_P, (number_P - number_P[0]) / rate, float(rate))
    near = nearby(change, 1)
    if runs((near > STILL) & (change < STUCK * near)) > LEAST:
        return Pictures(all_F, None, None)
    return Pictures(all_F, times_F, None)


def numbers(times_F: np.ndarray, rate: float, phase: float) -> np.ndarray:
    """The number (F,) of the picture that each frame shows; `phase` in units of 1 / rate."""
    return np.floor(times_F * rate - phase + 1e-6)


def changes(video_FHWC: np.ndarray) -> np.ndarray:
    """The change (F - 1,) of each frame after the first from the frame before, in [0, 255]; see BLOCKS."""
    height, width = video_FHWC.shape[1:3]
    tall, wide = max(4, height // BLOCKS), max(4, width // BLOCKS)
    found = []
    for before, after in pairwise(video_FHWC):
        gap = np.abs(after.astype(np.int16) - before).mean(2)
        blocks = np.add.reduceat(np.add.reduceat(gap, np.arange(0, height, tall), 0), np.arange(0, width, wide), 1)
        found.append(blocks.max() / (tall * wide))
    return np.array(found)


def nearby(change: np.ndarray, reach: int) -> np.ndarray:
    """For each change, the smaller of the largest change before and the largest change after it, within `reach`."""
    padded = np.pad(change, reach)
    before, after = (
        np.max([padded[reach + sign * k : len(change) + reach + sign * k] for k in range(1, reach + 1)], 0)
        for sign in (-1, 1)
    )
    return np.minimum(before, after)


def runs(flags: np.ndarray) -> int:
    """The number of runs of consecutive true values."""
    return int(flags[:1].sum() + (np.diff(flags.astype(int)) > 0).sum())
