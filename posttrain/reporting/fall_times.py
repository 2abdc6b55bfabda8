"""The report's section on p(t|y): does a model make all the falls that a first picture allows, and only these?"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation.records import Record
from posttrain.reporting.charts import Point, chart, nice_ticks

SHOWN = 3  # first pictures: that with the lowest beta, the middle one, that with the highest
LIFTED = 24  # videos of a picture whose heights are drawn


def section(records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> str:
    """A table of the tests, the distributions for three first pictures, and the falls in metres.

    Args:
        records: of records.read_apart.
        falls: of benchmarks.distribution.falls, for each of them.
    """
    if not falls:
        return ""
    note = (
        "Each first picture allows falls of many lengths, for it does not tell how far away the object is. Line "
        "<i>law</i>: p(t|y) for depths that are as likely as in the training clips, with the errors that the "
        "measurement makes on true clips. A Kolmogorov-Smirnov test that respects ties compares it with the impact "
        "frames of the model's videos; a perfect model is rejected on 5% of the pictures. Lifted: the depth that the "
        "fall's time implies, and how far the heights that follow from it are from a free fall."
    )
    table = f'<div class="wide"><table>{"".join(rows(falls, styles))}</table></div>'
    heading = "All the falls that a picture allows?"
    plots = figures(records, falls, styles)
    return f'<section id="falls"><h2>{heading}</h2><p class="note">{note}</p>{table}{plots}</section>'


def rows(falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> list[str]:
    """The table's rows, a model each."""
    heads = ("Pictures", "Videos of each", "Rejected", "Never lands", "Lifted depth as in training", "Off a free fall")
    out = ["<tr><th>Model</th>" + "".join(f"<th>{title}</th>" for title in heads) + "</tr>"]
    for found in falls:
        pictures = found["pictures"]
        cells = (
            str(len(pictures)),
            str(pictures[0]["videos"]),
            f"{100 * found['rejected']:.0f}%",
            f"{100 * found['never']:.0f}%",
            "–" if found["inside"] is None else f"{100 * found['inside']:.0f}%",
            "–" if found["fall_error"] is None else f"{found['fall_error']:.2f} m",
        )
        name = f'<span class="key {styles.get(found["model"], "")}"></span>{html.escape(found["model"])}'
        out.append(f"<tr><td>{name}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return out


def figures(records: Sequence[Record], falls: Sequence[Mapping[str, Any]], styles: Mapping[str, str]) -> str:
    """For each shown picture the law and what the models do, then what the last model does in metres."""
    fps, last = records[-1].fps, falls[-1]
    assert fps is not None
    betas = [picture["beta"] for picture in last["pictures"]]
    order = sorted(range(len(betas)), key=lambda i: betas[i])
    chosen = list(dict.fromkeys(order[round(i * (len(order) - 1) / (SHOWN - 1))] for i in range(SHOWN)))
    out = ""
    for i in chosen:
        series = [("truth", steps(last["pictures"][i]["pmf"], fps))]
        series += [(styles.get(found["model"], ""), steps(found["pictures"][i]["measured"], fps)) for found in falls]
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
    """A step per impact frame k, which ends the falls between (k - 1) / fps and k / fps."""
    return [(max(k + side, 0) / fps, share) for k, share in enumerate(shares) for side in (-1, 0)]


def lifts(found: Sequence[Mapping[str, Any]], model: str, beta: float, fps: float) -> str:
    """Heights in metres over time, as the fall's time implies them."""
    lines = [
        ("c0 thin", [None if y is None else (k / fps, float(y)) for k, y in enumerate(lift["heights"])])
        for lift in found
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
