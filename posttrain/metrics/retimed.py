"""When the pictures of a film are true that a converter brought to another rate.

A film of 16 frames per second becomes one of 24 or 60 when pictures are shown again, so the moment at which a frame is
shown is not the one that its picture is of: by up to a frame of the source or the new rate, which a fit of g must not
believe. Such a film is known by pictures that hardly change while things move before and after. With the source's
rate R, picture k is true at k / R, and a new one is seen in the first frame at or after

    k / R + phase    phase in (-0.85 / R, 0.15 / R]: 0 where the latest is shown, -1 / (2 R) where the nearest

R is the rate with which changes are seen where they should be, and nowhere else. Where pictures are shown again at no
steady rate, their moments are not known.

Pictures that were dropped leave no such trace: a film of 16 frames per second brought to 12 looks like one of 12.

Shape letters: F frames of the film, P pictures that differ, H W pixels, C colours.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BLOCKS = 16  # the change of a frame is that of the block which changes most, of so many by so many
STILL = 4.0  # of 255: where no block changes by more, nothing moves
HELD = 0.4  # of the changes nearby: a frame that changes by less shows a picture again
RATES = np.array([*range(2, 121), 7.5, 12.5])  # frames per second that films have
PHASES, MIDDLE = 40, -0.4  # of the phases above
APART = 1.1  # rates that fit equally well may differ by so much
RIGHT = 0.95  # of all changes, seen or missing as they should be at a steady rate
UNSEEN = 0.3  # so much less wrong than a change where there should be none is a new picture like the one before
STUCK = 0.1  # the same, where there is no steady rate to agree with
LEAST = 2  # times that a picture is shown again while things move before and after


class Pictures(NamedTuple):
    """The pictures of a film.

    Attributes:
        frames: (P,) int64, the first frame that shows each.
        times: (P,) seconds at which each is true, ascending from 0; None: it cannot be told.
        rate: the source's frames per second if the film was re-timed at a steady rate, else None.
    """

    frames: np.ndarray
    times: np.ndarray | None
    rate: float | None


def pictures(video_FHWC: np.ndarray, times_F: np.ndarray) -> Pictures:
    """Which frames of a film show a new picture, and when it is true: all, at their times, where it was not re-timed.

    Args:
        video_FHWC: uint8.
        times_F: seconds at which the frames are shown, ascending from 0.
    """
    all_F, frames = np.arange(len(video_FHWC)), len(video_FHWC)
    if frames < 2 * LEAST + 2:
        return Pictures(all_F, times_F, None)
    change = changes(video_FHWC)  # of frame 1, 2 ...
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
    """Of the picture that each frame shows; `phase` in pictures."""
    return np.floor(times_F * rate - phase + 1e-6)


def changes(video_FHWC: np.ndarray) -> np.ndarray:
    """How much each frame but the first (F - 1,) differs from the one before, in [0, 255]."""
    height, width = video_FHWC.shape[1:3]
    tall, wide = max(4, height // BLOCKS), max(4, width // BLOCKS)
    found = []
    for before, after in pairwise(video_FHWC):
        gap = np.abs(after.astype(np.int16) - before).mean(2)
        blocks = np.add.reduceat(np.add.reduceat(gap, np.arange(0, height, tall), 0), np.arange(0, width, wide), 1)
        found.append(blocks.max() / (tall * wide))
    return np.array(found)


def nearby(change: np.ndarray, reach: int) -> np.ndarray:
    """The smaller of the largest changes before and after each frame, `reach` frames away at most."""
    padded = np.pad(change, reach)
    before, after = (
        np.max([padded[reach + sign * k : len(change) + reach + sign * k] for k in range(1, reach + 1)], 0)
        for sign in (-1, 1)
    )
    return np.minimum(before, after)


def runs(flags: np.ndarray) -> int:
    """How many stretches of neighbours are true."""
    return int(flags[:1].sum() + (np.diff(flags.astype(int)) > 0).sum())
