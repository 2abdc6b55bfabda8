"""The scorecards of one clip of a throw, a ramp, a pendulum, a collision or a tower in SI units, as physics.py for
falls.

A level pinhole camera sees a body that moves in a plane at `depth` Z, so a pixel is Z / focal metres. Positions are
those of the mask's centre, x to the right and z up. The laws are fitted by least squares:

    throw      x(t) = x0 + vx t,   z(t) = z0 + vz t - g t^2 / 2                       t <= t_c, the first contact
    ramp       s(t) = s0 + v t + a t^2 / 2 down the slope, n(t) = n0 + c s away from it     until the foot of the ramp
    pendulum   angle(t) = exp(gain t) p(t),   sin(p / 2) = k sn(K(k) - sqrt(g / l) t, k),   k = sin(amplitude / 2)
    collision  x(t) = x0 + v min(t, t_c) + u max(t - t_c, 0)                          the same t_c for both bodies
    tower      angle'' = g (x cos angle + z sin angle) / I, from rest                 until TIPPED

and the scorecards have

    throw      g  m/s^2 · vx, vz  m/s, launch velocity · contact  s, t_c · sideways  m/s^2, x'' in flight, 0 in truth
    ramp       acceleration  m/s^2, a · friction  1, tan s - a / (G cos s) for a slope s and a world of gravity G ·
               share  1, a / (G sin s), 5/7 for a ball that rolls · angle  degrees, between path and slope, 0 in truth ·
               lift  m, n at the foot, 0 in truth, below 0 in the ramp
    pendulum   period  s, 4 sqrt(l / g) K(k) · g  m/s^2 · amplitude  degrees · gain  1/s, 0 in truth ·
               arm  m, mean distance from the pivot · stretch  m/s, its slope, 0 in truth
    collision  v, v_2, u, u_2  m/s, before and after · contact  s, t_c · momentum  1, gained at the collision, as a
               share of m |v| + m_2 |v_2|, 0 in truth · restitution  1, (u_2 - u) / (v - v_2) · energy  1, kinetic
               energy after the collision, as a share of that before · overlap  m, of the two balls at t_c, 0 in truth
    tower      g  m/s^2, of one that topples · fallen  m, how far the top box has come down at the end
    all        permanence  1, share of the clip's time in which the target is visible

A sigma is one standard deviation, to first order: that of the fit, and SCALE. Frames in which a mask touches the
picture's edge are left out.

Shape letters: F frames, H W pixels.
"""

import math
from collections.abc import Mapping

import numpy as np
from scipy.integrate import solve_ivp
from scipy.optimize import approx_fprime, least_squares
from scipy.special import ellipj, ellipk

from posttrain.metrics.physics import NOISE, SCALE, Measure, at_edge, checked, fit_covariance
from posttrain.metrics.pisa import MISFIT, after_contact, ascending, centroids, durations, frame_step

Card = dict[str, Measure | None]
THROW = ("g", "vx", "vz", "contact", "sideways", "permanence")
RAMP = ("acceleration", "friction", "share", "angle", "lift", "permanence")
PENDULUM = ("period", "g", "amplitude", "gain", "arm", "stretch", "permanence")
COLLISION = ("v", "v_2", "u", "u_2", "contact", "momentum", "restitution", "energy", "overlap", "permanence")
TOWER = ("g", "fallen", "permanence")
MIRRORED = ("vx", "sideways", "amplitude")  # signed by the side: average their magnitudes
WAY = 0.95  # share of the way down a ramp that is fitted
TIPPED = 0.5  # radians; later the boxes of a tower slide, or part from each other
BOX = 0.06  # as SCALE, for the boxes of a tower: a box that turns shows other sides
LANDS = 0.3  # m/s; a smaller change of the vertical velocity is not taken for a contact


def scorecard(
    motion: str,
    law: Mapping[str, float],
    masks_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    camera: tuple[float, float, float],
    others_FHW: np.ndarray | None = None,
) -> Card:
    """The scorecard of a clip of a world with a law; further arguments as `throw`.

    Args:
        motion, law: of the clip's row (sim/worlds/setups.py).
        camera: its position in the world, metres.
        others_FHW: the masks of the second ball of a collision; without them a collision is not measured.

    Returns:
        The quantities of the motion; empty if `motion` has no scorecard here.
    """
    seen = masks_FHW, times_F, focal, depth

    def point(name: str) -> tuple[float, float]:
        return law[f"{name}_x"] - camera[0], law[f"{name}_z"] - camera[2]

    match motion:
        case "throw":
            return throw(*seen)
        case "slide" | "roll":
            return ramp(*seen, law["slope"], law["length"], law["g"], law["front"])
        case "swing":
            return pendulum(*seen, point("pivot"), law["length"])
        case "collide" if others_FHW is not None:
            return collision(masks_FHW, others_FHW, times_F, focal, depth, law["mass"], law["mass_2"])
        case "stand":
            return tower(*seen, law["front"])
        case "topple":
            centre = law["centre_x"], law["centre_z"]
            return tower(*seen, law["front"], law["side"], point("edge"), centre, law["inertia"])
    return {}


def throw(masks_FHW: np.ndarray, times_F: np.ndarray, focal: float, depth: float) -> Card:
    """The scorecard of a throw.

    Args:
        masks_FHW: bool or 0/1, the body; empty where it is not visible.
        times_F: seconds at which the frames are shown, ascending from 0.
        focal: focal length in the masks' pixels.
        depth: metres along the optical axis from the camera to the body.

    Returns:
        THROW; None for what cannot be measured, because fewer than four frames show the whole body in flight.
    """
    card, t, x, z, pixel = _path(THROW, masks_FHW, times_F, focal, depth)
    if len(t) < 4:
        return card
    frame = frame_step(np.asarray(times_F, dtype=float))
    contact = _landing(t, x, z, frame, (MISFIT * np.shape(masks_FHW)[1] * pixel) ** 2)
    flying = t <= contact
    if flying.sum() < 4:
        return card
    t, x, z = t[flying], x[flying], z[flying]
    one = np.ones_like(t)
    card["g"], card["vz"] = (_fit(np.stack([one, t, -(t**2) / 2], 1), z, pixel)[i] for i in (2, 1))
    card["vx"] = _fit(np.stack([one, t], 1), x, pixel)[1]
    card["sideways"] = _fit(np.stack([one, t, t**2 / 2], 1), x, pixel)[2]
    if contact < times_F[-1]:
        card["contact"] = Measure(contact, frame / 4)
    return card


def ramp(
    masks_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    slope: float,
    length: float,
    gravity: float = 9.81,
    front: float = 0.0,
) -> Card:
    """The scorecard of a body on a ramp; further arguments as `throw`.

    Args:
        slope: degrees by which the ramp falls, above 0 if it falls to the right, below 0 to the left.
        length: metres along the slope that the body moves until it touches the floor.
        gravity: G, metres per second squared.
        front: metres from the body's centre to the flat side that faces the camera; 0 for a ball. As that side is
            nearer and fills most of the mask, the mask's centre is taken to be half of `front` nearer than the body's.

    Returns:
        RAMP; None for what cannot be measured, because fewer than four frames show the whole body on the ramp.
    """
    if not 0 < abs(slope) < 90:
        raise ValueError(f"slope must be between 0 and 90 degrees to one side, got {slope}")
    checked(masks_FHW, length=length, gravity=gravity)
    card, t, x, z, pixel = _path(RAMP, masks_FHW, times_F, focal, depth - front / 2)
    if len(t) < 4:
        return card
    tilt, side = math.radians(abs(slope)), math.copysign(1.0, slope)
    s, n = side * x * math.cos(tilt) - z * math.sin(tilt), side * x * math.sin(tilt) + z * math.cos(tilt)
    beyond = s - s[0] >= WAY * length
    end = int(np.argmax(beyond)) if beyond.any() else len(t)
    if end < 4:
        return card
    t, s, n = t[:end], s[:end], n[:end]
    acceleration = _fit(np.stack([np.ones_like(t), t, t**2 / 2], 1), s, pixel)[2]
    card["acceleration"] = acceleration
    down, normal = gravity * math.sin(tilt), gravity * math.cos(tilt)
    card["share"] = Measure(acceleration.value / down, acceleration.sigma / down)
    card["friction"] = Measure(math.tan(tilt) - acceleration.value / normal, acceleration.sigma / normal)
    if np.ptp(s) > 2 * pixel:
        away = _fit(np.stack([np.ones_like(s), s - s[0]], 1), n, pixel)[1]
        card["angle"] = Measure(math.degrees(math.atan(away.value)), math.degrees(away.sigma))
        card["lift"] = Measure(away.value * length, away.sigma * length)
    return card


def pendulum(
    masks_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    pivot: tuple[float, float],
    length: float,
) -> Card:
    """The scorecard of a pendulum that is released at rest at time 0; further arguments as `throw`.

    Args:
        pivot: metres to the right of the camera and above it.
        length: l, metres, of the point pendulum with the same period.

    Returns:
        PENDULUM; None for what cannot be measured, because fewer than six frames show the whole body, or it does not
        swing.
    """
    checked(masks_FHW, length=length)
    card, t, x, z, pixel = _path(PENDULUM, masks_FHW, times_F, focal, depth)
    if len(t) < 6:
        return card
    x, z = x - pivot[0], z - pivot[1]
    arm = np.hypot(x, z)
    card["arm"], card["stretch"] = _fit(np.stack([np.ones_like(t), t - t.mean()], 1), arm, pixel)
    angle = np.arctan2(x, -z)
    if np.ptp(angle) * arm.mean() < 4 * pixel:
        return card

    def swing(p: np.ndarray) -> np.ndarray:
        rate, amplitude, gain = p
        k = math.sin(abs(amplitude) / 2)
        sn = ellipj(ellipk(k**2) - rate * t, k**2)[0]
        return np.asarray(np.exp(gain * t) * np.sign(amplitude) * 2 * np.arcsin(k * sn))

    bounds = [0.1, -3.0, -5.0], [50.0, 3.0, 5.0]
    first = float(np.clip(angle[:2].mean(), -2.9, 2.9))
    rates = np.geomspace(0.5, 30.0, 80)
    best = min(rates, key=lambda rate: float(((swing(np.array([rate, first, 0.0])) - angle) ** 2).sum()))
    weight = arm / pixel  # so that residuals are pixels
    fit = least_squares(lambda p: (swing(p) - angle) * weight, [best, first, 0.0], x_scale="jac", bounds=bounds)
    spread = fit_covariance(fit.jac, fit.fun, NOISE)

    def numbers(p: np.ndarray) -> np.ndarray:
        rate, amplitude, gain = p
        return np.array(
            [4 * ellipk(math.sin(amplitude / 2) ** 2) / rate, rate**2 * length, math.degrees(amplitude), gain]
        )

    jacobian = approx_fprime(fit.x, numbers)
    sigma = np.sqrt(np.diag(jacobian @ spread @ jacobian.T))
    pairs = zip(("period", "g", "amplitude", "gain"), numbers(fit.x).tolist(), sigma.tolist(), strict=True)
    return card | {name: Measure(value, s) for name, value, s in pairs}


def collision(
    masks_FHW: np.ndarray,
    others_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    mass: float,
    mass_2: float,
) -> Card:
    """The scorecard of two balls that collide head on along the picture's horizontal; further arguments as `throw`.

    Args:
        others_FHW: the masks of the second ball.
        mass, mass_2: kilograms.

    Returns:
        COLLISION; None for what cannot be measured, because fewer than six frames show both balls, or nothing happens.
    """
    checked(masks_FHW, mass=mass, mass_2=mass_2)
    card, t, x, _, pixel = _path(COLLISION, masks_FHW, times_F, focal, depth)
    _, t_2, x_2, _, _ = _path(COLLISION, others_FHW, times_F, focal, depth)
    both, i, j = np.intersect1d(t, t_2, return_indices=True)
    if len(both) < 6:
        return card
    t, x, x_2 = both, x[i], x_2[j]
    frame = frame_step(np.asarray(times_F, dtype=float))

    def design(contact: float) -> np.ndarray:
        return np.stack([np.ones_like(t), np.minimum(t, contact), np.maximum(t - contact, 0)], 1)

    def misfit(contact: float) -> float:
        return float(
            sum(((y - (d := design(contact)) @ np.linalg.lstsq(d, y, rcond=None)[0]) ** 2).sum() for y in (x, x_2))
        )

    contact = min(np.arange(t[0] + frame, t[-1] - frame, frame / 20), key=misfit, default=math.nan)
    if math.isnan(contact):
        return card
    (x0, v, u), (x0_2, v_2, u_2) = (_fit(design(contact), y, pixel) for y in (x, x_2))
    card |= {"v": v, "v_2": v_2, "u": u, "u_2": u_2, "contact": Measure(float(contact), frame / 10)}
    radii = [math.sqrt(_area(masks) / math.pi) * pixel for masks in (masks_FHW, others_FHW)]
    apart = abs(x0_2.value + v_2.value * contact - x0.value - v.value * contact)
    closing = abs(v.value - v_2.value)
    card["overlap"] = Measure(sum(radii) - apart, math.hypot(SCALE * sum(radii), NOISE * pixel, closing * frame / 10))
    speeds, sigma = np.array([v, v_2, u, u_2]).T

    def numbers(p: np.ndarray) -> np.ndarray:
        before, after = p[:2], p[2:]
        masses = np.array([mass, mass_2])
        gained = masses @ (after - before) / (masses @ np.abs(before))
        return np.array([gained, (p[3] - p[2]) / (p[0] - p[1]), masses @ after**2 / (masses @ before**2)])

    if closing > 3 * math.hypot(v.sigma, v_2.sigma):
        spread = np.sqrt(((approx_fprime(speeds, numbers) * sigma) ** 2).sum(1))
        pairs = zip(("momentum", "restitution", "energy"), numbers(speeds).tolist(), spread.tolist(), strict=True)
        card |= {name: Measure(value, s) for name, value, s in pairs}
    return card


def tower(
    masks_FHW: np.ndarray,
    times_F: np.ndarray,
    focal: float,
    depth: float,
    front: float,
    side: float = 0.0,
    edge: tuple[float, float] = (0.0, 0.0),
    centre: tuple[float, float] = (0.0, 0.0),
    inertia: float = 1.0,
) -> Card:
    """The scorecard of a tower of boxes; further arguments as `throw`, with the masks of the top box.

    Args:
        front: as in `ramp`.
        side: 1 if it must topple to the right, -1 to the left, 0 if it must stand. The rest is for towers that topple.
        edge: that over which the upper part tips, metres to the right of the camera and above it.
        centre: x and z, metres from the edge to the upper part's centre of mass, away from the tower and up.
        inertia: I, m^2, the moment of inertia of the upper part about the edge, per mass.

    Returns:
        TOWER; None for what cannot be measured, because the box is not visible at the end, or the tower must stand, or
        it does not tip.
    """
    checked(masks_FHW, inertia=inertia)
    card, t, x, z, pixel = _path(TOWER, masks_FHW, times_F, focal, depth - front / 2)
    if len(t) < 2:
        return card
    if t[-1] == times_F[-1]:
        fallen = float(z[0] - z[-1])
        card["fallen"] = Measure(fallen, math.hypot(NOISE * pixel * math.sqrt(2), BOX * fallen))
    if not side:
        return card
    x, z = side * (x - edge[0]), z - edge[1]
    angle = np.unwrap(np.arctan2(x, z))
    angle -= angle[0]
    beyond = angle > TIPPED
    end = int(np.argmax(beyond)) if beyond.any() else len(t)
    if end < 4 or angle[end - 1] * np.hypot(x[0], z[0]) < 1.5 * pixel:
        return card

    def slope(_: float, state: np.ndarray) -> list[float]:
        return [state[1], (centre[0] * math.cos(state[0]) + centre[1] * math.sin(state[0])) / inertia]

    # angle(t) is a function of sqrt(g) t, so it is integrated once, with g = 1
    scaled = np.linspace(0, 10 * t[end - 1], 2000)
    curve = solve_ivp(slope, (0.0, scaled[-1]), [0.0, 0.0], t_eval=scaled, rtol=1e-6).y[0]
    weight = np.hypot(x[0], z[0]) / pixel

    def misfit(p: np.ndarray) -> np.ndarray:
        return np.asarray((np.interp(math.sqrt(p[0]) * t[:end], scaled, curve) - angle[:end]) * weight)

    first = min(np.geomspace(0.2, 80.0, 60), key=lambda g: float((misfit(np.array([g])) ** 2).sum()))
    fit = least_squares(misfit, [first], bounds=([0.05], [99.0]))
    sigma = float(np.sqrt(fit_covariance(fit.jac, fit.fun, NOISE)[0, 0]))
    card["g"] = Measure(float(fit.x[0]), math.hypot(sigma, BOX * float(fit.x[0])))
    return card


def _path(
    names: tuple[str, ...], masks_FHW: np.ndarray, times_F: np.ndarray, focal: float, depth: float
) -> tuple[Card, np.ndarray, np.ndarray, np.ndarray, float]:
    """An empty card with permanence; t, x and z of the frames that show the whole body; metres per pixel.

    x and z are metres to the right of and above the picture's centre.

    Raises:
        ValueError: masks_FHW is not (frames, H, W) or holds other values than a mask; the times do not fit or ascend; a
            number is not positive.
    """
    masks = checked(masks_FHW, focal=focal, depth=depth)
    times_F, pixel = ascending(times_F, len(masks)), depth / focal
    seen = masks.any((1, 2))
    card: Card = dict.fromkeys(names)
    card["permanence"] = Measure(float(np.average(seen, weights=durations(times_F))), 0.0)
    whole = seen & ~at_edge(masks)
    x, y = (centroids(masks[whole]) + 0.5 - np.array([masks.shape[2], masks.shape[1]]) / 2).T * pixel
    return card, times_F[whole], x, -y, pixel


def _fit(design: np.ndarray, y: np.ndarray, pixel: float) -> list[Measure]:
    """Least squares of y (metres): each coefficient with its sigma."""
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    sigma = np.sqrt(np.diag(fit_covariance(design, y - design @ solution, NOISE * pixel)))
    return [Measure(float(v), math.hypot(s, SCALE * v)) for v, s in zip(solution, sigma, strict=True)]


def _landing(t: np.ndarray, x: np.ndarray, z: np.ndarray, frame: float, misfit: float) -> float:
    """Seconds until the first contact; the last frame's time if there is none.

    After the contact t_c, other parabolas are fitted to the first frames (AFTER of metrics/pisa.py). As in physics.py,
    frames that are left out cost a misfit each, and a contact costs one more.
    """
    after = after_contact(frame) + 0.1 * frame

    def cost(contact: float) -> float:
        s, since = np.minimum(t, contact), np.maximum(t - contact, 0)
        used = since <= after
        columns = [np.ones_like(t), s, -(s**2) / 2, since, since**2 / 2]
        total = misfit * float((~used).sum() + (contact < t[-1]))
        for y, chosen in ((z, columns), (x, [columns[i] for i in (0, 1, 3)])):
            design = np.stack(chosen, 1)[used]
            solution = np.linalg.lstsq(design, y[used], rcond=None)[0]
            total += float(((y[used] - design @ solution) ** 2).sum())
            if y is z and contact < t[-1]:
                before = solution[1] - solution[2] * contact
                if solution[3] - before < LANDS:
                    return math.inf
        return total

    candidates = [*np.arange(t[0] + 2.5 * frame, t[-1] - frame / 2, frame / 4), float(t[-1])]
    return float(min(candidates, key=cost))


def _area(masks_FHW: np.ndarray) -> float:
    """The median area in pixels of the masks that are not empty."""
    area_F = np.asarray(masks_FHW).sum((1, 2))
    return float(np.median(area_F[area_F > 0]))
