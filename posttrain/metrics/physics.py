"""The scorecard of one clip in SI units: how well its masks agree with the laws of a falling body.

A level pinhole camera sees a body at `depth` Z, which does not change while it falls, so a pixel is Z / focal metres. A
least squares fit gives the height z(t) of the body's centre, with the release at t0 and the contact at t_c,

    z(t) = z0 - g max(t - t0, 0)^2 / 2                     t <= t_c
    z(t) = z(t_c) + w (t - t_c) + a (t - t_c)^2 / 2        t_c < t <= t_c + AFTER frames (metrics/pisa.py)

and with the speed v = g (t_c - t0) at the contact and the distance fallen d = g (t_c - t0)^2 / 2, the scorecard has

    g               m/s^2  0 if the body hovers, below 0 if it rises
    release         s      t0
    contact         s      t_c
    restitution     1      w / v, of the vertical motion; below 0 if the body moves on downwards, as off a pile
    penetration     m      d - drop_height, into or beside what the body lands on first; below 0 if it stops in the air
    energy_fall     J/kg   v^2 / 2 - G d, mechanical energy gained in the fall, in a world of gravity G; 0 in truth
    energy_contact  J/kg   (w^2 - v^2) / 2, gained at the contact; below 0 in truth
    drift           m/s    sideways until the contact, x(t) = x0 + drift t + jump [t >= t_jump], to the right
    jump            m      the largest sideways jump between two frames until the contact, to the right
    permanence      1      share of the clip's time in which the body is visible
    size            1/s    slope of log sqrt(area), Theil-Sen; 0 in truth, unless the body rotates or comes closer

If a body sinks into a surface, its lower part is hidden, and the mask's centre is that of the visible part; `_unhidden`
corrects this.

A sigma is one standard deviation, to first order: that of the fit, and the systematic errors below. Only permanence,
size, restitution and energy_contact use frames after the first contact, so a body that rolls off a pile and then sinks
into the floor has no penetration.

Shape letters: F frames, H W pixels, K candidates (t0, t_c).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag
from scipy.optimize import approx_fprime, least_squares

from posttrain.metrics.pisa import (
    FALL,
    MISFIT,
    SLOWER,
    after_contact,
    ascending,
    centroids,
    durations,
    frame_step,
)

# Standard deviations, chosen on 60 true clips of two worlds so that errors match the sigmas. On 1000 other clips the
# spread of error / sigma is 0.5 (size) to 1.45 (restitution): `python -m posttrain.studies.violations`
NOISE = 0.12  # of a mask's centre, pixels
SCALE = 0.02  # of a length, as a share of it: an outline is not at the depth of the body's centre
CONTACT = 0.12  # of t_c, frames: a body that lands on an edge lands twice
REBOUND = 0.08  # of w, as a share of v: a rotating body shows other sides, with other centres
TURNING = 0.3  # of log sqrt(area) over a clip: the sides of a body differ in area

VERTICAL = ("g", "release", "contact", "restitution", "penetration", "energy_fall", "energy_contact")
SIDEWAYS = ("drift", "jump")  # signed: average their magnitudes
QUANTITIES = (*VERTICAL, *SIDEWAYS, "permanence", "size")


class Measure(NamedTuple):
    """A quantity and its standard deviation."""

    value: float
    sigma: float


class Fall(NamedTuple):
    """The fit of z(t) in metres and seconds.

    Attributes:
        parameters: z0, g, t0 and, if the body lands, t_c, w, a; covariance: theirs.
        falls: whether the body falls far enough to fit t0.
        end: t_c, or the last frame's time.
    """

    parameters: np.ndarray
    covariance: np.ndarray
    falls: bool
    end: float

    @property
    def lands(self) -> bool:
        return len(self.parameters) == 6


def scorecard(
    masks_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    drop_height: float | None = None,
    gravity: float = 9.81,
) -> dict[str, Measure | None]:
    """Measure a clip that continues the first frame of a true one.

    Args:
        masks_FHW: bool or 0/1, the body that falls; empty where it is not visible.
        times_F: seconds at which the frames are shown, ascending from 0.
        focal: focal length in the masks' pixels.
        depth: metres along the optical axis from the camera to the body in frame 0.
        drop_height: Y0, metres that the true body falls until its first contact; None: penetration is not measured.
        gravity: G, metres per second squared.

    Returns:
        QUANTITIES; None for a quantity that cannot be measured: the body is fully visible in fewer than four frames
        (for sideways quantities: of the fall), does not fall, or does not land. A body that vanishes below drop_height
        counts as having sunk that far.

    Raises:
        ValueError: masks_FHW is not (frames, H, W) or holds other values than a mask; the times do not fit or ascend; a
            number is not positive.
    """
    masks = checked(masks_FHW, focal=focal, depth=depth, drop_height=drop_height, gravity=gravity)
    times_F = ascending(times_F, len(masks))
    card: dict[str, Measure | None] = dict.fromkeys(QUANTITIES)
    seen = masks.any((1, 2))
    card["permanence"] = Measure(float(np.average(seen, weights=durations(times_F))), 0.0)
    whole = seen & ~at_edge(masks)
    if whole.sum() < 4:
        return card
    t, masks, pixel = times_F[whole], masks[whole], depth / focal
    card["size"] = _size(t, masks)
    x, y = (pixel * centroids(masks)).T
    fallen = y - y[0]
    if drop_height is not None:
        fallen = pixel * _unhidden(fallen / pixel, masks, drop_height / pixel)
    fall = fit_fall(t, -fallen, frame_step(times_F), pixel, masks.shape[1])
    card |= _vertical(fall, drop_height, gravity)
    falling = t <= fall.end
    if falling.sum() >= 4:
        card |= _sideways(t[falling], x[falling], NOISE * pixel)
    return card


def checked(masks_FHW: np.ndarray, **numbers: float | None) -> np.ndarray:
    """The masks as bool (F, H, W); ValueError if they are not masks, or one of the numbers is not positive."""
    masks = np.asarray(masks_FHW)
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"masks_FHW has shape {masks.shape}; expected (frames, H, W)")
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError("masks_FHW holds other values than 0 and 1; threshold it first")
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive, got {number}")
    return np.asarray(masks != 0)


def fit_fall(t: np.ndarray, z: np.ndarray, frame: float, pixel: float, height: int) -> Fall:
    """Fit z(t) (metres) by least squares, from the best point of a grid over t0 and t_c.

    A body that hardly falls gets a parabola from time 0.

    Args:
        frame: seconds between two frames.
        pixel: metres per pixel.
        height: of the picture, pixels.
    """
    after, least, misfit = after_contact(frame) + 0.1 * frame, FALL * height * pixel, (MISFIT * height * pixel) ** 2
    step = max(frame / 2, (t[-1] - t[0]) / 80)  # so that long clips take no more time
    coarse, fine = np.arange(t[0] - frame, t[-1] + frame / 4, step), np.arange(-8, 9) * step / 4
    _, t0, contact = _search(t, z, coarse, coarse, frame, after, least, misfit)
    t, z = t[t <= contact + after], z[t <= contact + after]
    times = contact + fine if contact < t[-1] else t[-1:]
    (z0, g, w, a), t0, contact = _search(t, z, t0 + fine, times, frame, math.inf, least, misfit)  # on the same frames
    lands, falls = contact < t[-1], abs(g) * (contact - t0) ** 2 / 2 > least
    if falls:
        initial = np.array([z0, g, t0, contact, w, a] if lands else [z0, g, t0])
        slack = np.array([np.inf, np.inf, 0.45 * frame, 0.45 * frame, np.inf, np.inf])[: len(initial)]
        bounds = initial - slack, initial + slack
        fit = least_squares(lambda p: _height(p, t) - z, initial, x_scale="jac", bounds=bounds)
        parameters, jacobian, residual = fit.x, fit.jac, fit.fun
    else:
        design = np.stack([np.ones_like(t), -(t**2) / 2, np.zeros_like(t)], 1)
        parameters = np.linalg.lstsq(design, z, rcond=None)[0]
        jacobian, residual = design, z - design @ parameters
    covariance = fit_covariance(jacobian, residual, NOISE * pixel)
    if len(parameters) < 6:
        return Fall(parameters, covariance, falls, float(t[-1]))
    _, g, t0, contact, *_ = parameters
    covariance += np.diag([0, 0, 0, CONTACT * frame, REBOUND * g * (contact - t0), 0]) ** 2
    return Fall(parameters, covariance, falls, float(contact))


def _search(
    t: np.ndarray,
    z: np.ndarray,
    releases: np.ndarray,
    contacts: np.ndarray,
    frame: float,
    after: float,
    least: float,
    misfit: float,
) -> tuple[np.ndarray, float, float]:
    """The best (z0, g, w, a), t0 and t_c, at least about a frame apart; t_c is the last frame's time if nothing lands.

    Frames later than `after` seconds after the contact are left out and cost a misfit each. A contact costs one more
    misfit, so that noise is not taken for a contact.
    """
    t0_K, contact_K = (
        v[contacts - releases[:, None] > 0.9 * frame] for v in np.meshgrid(releases, contacts, indexing="ij")
    )
    lands_K = contact_K < t[-1] - frame / 20
    since_KF = np.maximum(t - contact_K[:, None], 0)
    fall_KF = np.maximum(t - since_KF - t0_K[:, None], 0) ** 2 / 2
    used_KF = since_KF <= after
    design_KF4 = np.stack([np.ones_like(fall_KF), -fall_KF, since_KF, since_KF**2 / 2], -1) * used_KF[..., None]
    transposed_K4F = design_KF4.swapaxes(1, 2)
    normal_K44 = transposed_K4F @ design_KF4 + 1e-12 * np.eye(4)  # w and a may be undetermined
    solution_K4 = np.linalg.solve(normal_K44, (transposed_K4F @ z)[..., None])[..., 0]
    error_K = (used_KF * (z - (design_KF4 @ solution_K4[..., None])[..., 0]) ** 2).sum(1)
    speed_K = solution_K4[:, 1] * (contact_K - t0_K)
    ends_K = (speed_K * (contact_K - t0_K) / 2 > least) & (-solution_K4[:, 2] < SLOWER * speed_K)
    cost_K = error_K + misfit * ((~used_KF).sum(1) + lands_K)
    best = int(np.argmin(np.where(lands_K & ~ends_K, np.inf, cost_K)))
    return solution_K4[best], float(t0_K[best]), float(contact_K[best] if lands_K[best] else t[-1])


def _height(parameters: np.ndarray, t: np.ndarray) -> np.ndarray:
    """z(t)."""
    z0, g, t0 = parameters[:3]
    contact, w, a = parameters[3:] if len(parameters) == 6 else (math.inf, 0.0, 0.0)
    since = np.maximum(t - contact, 0)
    return z0 - g * np.maximum(t - since - t0, 0) ** 2 / 2 + w * since + a * since**2 / 2


def fit_covariance(jacobian: np.ndarray, residual: np.ndarray, noise: float) -> np.ndarray:
    """The covariance of the fitted parameters. The variance of a point is that of the residuals, at least noise^2."""
    freedom = max(len(residual) - jacobian.shape[1], 1)
    return max(noise**2, float(residual @ residual) / freedom) * np.linalg.pinv(jacobian.T @ jacobian)


def _vertical(fall: Fall, drop_height: float | None, gravity: float) -> dict[str, Measure | None]:
    """The quantities of VERTICAL from the fit; sigmas by linear error propagation."""

    def numbers(p: np.ndarray) -> np.ndarray:
        scale, _, g, t0 = p[:4]
        contact, w = p[4:6] if fall.lands else (math.nan, math.nan)
        time = (contact if fall.lands else fall.end) - t0
        speed, depth = scale * g * time, scale * g * time**2 / 2
        sunk = depth - (math.nan if drop_height is None else drop_height)
        return np.array(
            [
                scale * g,
                t0 if fall.falls else math.nan,
                contact,
                scale * w / speed if fall.lands else math.nan,
                sunk if fall.lands or sunk > 0 else math.nan,
                speed**2 / 2 - gravity * depth,
                ((scale * w) ** 2 - speed**2) / 2,
            ]
        )

    p = np.append(1.0, fall.parameters)
    jacobian, covariance = approx_fprime(p, numbers), block_diag(SCALE**2, fall.covariance)
    sigma = np.sqrt(np.diag(jacobian @ covariance @ jacobian.T))
    pairs = zip(VERTICAL, numbers(p).tolist(), sigma.tolist(), strict=True)
    return {name: Measure(v, s) if math.isfinite(v) else None for name, v, s in pairs}


def _sideways(t: np.ndarray, x: np.ndarray, noise: float) -> dict[str, Measure | None]:
    """Drift (m/s) and jump (m) from one fit of x(t), so that a jump does not count as drift."""

    def solve(step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        design = np.stack([np.ones_like(t), t, step], 1)
        solution = np.linalg.lstsq(design, x, rcond=None)[0]
        return solution, x - design @ solution, design

    steps = np.tri(len(t))[:, 1:].T  # 1 from frame 1 on, from frame 2 on, ...
    solution, residual, design = min(map(solve, steps), key=lambda fit: float(fit[1] @ fit[1]))
    sigma = np.hypot(np.sqrt(np.diag(fit_covariance(design, residual, noise))), SCALE * solution)
    return {name: Measure(float(solution[i]), float(sigma[i])) for i, name in ((1, "drift"), (2, "jump"))}


def _size(t: np.ndarray, masks_FHW: np.ndarray) -> Measure:
    from scipy.stats import theilslopes  # it takes half a second to import

    slope, _, low, high = theilslopes(np.log(masks_FHW.sum((1, 2))) / 2, t, 0.68)
    return Measure(float(slope), math.hypot((high - low) / 2, TURNING / (t[-1] - t[0])))


def _unhidden(fallen_F: np.ndarray, masks_FHW: np.ndarray, surface: float) -> np.ndarray:
    """The distance (F,) in pixels that the whole body has fallen, if its visible part's centre has fallen `fallen_F`.

    The surface lies `surface` pixels below the body's first position. If a body sinks `cut` pixels into the surface,
    its visible mask is the first mask without the lowest `cut` rows. The visible centre and the visible area each give
    an estimate of `cut`. The smaller estimate is used, because rotation or a landing next to the surface changes only
    one of them.
    """
    rows, area_F = masks_FHW[0].sum(1).astype(float), masks_FHW.sum((1, 2))
    top, bottom = np.flatnonzero(rows)[[0, -1]] + [0, 1]
    sums = [np.append(0, np.cumsum(v[top:bottom])) for v in (rows, rows * (np.arange(len(rows)) + 0.5))]
    cut = np.linspace(0, bottom - top, 20 * (bottom - top), endpoint=False)
    area, moment = (np.interp(bottom - cut, np.arange(top, bottom + 1), v) for v in sums)
    raised = moment[0] / area[0] - moment / area  # how far the visible part's centre is above the body's
    seen = np.maximum.accumulate(surface + cut - raised)  # hiding a wide base first raises the visible centre
    by_centre_F = np.where(fallen_F < seen[-1], np.interp(fallen_F, seen, raised), 0.0)
    above = max(int(np.argmax(fallen_F > surface)) - 1, 0)  # the last frame that is not hidden
    by_area_F = np.interp(-area_F / area_F[above], -area / area[0], raised)
    return fallen_F + np.where(fallen_F > surface, np.minimum(by_centre_F, by_area_F), 0.0)


def at_edge(masks_FHW: np.ndarray) -> np.ndarray:
    """Whether (F,) the mask touches the picture's edge: then the body may be cut, and the centre is not the body's."""
    return masks_FHW.sum((1, 2)) > masks_FHW[:, 1:-1, 1:-1].sum((1, 2))
