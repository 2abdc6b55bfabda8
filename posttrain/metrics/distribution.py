"""Test whether a model generates all falls that a first frame allows (PISA, arXiv 2503.09595, sections 5.1-5.2, D-G).

A frame shows the ray from the camera to an object's bottom, but not the object's distance. With a level camera h metres
above the floor,

    Y(Z) = h + beta Z,   beta = (H / 2 - r) sensor / (H f) = (H / 2 - r) / f_pixels,   Y = g t^2 / 2

where Z is the depth, Y the height above the floor, r the row just below the object, counted from the top. The ambiguous
set has Z ~ U(2, 18) m, so its heights are uniform too, and its fall times have the density (paper eq. 4 and 19)

    p(t|y) = g t / ((Z_max - Z_min) |beta|),   t(Z_min) <= t <= t(Z_max)

For beta < 0 the limits swap and Z ends at -h / beta, where the ray meets the floor. For beta = 0 all heights are h.

Departures from the paper. The paper's eq. 3 omits the camera's height. The paper compares with 1,000 quantised draws in
a two-sample test for continuous values, whose p-values are too large with ties. Here the distribution of the impact
frame is exact and can include measurement errors, and the p-value is correct with ties. A fall that does not end within
the clip is a separate outcome, later than all frames.

Shape letters: F frames of a clip, K = F + 1 outcomes: impact frame k < F, and last no contact.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

DEPTH = (2.0, 18.0)  # metres, of the ambiguous set
GRAVITY = 9.81

Heights = tuple[float, float]  # metres, lowest and highest Y that a first frame allows; uniform in between
Errors = Mapping[int | None, float]  # share of each (estimated - true impact frame); None: the contact was missed


def slope(rows_F: np.ndarray, height: int, focal_pixels: float) -> np.ndarray:
    """beta (F,) of the row edges just below the object in pictures `height` pixels high, see `bottoms`."""
    return (height / 2 - rows_F) / focal_pixels


def bottoms(masks_FHW: np.ndarray) -> np.ndarray:
    """The row edges (F,) just below the object, counted from the top; NaN where a mask is empty."""
    edges_F = np.where(masks_FHW.any(2), np.arange(1, masks_FHW.shape[1] + 1), 0).max(1)
    return np.where(edges_F > 0, edges_F, np.nan)


def drop_heights(beta: float, camera_height: float, depth: tuple[float, float] = DEPTH) -> Heights:
    """The lowest and the highest fall, in metres, that the first frame allows: Y(Z) = h + beta Z, at least 0.

    Args:
        beta: of the row just below the object, see `slope`.
        camera_height: h, metres.
        depth: the least and the largest Z, metres.

    Raises:
        ValueError: the object would be below the floor at all of these depths.
    """
    low, high = sorted(camera_height + beta * z for z in depth)
    if high < 0:
        raise ValueError(f"the object's bottom is below the floor from {depth[0]} m on, beta is {beta}")
    return max(low, 0.0), high


def density(t: np.ndarray, heights: Heights, gravity: float = GRAVITY) -> np.ndarray:
    """The density p(t|y) of fall times at `t` (seconds), per second.

    If both heights are equal, only one time is possible: the density is infinite there, and 0 elsewhere.
    """
    low, high = heights
    y = gravity * np.square(t) / 2
    if low == high:
        return np.where(y == low, np.inf, 0.0)
    return gravity * np.asarray(t) * (((low <= y) & (y <= high)) / (high - low)) * (np.asarray(t) >= 0)


def cdf(t: np.ndarray, heights: Heights, gravity: float = GRAVITY) -> np.ndarray:
    """P(fall time <= t)."""
    low, high = heights
    y = gravity * np.square(np.maximum(t, 0)) / 2
    return np.where(y >= low, 1.0, 0.0) if low == high else np.clip((y - low) / (high - low), 0, 1)


def quantile(q: np.ndarray, heights: Heights, gravity: float = GRAVITY) -> np.ndarray:
    """The time in seconds before which a share q of the falls end; q ~ U(0, 1) gives samples of p(t|y)."""
    low, high = heights
    return np.sqrt(2 * (low + np.asarray(q) * (high - low)) / gravity)


def frame_pmf(
    heights: Heights, fps: float, frames: int, gravity: float = GRAVITY, errors: Errors | None = None
) -> np.ndarray:
    """P(impact frame = k) for k < `frames`, then P(no contact within the clip): (K,).

    k is the impact frame of falls with k - 1 < t fps <= k, see `pisa.first_frame_after`. The pmf is convolved with
    `errors`, those of the estimator on true clips (`estimator_errors`), which are assumed equal for all fall times.
    """
    ends_F = cdf((np.arange(frames) + 1e-9) / fps, heights, gravity)  # the same rounding as in first_frame_after
    ends_F[0] = 0  # an impact frame is at least 1
    pmf_K = np.diff(np.append(ends_F, 1.0), prepend=0.0)
    if errors is None:
        return pmf_K
    seen_K = np.zeros_like(pmf_K)
    seen_K[-1] = pmf_K[-1]
    for error, share in errors.items():
        k_F = np.full(frames, frames) if error is None else np.clip(np.arange(frames) + error, 1, frames)
        np.add.at(seen_K, k_F, share * pmf_K[:-1])
    return seen_K


def estimator_errors(estimated: Sequence[int | None], true: Sequence[int]) -> dict[int | None, float]:
    """Distribution of the difference between estimated and true impact frames in true clips."""
    errors = Counter(
        None if estimate is None else estimate - known for estimate, known in zip(estimated, true, strict=True)
    )
    return {error: count / len(true) for error, count in errors.items()}


def ks_test(
    impact_frames: Sequence[int | None], pmf_K: np.ndarray, rng: np.random.Generator, draws: int = 999
) -> dict[str, float]:
    """Kolmogorov-Smirnov test of impact frames (None: no contact) against `frame_pmf`.

    D = max_k |share of the frames <= k - P(F <= k)|. The p-value is the share, among this sample and `draws` samples of
    the same size drawn from the pmf, with at least this D, so it is correct with ties.

    Returns:
        statistic: D.
        p_value: at least 1 / (draws + 1).

    Raises:
        ValueError: there are no impact frames, or one is not within the clip.
    """
    last = len(pmf_K) - 1
    outcomes = np.array([last if frame is None else frame for frame in impact_frames])
    if not len(outcomes) or not all(frame is None or 0 <= frame < last for frame in impact_frames):
        raise ValueError(f"impact frames must be in 0 to {last - 1}, or None, got {list(impact_frames)}")
    law_K = pmf_K.cumsum()

    def distance(counts: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(counts.cumsum(axis) / len(outcomes) - law_K).max(axis)

    from scipy.stats import monte_carlo_test  # it takes half a second to import

    counts_K = np.bincount(outcomes, minlength=len(pmf_K))
    test = monte_carlo_test(
        counts_K,
        lambda size: rng.multinomial(len(outcomes), pmf_K / pmf_K.sum(), size=size[0]),
        distance,
        vectorized=True,
        n_resamples=draws,
        alternative="greater",
    )
    return {"statistic": float(test.statistic), "p_value": float(test.pvalue)}


def lift(
    betas_F: np.ndarray, t_drop: float, camera_height: float, gravity: float = GRAVITY
) -> tuple[float, np.ndarray]:
    """The depth Z and the heights Y_i (F,), in metres, that a clip's fall time implies (appendix G).

    Z = (g t_drop^2 / 2 - h) / beta_0,   Y_i = h + beta_i Z

    All are NaN for beta_0 = 0 (every depth gives that fall time) and if no depth in front of the camera gives it. A
    frame without an object (beta_i NaN) has NaN.
    """
    z = (gravity * t_drop**2 / 2 - camera_height) / betas_F[0] if betas_F[0] else math.nan
    z = z if z > 0 else math.nan
    return float(z), camera_height + betas_F * z


def fall_error(heights_F: np.ndarray, t_F: np.ndarray, t_drop: float, gravity: float = GRAVITY) -> float:
    """Root mean square, metres, until t_drop, of `heights_F` minus those of a fall from rest, g (t_drop^2 - t^2) / 2.

    `t_F`: times of the frames in seconds. Frames without a height are left out; NaN if no frame has a height.
    """
    off_F = (heights_F - gravity * (t_drop**2 - t_F**2) / 2)[t_F <= t_drop]
    off_F = off_F[np.isfinite(off_F)]
    return float(np.sqrt(np.mean(off_F**2))) if len(off_F) else math.nan
