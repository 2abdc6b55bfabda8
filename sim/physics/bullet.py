"""Rigid bodies in PyBullet, set up so that free flight agrees with the closed form to rounding.

Departures from Bullet's defaults:
- Damping is 0.
- Dropped bodies start with their velocity and g dt / 2 against gravity, which cancels the deviation g t dt / 2 of
  semi-implicit Euler from the parabola.
- A step is 1/960 s or a little less (RATE, STEPS). Contacts begin at a gap of 0.5 mm instead of 2 cm, because bodies
  that touch earlier do not bounce. Overlaps are corrected slowly, because the correction adds speed. A bounce keeps at
  most 0.006 more of the speed than the restitution (a ball 0.005); with 1/240 s, 2 mm and ten times the correction it
  was 0.035 more, and contacts were 2 ms late. In scenes with obstacles, overlaps are corrected ten times as fast:
  else a box sinks up to 6 mm into the ramp that it slides down.
- Bodies collide as the convex parts of library.parts, without Bullet's margin, with which they would touch 1 mm above
  the mesh. Balls are spheres.
- A body has the inertia of its mesh; Bullet's default is that of the bounding box. So the body's frame in Bullet is
  along its principal axes.

Shape letters: S records, T frames, N bodies, V hull vertices.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from posttrain.core.recipe import Strict
from sim.assets import library
from sim.geometry import xyzw
from sim.scene import (
    FLOOR,
    AddEnergy,
    Body,
    Contact,
    Hold,
    Intervention,
    Quaternion,
    Scene,
    Teleport,
    Trajectory,
    Tunnel,
    Vector,
)

RATE = 240  # records per second, or the next higher rate with a whole number of records per frame
STEPS = 4  # physics steps per record
GAP = 3  # a contact ends after more than so many records without impulse
STILL = 5e-3  # metres (and radians) per second: a settling body that is slower is at rest
Hook = Callable[[int], None]  # called before each step with the step's number, from 0


class Config(Strict):
    """No keys."""


DEFAULT = Config()


@lru_cache(maxsize=1)
def engine() -> ModuleType:
    """PyBullet, with one world per process. Its C code prints a line when imported, which goes to /dev/null."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import pybullet
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    pybullet.connect(pybullet.DIRECT)
    return pybullet


def records_per_frame(fps: float) -> int:
    return math.ceil(RATE / fps)


@cache
def _principal(asset: str) -> Rotation:
    """The rotation from a body's frame in Bullet to the frame of its mesh."""
    return Rotation.from_matrix(library.inertia(asset)[1])


@cache
def _obj(asset: str) -> str:
    """The text of an OBJ file with an object per convex part, in the body's frame in Bullet."""
    lines, count = [], 0
    for i, points in enumerate(library.parts(asset)):
        lines.append(f"o {i}")
        lines += ["v {:.9g} {:.9g} {:.9g}".format(*point) for point in _principal(asset).inv().apply(points)]
        corners = np.resize(np.arange(count, count + len(points)) + 1, -(-len(points) // 3) * 3)  # each at least once
        lines += ["f {} {} {}".format(*face) for face in corners.reshape(-1, 3)]
        count += len(points)
    return "\n".join(lines) + "\n"


def _orientations(body: Body, xyzw_S4: np.ndarray) -> np.ndarray:
    """Orientations (S, 4) of the body, w first, from those in Bullet, w last."""
    return np.roll((Rotation.from_quat(xyzw_S4) * _principal(body.asset).inv()).as_quat(), 1, axis=-1)


def _create(bullet: ModuleType, body: Body, mass: float, position: Vector) -> int:
    """Add a body to Bullet's world; returns its handle. Convex parts go through a file, as Bullet reads only those."""
    turn = (Rotation.from_quat(xyzw(body.orientation)) * _principal(body.asset)).as_quat().tolist()
    text = "" if library.is_round(body.asset) else _obj(body.asset)  # before the file, since it can take seconds
    with tempfile.NamedTemporaryFile("w", suffix=".obj") as file:
        file.write(text)
        file.flush()
        if text:
            shape = bullet.createCollisionShape(bullet.GEOM_MESH, fileName=file.name, meshScale=[body.size] * 3)
        else:
            shape = bullet.createCollisionShape(bullet.GEOM_SPHERE, radius=body.size / 2)
        handle = int(bullet.createMultiBody(mass, shape, basePosition=position, baseOrientation=turn))
    bullet.changeDynamics(handle, -1, lateralFriction=body.friction, restitution=body.restitution, collisionMargin=0)
    return handle


def _add(bullet: ModuleType, body: Body) -> int:
    mass = 0.0 if body.role == "moved" else body.mass
    handle = _create(bullet, body, mass, body.position)
    bullet.changeDynamics(handle, -1, linearDamping=0, angularDamping=0)
    if mass:
        moments = library.inertia(body.asset)[0] * mass * body.size**2
        bullet.changeDynamics(handle, -1, localInertiaDiagonal=moments.tolist())
    return handle


def _hang(bullet: ModuleType, handle: int, point: Vector) -> None:
    """Fix the point of a body that is now at `point` (metres in the world) there; the body can turn about it."""
    position, turn = bullet.getBasePositionAndOrientation(handle)
    arm = Rotation.from_quat(turn).inv().apply(np.subtract(point, position)).tolist()
    bullet.createConstraint(handle, -1, -1, -1, bullet.JOINT_POINT2POINT, (0, 0, 0), arm, point)


def _load(scene: Scene, steps: int, gap: float, mending: float) -> tuple[ModuleType, list[int], float]:
    """A new world with the floor (handle 0) and all bodies: (PyBullet, the bodies' handles, seconds per step).

    Args:
        steps: number of steps per record.
        gap: distance between bodies at which a contact begins, metres.
        mending: share of an overlap that is corrected per step.
    """
    bullet = engine()
    step = 1 / (scene.fps * records_per_frame(scene.fps) * steps)
    bullet.resetSimulation()
    bullet.setGravity(*scene.gravity)
    bullet.setPhysicsEngineParameter(
        fixedTimeStep=step, deterministicOverlappingPairs=1, contactBreakingThreshold=gap, contactERP=mending
    )
    bullet.setPhysicsEngineParameter(enableFileCaching=0)  # each shape's file has a new name
    floor = bullet.createMultiBody(0, bullet.createCollisionShape(bullet.GEOM_PLANE))
    bullet.changeDynamics(floor, -1, lateralFriction=scene.floor_friction, restitution=scene.floor_restitution)
    return bullet, [_add(bullet, body) for body in scene.bodies], step


def simulate(scene: Scene, interventions: Sequence[Intervention] = (), config: Config = DEFAULT) -> Trajectory:
    """The motion from time 0 on: `dropped` bodies fly, `pile` rests, `moved` are fixed obstacles.

    A contact's time is that of the first step with an impulse, plus the gap at that step divided by the closing speed.
    Its impulse is the sum of the normal impulses until the two bodies separate (or until the clip ends, if the body
    rests). The energy is recorded at RATE.
    """
    obstacles = any(body.role == "moved" for body in scene.bodies)
    bullet, handles, step = _load(scene, STEPS, gap=5e-4, mending=0.05 if obstacles else 0.005)
    per_frame = records_per_frame(scene.fps)
    body_of = {handle: i for i, handle in enumerate(handles)}  # any other handle is the floor: 0, or a copy of it
    gravity = np.array(scene.gravity)
    for handle, body in zip(handles, scene.bodies, strict=True):
        if body.role == "dropped":
            bullet.resetBaseVelocity(handle, (np.array(body.velocity) - gravity * step / 2).tolist(), (0, 0, 0))
    for pivot in scene.pivots:
        _hang(bullet, handles[pivot.body], pivot.point)

    hooks = [_hook(bullet, handles, scene, step, intervention) for intervention in interventions]
    poses, velocities = [], []  # for every record, those of every body
    touches: dict[tuple[int, int], list[float]] = {}  # (time, impulse, last step) of the pairs that touch now
    contacts = []
    for n in range((scene.frames - 1) * per_frame * STEPS + 1):
        for hook in hooks:
            hook(n)
        velocity = {handle: bullet.getBaseVelocity(handle) for handle in handles}
        if n % STEPS == 0:
            poses.append([sum(bullet.getBasePositionAndOrientation(handle), ()) for handle in handles])
            velocities.append([sum(velocity[handle], ()) for handle in handles])
        bullet.stepSimulation()
        points: dict[tuple[int, int], list[Any]] = {}
        for point in bullet.getContactPoints():
            if point[9] > 0:
                pair = body_of.get(point[1], FLOOR), body_of.get(point[2], FLOOR)
                pair = (max(pair), FLOOR) if FLOOR in pair else (min(pair), max(pair))
                points.setdefault(pair, []).append(point)
        for pair, touching in points.items():
            if pair in touches and n - touches[pair][2] > GAP * STEPS:
                contacts.append((touches[pair][0], *pair, touches.pop(pair)[1]))
            if pair not in touches:
                early = min(_until_touch(bullet, point, velocity, step) for point in touching)
                touches[pair] = [max(n * step + early, 0.0), 0.0, n]
            touches[pair][1:] = touches[pair][1] + sum(point[9] for point in touching) * step, n
    contacts += [(touch[0], *pair, touch[1]) for pair, touch in touches.items()]

    poses_SN7 = np.array(poses, dtype=np.float64).reshape(len(poses), len(handles), 7)
    velocities_SN6 = np.array(velocities, dtype=np.float64).reshape(len(poses), len(handles), 6)
    mass_N = np.array([body.mass * (body.role != "moved") for body in scene.bodies])
    inertia_N3 = np.array([bullet.getDynamicsInfo(handle, -1)[2] for handle in handles]).reshape(-1, 3)
    # Bullet's velocity is that half a step before the position's time, so half a step of gravity is added.
    linear_SN3 = velocities_SN6[..., :3] + gravity * step / 2
    spin_SN3 = _rotate_back(poses_SN7[..., 3:], velocities_SN6[..., 3:])
    energy_SN = mass_N * ((linear_SN3**2).sum(-1) / 2 - poses_SN7[..., :3] @ gravity)
    energy_SN += (inertia_N3 * spin_SN3**2).sum(-1) / 2
    turns_TN4 = poses_SN7[::per_frame, :, 3:]
    turns = [_orientations(body, turns_TN4[:, i]) for i, body in enumerate(scene.bodies)]
    return Trajectory(
        positions_TN3=poses_SN7[::per_frame, :, :3],
        quaternions_TN4=np.stack(turns, axis=1) if turns else turns_TN4,
        contacts=tuple(Contact(*contact) for contact in sorted(contacts)),
        energy=energy_SN.sum(-1),
    )


def _hook(bullet: ModuleType, handles: list[int], scene: Scene, step: float, intervention: Intervention) -> Hook:
    """A function that carries out an intervention during the simulation."""
    handle = handles[intervention.body]
    done = False

    def hold(n: int, height: float) -> None:
        (x, y, z), turn = bullet.getBasePositionAndOrientation(handle)
        if z <= height:
            bullet.resetBasePositionAndOrientation(handle, (x, y, height), turn)
            bullet.resetBaseVelocity(handle, (0, 0, 0), (0, 0, 0))
            bullet.changeDynamics(handle, -1, mass=0)

    def tunnel(n: int, through: tuple[int, ...], depth: float) -> None:
        if n > 0:
            return
        for index in through:
            bullet.setCollisionFilterPair(handle, 0 if index == FLOOR else handles[index], -1, -1, 0)
            if index == FLOOR:
                plane = bullet.createCollisionShape(bullet.GEOM_PLANE)
                copy = bullet.createMultiBody(0, plane, basePosition=(0.0, 0.0, -depth))
                surface = {"lateralFriction": scene.floor_friction, "restitution": scene.floor_restitution}
                bullet.changeDynamics(copy, -1, **surface)
            else:
                x, y, z = scene.bodies[index].position
                copy = _create(bullet, scene.bodies[index], 0.0, (x, y, z - depth))
            for other in handles:
                if other != handle:
                    bullet.setCollisionFilterPair(copy, other, -1, -1, 0)

    def add_energy(n: int, height: float) -> None:
        nonlocal done
        if done or not any(point[9] > 0 for point in bullet.getContactPoints(handle)):
            return
        done = True
        (x, y, z), spin = bullet.getBaseVelocity(handle)
        z = math.sqrt(z**2 + 2 * abs(scene.gravity[2]) * height)
        bullet.resetBaseVelocity(handle, (x, y, z), spin)

    def teleport(n: int, time: float, offset: Vector) -> None:
        if n == round(time / step):
            position, turn = bullet.getBasePositionAndOrientation(handle)
            velocity = bullet.getBaseVelocity(handle)
            moved = tuple(p + o for p, o in zip(position, offset, strict=True))
            bullet.resetBasePositionAndOrientation(handle, moved, turn)
            bullet.resetBaseVelocity(handle, *velocity)

    match intervention:
        case Hold(_, height):
            return lambda n: hold(n, height)
        case Tunnel(_, through, depth):
            return lambda n: tunnel(n, through, depth)
        case AddEnergy(_, height):
            return lambda n: add_energy(n, height)
        case Teleport(_, time, offset):
            return lambda n: teleport(n, time, offset)


def _until_touch(bullet: ModuleType, point: Any, velocity: dict[int, Any], step: float) -> float:
    """Seconds until two bodies touch at a point: gap / closing speed, at most a step; negative: they touch already."""
    _, a, b, _, _, on_a, on_b, normal, gap, *_ = point
    closing = 0.0
    for handle, position, sign in ((a, on_a, -1.0), (b, on_b, 1.0)):
        if handle in velocity:
            linear, spin = velocity[handle]
            arm = np.subtract(position, bullet.getBasePositionAndOrientation(handle)[0])
            closing += sign * float(np.dot(np.add(linear, np.cross(spin, arm)), normal))
    return float(np.clip(gap / closing, -step, step)) if closing > 1e-3 else 0.0


def _rotate_back(xyzw_SN4: np.ndarray, vectors_SN3: np.ndarray) -> np.ndarray:
    """World vectors (S, N, 3) in the frames of bodies with the given orientations (S, N, 4), w last."""
    axis, w = -xyzw_SN4[..., :3], xyzw_SN4[..., 3:]
    twice = 2 * np.cross(axis, vectors_SN3)
    return vectors_SN3 + w * twice + np.cross(axis, twice)


def settle(scene: Scene, seconds: float = 6.0) -> list[tuple[Vector, Quaternion]] | None:
    """Poses of the bodies when they have come to rest; None if they do not within `seconds`.

    Motion is damped and nothing bounces, because only the final poses matter.
    """
    bullet, handles, step = _load(scene, 1, gap=2e-3, mending=0.05)
    for handle in handles:
        bullet.changeDynamics(handle, -1, linearDamping=0.9, angularDamping=0.99, restitution=0)
    still = 0
    for n in range(round(seconds / step)):
        bullet.stepSimulation()
        if n % 8:
            continue
        speed = np.abs([bullet.getBaseVelocity(handle) for handle in handles]).max()
        still = still + 1 if speed < STILL else 0
        if still == 3:
            poses = [bullet.getBasePositionAndOrientation(handle) for handle in handles]
            return [
                (tuple(position), tuple(_orientations(body, np.array([q]))[0].tolist()))
                for body, (position, q) in zip(scene.bodies, poses, strict=True)
            ]
    return None


def clearance(scene: Scene) -> float:
    """The smallest gap in metres (at most 0.05) between any two of bodies and floor at time 0; negative: they overlap.

    Touching bodies overlap by a fraction of a millimetre.
    """
    bullet, handles, _ = _load(scene, 1, gap=2e-3, mending=0.05)
    things = [0, *handles]
    near = [bullet.getClosestPoints(a, b, 0.05) for i, a in enumerate(things) for b in things[i + 1 :]]
    return min((point[8] for points in near for point in points), default=0.05)
