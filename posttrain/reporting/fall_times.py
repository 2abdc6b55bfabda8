"""The report's section on p(t|y), the density of fall times that a first frame allows (metrics/distribution.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation.records import Record
from posttrain.reporting.charts import Figure, Point, chart, nice_ticks

SHOWN = 3  # first frames that are shown: those with the lowest, the middle and the highest beta
LIFTED = 24  # videos per first frame whose heights are drawn


def section(
    records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]
) -> dict[str, Any] | None:
    """A table of the tests, the distributions for three first frames, and the falls in metres; None without falls.

    Args:
        records: from records.read_apart.
        falls: from benchmarks.distribution.falls, one for each record.
    """
    if not falls:
        return None
    heads = ("Pictures", "Videos of each", "Rejected", "Never lands", "Lifted depth as in training", "Off a free fall")
    return {"heads": heads, "rows": rows(falls, styles), "figures": figures(records, falls, styles)}


def rows(falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The table's rows, one per model."""
    out = []
    for model_falls in falls:
        pictures = model_falls["pictures"]
        cells = (
            str(len(pictures)),
            str(pictures[0]["videos"]),
            f"{100 * model_falls['rejected']:.0f}%",
            f"{100 * model_falls['never']:.0f}%",
            "–" if model_falls["inside"] is None else f"{100 * model_falls['inside']:.0f}%",
            "–" if model_falls["fall_error"] is None else f"{model_falls['fall_error']:.2f} m",
        )
        name = model_falls["model"]
        out.append({"model": name, "style": styles.get(name, ""), "cells": cells})
    return out


def figures(records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> list[Figure]:
    """Charts for each shown first frame: p(t|y) with the models' shares, then the last model's falls in metres."""
    fps, last = records[-1].fps, falls[-1]
    assert fps is not None
    betas = [picture["beta"] for picture in last["pictures"]]
    order = sorted(range(len(betas)), key=lambda i: betas[i])
    chosen = list(dict.fromkeys(order[round(i * (len(order) - 1) / (SHOWN - 1))] for i in range(SHOWN)))
    out = []
    for i in chosen:
        series = [("truth", steps(last["pictures"][i]["pmf"], fps))]
        series += [
            (styles.get(model_falls["model"], ""), steps(model_falls["pictures"][i]["measured"], fps))
            for model_falls in falls
        ]
        top = max(share for _, points in series for _, share in points)
        end = len(last["pictures"][i]["pmf"]) / fps
        ticks = [(x, f"{x:g} s") for x in nice_ticks(0, end)]
        plot = chart(series, (0.0, end), (0.0, top), ticks, [(y, f"{100 * y:.0f}%") for y in nice_ticks(0, top)])
        p_values = ", ".join(f"{f['model']} p {f['pictures'][i]['p_value']:.3f}" for f in falls)
        caption = f"Impact, beta {betas[i]:.3f}; {p_values}; the last step never lands"
        out.append((caption, plot))
    groups = list(dict.fromkeys(clip.truth["group"] for clip in records[-1].clips))
    for i in chosen:
        clips = [clip for clip in records[-1].clips if clip.truth["group"] == groups[i]]
        out += lifts(
            [lift for clip in clips for lift in clip.lifted or () if lift][:LIFTED], last["model"], betas[i], fps
        )
    return out


def steps(shares: Sequence[float], fps: float) -> list[Point]:
    """The line (seconds, share) of a step function; step k is for falls that end from (k - 1) / fps to k / fps."""
    return [(max(k + side, 0) / fps, share) for k, share in enumerate(shares) for side in (-1, 0)]


def lifts(falls: Sequence[Mapping[str, Any]], model: str, beta: float, fps: float) -> list[Figure]:
    """A chart of lifted heights in metres over time (`distribution.lift`); empty if no fall has heights."""
    lines = [
        ("c0 thin", [None if y is None else (k / fps, float(y)) for k, y in enumerate(lift["heights"])])
        for lift in falls
    ]
    present = [point for _, points in lines for point in points if point]
    if not present:
        return []
    times, heights = zip(*present, strict=True)
    end, low, top = max(times), min(*heights, 0.0), max(heights)
    ticks = [(x, f"{x:g} s") for x in nice_ticks(0, end)]
    plot = chart(lines, (0.0, end), (low, top), ticks, [(y, f"{y:g}") for y in nice_ticks(low, top)])
    caption = f"Falls of {model}, lifted: metres above the floor, beta {beta:.3f}"
    return [(caption, plot)]
