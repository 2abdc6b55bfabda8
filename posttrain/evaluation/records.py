"""Records that evaluate.py and score.py write: read, set in order, told as means, intervals, differences and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.evaluation.benchmarks import pisa

REFERENCES = ("truth", "truth_vae", "frozen")  # nothing random in them, so one seed
FIXED = (*REFERENCES, "base")  # the same for all runs of one base
GRID, FALLS = "grid", "falls"  # beside the splits


def read_records(run: Path | str) -> list[dict[str, Any]]:
    """The finished records of a run, split by split, references and base first; that of the grid as `id` and `ood`.

    Raises:
        UserError: there is none, or they are not of one evaluation.
    """
    records = [part for record in _finished(Path(run)) if record["split"] != FALLS for part in parts(record)]
    return sorted(records, key=position)


def read_falls(run: Path | str) -> list[dict[str, Any]]:
    """The finished records of the test of p(t|y), which may be none."""
    return sorted((record for record in _finished(Path(run)) if record["split"] == FALLS), key=position)


def _finished(run: Path) -> list[dict[str, Any]]:
    folder = run / "evaluation"
    records = [files.read_json(path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if len(record["clips"]) == record["total"]]
    if not records:
        raise UserError(f"{folder}: has no finished evaluation; run `posttrain eval` first")
    if any(record.get("settings") != records[0].get("settings") for record in records):
        raise UserError(f"{folder}: an evaluation with other settings was cut off; run `posttrain eval` to its end")
    return records


def gather(runs: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """The records of several runs, named by the value of a sweep or the row of a table that they are of.

    References and base, where all share them, are there once. `row` is None of these. Runs of one row are pooled.

    Raises:
        UserError: runs of one row were measured in different ways, or one of them was not.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row, folders in runs.items():
        alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for folder in folders:
            for record in read_records(folder):
                samples = str(folder / "samples" / record["model"])
                alike.setdefault((record["model"], record["split"]), []).append(record | {"samples": samples})
        for (name, split), records in alike.items():
            fixed = name in FIXED
            if len(records) < len(folders):
                raise UserError(f"{folders[0].parent}: not all its runs were measured on {split} clips; evaluate them")
            for record, folder in zip(records, folders, strict=True):
                if record["settings"] != records[0]["settings"] or (fixed and record["key"] != records[0]["key"]):
                    raise UserError(f"{folder}: was measured otherwise than {folders[0]}; `posttrain eval` both again")
            record = records[0] if fixed else pooled(records)
            shared = fixed and found.get((name, split), record)["key"] == record["key"]
            label = name if shared else f"{name} {row}"
            found[label, split] = record | {"model": label, "row": None if fixed else row}
    return sorted(found.values(), key=position)


def comparable(records: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Of what `gather` gives, the trained models' records by split, where each of `rows` was measured on it.

    Raises:
        UserError: there is no such split, or they were measured on other clips or in another way.
    """
    labels = {(record["model"], record["split"]) for record in records}
    splits: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["row"] is not None:
            splits.setdefault(record["split"], []).append(record)
    splits = {split: found for split, found in splits.items() if len(found) == len(rows)}
    if not splits:
        raise UserError(f"{', '.join(rows)}: no split on which all of them were measured; `posttrain eval` each")
    for split, (first, *others) in splits.items():
        for record in others:
            row = record["row"]
            # what the tracker finds in the true clips is the same where clips, tracker and the code that measures are
            if (f"truth {row}", split) in labels:
                raise UserError(f"{row}: was measured on other clips than {rows[0]}, by another tracker or older code")
            if any(record["settings"][key] != first["settings"][key] for key in ("seeds", "sampler")):
                raise UserError(
                    f"{row}: was measured with other eval.seeds or eval.sampler than {rows[0]}; measure again"
                )
    return list(splits.values())


def pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of a row's runs, clip by clip: the mean of each number that is there; the paths of all samples."""
    if len(records) == 1:
        return records[0]
    clips = []
    for same in zip(*(record["clips"] for record in records), strict=True):
        assert len({clip["id"] for clip in same}) == 1
        joined: dict[str, Any] = {
            key: [each for clip in same for each in clip[key]] for key in ("paths", "impact_frames") if key in same[0]
        }
        if "physics" in same[0]:
            joined["physics"] = {
                name: pisa.pooled([clip["physics"][name] for clip in same]) for name in same[0]["physics"]
            }
        clips.append(average([{k: v for k, v in clip.items() if k not in joined} for clip in same]) | joined)
    return records[0] | {"clips": clips, "seconds": sum(record["seconds"] for record in records)}


def average(values: Sequence[Any]) -> Any:
    """The mean of numbers that are not None, place by place in lists and mappings; what is the same in all stays."""
    present = [value for value in values if value is not None]
    if all(value == present[0] for value in present):
        return present[0] if present else None
    match present[0]:
        case dict() as first:
            return {key: average([value[key] for value in present]) for key in first}
        case list():
            return [average(same) for same in zip(*present, strict=True)]
        case _:
            return sum(present) / len(present)


def parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of a grid as one of the clips within the distribution of the training clips and one of the others."""
    if record["split"] != GRID:
        return [record]
    clips = {
        name: [clip for clip in record["clips"] if clip["truth"]["id"] == (name == "id")] for name in ("id", "ood")
    }
    return [record | {"split": name, "clips": some} for name, some in clips.items() if some]


def position(record: dict[str, Any]) -> tuple[bool, str, int]:
    """Where a record stands among others: by split, unseen first, references and base before the rest."""
    row = record["model"]
    return record["split"] != "unseen", record["split"], FIXED.index(row) if row in FIXED else len(FIXED)


def interval(
    values: Sequence[float | None], statistic: Literal["mean", "median"] = "mean", level: float = 0.95
) -> dict[str, Any]:
    """Mean of the values that exist, its percentile bootstrap interval (10,000 resamples, seeded), their number.

    Or their median, and its interval. `level` is the interval's.
    """
    present = np.array([value for value in values if value is not None], dtype=float)
    if not len(present):
        return {statistic: None, "low": None, "high": None, "n": 0}
    low = high = middle = float(getattr(np, statistic)(present))
    if len(present) > 1:
        resampled = bootstrap(
            (present,),
            getattr(np, statistic),
            n_resamples=10_000,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=1000,
        )
        low, high = resampled.confidence_interval
    return {statistic: middle, "low": float(low), "high": float(high), "n": len(present)}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """One row of report.json: each metric's interval over clips; "released" holds those of the other convention.

    "physics" is the scorecard, with medians, as a fit fails now and then.
    """
    clips = record["clips"]
    released = {key: interval([clip["released"][key] for clip in clips]) for key in clips[0]["released"]}
    means = {key: interval([clip[key] for clip in clips]) for key in pisa.METRICS}
    cards = [clip.get("physics", {}) for clip in clips]  # older runs have none
    card = {name: interval([found[name] and found[name][0] for found in cards], "median") for name in cards[0]}
    return {"model": record["model"], "split": record["split"]} | means | {"released": released, "physics": card}


def difference(record: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Each metric of `record` minus that of `against`, clip by clip; paired intervals over the clips in both."""
    others = {clip["id"]: clip for clip in against["clips"]}
    pairs = [(clip, others[clip["id"]]) for clip in record["clips"] if clip["id"] in others]

    def gap(key: str) -> list[float | None]:
        return [None if a[key] is None or b[key] is None else a[key] - b[key] for a, b in pairs]

    names = {"model": record["model"], "against": against["model"], "split": record["split"]}
    return names | {key: interval(gap(key)) for key in pisa.METRICS}


def wide() -> Console:
    """For the names of several runs, where no terminal says how wide it is."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_table(records: Sequence[dict[str, Any]], console: Console | None = None, released: bool = False) -> None:
    """The records' means, L2 first with its interval; `released`: in the other convention. Fits 80 columns."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = {
        "l2": "L2 [95%]",
        "chamfer": "Chamfer",
        "iou": "IoU",
        "vanished": "Vanished",
        "time_error": "Time error",
    }
    if released:
        del headings["time_error"]
    for heading in ("Model", "Clips", *headings.values()):
        table.add_column(heading, justify="left" if heading in ("Model", "Clips") else "right", no_wrap=True)
    for previous, record in zip([records[0], *records], records, strict=False):
        if previous["split"] != record["split"]:
            table.add_row()
        row = summary(record)["released"] if released else summary(record)
        cells = {key: "-" if row[key]["mean"] is None else f"{row[key]['mean']:.3f}" for key in headings}
        if row["l2"]["mean"] is not None:
            cells["l2"] += f" [{row['l2']['low']:.3f}, {row['l2']['high']:.3f}]"
        if not released and row["time_error"]["mean"] is not None:
            cells["time_error"] += " s"
        style = "dim" if record["model"] in REFERENCES else None
        table.add_row(record["model"], record["split"], *cells.values(), style=style)
    (console or Console()).print(table)


def print_differences(splits: Sequence[Sequence[dict[str, Any]]], console: Console | None = None) -> None:
    """What records of each split differ by from its first one: paired means over clips with 95% intervals."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"Minus {splits[0][0]['model']}", no_wrap=True)
    table.add_column("Clips", no_wrap=True)
    for heading in ("L2 [95%]", "IoU [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for first, *others in splits:
        for record in others:
            gap = difference(record, first)
            cells = [f"{gap[k]['mean']:+.3f} [{gap[k]['low']:+.3f}, {gap[k]['high']:+.3f}]" for k in ("l2", "iou")]
            table.add_row(record["model"], record["split"], *cells)
    (console or Console()).print(table)
