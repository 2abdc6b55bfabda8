"""PISA's test of unseen depths and heights (Li et al. 2025, section 5.1): one object, anywhere in depth x height.

Depth and height are drawn uniformly. The camera does not move back; pairs whose fall it cannot see completely are drawn
again. A row's `id` says whether the pair is within the ranges of the training clips, `seen_depth` and `seen_height`.
"""

from collections.abc import Iterator
from typing import Literal

from posttrain.core.errors import UserError
from sim.physics.base import Simulate
from sim.render.base import Render
from sim.worlds import drop
from sim.worlds.base import Amount, Amounts, Draw, Positives, Take


class Config(drop.Config):
    """`drop`: heights, `depth`: depths, in metres; `camera_gap` is not used."""

    dropped: tuple[Literal[1], Literal[1]] = (1, 1)
    pile: tuple[Literal[0], Literal[0]] = (0, 0)
    drop: Positives = (0.5, 2.5)
    camera_height: Positives = (0.5, 0.5)
    region: tuple[Amount, Amount] = (0.0, 0.0)
    depth: Positives = (1.0, 5.0)
    seen_depth: Amounts = (1.0, 3.0)
    seen_height: Amounts = (0.5, 1.5)

    def nearest(self) -> float:
        return self.depth[0]


def takes(draw: Draw, config: Config, simulate: Simulate, render: Render) -> Iterator[Take]:
    """One clip; its row has the depth of the object's centre and the height of its lowest point, in metres, and `id`.

    Raises:
        UserError: no such scene fits the ranges.
    """
    for _ in range(drop.ATTEMPTS):
        depth, height = float(draw.rng.uniform(*config.depth)), float(draw.rng.uniform(*config.drop))
        framed = drop.alone(draw, config, simulate, depth, height)
        if framed is not None:
            seen = _within(depth, config.seen_depth) and _within(height, config.seen_height)
            yield Take(*framed, render(*framed), {"depth": depth, "height": height, "id": seen})
            return
    remedy = "widen depth, drop, target_pixels or size"
    raise UserError(f"world: no scene fits after {drop.ATTEMPTS} tries; {remedy}", "value", "world")


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
