"""The default renderer: OpenGL 3.3 without a window, on Mesa's software rasteriser or on a graphics card.

The background is painted once per clip, into the plate: its light without the sun, the light that the sun adds, and
depth. Then all frames are drawn, stacked in one tall target: a shadow map; the colours, `supersample` x `supersample`
samples per pixel averaged in linear light; and instance, depth and forward flow, one sample per pixel, so they are
exact at pixel centres. Rows run downwards everywhere: the projection flips the picture, so nothing is flipped after
reading.

Light: radiance = albedo * (hemisphere ambient * open + sun * cosine * shadow), and bodies have a small gloss. `open` is
the product over the other bodies of 1 - 0.8 (r / d)^2 * cosine, with spheres of the bodies' volumes, of radius r at
distance d.
"""

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import moderngl
import numpy as np
from pydantic import Field

from posttrain.core.errors import UserError
from posttrain.core.recipe import Strict
from sim.assets import library
from sim.assets.surfaces import PATTERNS
from sim.geometry import focal_pixels, rotation
from sim.render import shaders
from sim.render.base import check
from sim.scene import Body, Camera, Clip, Material, Scene, Trajectory

NEAR = 0.05  # metres; the far plane is at infinity
TALLEST = 12288  # rows of a target; further frames are drawn in the next batch
OCCLUDERS = 16  # only so many bodies occlude ambient light
SRGB8 = 0x8C41  # OpenGL's name for 8-bit sRGB texels
IMAGE = len(PATTERNS)  # the number of the pattern that shows the asset's own texture

Value = float | tuple[float, ...] | np.ndarray


class Config(Strict):
    """`supersample`^2 colour samples per pixel."""

    supersample: int = Field(2, ge=1, le=8)


DEFAULT = Config()


def render(scene: Scene, trajectory: Trajectory, config: Config = DEFAULT) -> Clip:
    """Render the clip of the trajectory; see `Clip`.

    Raises:
        UserError: no EGL on this machine, or more bodies than a uint8 mask can number.
    """
    check(scene)
    gl = stage(os.getpid())
    with gl.context:  # another context may be current
        return gl.render(scene, trajectory, config.supersample)


def missing_egl(reason: Exception) -> UserError:
    """The error for a machine that cannot open an EGL context."""
    return UserError(
        f"renderer gl: no EGL context ({str(reason) or type(reason).__name__}); install it with `sudo apt-get install "
        "-y libegl1 libgl1-mesa-dri`, or write `renderer: {name: tiny}` in the recipe, a simpler renderer",
        "not_installed",
        "renderer.name",
    )


@cache
def stage(process: int) -> "Stage":
    """The `Stage` of process number `process`, because after a fork a child must not use its parent's context."""
    return Stage()


class Stage:
    """An OpenGL context, and the programs, meshes, textures and targets that stay on the device between clips."""

    def __init__(self) -> None:
        os.environ.setdefault("LP_NUM_THREADS", "1")  # llvmpipe; one process per core is faster than threads
        try:
            # glcontext asks for libGL, which headless machines lack; libEGL has every function too
            settings: Any = {"backend": "egl", "libgl": "libEGL.so.1", "libegl": "libEGL.so.1"}
            self.context = moderngl.create_context(standalone=True, require=330, **settings)
        except Exception as error:  # glcontext raises bare exceptions
            raise missing_egl(error) from error
        self.context.enable_only(moderngl.DEPTH_TEST)
        self.context.depth_func = "<="  # the sky has the depth of a cleared buffer
        self.programs: dict[tuple[str, str], moderngl.Program] = {}
        self.meshes: dict[str, tuple[moderngl.Buffer, moderngl.Buffer]] = {}
        self.arrays: dict[tuple[moderngl.Program, str], moderngl.VertexArray] = {}
        self.images: dict[str, moderngl.Texture] = {}
        self.targets: dict[tuple[int, ...], Targets] = {}

    def program(self, vertex: str, fragment: str, pattern: int = 0) -> moderngl.Program:
        """The program of two shaders, compiled for one pattern (KIND)."""
        fragment = fragment.replace("#version 330", f"#version 330\n#define KIND {pattern}")
        if (vertex, fragment) not in self.programs:
            self.programs[vertex, fragment] = self.context.program(vertex, fragment)
        return self.programs[vertex, fragment]

    def array(self, program: moderngl.Program, asset: str | None) -> moderngl.VertexArray:
        """The asset's triangles as input of a program; None: one triangle that covers the screen."""
        key = (program, asset or "")
        if key not in self.arrays:
            if asset is None:
                self.arrays[key] = self.context.vertex_array(program, [])
            else:
                wanted = [("in_position", 3), ("in_normal", 3), ("in_uv", 2)]
                layout = " ".join(f"{n}f" if name in program else f"{n}x4" for name, n in wanted)
                names = [name for name, _ in wanted if name in program]
                vertices, faces = self.mesh(asset)
                self.arrays[key] = self.context.vertex_array(program, [(vertices, layout, *names)], index_buffer=faces)
        return self.arrays[key]

    def mesh(self, asset: str) -> tuple[moderngl.Buffer, moderngl.Buffer]:
        if asset not in self.meshes:
            m = library.mesh(asset)
            uv = np.zeros((len(m.vertices), 2)) if m.uv is None else m.uv
            table = np.concatenate([m.vertices, m.normals, uv], axis=1).astype(np.float32)
            self.meshes[asset] = self.context.buffer(table.tobytes()), self.context.buffer(m.faces.tobytes())
        return self.meshes[asset]

    def image(self, asset: str) -> moderngl.Texture | None:
        pixels = library.mesh(asset).texture
        if pixels is not None and asset not in self.images:
            height, width, _ = pixels.shape
            rows = pixels[::-1].tobytes()
            texture = self.context.texture((width, height), 3, rows, alignment=1, internal_format=SRGB8)
            texture.build_mipmaps()
            texture.anisotropy = 4.0
            self.images[asset] = texture
        return self.images.get(asset)

    def target(self, width: int, height: int, supersample: int, frames: int, shadow: int) -> "Targets":
        key = (width, height, supersample, frames, shadow)
        if key not in self.targets:
            self.targets[key] = Targets(self.context, (width, height), supersample, frames, shadow)
        return self.targets[key]

    def render(self, scene: Scene, trajectory: Trajectory, supersample: int) -> Clip:
        camera, count = scene.camera, len(trajectory.positions_TN3)
        shadow = min(max(256, 4 * max(camera.width, camera.height)), 2048)
        batch = max(1, min(count, TALLEST // max(shadow, camera.height * supersample)))
        targets = self.target(camera.width, camera.height, supersample, batch, shadow)
        look = Look(scene, trajectory, shadow)
        self.paint_plate(scene, look, targets.plate, supersample)
        self.paint_plate(scene, look, targets.label_plate, 1)
        parts = [
            self.render_frames(scene, look, targets, supersample, range(k, min(k + batch, count)))
            for k in range(0, count, batch)
        ]
        rgb, label = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Clip(rgb, label[..., 0].astype(np.uint8), np.ascontiguousarray(label[..., 1]), label[..., 2:].copy())

    def draw(self, program: moderngl.Program, asset: str | None, **uniforms: Value) -> None:
        put(program, uniforms)
        self.array(program, asset).render(moderngl.TRIANGLES, vertices=3 if asset is None else -1)

    def paint_plate(self, scene: Scene, look: "Look", plate: moderngl.Framebuffer, samples: int) -> None:
        """Paint floor, wall and sky without bodies."""
        background = scene.background
        plate.use()
        plate.clear()
        always = {**look.light, "lens": lens(scene.camera, samples), "top": 0.0}
        planes = [(background.floor, (0.0, 0.0, 1.0), 0.0)]
        if background.wall is not None:
            planes.append((background.wall, (0.0, -1.0, 0.0), -background.wall_y))
        for material, normal, offset in planes:
            program = self.program(
                shaders.SCREEN_VERTEX, shaders.COMMON + shaders.PATTERN + shaders.PLATE, pattern_index(material)
            )
            self.draw(program, None, **always, **pattern(material), normal=normal, offset=offset)
        sky = self.program(shaders.SCREEN_VERTEX, shaders.COMMON + shaders.SKY)
        self.draw(sky, None, **always, horizon=background.sky_horizon, zenith=background.sky_zenith)

    def render_frames(
        self, scene: Scene, look: "Look", targets: "Targets", samples: int, frames: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """Colours uint8 (T, H, W, 3) and labels float32 (T, H, W, 4) of the given frames."""
        width, height, bodies = scene.camera.width, scene.camera.height, scene.bodies
        count = targets.shadow.height // targets.shadow.width

        targets.shadow.use()
        targets.shadow.clear()
        program = self.program(shaders.SHADOW_VERTEX, shaders.SHADOW)
        for row, k in enumerate(frames):
            targets.shadow.viewport = (0, row * targets.shadow.width, targets.shadow.width, targets.shadow.width)
            for i, body in enumerate(bodies):
                self.draw(program, body.asset, to_light=look.to_light[k, i])

        targets.fine.use()
        targets.fine.clear()
        targets.shadows.use(0)
        targets.shade.use(1)
        targets.sunshine.use(2)
        backdrop = self.program(shaders.SCREEN_VERTEX, shaders.COMMON + shaders.BACKDROP)
        programs = [
            self.program(shaders.BODY_VERTEX, shaders.COMMON + shaders.PATTERN + shaders.BODY, look.patterns[i])
            for i in range(len(bodies))
        ]
        wall_y = scene.background.wall_y if scene.background.wall else 1e9
        always = {**look.light, "lens": lens(scene.camera, samples), "frames": float(count), "shadow_map": 0}
        put(backdrop, {**always, "shade": 1, "sunshine": 2, "wall_y": wall_y, "own": -1})
        for p in programs:
            put(p, {**always, "image": 3})
        for row, k in enumerate(frames):
            targets.fine.viewport = (0, row * height * samples, width * samples, height * samples)
            now = {"frame": float(row), "top": float(row * height * samples), "spheres": look.spheres[k]}
            self.draw(backdrop, None, **now)
            for i, body in enumerate(bodies):
                image = self.image(body.asset)
                if image is not None:
                    image.use(3)
                pose = {"to_world": look.to_world[k, i], "to_camera": look.to_camera[k, i], "size": body.size, "own": i}
                self.draw(programs[i], body.asset, **now, **pose, **look.paints[i])

        targets.rgb.use()
        targets.light.use(0)
        self.draw(self.program(shaders.SCREEN_VERTEX, shaders.RESOLVE), None, fine=0, samples=samples)

        targets.label.use()
        targets.label.clear()
        targets.label_shade.use(0)
        backdrop = self.program(shaders.SCREEN_VERTEX, shaders.COMMON + shaders.LABEL_BACKDROP)
        program = self.program(shaders.LABEL_VERTEX, shaders.LABEL)
        put(backdrop, {"lens": lens(scene.camera, 1), "shade": 0})
        put(program, {"lens": lens(scene.camera, 1)})
        for row, k in enumerate(frames):
            targets.label.viewport = (0, row * height, width, height)
            self.draw(backdrop, None, top=float(row * height))
            after = min(k + 1, len(look.to_camera) - 1)
            for i, body in enumerate(bodies):
                poses = {"to_camera": look.to_camera[k, i], "to_camera_next": look.to_camera[after, i]}
                self.draw(program, body.asset, **poses, size=body.size, instance=float(i + 1))

        rgb = np.empty((len(frames), height, width, 3), dtype=np.uint8)
        label = np.empty((len(frames), height, width, 4), dtype=np.float32)
        box = (0, 0, width, height * len(frames))
        targets.rgb.read_into(rgb, viewport=box, components=3, alignment=1)
        targets.label.read_into(label, viewport=box, components=4, dtype="f4")
        return rgb, label


class Targets:
    """Framebuffers and their textures; frames are stacked downwards."""

    def __init__(self, c: moderngl.Context, size: tuple[int, int], supersample: int, frames: int, shadow: int) -> None:
        fine = (size[0] * supersample, size[1] * supersample)
        tall, tall_fine = (size[0], size[1] * frames), (fine[0], fine[1] * frames)
        self.shadows = c.depth_texture((shadow, shadow * frames))
        self.shadows.compare_func = "<="
        self.shade, self.sunshine = c.texture(fine, 4, dtype="f4"), c.texture(fine, 4, dtype="f2")
        self.label_shade = c.texture(size, 4, dtype="f4")
        self.light = c.texture(tall_fine, 4, dtype="f2")
        self.shadow = c.framebuffer(depth_attachment=self.shadows)
        self.plate = c.framebuffer([self.shade, self.sunshine], c.depth_renderbuffer(fine))
        self.label_plate = c.framebuffer([self.label_shade], c.depth_renderbuffer(size))
        self.fine = c.framebuffer([self.light], c.depth_renderbuffer(tall_fine))
        self.rgb = c.framebuffer([c.texture(tall, 4)])
        self.label = c.framebuffer([c.texture(tall, 4, dtype="f4")], c.depth_renderbuffer(tall))


class Look:
    """A scene as inputs of the shaders: float32 arrays (T, N, ...), matrices column by column."""

    def __init__(self, scene: Scene, trajectory: Trajectory, shadow: int) -> None:
        camera, positions = scene.camera, trajectory.positions_TN3
        meshes = [library.mesh(body.asset) for body in scene.bodies]
        sizes = np.array([body.size for body in scene.bodies])
        poses = np.zeros((*positions.shape[:2], 4, 4))
        poses[..., :3, :3], poses[..., :3, 3], poses[..., 3, 3] = rotation(trajectory.quaternions_TN4), positions, 1
        scales_TN = np.ones(positions.shape[:2]) if trajectory.scales_TN is None else trajectory.scales_TN
        poses[..., :3, :3] *= scales_TN[..., None, None]
        view = np.eye(4)
        view[:3, :3] = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
        view[:3, 3] = -view[:3, :3] @ camera.position
        self.to_world = columns(poses)
        self.to_camera = columns(view @ poses)  # multiplied in float64, to be exact far from the origin too

        sun = np.array(scene.light.direction) / np.linalg.norm(scene.light.direction)
        side = np.cross(sun, [0.0, 1.0, 0.0] if abs(sun[1]) < 0.9 else [1.0, 0.0, 0.0])
        side /= np.linalg.norm(side)
        axes = np.stack([side, np.cross(sun, side), -sun])
        reach = sizes * [np.linalg.norm(m.vertices, axis=1).max() for m in meshes]
        centres = positions @ axes.T
        low = (centres - reach[:, None]).min(axis=(0, 1), initial=1e6)
        width = max(((centres + reach[:, None]).max(axis=(0, 1), initial=-1e6) - low).max(), 0.1)
        texel = width / (shadow - 8)  # four empty texels all around keep the frames of the stack apart
        light = np.eye(4)
        light[:3, :3] = axes / (texel * shadow)
        light[:3, 3] = -(low - 4 * texel) / (texel * shadow)
        scaled = poses.copy()
        scaled[..., :3, :3] *= sizes[:, None, None]
        self.to_light = columns(light @ scaled)
        if not scene.light.shadows:
            light[:3] = [0, 0, 0, -1]  # every point lies outside the shadow map

        radii = sizes * np.cbrt([3 * m.volume / (4 * np.pi) for m in meshes])
        self.spheres = np.zeros((len(positions), OCCLUDERS, 4), dtype=np.float32)
        n = min(len(sizes), OCCLUDERS) if scene.light.shadows else 0
        self.spheres[:, :n, :3], self.spheres[:, :n, 3] = positions[:, :n], (radii * scales_TN)[:, :n]
        self.light: dict[str, Value] = {
            "eye": camera.position, "sun": tuple(sun.tolist()), "sun_color": scene.light.color,
            "ambient": scene.light.ambient, "light": columns(light), "texel": float(texel), "occluders": n,
        }  # fmt: skip
        surfaces = [surface(body) for body in scene.bodies]
        self.patterns = [IMAGE if m is None else pattern_index(m) for m in surfaces]
        self.paints: list[dict[str, Value]] = [{} if m is None else pattern(m) for m in surfaces]


def surface(body: Body) -> Material | None:
    """The body's material; None: the asset's own texture. Grey if there is neither."""
    if body.material is None and library.mesh(body.asset).texture is None:
        return Material("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, 0)
    return body.material


def pattern_index(material: Material) -> int:
    """The shader's number of a pattern."""
    return PATTERNS.index(material.pattern)


def pattern(material: Material) -> dict[str, Value]:
    return {"color": material.color, "second": material.second, "scale": material.scale, "seed": material.seed}


def lens(camera: Camera, samples: int) -> tuple[float, float, float, float]:
    return (focal_pixels(camera) * samples, camera.width * samples / 2, camera.height * samples / 2, 0.0)


def columns(matrices: np.ndarray) -> np.ndarray:
    """Matrices (..., 4, 4) as OpenGL stores them: float32, column by column."""
    return np.ascontiguousarray(matrices.swapaxes(-1, -2), dtype=np.float32)


def put(program: moderngl.Program, uniforms: Mapping[str, Value]) -> None:
    """Set the uniforms that the program has; the compiler removes uniforms that a pattern does not use."""
    for name, value in uniforms.items():
        uniform = program.get(name, None)
        if isinstance(uniform, moderngl.Uniform):
            if isinstance(value, np.ndarray):
                uniform.write(value)
            else:
                uniform.value = value
