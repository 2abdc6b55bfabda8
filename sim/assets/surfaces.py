"""Colours, materials and backgrounds. Hue, saturation and value are of sRGB; returned colours are linear."""

import colorsys
from functools import cache
from typing import get_args, get_type_hints

import numpy as np

from posttrain.core.errors import UserError
from sim.scene import Background, Material, Vector

BACKGROUNDS = 512
VALIDATION = 51  # further backgrounds, for validation only
PATTERNS = get_args(get_type_hints(Material)["pattern"])
HUES = {
    "red": 0.0, "orange": 0.075, "yellow": 0.145, "green": 0.33,
    "teal": 0.49, "blue": 0.6, "purple": 0.77, "pink": 0.91,
}  # fmt: skip
# Ranges of hue, saturation and value at the horizon and at the zenith.
SKIES = {
    "day": (((0.56, 0.56), (0.05, 0.25), (0.97, 0.97)), ((0.56, 0.63), (0.45, 0.8), (0.6, 0.95))),
    "overcast": (((0.6, 0.6), (0.04, 0.04), (0.75, 0.95)), ((0.6, 0.6), (0.03, 0.15), (0.5, 0.8))),
    "dusk": (((0.02, 0.1), (0.3, 0.7), (0.95, 0.95)), ((0.6, 0.85), (0.3, 0.6), (0.3, 0.7))),
    "studio": (((0.1, 0.1), (0.03, 0.03), (0.2, 0.9)), ((0.6, 0.6), (0.03, 0.03), (0.1, 0.7))),
    "fancy": (((0.0, 1.0), (0.1, 0.5), (0.5, 1.0)), ((0.0, 1.0), (0.2, 0.7), (0.3, 0.9))),
}


def linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0.0) ** (1 / 2.4) - 0.055)


def color(hue: float, saturation: float, value: float) -> Vector:
    """Linear RGB of an sRGB hue, saturation and value; the last two are clipped to [0, 1]."""
    srgb = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    r, g, b = linear(np.array(srgb)).tolist()
    return (r, g, b)


def color_name(rgb: Vector) -> str:
    """The everyday name of a linear RGB: red, orange, yellow, green, teal, blue, purple, pink, brown, or a grey."""
    r, g, b = np.clip(encoded(np.array(rgb, dtype=float)), 0, 1).tolist()
    hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
    if value < 0.2:
        return "black"
    if saturation < 0.18:
        return "white" if value > 0.8 else "grey"
    name = min(HUES, key=lambda n: abs((hue - HUES[n] + 0.5) % 1.0 - 0.5))
    return "brown" if name in ("red", "orange", "yellow") and value < 0.62 and hue > 0.02 else name


def material(rng: np.random.Generator, size: float = 0.25) -> Material:
    """A surface for an object of `size` metres, with a clear main colour that `color_name` can name."""
    hue, saturation, value = rng.random(), rng.uniform(0.55, 1.0), rng.uniform(0.5, 1.0)
    if rng.random() < 0.15:
        saturation, value = 0.05, float(rng.choice([0.12, 0.5, 0.95]))
    if rng.random() < 0.5:  # the second colour is a shade of the first, else another hue
        paler, darker = rng.uniform(0.5, 1.0), rng.uniform(0.4, 0.75)
        second = color(hue + rng.uniform(-0.05, 0.05), saturation * paler, value * darker)
    else:
        second = color(rng.random(), rng.uniform(0.0, 0.8), rng.uniform(0.3, 1.0))
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=[0.3, 0.14, 0.1, 0.12, 0.1, 0.04, 0.1, 0.1])]
    scale = size * rng.uniform(0.2, 0.6)
    return Material(pattern, color(hue, saturation, value), second, scale, int(rng.integers(2**31)))


def surface(rng: np.random.Generator, scale: float) -> Material:
    """A floor or a wall, with less contrast than objects, so that objects stand out."""
    pattern = PATTERNS[rng.choice(len(PATTERNS), p=[0.1, 0.18, 0.14, 0.1, 0.08, 0.12, 0.14, 0.14])]
    family = rng.choice(["grey", "earth", "pastel", "vivid"], p=[0.25, 0.3, 0.25, 0.2])
    hue, value = rng.random(), rng.uniform(0.35, 0.9)
    saturation = {"grey": 0.06, "earth": 0.4, "pastel": 0.25, "vivid": 0.6}[family] * rng.uniform(0.5, 1.3)
    if family == "earth" or pattern == "wood":
        hue = rng.uniform(0.03, 0.13)
    contrast = rng.uniform(0.55, 0.85) if rng.random() < 0.5 else rng.uniform(1.15, 1.5)
    other = rng.random() if rng.random() < 0.25 else hue + rng.uniform(-0.03, 0.03)
    second = color(other, saturation * rng.uniform(0.6, 1.2), value * contrast)
    return Material(pattern, color(hue, saturation, value), second, scale, int(rng.integers(2**31)))


def background_ids() -> list[str]:
    """All backgrounds for training and testing, sorted."""
    return [f"background/{i:03d}" for i in range(BACKGROUNDS)]


def validation_ids() -> list[str]:
    """The backgrounds that only validation uses, sorted."""
    return [f"background/{i:03d}" for i in range(BACKGROUNDS, BACKGROUNDS + VALIDATION)]


@cache
def background(id: str) -> Background:
    """The background of an id: floor, optional wall (at y = 1.5 to 4 metres) and sky.

    Raises:
        UserError: there is no such background.
    """
    if id not in background_ids() and id not in validation_ids():
        raise UserError(f"{id}: there is no such background; surfaces.background_ids() lists them", "unknown_name")
    rng = np.random.default_rng([98, int(id.partition("/")[2])])
    floor = surface(rng, float(np.exp(rng.uniform(np.log(0.12), np.log(0.9)))))
    wall = surface(rng, float(np.exp(rng.uniform(np.log(0.15), np.log(1.2))))) if rng.random() < 0.5 else None
    wall_y = rng.uniform(1.5, 4.0)
    sky = SKIES[str(rng.choice(list(SKIES)))]
    horizon, zenith = (color(*(rng.uniform(*bounds) for bounds in ranges)) for ranges in sky)
    return Background(id, floor, wall, wall_y, horizon, zenith)
