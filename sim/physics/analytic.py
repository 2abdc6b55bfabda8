"""Free fall and bounces on the floor in closed form: an engine for balls, and the reference for tests of others.

SI units, z up; heights are those of a body's lowest point. There is no rotation or friction, so `simulate` refuses
scenes that need them: bodies that may touch each other, bodies other than balls that touch the floor, and gravity that
moves a body along the floor. Interventions, first velocities and pivots are refused too.

Shape letters: T times, N bodies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posttrain.core.recipe import Strict
from sim import geometry
from sim.assets import library
from sim.physics.base import unsupported
from sim.scene import FLOOR, Body, Contact, Intervention, Scene, Trajectory

GRAVITY = 9.81


def fall_time(height: float, gravity: float = GRAVITY) -> float:
    """Seconds that a fall from rest at `height` metres takes: t = sqrt(2 h / g)."""
    return float(np.sqrt(2 * height / gravity))


def drop_height(contact_time: float, gravity: float = GRAVITY) -> float:
    """Metres fallen from rest after `contact_time` seconds, PISA's Y0 = g t^2 / 2."""
    return gravity * contact_time**2 / 2


def impact_speed(height: float, gravity: float = GRAVITY) -> float:
    """Metres per second at the end of a fall from rest: v = sqrt(2 g h)."""
    return float(np.sqrt(2 * gravity * height))


@dataclass(frozen=True)
class Fall:
    """A body released at rest at `height` metres; each bounce keeps the share `restitution` of its speed."""

    height: float
    restitution: float = 0.0
    gravity: float = GRAVITY

    def contacts(self, until: float) -> list[float]:
        """Times of the contacts before `until` seconds; after the k-th, the flight lasts 2 e^k v / g.

        A restitution below 1 gives infinitely many contacts in finite time; flights under a microsecond are left out.
        """
        if self.gravity == 0:
            return []
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
        initial_height = np.where(touches == 0, self.height, 0.0)
        speed = np.where(touches == 0, 0.0, speed)
        height = initial_height + speed * since - self.gravity * since**2 / 2
        resting = (touches > 0) & (since > 2 * speed / self.gravity)
        return np.where(resting, 0.0, height), np.where(resting, 0.0, speed - self.gravity * since)


class Config(Strict):
    """No keys."""


DEFAULT = Config()


def simulate(scene: Scene, interventions: Sequence[Intervention] = (), config: Config = DEFAULT) -> Trajectory:
    """The motion from time 0 on: `dropped` bodies fall from rest, all others stay. `energy` is given at the frames.

    A contact's impulse is m v (1 + e). After the last contact the body rests, and the impulse includes its weight until
    the clip ends.

    Raises:
        UserError: the scene needs more than free fall and bounces, or there are interventions.
    """
    if interventions:
        name = type(interventions[0]).__name__
        raise unsupported("analytic", scene, f"{name} has no closed form")
    if scene.pivots or any(any(body.velocity) for body in scene.bodies):
        raise unsupported("analytic", scene, "bodies that are thrown or hang on a pivot are not falls from rest")
    times_T = np.arange(scene.frames) / scene.fps
    positions_TN3 = np.tile(np.array([body.position for body in scene.bodies]), (scene.frames, 1, 1))
    contacts: list[Contact] = []
    energy_T = np.zeros(scene.frames)
    for i, body in enumerate(scene.bodies):
        if body.role == "moved":
            continue
        speeds_T = np.zeros(scene.frames)
        if body.role == "dropped":
            positions_TN3[:, i], speeds_T, touches = _fall(scene, body, times_T)
            if touches and not library.is_round(body.asset):
                remedy = "write `physics: {name: bullet}`, or take balls (`shapes: [ball]`)"
                raise unsupported("analytic", scene, f"{body.asset} would rotate when it hits the floor", remedy)
            if touches and any(scene.gravity[:2]):
                raise unsupported("analytic", scene, "gravity drives a body along the floor, where friction acts")
            contacts += [Contact(time, i, FLOOR, impulse) for time, impulse in touches]
        energy_T += body.mass * (speeds_T**2 / 2 - positions_TN3[:, i] @ np.array(scene.gravity))
    _refuse_touch(scene)
    return Trajectory(
        positions_TN3=positions_TN3,
        quaternions_TN4=np.tile(np.array([body.orientation for body in scene.bodies]), (scene.frames, 1, 1)),
        contacts=tuple(sorted(contacts, key=lambda contact: contact.time)),
        energy=energy_T,
    )


def _fall(scene: Scene, body: Body, times_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float]]]:
    """Positions (T, 3) and speeds (T,) of a falling body, and (time, impulse) of its contacts with the floor."""
    gravity = np.array(scene.gravity)
    if gravity[2] >= 0:  # it never comes down
        flight_T3 = np.array(body.position) + gravity * times_T[:, None] ** 2 / 2
        return flight_T3, np.linalg.norm(gravity) * times_T, []
    restitution = body.restitution * scene.floor_restitution
    height = float(geometry.lowest(body)[2])
    fall = Fall(height, restitution, -float(gravity[2]))
    end = float(times_T[-1])
    heights_T, speeds_T = fall.at(times_T)
    positions_T3 = np.array(body.position) + gravity * times_T[:, None] ** 2 / 2
    positions_T3[:, 2] = body.position[2] - height + heights_T
    touches, speed = [], impact_speed(height, fall.gravity)
    for time in (times := fall.contacts(end)):
        touches.append((time, body.mass * speed * (1 + restitution)))
        speed *= restitution
    if times and times[-1] + 2 * speed / fall.gravity < end:  # it rests
        touches[-1] = times[-1], touches[-1][1] + body.mass * fall.gravity * (end - times[-1])
    sideways_T = np.hypot(gravity[0], gravity[1]) * times_T
    return positions_T3, np.hypot(speeds_T, sideways_T), touches


def _refuse_touch(scene: Scene) -> None:
    """Refuse a scene in which the bounding spheres of a dropped body and another body touch."""
    moving = [i for i, body in enumerate(scene.bodies) if body.role == "dropped"]
    fine_T = np.linspace(0, (scene.frames - 1) / scene.fps, 16 * scene.frames)
    still = {i: np.tile(body.position, (len(fine_T), 1)) for i, body in enumerate(scene.bodies)}
    paths = still | {i: _fall(scene, scene.bodies[i], fine_T)[0] for i in moving}
    reach = [
        body.size * (0.5 if library.is_round(body.asset) else np.linalg.norm(library.hull(body.asset), axis=1).max())
        for body in scene.bodies
    ]
    for i in moving:
        for j in range(len(scene.bodies)):
            if j != i and np.linalg.norm(paths[i] - paths[j], axis=1).min() < reach[i] + reach[j]:
                raise unsupported("analytic", scene, f"bodies {min(i, j)} and {max(i, j)} may touch")
