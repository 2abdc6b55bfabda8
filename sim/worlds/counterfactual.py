"""Clips that break one law by a known amount: groups of a true drop scene and its violations.

All clips of a group have the scene, the camera and the first frame of the true clip (drop.py); each clip but the true
one breaks one law. A violation's `value` is a physical quantity; its `severity` measures how wrong the clip is:

    severity = min(1, d / d_static),   d = mean over frames and bodies of |x - x_true|, metres,

where x are the bodies' centres of mass and d_static is the d of the clip in which nothing moves. If the target vanishes
or melts, its centre may be right; then d is the number of pixels in which its mask differs from the true one, mean over
frames.

Shape letters: T frames, N bodies.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from sim.physics import analytic
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.scene import FLOOR, AddEnergy, Clip, Hold, Intervention, Scene, Teleport, Trajectory, Tunnel
from sim.worlds import drop
from sim.worlds.base import Draw, Take

# kind of violation -> meaning of its value, least and largest value, and a sweep from mild to severe
Table = dict[str, tuple[str, tuple[float, float], tuple[float, ...]]]
VIOLATIONS: Table = {
    "weak_gravity": ("of g", (0.0, 1.0), (0.8, 0.6, 0.4, 0.2)),
    "strong_gravity": ("of g", (1.0, 20.0), (1.25, 1.6, 2.5, 5.0)),
    "sideways_gravity": ("degrees from down", (0.0, 90.0), (1.0, 3.0, 10.0, 30.0)),
    "upward_gravity": ("of g, upwards", (0.0, 10.0), (0.05, 0.2, 0.5, 1.0)),
    "hover": ("of the fall missing", (0.0, 1.0), (0.1, 0.3, 0.6, 1.0)),
    "delay": ("s until the release", (0.0, 60.0), (0.125, 0.25, 0.5, 1.0)),
    "tunnel_floor": ("m into the floor", (0.0, 10.0), (0.05, 0.1, 0.2, 0.4)),
    "tunnel_pile": ("m into the pile", (0.0, 10.0), (0.1, 0.2, 0.25, 0.3)),
    "more_bounce": ("of the speed kept at a bounce off the floor", (0.0, 1.0), (0.7, 0.8, 0.9, 1.0)),
    "less_bounce": ("of the bounce kept", (0.0, 1.0), (0.95, 0.7, 0.4, 0.0)),
    "energy": ("m of height gained at the first contact", (0.0, 10.0), (0.1, 0.2, 0.4, 0.8)),
    "teleport": ("m sideways at half the time of the fall", (0.0, 10.0), (0.1, 0.2, 0.4, 0.8)),
    "vanish": ("s gone at the end", (0.0, 60.0), (0.25, 0.5, 1.0, 1.75)),
    "melt": ("of the size left at the end", (0.0, 1.0), (0.8, 0.6, 0.4, 0.2)),
    "slow_motion": ("of the speed", (0.0, 1.0), (0.8, 0.6, 0.4, 0.2)),
}
SEEN = ("vanish", "melt")  # their severity is measured by masks, since their paths are right
RIGHT = 0.005  # a clip with a lower severity violates nothing and is left out


@dataclass(frozen=True)
class Violation:
    kind: str
    value: float


class Config(drop.Config):
    """`violations`: the values of each kind (default: the sweeps of VIOLATIONS). tunnel_pile needs a pile."""

    violations: dict[str, Annotated[tuple[float, ...], Field(min_length=1)]] = Field(
        default_factory=lambda: {kind: sweep for kind, (_, _, sweep) in VIOLATIONS.items()}
    )
    # clips of a group at most, with the true one; others are drawn; None: all. Clips that violate nothing are left out
    members: int | None = Field(None, ge=2)

    @field_validator("violations")
    @classmethod
    def _possible(cls, violations: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        return possible(violations, VIOLATIONS)


def possible(violations: dict[str, tuple[float, ...]], table: Table) -> dict[str, tuple[float, ...]]:
    """The violations, checked: `table` has their kinds, and their values are in its ranges."""
    if unknown := [kind for kind in violations if kind not in table]:
        known = ", ".join(table)
        raise PydanticCustomError("part", f"no violation is called {unknown[0]}; choose from {known}")
    for kind, values in violations.items():
        meaning, (least, largest), _ = table[kind]
        if wrong := [value for value in values if not least <= value <= largest]:
            raise PydanticCustomError("part", f"{kind} is {wrong[0]:g}, not {least:g} to {largest:g} {meaning}")
    return violations


def group(draw: Draw, config: Config, simulate: Simulate) -> tuple[Scene, Trajectory, list[Violation]]:
    """A true scene, its motion, and the violations of the group's other clips.

    Raises:
        UserError: as `drop.make`.
    """
    scene, trajectory = drop.make(draw, config, simulate)
    pile = any(body.role == "pile" for body in scene.bodies)
    violations = {kind: values for kind, values in config.violations.items() if pile or kind != "tunnel_pile"}
    return scene, trajectory, chosen(draw, violations, config.members)


def chosen(draw: Draw, violations: Mapping[str, Sequence[float]], members: int | None) -> list[Violation]:
    """The violations of a group of `members` clips with the true one: all of them (None), or as many as there is space
    for, drawn."""
    every = [Violation(kind, value) for kind, values in violations.items() for value in values]
    if members is None or members - 1 >= len(every):
        return every
    return [every[i] for i in sorted(draw.rng.choice(len(every), members - 1, replace=False).tolist())]


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """The clips of a group, the true one first."""
    scene, true, violations = group(draw, config, simulate)
    yield from films(
        scene, true, violations, lambda violation: violate(scene, true, violation, simulate), VIOLATIONS, render
    )


def films(
    scene: Scene,
    true: Trajectory,
    violations: Sequence[Violation],
    broken: Callable[[Violation], Trajectory],
    table: Table,
    render: Render,
    motion: str = "drop",
    labels: Mapping[str, Any] | None = None,
) -> Iterator[Take]:
    """The clips of a group: the true one, and one of each violation, but for those that violate nothing.

    Args:
        broken: gives the motion of a violation.
        table: the kinds of violation, as VIOLATIONS.
        labels: further labels of all clips.
    """
    truth = render(scene, true)
    contact = contact_time(scene, true)
    height = None if contact is None else analytic.drop_height(contact, abs(scene.gravity[2]))
    shared = {"group": scene.seed, **(labels or {})}
    yield Take(scene, true, truth, shared | {"violation": None}, motion)
    for violation in violations:
        trajectory = broken(violation)
        clip = render(scene, trajectory)
        clip.rgb[0] = truth.rgb[0]  # else a wider motion has coarser shadows, which would reveal it
        wrong = severity(scene, violation.kind, clip, trajectory, true, truth)
        if wrong < RIGHT:  # for example, the target never hits the pile that it would tunnel through
            continue
        seen = float((clip.instances == scene.target + 1).any(axis=(1, 2)).mean())
        described = {
            "kind": violation.kind,
            "value": violation.value,
            "meaning": table[violation.kind][0],
            "severity": wrong,
            "seen": seen,
        }
        yield Take(scene, trajectory, clip, shared | {"violation": described, "drop_height": height}, motion)


def violate(scene: Scene, true: Trajectory, violation: Violation, simulate: Simulate) -> Trajectory:
    """The scene's motion with one law broken. Gravity, time and release change for all bodies, the rest for the target.

    Raises:
        UserError: the engine cannot simulate the violation.
    """
    kind, value = violation.kind, violation.value
    times_T = np.arange(scene.frames) / scene.fps
    down = abs(scene.gravity[2])
    target = scene.bodies[scene.target]
    match kind:
        case "weak_gravity" | "strong_gravity":
            return simulate(replace(scene, gravity=(0.0, 0.0, -down * value)))
        case "upward_gravity":
            return simulate(replace(scene, gravity=(0.0, 0.0, down * value)))
        case "sideways_gravity":
            tilt = math.radians(value)
            gravity = (_inwards(scene) * down * math.sin(tilt), 0.0, -down * math.cos(tilt))
            return simulate(replace(scene, gravity=gravity))
        case "slow_motion":
            if value == 0:
                return static(scene, simulate)
            slow = simulate(replace(scene, fps=scene.fps / value))
            return replace(slow, contacts=tuple(replace(c, time=c.time / value) for c in slow.contacts))
        case "delay":
            held = min(round(value * scene.fps), scene.frames - 1)
            source_T = np.maximum(np.arange(scene.frames) - held, 0)
            late = tuple(replace(c, time=c.time + held / scene.fps) for c in true.contacts)
            return replace(
                true,
                positions_TN3=true.positions_TN3[source_T],
                quaternions_TN4=true.quaternions_TN4[source_T],
                contacts=tuple(c for c in late if c.time <= times_T[-1]),
            )
        case "more_bounce" | "less_bounce":
            kept = target.restitution * scene.floor_restitution
            # so that the product with the floor's restitution is `value`; with 0 nothing bounces off the floor
            more = max(value, kept) / (scene.floor_restitution or 1.0)
            other = replace(target, restitution=more if kind == "more_bounce" else value * target.restitution)
            bodies = [other if body is target else body for body in scene.bodies]
            return simulate(replace(scene, bodies=tuple(bodies)))
        case "vanish" | "melt":
            scales_TN = np.ones((scene.frames, len(scene.bodies)))
            if kind == "vanish":
                scales_TN[(times_T > times_T[-1] - value) & (times_T > 0), scene.target] = (
                    0  # except in frame 0, which all clips share
                )
            else:
                scales_TN[:, scene.target] = 1 + (value - 1) * times_T / times_T[-1]
            return replace(true, scales_TN=scales_TN)
        case _:
            return simulate(scene, [intervention(scene, true, violation)])


def intervention(scene: Scene, true: Trajectory, violation: Violation) -> Intervention:
    """The engine's intervention for hover, tunnel_floor, tunnel_pile, energy or teleport."""
    value, target = violation.value, scene.target
    contact = contact_time(scene, true)
    contact = (scene.frames - 1) / scene.fps if contact is None else contact
    match violation.kind:
        case "hover":
            fall = abs(scene.gravity[2]) * contact**2 / 2 - scene.bodies[target].velocity[2] * contact
            return Hold(target, height=scene.bodies[target].position[2] - (1 - value) * fall)
        case "tunnel_floor":
            return Tunnel(target, (FLOOR,), depth=value)
        case "tunnel_pile":
            pile = tuple(i for i, body in enumerate(scene.bodies) if body.role == "pile")
            return Tunnel(target, pile, depth=value)
        case "energy":
            return AddEnergy(target, height=value)
        case _:
            return Teleport(target, time=contact / 2, offset=(_inwards(scene) * value, 0.0, 0.0))


def _inwards(scene: Scene) -> float:
    """The direction from the target to the picture's centre: -1 left, 1 right."""
    return -1.0 if scene.bodies[scene.target].position[0] > 0 else 1.0


def contact_time(scene: Scene, trajectory: Trajectory) -> float | None:
    """Seconds until the target touches anything, None if it never does."""
    return next((c.time for c in trajectory.contacts if scene.target in (c.a, c.b)), None)


def static(scene: Scene, simulate: Simulate) -> Trajectory:
    """The scene's trajectory if nothing moves."""
    return simulate(replace(scene, bodies=tuple(replace(body, role="moved") for body in scene.bodies)))


def deviation(positions_TN3: np.ndarray, true_TN3: np.ndarray) -> float:
    """Distance in metres of the bodies from their true positions, mean over frames and bodies."""
    return float(np.linalg.norm(positions_TN3 - true_TN3, axis=-1).mean())


def mask_deviation(mask_THW: np.ndarray, true_THW: np.ndarray) -> float:
    """Number of pixels in which two masks differ, mean over frames."""
    return float((mask_THW != true_THW).sum(axis=(1, 2)).mean())


def severity(scene: Scene, kind: str, clip: Clip, trajectory: Trajectory, true: Trajectory, true_clip: Clip) -> float:
    """The severity in [0, 1]: 0 for the true clip, 1 if a clip is as far from it as the clip in which nothing moves."""
    if kind in SEEN:
        mask_THW, true_THW = (c.instances == scene.target + 1 for c in (clip, true_clip))
        wrong, most = mask_deviation(mask_THW, true_THW), mask_deviation(true_THW[:1], true_THW)
    else:
        true_TN3 = true.positions_TN3
        wrong, most = deviation(trajectory.positions_TN3, true_TN3), deviation(true_TN3[:1], true_TN3)
    return min(1.0, wrong / most) if most else float(wrong > 0)
