"""The report's section on p(t|y): whether a model makes all falls that a first picture allows, and no others."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation.records import Record
from posttrain.reporting.charts import Point, chart, nice_ticks

SHOWN = 3  # first pictures: those with the lowest, the middle and the highest beta
LIFTED = 24  # videos per picture whose heights are drawn


def section(records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> str:
    """A table of the tests, the distributions for three first pictures, and the falls in metres.

    Args:
        records: from records.read_apart.
        falls: from benchmarks.distribution.falls, one for each record.
    """
    if not falls:
        return ""
    note = (
        "Each first picture allows falls of many durations, since it does not show how far away the object is. Line "
        "<i>law</i>: p(t|y) for depths distributed as in the training clips, with the measurement's errors on true "
        "clips. A Kolmogorov-Smirnov test for tied values compares it with the impact frames of the model's videos; a "
        "perfect model is rejected on 5% of the pictures. Lifted: the depth that follows from the fall time, and how "
        "far the heights at that depth are from a free fall."
    )
    table = f'<div class="wide"><table>{"".join(rows(falls, styles))}</table></div>'
    heading = "All the falls that a picture allows?"
    plots = figures(records, falls, styles)
    return f'<section id="falls"><h2>{heading}</h2><p class="note">{note}</p>{table}{plots}</section>'


def rows(falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> list[str]:
    """The table's rows, one per model."""
    heads = ("Pictures", "Videos of each", "Rejected", "Never lands", "Lifted depth as in training", "Off a free fall")
    out = ["<tr><th>Model</th>" + "".join(f"<th>{title}</th>" for title in heads) + "</tr>"]
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
        name = f'<span class="key {styles.get(model_falls["model"], "")}"></span>{html.escape(model_falls["model"])}'
        out.append(f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return out


def figures(records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> str:
    """For each shown picture p(t|y) and the models' shares, then the last model's falls in metres."""
    fps, last = records[-1].fps, falls[-1]
    assert fps is not None
    betas = [picture["beta"] for picture in last["pictures"]]
    order = sorted(range(len(betas)), key=lambda i: betas[i])
    chosen = list(dict.fromkeys(order[round(i * (len(order) - 1) / (SHOWN - 1))] for i in range(SHOWN)))
    out = ""
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
        p_values = ", ".join(f"{html.escape(f['model'])} p {f['pictures'][i]['p_value']:.3f}" for f in falls)
        caption = f"Impact, beta {betas[i]:.3f}; {p_values}; the last step never lands"
        out += f"<figure><figcaption>{caption}</figcaption>{plot}</figure>"
    groups = list(dict.fromkeys(clip.truth["group"] for clip in records[-1].clips))
    for i in chosen:
        clips = [clip for clip in records[-1].clips if clip.truth["group"] == groups[i]]
        out += lifts(
            [lift for clip in clips for lift in clip.lifted or () if lift][:LIFTED], last["model"], betas[i], fps
        )
    return f'<div class="curves">{out}</div>'


def steps(shares: Sequence[float], fps: float) -> list[Point]:
    """A step per impact frame k, the frame of all falls that end between (k - 1) / fps and k / fps."""
    return [(max(k + side, 0) / fps, share) for k, share in enumerate(shares) for side in (-1, 0)]


def lifts(falls: Sequence[Mapping[str, Any]], model: str, beta: float, fps: float) -> str:
    """A figure of heights in metres over time, as they follow from the fall time."""
    lines = [
        ("c0 thin", [None if y is None else (k / fps, float(y)) for k, y in enumerate(lift["heights"])])
        for lift in falls
    ]
    present = [point for _, points in lines for point in points if point]
    if not present:
        return ""
    times, heights = zip(*present, strict=True)
    end, low, top = max(times), min(*heights, 0.0), max(heights)
    ticks = [(x, f"{x:g} s") for x in nice_ticks(0, end)]
    plot = chart(lines, (0.0, end), (low, top), ticks, [(y, f"{y:g}") for y in nice_ticks(low, top)])
    caption = f"Falls of {html.escape(model)}, lifted: metres above the floor, beta {beta:.3f}"
    return f"<figure><figcaption>{caption}</figcaption>{plot}</figure>"
