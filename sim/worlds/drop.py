"""PISA's drop scenes (Li et al. 2025, section 4.1 and appendix K), with corrections of its generator.

Objects hang at rest over piles and are released at time 0, which is frame 0. Corrections: ranges of numbers of objects
include their upper ends, a drop height is the gap below the lowest point, piles are settled before time 0, nothing
interpenetrates, restitution is never forced to 0. All random choices are made here, so the scene is a function of the
random numbers. Bullet settles the piles and finds overlaps, also if another engine simulates the scene.

Shape letters: P points, T frames, N bodies, V hull vertices.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from posttrain.core.errors import UserError
from sim.assets import library, surfaces
from sim.geometry import focal_pixels, outline, paths, project
from sim.physics import bullet
from sim.physics.base import Simulate, energy_gain
from sim.render.base import MOST, Render
from sim.scene import Background, Body, Camera, Light, Material, Scene, Trajectory, Vector
from sim.worlds.base import Amount, Amounts, Draw, Positive, Positives, Share, Shares, Take, WorldConfig, ascending

SMALLEST = 2.0  # pixels, root of the area of the target's box; a smaller target may cover no pixel's centre
BOUNCIEST = 0.99  # largest product of both restitutions, so that an engine that adds 0.006 does not raise the energy
ATTEMPTS = 400
TOUCH = -2e-3  # metres; bodies that overlap by less count as touching


def _above_the_horizon(degrees: tuple[float, float]) -> tuple[float, float]:
    if degrees[1] > 90:
        raise PydanticCustomError("range", "should end at 90 degrees")
    return degrees


class Config(WorldConfig):
    """Ranges are inclusive and drawn from uniformly; lengths in metres."""

    dropped: Annotated[tuple[Annotated[int, Field(ge=1)], int], AfterValidator(ascending)] = (1, 6)
    pile: Annotated[tuple[Annotated[int, Field(ge=0)], int], AfterValidator(ascending)] = (0, 4)  # below each dropped
    drop: Positives = (0.5, 1.5)
    size: Positives = (0.1, 0.4)
    region: tuple[Amount, Amount] = (2.0, 2.0)  # the ground on which objects start: width, depth
    camera_gap: Positive = 1.0  # from the camera to the region, before the camera moves back
    camera_height: Positives = (0.4, 0.6)
    camera_step: Amounts = (0.0, 0.4)  # of one move back
    target_pixels: Amounts = (0.0, 1e9)  # of the target in frame 0: root of its box's area
    hidden: Share = 0.5  # share of the target's box that may lie behind another's box
    texture: Amount = (
        1.0  # contrast of procedural patterns; at 64 pixels, fine patterns with full contrast are mostly aliasing
    )
    studio: bool = False  # a backdrop of the floor's colour, without wall or horizon
    contrast: Amount = 0.0  # least sRGB distance of the target's colour from floor and wall or sky
    shapes: tuple[str, ...] = ()  # categories of objects, such as "ball"; empty: all
    density: Positives = (200.0, 800.0)  # kg / m^3
    friction: Amounts = (0.5, 0.9)
    restitution: Shares = (0.2, 0.6)
    floor_friction: Amounts = (0.7, 1.0)
    floor_restitution: Shares = (0.4, 0.7)
    sun: Annotated[Positives, AfterValidator(_above_the_horizon)] = (60.0, 85.0)  # degrees above the horizon
    gravity: Positive = 9.81

    def nearest(self) -> float:
        """The least distance in metres from the camera to an object."""
        return self.camera_gap

    @field_validator("shapes")
    @classmethod
    def _known(cls, shapes: tuple[str, ...]) -> tuple[str, ...]:
        known = {library.category(asset) for asset in library.object_ids()}
        if unknown := [shape for shape in shapes if shape not in known]:
            raise PydanticCustomError("part", f"no object is a {unknown[0]}; choose from {', '.join(sorted(known))}")
        return shapes

    @model_validator(mode="after")
    def _can_be_seen(self) -> Self:
        size, bodies = self.size[0], self.dropped[1] * (1 + self.pile[1])
        pixels = focal_pixels(Camera((0.0, 0.0, 0.0), width=self.width)) * size / self.nearest()
        if pixels < SMALLEST:
            remedy = "choose larger sizes, a nearer camera or more pixels"
            raise PydanticCustomError("part", f"size: {size:g} m are {pixels:.2g} pixels at most; {remedy}")
        kept = self.restitution[0] * self.floor_restitution[0]
        if kept > BOUNCIEST:
            remedy = (
                f"choose less: their product is {kept:g}, but must be at most {BOUNCIEST:g}, or the energy would rise"
            )
            raise PydanticCustomError("part", f"restitution and floor_restitution: {remedy}")
        if bodies > MOST:
            raise PydanticCustomError(
                "part", f"dropped and pile give up to {bodies} bodies; at most {MOST} are possible"
            )
        return self


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """One clip.

    Raises:
        UserError: as `make`.
    """
    scene, trajectory = make(draw, config, simulate)
    yield Take(scene, trajectory, render(scene, trajectory))


def make(draw: Draw, config: Config, simulate: Simulate) -> tuple[Scene, Trajectory]:
    """A scene and its motion. Numbers of bodies and drop heights are drawn once, the rest again until the scene fits.

    Raises:
        UserError: no such scene fits the ranges, or the split has none of `shapes`.
    """
    heights, piles = numbers(draw, config)
    for _ in range(ATTEMPTS):
        scene = stage(draw, config, heights, piles)
        if scene is None or not large_enough(scene, config):
            continue
        trajectory = simulate(scene)
        framed = place_camera(draw, config, scene, trajectory) if sound(scene, trajectory) else None
        if framed is not None:
            return framed, trajectory
    raise UserError(
        f"world: no scene with {len(heights)} dropped objects fits after {ATTEMPTS} tries; "
        "widen target_pixels, size or region",
        "value",
        "world",
    )


def numbers(draw: Draw, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Drop heights of the dropped bodies, metres, and the number of bodies below each."""
    heights = draw.rng.uniform(*config.drop, size=draw.rng.integers(*config.dropped, endpoint=True))
    return heights, draw.rng.integers(*config.pile, size=len(heights), endpoint=True)


def stage(draw: Draw, config: Config, heights: np.ndarray, piles: np.ndarray) -> Scene | None:
    """The scene at time 0, before the camera moves back.

    None: bodies overlap, a pile does not come to rest, or the target's colour is too close to the background's.

    Raises:
        UserError: the split has none of `shapes`.
    """
    rng, objects = draw.rng, draw.objects
    if config.shapes:
        objects = [asset for asset in objects if library.category(asset) in config.shapes]
        if not objects:
            wanted = " or ".join(config.shapes)
            raise UserError(
                f"world.shapes: none of the split's objects is a {wanted}; name others", "value", "world.shapes"
            )
    width, depth = config.region
    viewpoint = (0.0, -config.camera_gap, float(rng.uniform(*config.camera_height)))
    light, background = _light(rng, config), _background(rng, config, draw.backgrounds)
    scene = Scene(
        bodies=(),
        camera=Camera(viewpoint, width=config.width, height=config.height),
        light=light,
        background=seamless(background, light) if config.studio else background,
        floor_friction=float(rng.uniform(*config.floor_friction)),
        floor_restitution=float(rng.uniform(*config.floor_restitution)),
        gravity=(0.0, 0.0, -config.gravity),
        frames=config.frames,
        fps=config.fps,
        target=0,
        caption="",
        seed=draw.index,
    )
    spots = np.stack([rng.uniform(-width / 2, width / 2, len(heights)), rng.uniform(0, depth, len(heights))], axis=1)
    stacks = [_stack(rng, config, objects, spot, count) for spot, count in zip(spots, piles, strict=True)]
    waiting = tuple(body for stack in stacks for body in stack)
    if waiting:
        rest = bullet.settle(replace(scene, bodies=waiting))
        if rest is None:
            return None
        waiting = tuple(replace(body, position=p, orientation=q) for body, (p, q) in zip(waiting, rest, strict=True))
    dropped: list[Body] = []
    for spot, height, count, first in zip(spots, heights, piles, np.cumsum(piles) - piles, strict=True):
        if count:  # above the highest body of its own settled pile
            spot = np.array(max((body.position for body in waiting[first : first + count]), key=lambda p: p[2])[:2])
        body = _body(rng, config, objects, "dropped")
        points_V3 = outline(body)
        low, high = points_V3.min(0)[:2] + spot, points_V3.max(0)[:2] + spot
        floor = max((_top(other, low, high) for other in waiting), default=0.0)
        z = floor + height - points_V3[:, 2].min()
        dropped.append(replace(body, position=(float(spot[0]), float(spot[1]), float(z))))
    scene = replace(scene, bodies=(*dropped, *waiting), caption=sentence([body.name for body in dropped]))
    if not stands_out(scene, config):
        return None
    # a single body hangs in the air
    return scene if len(scene.bodies) == 1 or bullet.clearance(scene) >= TOUCH else None


def place_camera(
    draw: Draw, config: Config, scene: Scene, trajectory: Trajectory, others: tuple[int, ...] = ()
) -> Scene | None:
    """Move the camera back until the picture shows all bodies at time 0, and the target and `others` in all frames.

    None: the target is then too small, too large or hidden.
    """
    below = [[(*body.position[:2], 0.0)] for body in scene.bodies if body.role != "pile"]  # their shadows
    start_P3 = np.concatenate([*below, *(outline(body) + body.position for body in scene.bodies)])
    path_TV3 = paths(scene, trajectory, scene.target)
    seen = [path_TV3, *(paths(scene, trajectory, i) for i in others)]
    farthest = _farthest(scene.camera, np.concatenate([start_P3, *(path.reshape(-1, 3) for path in seen)]))
    x, y, z = scene.camera.position
    while y > farthest:
        y -= float(draw.rng.uniform(*config.camera_step)) + 1e-3
    behind = max(config.region[1], float(trajectory.positions_TN3[..., 1].max()) + config.size[1])
    scene = replace(
        scene,
        camera=replace(scene.camera, position=(x, y, z)),
        background=replace(scene.background, wall_y=behind + float(draw.rng.uniform(0.5, 4.0))),
    )
    if not large_enough(scene, config) or _hidden(scene, trajectory, path_TV3) > config.hidden:
        return None
    return scene


def alone(
    draw: Draw, config: Config, simulate: Simulate, depth: float, height: float
) -> tuple[Scene, Trajectory] | None:
    """One object at `depth` metres from a camera that does not move back, `height` metres above the floor.

    The object is within `config.region`, which begins at `depth`. None: the drawn scene does not fit.
    """
    near = config.model_copy(update={"camera_gap": depth})
    scene = stage(draw, near, np.array([height]), np.zeros(1, int))
    if scene is None or not large_enough(scene, near):
        return None
    trajectory = simulate(scene)
    framed = place_camera(draw, near, scene, trajectory) if sound(scene, trajectory) else None
    return (framed, trajectory) if framed is not None and framed.camera == scene.camera else None


def sentence(names: list[str]) -> str:
    """The caption, such as "a duck and an orange box fall."."""
    return listed([article(name) for name in names]) + (" fall." if len(names) > 1 else " falls.")


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _farthest(camera: Camera, points_P3: np.ndarray) -> float:
    """The largest camera y from which all points lie in the picture, at least a pixel from its edge."""
    _, _, height = camera.position
    slope_x = (camera.width / 2 - 1) / camera.width * camera.sensor / camera.focal
    slope_z = (camera.height / 2 - 1) / camera.width * camera.sensor / camera.focal
    needed = np.maximum(np.abs(points_P3[:, 0]) / slope_x, np.abs(points_P3[:, 2] - height) / slope_z)
    return float((points_P3[:, 1] - needed).min())


def sound(scene: Scene, trajectory: Trajectory) -> bool:
    """Whether the simulation is plausible: piles stay at rest (within 2 mm) and energy never rises (within 1%)."""
    dropped = {i for i, body in enumerate(scene.bodies) if body.role == "dropped"}
    first = min((c.time for c in trajectory.contacts if {c.a, c.b} & dropped), default=np.inf)
    before_TN3 = trajectory.positions_TN3[: int(min(first * scene.fps, scene.frames - 1)) + 1, len(dropped) :]
    moved = np.linalg.norm(before_TN3 - before_TN3[:1], axis=-1).max(initial=0.0)
    return bool(moved <= 2e-3) and energy_gain(trajectory) <= 0.01


def large_enough(scene: Scene, config: Config) -> bool:
    """Whether the target's size in pixels is allowed, seen from the nearest position that shows all of frame 0."""
    points_P3 = np.concatenate([outline(body) + body.position for body in scene.bodies])
    x, y, z = scene.camera.position
    y = min(y, _farthest(scene.camera, points_P3))
    target = scene.bodies[scene.target]
    pixels_V2 = project(replace(scene.camera, position=(x, y, z)), outline(target) + target.position)[0]
    low, high = config.target_pixels
    return max(low, SMALLEST) <= float(np.sqrt(np.prod(np.ptp(pixels_V2, axis=0)))) <= high


def _hidden(scene: Scene, trajectory: Trajectory, target_TV3: np.ndarray) -> float:
    """The largest share, over frames and other bodies, of the target's box that a nearer body's box covers."""
    own_TV2, _ = project(scene.camera, target_TV3)
    low_T2, high_T2 = own_TV2.min(1), own_TV2.max(1)
    worst = 0.0
    for i in range(len(scene.bodies)):
        if i == scene.target:
            continue
        path_TV3 = paths(scene, trajectory, i)
        nearer_T = path_TV3[..., 1].mean(1) < target_TV3[..., 1].mean(1)
        other_TV2, _ = project(scene.camera, path_TV3)
        shared_T2 = np.clip(np.minimum(high_T2, other_TV2.max(1)) - np.maximum(low_T2, other_TV2.min(1)), 0, None)
        worst = max(worst, float((nearer_T * shared_T2.prod(1) / (high_T2 - low_T2).prod(1)).max()))
    return worst


def _body(rng: np.random.Generator, config: Config, objects: list[str], role: Literal["dropped", "pile"]) -> Body:
    asset = library.choose(rng, objects)
    size = float(rng.uniform(*config.size))
    w, i, j, k = rng.normal(size=4)
    norm = float(np.sqrt(w * w + i * i + j * j + k * k))
    name, material = look(rng, config, asset, size)
    return Body(
        asset=asset,
        name=name,
        size=size,
        mass=float(rng.uniform(*config.density)) * library.mesh(asset).volume * size**3,
        friction=float(rng.uniform(*config.friction)),
        restitution=float(rng.uniform(*config.restitution)),
        position=(0.0, 0.0, 0.0),
        orientation=(w / norm, i / norm, j / norm, k / norm),
        role=role,
        material=material,
    )


def _stack(rng: np.random.Generator, config: Config, objects: list[str], spot: np.ndarray, count: int) -> list[Body]:
    """Bodies above each other with small gaps in between, before they are settled."""
    top, bodies = 0.0, []
    for _ in range(count):
        body = _body(rng, config, objects, "pile")
        heights_V = outline(body)[:, 2]
        x, y = spot + rng.normal(scale=0.1 * body.size, size=2)
        bodies.append(replace(body, position=(float(x), float(y), float(top + 0.005 - heights_V.min()))))
        top += 0.005 + float(np.ptp(heights_V))
    return bodies


def _top(body: Body, low_2: np.ndarray, high_2: np.ndarray) -> float:
    """The height of the body's top if its box lies over or below the footprint `low_2` to `high_2`, else 0."""
    points_V3 = outline(body) + body.position
    apart = (points_V3.min(0)[:2] > high_2).any() or (points_V3.max(0)[:2] < low_2).any()
    return 0.0 if apart else float(points_V3[:, 2].max())


def look(rng: np.random.Generator, config: Config, asset: str, size: float) -> tuple[str, Material | None]:
    """The name for captions, and a surface (None: the asset's own texture)."""
    mesh = library.mesh(asset)
    if mesh.texture is not None:
        return mesh.name, None
    material = surfaces.material(rng, size)
    adjective = "wooden" if material.pattern == "wood" else surfaces.color_name(material.color)
    return f"{adjective} {mesh.name}", _faded(material, config.texture)


def _background(rng: np.random.Generator, config: Config, backgrounds: list[str]) -> Background:
    full = surfaces.background(str(rng.choice(backgrounds)))
    wall = full.wall and _faded(full.wall, config.texture)
    return replace(full, floor=_faded(full.floor, config.texture), wall=wall)


def seamless(background: Background, light: Light) -> Background:
    """The background without wall, and with a sky of the colour that the floor has in this light."""
    radiance = np.array(background.floor.color) * (np.array(light.ambient) + np.array(light.color) * light.direction[2])
    r, g, b = radiance.tolist()
    return replace(background, wall=None, sky_horizon=(r, g, b), sky_zenith=(r, g, b))


def _faded(material: Material, contrast: float) -> Material:
    """The same surface, with `contrast` times the difference between its second and first colour."""
    first, second = np.array(material.color), np.array(material.second)
    r, g, b = (first + contrast * (second - first)).tolist()
    return replace(material, second=(r, g, b))


def stands_out(scene: Scene, config: Config) -> bool:
    """Whether the target's colour differs enough from all backgrounds that may be behind it."""
    behind, body = scene.background, scene.bodies[scene.target]
    if body.material:
        own = surfaces.encoded(np.array(body.material.color))
    else:
        texture = library.mesh(body.asset).texture
        assert texture is not None
        own = texture.mean((0, 1)) / 255
    upper = [behind.wall.color] if behind.wall else [behind.sky_horizon, behind.sky_zenith]
    colors = np.array([behind.floor.color, *upper])
    return float(np.linalg.norm(surfaces.encoded(colors) - own, axis=1).min()) >= config.contrast


def distance(one: Vector, other: Vector) -> float:
    """The sRGB distance of two linear colours."""
    return float(np.linalg.norm(surfaces.encoded(np.array(one)) - surfaces.encoded(np.array(other))))


def _light(rng: np.random.Generator, config: Config) -> Light:
    """A sun and a bluish or warm sky light."""
    height, turn = np.radians(rng.uniform(*config.sun)), rng.uniform(0, 2 * np.pi)
    warmth, power = rng.uniform(-0.1, 0.1), rng.uniform(0.7, 1.1)
    sky = rng.uniform(0.2, 0.45)
    return Light(
        direction=(
            float(np.cos(height) * np.cos(turn)),
            float(np.cos(height) * np.sin(turn)),
            float(np.sin(height)),
        ),
        color=(float(power * (1 + warmth)), float(power), float(power * (1 - warmth))),
        ambient=(float(sky * (1 - warmth)), float(sky), float(sky * (1 + warmth))),
    )
