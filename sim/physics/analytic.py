"""Free fall and bounces of one body over the floor in closed form: what the other engines are tested against.

SI units, z up, heights are those of the body's lowest point. Rotation and friction play no part.
"""

from dataclasses import dataclass

import numpy as np

GRAVITY = 9.81


def fall_time(height: float, gravity: float = GRAVITY) -> float:
    """Seconds from rest at `height` metres to the touch: t = sqrt(2 h / g)."""
    return float(np.sqrt(2 * height / gravity))


def drop_height(contact_time: float, gravity: float = GRAVITY) -> float:
    """Metres fallen from rest after `contact_time` seconds, PISA's Y0 = g t^2 / 2."""
    return gravity * contact_time**2 / 2


def impact_speed(height: float, gravity: float = GRAVITY) -> float:
    """Metres per second at the first touch: v = sqrt(2 g h)."""
    return float(np.sqrt(2 * gravity * height))


@dataclass(frozen=True)
class Fall:
    """A body released at rest at `height` metres whose touches return the share `restitution` of its speed."""

    height: float
    restitution: float = 0.0
    gravity: float = GRAVITY

    def contacts(self, until: float) -> list[float]:
        """Times of the touches before `until` seconds; after the k-th, the flight lasts 2 e^k v / g.

        A restitution below 1 gives infinitely many touches in finite time; flights under a microsecond are left out.
        """
        time, flight, times = fall_time(self.height, self.gravity), 2 * fall_time(self.height, self.gravity), []
        while time < until:
            times.append(time)
            flight *= self.restitution
            if flight < 1e-6:
                break
            time += flight
        return times

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Height (m) and upward velocity (m/s) at `times` (T,) seconds after the release."""
        times = np.asarray(times, dtype=np.float64)
        contacts = np.array(self.contacts(float(times.max(initial=0.0)) + 1e-12))
        touches = np.searchsorted(contacts, times, side="right")
        speed = impact_speed(self.height, self.gravity) * self.restitution**touches
        since = times - np.concatenate([[0.0], contacts])[touches]
        start = np.where(touches == 0, self.height, 0.0)
        speed = np.where(touches == 0, 0.0, speed)
        height = start + speed * since - self.gravity * since**2 / 2
        resting = (touches > 0) & (since > 2 * speed / self.gravity)
        return np.where(resting, 0.0, height), np.where(resting, 0.0, speed - self.gravity * since)
