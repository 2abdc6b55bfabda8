"""The report's charts: SVG lines that scale with the page, and labels that keep their size. report.html draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.evaluation.benchmarks.base import Metric
from posttrain.training.tripwires import QUANTITIES

TITLES = {
    "loss": "Training loss",
    "grad_norm": "Norm of the gradient",
    "val_distance": "Distance from the start",
    "val_tripped": "Wires tripped",
}
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """The data of one SVG chart: lines in a box, and labels.

    Attributes:
        grid: path data of the horizontal lines.
        lines: for each line: CSS class and path data.
        x: for each label: position (percent from the left), CSS class and text.
        y: for each label: position (percent from the top) and text.
        side: side length of the box in which the lines are drawn.
    """

    grid: str
    lines: list[tuple[str, str]]
    x: list[tuple[str, str, str]]
    y: list[tuple[str, str]]
    side: int


Figure = tuple[str, Chart]  # caption and chart


def curves(log: list[dict[str, Any]], metrics: Sequence[Metric]) -> list[Figure]:
    """Charts of everything in the log over steps: loss, validation, the method's metrics.

    `metrics`: the benchmark's, for the titles of validation charts.
    """
    known = {f"val_{m.key}": f"Validation: {m.title}{m.unit and f', {m.unit}'}" for m in (*QUANTITIES, *metrics)}
    titles = TITLES | known
    keys = dict.fromkeys(key for row in log for key in row if key not in ("step", "lr", "seconds"))
    figures = []
    for key in sorted(keys, key=lambda key: (key != "loss", not key.startswith("val_"))):
        numbers = [(row.get("step"), row[key]) for row in log if key in row]
        points = [(float(x), float(y)) for x, y in numbers if isinstance(x, int) and isinstance(y, int | float)]
        if len(points) > 1:
            figures.append((titles.get(key, key), curve(points)))
    return figures


def curve(points: Sequence[Point]) -> Chart:
    """One quantity over steps: up to 40 values as a line; more as a faint line with their running mean."""
    steps, values = np.array(points).T
    low, high = np.quantile(values, [0.0, 0.995])
    if low == high or 0 <= low < 0.5 * high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    ticks = nice_ticks(low, high)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    lines: list[tuple[str, Sequence[Point | None]]] = [("c0", points)]
    if len(points) > 40:
        window = max(len(points) // 20, 3)
        mean = np.convolve(values, np.ones(window) / window, "valid")
        middle = steps[window // 2 : window // 2 + len(mean)]
        thinned = slice(None, None, max(len(points) // 500, 1))
        clipped = np.clip(values, bottom, top)
        lines = [
            ("c0 faint", list(zip(steps[thinned], clipped[thinned], strict=True))),
            ("c0", list(zip(middle[thinned], mean[thinned], strict=True))),
        ]
    span = (0.0, float(steps[-1]))
    x_ticks = [(x, f"{x:g}") for x in nice_ticks(*span)]
    return chart(lines, span, (bottom, top), x_ticks, [(y, f"{y:g}".replace("-", "−")) for y in ticks])


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values in [low, high]."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(
    series: Sequence[tuple[str, Sequence[Point | None]]],
    x_range: Point,
    y_range: Point,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> Chart:
    """A chart of lines (CSS class, points; None breaks a line); strokes and labels keep their size when it scales."""
    size = 1000

    def at(value: float, span: Point) -> float:
        return (value - span[0]) / (span[1] - span[0])

    def place(points: Sequence[Point | None]) -> list[Point | None]:
        # SVG's y points down
        return [None if p is None else (size * at(p[0], x_range), size * (1 - at(p[1], y_range))) for p in points]

    grid = "".join(f"M0 {size * (1 - at(y, y_range)):.0f}H{size}" for y, _ in y_ticks) + f"M0 {size}H{size}"
    lines = [(style, path_d(place(points), 0)) for style, points in series]
    y = [(f"{100 * (1 - at(value, y_range)):.1f}", text) for value, text in y_ticks]
    x = []
    for i, (value, text) in enumerate(x_ticks):
        end = " first" if i == 0 else " last" if at(value, x_range) > 0.95 else ""
        x.append((f"{100 * at(value, x_range):.1f}", f"x{end}", text))
    return Chart(grid, lines, x, y, size)


def path_d(points: Sequence[Point | None], decimals: int) -> str:
    """SVG path data of a line; None breaks it."""
    out, down = [], False
    for point in points:
        if point is not None:
            out.append(f"{'L' if down else 'M'}{point[0]:.{decimals}f} {point[1]:.{decimals}f}")
        down = point is not None
    return "".join(out)


def number(value: float | None, decimals: int) -> str:
    if value is None:
        return "–"
    text = f"{value:.{decimals}f}"
    return text.replace("-", "−" if float(text) else "")
