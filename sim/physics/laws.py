"""The laws of motions other than falls in closed form, the references for tests of engines. SI units, radians.

A ball of radius r is solid, with the moment of inertia 2/5 m r^2. Shape letters: T times.
"""

import math

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import ellipj, ellipk

from sim.physics.analytic import GRAVITY


def flight(velocity: tuple[float, float], times_T: np.ndarray, gravity: float = GRAVITY) -> np.ndarray:
    """Metres (T, 2) sideways and upwards of a thrown body: x = v_x t, z = v_z t - g t^2 / 2."""
    return np.outer(times_T, velocity) - np.outer(gravity * np.square(times_T) / 2, [0.0, 1.0])


def flight_time(height: float, upwards: float, gravity: float = GRAVITY) -> float:
    """Seconds until a body thrown `height` metres above the floor lands: t = (v_z + sqrt(v_z^2 + 2 g h)) / g."""
    return (upwards + math.sqrt(upwards**2 + 2 * gravity * height)) / gravity


def slide(slope: float, friction: float, gravity: float = GRAVITY) -> float:
    """Acceleration down a slope: a = g (sin s - mu cos s), or 0 if friction holds the body, mu >= tan s."""
    return max(0.0, gravity * (math.sin(slope) - friction * math.cos(slope)))


def roll(slope: float, gravity: float = GRAVITY) -> float:
    """Acceleration of a solid ball that rolls down a slope: a = 5/7 g sin s. It needs friction mu >= 2/7 tan s."""
    return 5 / 7 * gravity * math.sin(slope)


def pendulum_length(arm: float, radius: float) -> float:
    """The length of the point pendulum with the period of a ball of this radius on a stiff rod: l = L + 2 r^2 / (5 L).

    `arm` is L, from the pivot to the ball's centre.
    """
    return arm + 2 * radius**2 / (5 * arm)


def pendulum_period(length: float, amplitude: float, gravity: float = GRAVITY) -> float:
    """T = 4 sqrt(l / g) K(k), k = sin(amplitude / 2), K the complete elliptic integral of the first kind."""
    return float(4 * math.sqrt(length / gravity) * ellipk(math.sin(amplitude / 2) ** 2))


def pendulum_angle(length: float, amplitude: float, times_T: np.ndarray, gravity: float = GRAVITY) -> np.ndarray:
    """The angle (T,) from straight down after a release at rest: sin(angle / 2) = k sn(K(k) - sqrt(g / l) t, k)."""
    k = math.sin(amplitude / 2)
    sn = ellipj(ellipk(k**2) - math.sqrt(gravity / length) * np.asarray(times_T), k**2)[0]
    return np.asarray(2 * np.arcsin(k * sn))


def collision(masses: tuple[float, float], before: tuple[float, float], restitution: float) -> tuple[float, float]:
    """Velocities after a head-on collision: m u + m' u' = m v + m' v' and u' - u = e (v - v')."""
    (m, m_), (v, v_) = masses, before
    mean, apart = (m * v + m_ * v_) / (m + m_), restitution * (v - v_)
    return mean - m_ / (m + m_) * apart, mean + m / (m + m_) * apart


def margins(centres: list[float], masses: list[float], width: float) -> list[float]:
    """By how many metres each joint of a tower of boxes holds, from the lowest joint up.

    The boxes, from the lowest up, have the same `width` and their `centres` along one axis. The boxes above a joint
    stand on the overlap of the two boxes that meet there, from l to r, if their common centre of mass c lies in it:

        m = min(c - l, r - c);   the tower stands if all m > 0, and topples at a joint with m < 0
    """
    found = []
    for k in range(1, len(centres)):
        c = float(np.average(centres[k:], weights=masses[k:]))
        left, right = max(centres[k - 1 : k + 1]) - width / 2, min(centres[k - 1 : k + 1]) + width / 2
        found.append(min(c - left, right - c))
    return found


def tipping(centre: tuple[float, float], inertia: float, times_T: np.ndarray, gravity: float = GRAVITY) -> np.ndarray:
    """The angle (T,) by which a rigid body has tipped over an edge, from rest at time 0.

    With the centre of mass at `centre` (beside and above the edge, metres), and `inertia` per mass about the edge, in
    m^2:

        angle'' = g (x cos angle + z sin angle) / inertia
    """

    def slope(_: float, state: np.ndarray) -> list[float]:
        angle, rate = state
        return [rate, gravity * (centre[0] * math.cos(angle) + centre[1] * math.sin(angle)) / inertia]

    end = float(np.max(times_T))
    return np.asarray(solve_ivp(slope, (0.0, end), [0.0, 0.0], t_eval=times_T, rtol=1e-8, atol=1e-10).y[0])
