"""How accurate the scorecard of posttrain.metrics.physics is on the simulator's own masks, as Markdown.

    python -m posttrain.studies.violations data/pocket-violations data/pocket-drop --figure violations.png

The first table has, on true clips, the error of every quantity, compared with its sigma. The second has, on clips that
break one law (sim/worlds/counterfactual.py), every quantity at each value of the violation, and Spearman's rho of
quantity and value. The figure shows the quantities, and the metrics of posttrain.metrics.pisa, over severity.

The true gravity, first contact and drop height are in the rows of metadata.jsonl. The true restitution is that of the
body's centre on the simulator's path, if the body flies freely in the first three frames after the contact. The true
permanence is 1; the other true values are 0.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.core.progress import markdown, track
from posttrain.data.dataset import Split, open_split, read_annotations
from posttrain.data.schema import ClipRow
from posttrain.metrics import pisa
from posttrain.metrics.physics import QUANTITIES, SIDEWAYS, Measure, scorecard

UNITS = ("m/s²", "s", "s", "1", "m", "J/kg", "J/kg", "m/s", "m", "1", "1/s")
PISA = ("l2", "chamfer", "iou", "vanished", "time_error")
MOVED = 0.5  # a quantity follows the violation if |rho| is above this


class Measured(NamedTuple):
    """A clip's scorecard. `truth` has its true values (None: unknown), and is empty for a clip that breaks a law."""

    card: dict[str, Measure | None]
    kind: str | None
    value: float
    truth: dict[str, float | None]
    severity: float = 0.0
    scores: dict[str, float | None] | None = None  # PISA's, against the group's true clip; None for the true clip


def measure(split: Split) -> list[Measured]:
    """The scorecards of a split's clips; penetration is measured with the drop height of the group's true clip.

    Raises:
        UserError: the rows of true clips have no drop height or contacts, or annotations are missing or damaged.
    """
    true = [row for row in split.rows if row.violation is None]
    if not all(row.drop_height and row.contacts and row.camera and row.gravity for row in true):
        raise UserError(f"{split.folder}: does not say when bodies land; name a folder of drops", "mismatch")
    heights = {row.group: row.drop_height for row in true if row.group is not None}
    firsts = {row.group: first_met(row) for row in true if row.group is not None}
    clips, truths = [], dict[int, np.ndarray]()
    for index in track(range(len(split.rows)), "measuring", len(split.rows)):
        row, violation = split.rows[index], split.rows[index].violation
        assert row.target is not None
        assert row.camera is not None
        assert row.gravity is not None
        arrays = read_annotations(split.annotations(index), ["instances", "positions"])
        path_F3, masks_FHW = arrays["positions"][:, row.target], arrays["instances"] == row.target + 1
        times_F = pisa.even_times(len(masks_FHW), row.fps)
        card = scorecard(
            masks_FHW,
            times_F,
            row.camera.intrinsics[0][0],
            path_F3[0, 1] - row.camera.position[1],
            row.drop_height if row.group is None else heights.get(row.group, row.drop_height),
            math.hypot(*row.gravity),
        )
        if violation is None:
            clips.append(Measured(card, None, 0.0, truth(row, path_F3[:, 2])))
            truths[-1 if row.group is None else row.group] = masks_FHW  # the first of its group
        else:
            assert row.group is not None
            # if the body lands on a pile first, it sinks into the floor only after its first contact
            later = violation.kind == "tunnel_floor" and firsts[row.group] >= 0
            kind, height = violation.kind + " later" * later, heights[row.group]
            assert height is not None
            scores: dict[str, float | None] = dict(pisa.score(masks_FHW, truths[row.group], times_F, row.fps))
            scores["time_error"] = pisa.time_error(masks_FHW, times_F, height, math.hypot(*row.gravity))["time_error"]
            clips.append(Measured(card, kind, violation.value, {}, violation.severity, scores))
    return clips


def first_met(row: ClipRow) -> int:
    """What the target lands on: a body's index, or -1 for the floor."""
    a, b = next(contact.pair for contact in row.contacts if row.target in contact.pair)
    return b if a == row.target else a


def truth(row: ClipRow, z_F: np.ndarray) -> dict[str, float | None]:
    """The true values of a true clip's scorecard; None: unknown. `z_F`: heights of the body's centre in metres."""
    assert row.gravity is not None
    assert row.contact_time is not None
    gravity, contact, fps = -row.gravity[2], row.contact_time, row.fps
    k = int(contact * fps) + 2  # the second frame after the contact
    restitution = None
    if k + 1 < len(z_F) and abs(np.diff(z_F[k - 1 : k + 2], 2)[0] * fps**2 + gravity) < 0.01 * gravity:
        velocity = (z_F[k + 1] - z_F[k - 1]) * fps / 2  # exact in free flight
        restitution = float(velocity + gravity * (k / fps - contact)) / (gravity * contact)
    kept = None if restitution is None else (restitution**2 - 1) * (gravity * contact) ** 2 / 2
    zero = dict.fromkeys(QUANTITIES, 0.0)
    return zero | {
        "g": gravity,
        "contact": contact,
        "restitution": restitution,
        "energy_contact": kept,
        "permanence": 1.0,
    }


def accuracy(clips: Sequence[Measured]) -> str:
    """Markdown: a line per quantity with mean and standard deviation of its error, median sigma, and the standard
    deviation of error / sigma."""
    lines = []
    for name, unit in zip(QUANTITIES, UNITS, strict=True):
        pairs = [(clip.card[name], clip.truth[name]) for clip in clips]
        errors = [(m.value - t, m.sigma) for m, t in pairs if m is not None and t is not None]
        if not errors:
            lines.append([name, unit, "0", "–", "–", "–", "–"])
            continue
        error, sigma = np.array(errors).T
        cells = [f"{error.mean():+.4f}", f"{error.std():.4f}", f"{np.median(sigma):.4f}"]
        lines.append([name, unit, str(len(errors)), *cells, f"{(error / sigma).std():.2f}" if sigma.all() else "–"])
    return markdown(["quantity", "unit", "clips", "bias", "spread", "sigma", "spread of error / sigma"], lines)


def response(clips: Sequence[Measured]) -> str:
    """Markdown: a line per kind of violation, a column per quantity with its median at each value of the violation, and
    rho, in bold if |rho| is above MOVED.

    Medians of sideways quantities are of their magnitudes. A dash means that most clips do not have the quantity.
    """
    lines = [["true clips", *(cell([clip for clip in clips if clip.kind is None], name) for name in QUANTITIES)]]
    for kind in dict.fromkeys(clip.kind for clip in clips if clip.kind is not None):
        chosen = [clip for clip in clips if clip.kind == kind]
        values = list(dict.fromkeys(clip.value for clip in chosen))
        head = f"{kind} {' '.join(f'{value:g}' for value in values)}"
        lines.append([head, *(cell(chosen, name) for name in QUANTITIES)])
    return markdown(["violation", *QUANTITIES], lines)


def cell(clips: Sequence[Measured], name: str) -> str:
    """A quantity's medians by value of the violation, and rho if there are several values."""
    medians, pairs = [], []
    for value in dict.fromkeys(clip.value for clip in clips):
        measures = [clip.card[name] for clip in clips if clip.value == value]
        numbers_of_value = [abs(m.value) if name in SIDEWAYS else m.value for m in measures if m is not None]
        enough = 2 * len(numbers_of_value) > len(measures)
        medians.append(f"{np.round(np.median(numbers_of_value), 4) + 0.0:.3g}" if enough else "–")
        pairs += [(value, number) for number in numbers_of_value if enough]
    text = " ".join(medians)
    by_value, numbers = zip(*pairs, strict=True) if pairs else ((), ())
    if len(set(by_value)) > 1 and len(set(numbers)) > 1:
        rho = spearmanr(by_value, numbers).statistic
        text += f" (**{rho:+.2f}**)" if abs(rho) > MOVED else f" ({rho:+.2f})"
    return text


def figure(clips: Sequence[Measured], path: Path) -> None:
    """Write a PNG with a panel per kind of violation and quantity: the median at each value, over the mean severity.

    The true clips' median and quartiles are grey. Lines with |rho| above MOVED are red and thick.
    """
    from matplotlib.figure import Figure

    true, columns = [clip for clip in clips if clip.kind is None], (*PISA, *QUANTITIES)
    kinds = sorted({clip.kind for clip in clips if clip.kind is not None})
    size = (0.95 * len(columns) + 1.6, 0.62 * len(kinds) + 1.0)
    drawing = Figure(size)
    axes = drawing.subplots(len(kinds), len(columns), sharex=True, sharey="col", squeeze=False)
    for j, name in enumerate(columns):
        usual = [number for clip in true if (number := quantity(clip, name)) is not None]
        low, middle, high = np.quantile(usual, (0.25, 0.5, 0.75))
        lines = [line(clips, kind, name) for kind in kinds]
        levels = np.array([low, high, *(median for points, _ in lines for _, median in points)])
        bottom, top = np.quantile(levels, (0.02, 0.98))  # a kind with large values must not flatten the others
        margin = 0.15 * (top - bottom) or 1.0
        units = dict(zip(QUANTITIES, UNITS, strict=True)) | {"time_error": "s"}
        axes[0, j].set_title(f"{name.replace('_', ' ')}\n{units.get(name, '1')}", fontsize=7)
        for i, (points, rho) in enumerate(lines):
            cell = axes[i, j]
            follows = abs(rho) > MOVED
            cell.axhspan(low, high, color="0.9", linewidth=0)
            cell.axhline(middle, color="0.6", linewidth=0.6)
            if points:
                colour, width = ("C3", 1.6) if follows else ("0.35", 0.8)
                cell.plot(
                    *zip(*points, strict=True), color=colour, linewidth=width, marker=".", markersize=3, clip_on=True
                )
            cell.set(xlim=(0, 1.02), ylim=(bottom - margin, top + margin), xticks=(0, 0.5, 1))
            cell.tick_params(labelsize=5, length=2, pad=1)
    for i, kind in enumerate(kinds):
        axes[i, 0].set_ylabel(kind.replace("_", " "), fontsize=7, rotation=0, ha="right", va="center")
    drawing.supxlabel("severity: 0 as the truth, 1 as far from it as a clip in which nothing moves", fontsize=8)
    left, bottom = 1.3 / size[0], 0.55 / size[1]  # inches; matplotlib's own layouts take minutes for so many cells
    drawing.subplots_adjust(left, bottom, 0.995, 1 - 0.5 / size[1], wspace=0.35, hspace=0.25)
    with replacing(path) as temporary:
        drawing.savefig(temporary, dpi=110, format="png")


def quantity(clip: Measured, name: str) -> float | None:
    """A clip's quantity (its magnitude if sideways) or metric (perfect for true clips); None: the clip lacks it."""
    if name in PISA:
        return float(name == "iou") if clip.scores is None else clip.scores[name]
    measure = clip.card[name]
    return None if measure is None else abs(measure.value) if name in SIDEWAYS else measure.value


def line(clips: Sequence[Measured], kind: str, name: str) -> tuple[list[tuple[float, float]], float]:
    """Points (mean severity, median of a quantity), one per value of a violation, and rho of severity and quantity.

    rho includes the true clips, at severity 0. A value at which most clips lack the quantity is left out.
    """
    points, pairs = [], []
    for value in dict.fromkeys(clip.value for clip in clips if clip.kind == kind):
        chosen = [clip for clip in clips if clip.kind == kind and clip.value == value]
        points_of_value = [(clip.severity, number) for clip in chosen if (number := quantity(clip, name)) is not None]
        if 2 * len(points_of_value) > len(chosen):
            severities, numbers = np.array(points_of_value).T
            points.append((float(severities.mean()), float(np.median(numbers))))
            pairs += [(points[-1][0], number) for number in numbers]
    pairs += [(0.0, number) for clip in clips if clip.kind is None and (number := quantity(clip, name)) is not None]
    severities, numbers = np.array(pairs).T
    varied = points and len(set(numbers)) > 1
    return sorted(points), float(spearmanr(severities, numbers).statistic) if varied else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the scorecard on simulated clips")
    parser.add_argument("clips", nargs="+", help="dataset folders")
    parser.add_argument("--split", default="test_unseen")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the clips that break a law (PNG)")
    options = parser.parse_args(arguments)
    try:
        folders = [measure(open_split(folder, options.split)) for folder in options.clips]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(accuracy([clip for clips in folders for clip in clips if clip.kind is None]))
    for clips in folders:
        if any(clip.kind for clip in clips):
            print(f"\n{response(clips)}")
    if options.figure:
        figure([clip for clips in folders if any(clip.kind for clip in clips) for clip in clips], options.figure)
        print(f"\nfigure: {options.figure}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
