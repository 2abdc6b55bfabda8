"""The report of a run, made from the run's files: report.json for programs, report.html for people, and report.gif.

report.html is one file that needs no network: table with intervals, players, trajectories, learning curves, recipe.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from posttrain.core import files, pages
from posttrain.evaluation.benchmarks import distribution
from posttrain.evaluation.benchmarks.base import BASE, Benchmark, Metric
from posttrain.evaluation.records import (
    Record,
    difference,
    fixed,
    gather,
    named,
    read_apart,
    read_records,
    references,
    summary,
    unequal,
)
from posttrain.reporting import fall_times
from posttrain.reporting.charts import Figure, Point, chart, curves, nice_ticks, number
from posttrain.reporting.gallery import animation
from posttrain.reporting.players import Shown, heading, players, side_by_side, unlike

SHOWN = 4  # clips in report.gif
PACKAGES = ("posttrain", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "av")


def report(run: Path | str, runs: Mapping[str, Sequence[Path]] | None = None) -> tuple[Path, Path]:
    """Write report.json, report.html and report.gif of the run folder `run`; returns the paths of the first two.

    Args:
        runs: if `run` is a sweep or a table, the run folders of each value or row.

    Raises:
        UserError: the run has no finished evaluation, or a sample that the page shows is missing.
    """
    run = Path(run)
    records = gather(runs) if runs else read_records(run)
    folders = [folder for each in runs.values() for folder in each] if runs else [run]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) if (run / "recipe.yaml").exists() else {}
    logs = [files.read_log(path) for folder in folders if (path := folder / "log.jsonl").exists()]
    falls = [] if runs else read_apart(run)
    facts = summarise(run.name, records, recipe, [line for log in logs for line in log], falls)
    files.write_json(run / "report.json", facts)
    shown = side_by_side(run, records)
    files.write_text(run / "report.html", page(records, facts, [] if runs or not logs else logs[0], shown, falls))
    if shown:
        models, _, first = shown[0]
        names, fps = [record.row for record in models], models[0].fps
        assert fps is not None
        alike = [p for m, _, p in shown if [r.row for r in m] == names and p[0].shape == first[0].shape]
        animation(run / "report.gif", alike[:SHOWN], fps, names)
    return run / "report.json", run / "report.html"


def summarise(
    name: str,
    records: Sequence[Record],
    recipe: dict[str, Any],
    log: list[dict[str, Any]],
    falls: Sequence[Record] = (),
) -> dict[str, Any]:
    """The content of report.json.

    Rows, paired differences from `base`, the tests of p(t|y), versions, machine, times (seconds), recipe.
    """
    truth = next((record for record in falls if record.row == fixed(record)[0]), None)
    tested = [record for record in falls if record.row not in references(record)]  # references have too few samples
    found = {(record.row, record.split): record for record in records}
    pairs = [
        (record, found.get((f"{BASE.name} {record.origin}", record.split)) or found.get((BASE.name, record.split)))
        for record in records
        if record.model not in fixed(record)
    ]
    return {
        "run": name,
        "benchmark": records[0].benchmark,
        "rows": [summary(record) for record in records],
        "unequal": [*unequal(records), *unlike(records)],
        "differences": [difference(record, base) for record, base in pairs if base],
        "falls": [distribution.falls(record, truth, np.random.default_rng(0)) for record in tested],
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "machine": machine(),
        "times": {
            "train": round(sum(line.get("seconds", 0.0) for line in log), 1),
            "evaluate": {f"{record.row}-{record.split}": record.seconds for record in records},
        },
        "recipe": recipe,
    }


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory (GiB), accelerator, system."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
    }


# ---------------------------------------------------------------- the page


def page(
    records: Sequence[Record],
    facts: dict[str, Any],
    log: list[dict[str, Any]],
    shown: Sequence[Shown],
    falls: Sequence[Record] = (),
) -> str:
    """The whole of report.html."""
    benchmark = named(records[0].benchmark)
    tuned = [name for name in dict.fromkeys(record.row for record in records) if name not in fixed(records[0])]
    styles = {row.name: row.name for row in benchmark.rows if row.shown}
    styles |= {name: f"c{i % 5}" for i, name in enumerate(tuned)}
    cards, data = players(shown, styles)
    root = resources("posttrain.reporting")
    widest = max((len(models) for models, _, _ in shown), default=1)
    return pages.render(
        "posttrain.reporting",
        "report.html",
        style=(root / "report.css").read_text() + f":root {{ --panels: {widest}; }}\n",
        script=(root / "report.js").read_text(),
        media="media-src data:",
        title=facts["run"],
        lead=lead(facts, records),
        benchmark=benchmark,
        headline=headline(facts, tuned, benchmark),
        table=table(facts, styles, benchmark),
        scorecard=scorecard(facts, styles, benchmark.scorecard),
        falls=fall_times.section(falls, facts["falls"], styles),
        sweep=sweep(facts, benchmark.headlines[:2]),
        players=cards,
        curves=curves(log, benchmark.metrics),
        details=details(facts),
        recipe=yaml.safe_dump(facts["recipe"], sort_keys=False, allow_unicode=True) if facts["recipe"] else "",
        data=data,
    )


def lead(facts: dict[str, Any], records: Sequence[Record]) -> str:
    """The page's first sentences: what was trained, and what was measured."""
    recipe, sentences = facts["recipe"], []
    asked = recipe.get("table")
    if {"method", "model", "train"} <= recipe.keys() and not asked:
        adapter, train = recipe["model"].get("adapter"), recipe["train"]
        how = f"a rank-{adapter['rank']} adapter" if adapter else "all weights"
        start = "random weights of " if recipe["model"].get("init") == "random" else ""
        took = f" in {duration(facts['times']['train'])}" if facts["times"]["train"] else ""
        sentences.append(
            f"{recipe['method']['name']} on {start}{recipe['model']['path']}: {how} trained{took}, "
            f"{train['steps']} steps of {train['batch']} clips, seed {train['seed']}."
        )
    if started := recipe.get("model", {}).get("start"):
        sentences.append(f"It goes on from {started}, which is base here.")
    if asked:
        seeds = ", ".join(map(str, asked["seeds"] or [recipe["train"]["seed"]]))
        rows = ", ".join(asked["rows"])
        sentences.append(f"A row each for {rows}: the means of seeds {seeds}, as far as they were run, clip by clip.")
    for key, values in (recipe.get("sweep") or {}).items():
        sentences.append(f"A run for each {key}: {', '.join(map(str, values))}.")
    counts = {record.split: len(record.clips) for record in records}
    sampled = next((record for record in reversed(records) if record.row not in references(record)), records[-1])
    steps = f", {sampled.sampler['steps']} sampling steps" if sampled.sampler else ""
    sentences.append(
        f"Measured on {' and '.join(f'{n} {split}' for split, n in counts.items())} clips, "
        f"{sampled.seeds} samples each{steps}."
    )
    return " ".join(sentences)


def headline(facts: dict[str, Any], tuned: Sequence[str], benchmark: Benchmark) -> list[dict[str, str]]:
    """The main result: the last tuned model compared with its base, on the first split of the table."""
    split = facts["rows"][0]["split"]
    rows = {row["model"]: row for row in facts["rows"] if row["split"] == split}
    if not tuned or not {BASE.name, tuned[-1]} <= rows.keys():
        return []
    after, before, figures = rows[tuned[-1]], rows[BASE.name], list[dict[str, str]]()
    for metric in benchmark.headlines:
        values = (each[metric.key]["mean"] for each in (after, before))
        now, then = (percent(value) if metric.share else number(value, metric.decimals) for value in values)
        text = metric.headline + ("" if figures else f", {split} clips")
        figures.append({"now": now, "then": then, "text": text})
    return figures


def table(facts: dict[str, Any], styles: dict[str, str], benchmark: Benchmark) -> dict[str, Any]:
    """Rows by split; means over clips, 95% intervals below them, the first metric also drawn."""
    rows, first, reference_names = facts["rows"], benchmark.metrics[0], {row.name for row in benchmark.references}
    longest = max((row[first.key]["high"] or 0 for row in rows), default=0) or 1
    # the share that was compared is a column only where videos are shorter than the true clips
    metrics = [m for m in benchmark.metrics if m.key != "span" or any((row["span"]["mean"] or 0) < 1 for row in rows)]
    columns = [{"style": column(m, first), "title": m.title, "hint": hint(m)} for m in metrics]
    splits = []
    for split in dict.fromkeys(row["split"] for row in rows):
        chosen = [row for row in rows if row["split"] == split]
        shown = []
        for row, following in zip(chosen, [*chosen[1:], None], strict=True):
            reference = row["model"] in reference_names
            last = reference and following is not None and following["model"] not in reference_names
            shown.append(
                {
                    "marks": " ".join(name for name, on in (("reference", reference), ("last", last)) if on),
                    "model": row["model"],
                    "style": styles.get(row["model"], ""),
                    "cells": [cell(column(m, first), row[m.key], m.decimals, row[first.key]["n"]) for m in metrics],
                    "forest": forest(row[first.key], longest),
                }
            )
        splits.append({"heading": heading(split), "rows": shown})
    gaps = facts["differences"]  # if there are more than four, only the first split's are shown; report.json has all
    gains = [gain(row, first) for row in gaps if len(gaps) <= 4 or row["split"] == gaps[0]["split"]]
    return {"columns": columns, "splits": splits, "lines": [line for line in (*facts["unequal"], *gains) if line]}


def scorecard(facts: dict[str, Any], styles: dict[str, str], quantities: Sequence[Metric]) -> dict[str, Any] | None:
    """The scorecard of the first split in SI units: medians over clips with a value, 95% intervals, number of clips."""
    rows = [row for row in facts["rows"] if row["split"] == facts["rows"][0]["split"] and row.get("physics")]
    if not rows:
        return None
    shown = []
    for quantity in quantities:
        if not all(quantity.key in row["physics"] for row in rows):  # of another motion
            continue
        cells = []
        for measured in (row["physics"][quantity.key] for row in rows):
            parts = (interval(measured, quantity.decimals), f"n {measured['n']}")
            cells.append((number(measured["median"], quantity.decimals), ", ".join(part for part in parts if part)))
        shown.append({"title": quantity.title, "unit": quantity.unit, "cells": cells})
    models = [(row["model"], styles.get(row["model"], "")) for row in rows]
    return {"split": heading(rows[0]["split"]), "models": models, "quantities": shown}


def gain(row: dict[str, Any], metric: Metric) -> str:
    """A sentence that states a row's paired difference of a metric."""
    mean, low, high = (row[metric.key][key] for key in ("mean", "low", "high"))
    if mean is None:
        return ""
    side, sign = ("below", -1) if mean < 0 else ("above", 1)
    span = sorted((sign * low, sign * high))
    gap, least, most = (number(value, metric.decimals) for value in (sign * mean, *span))
    return (
        f"On {row['split']} clips the {metric.title} of {row['model']} is {gap} ({least} to {most}, "
        f"paired) {side} that of {row['against']}."
    )


def hint(metric: Metric) -> str:
    """The text below a column's title."""
    return metric.hint or metric.unit or ("larger is better" if metric.better == "more" else "smaller is better")


def column(metric: Metric, first: Metric) -> str:
    """The CSS class of a column: small screens show only the first column and the headline metrics."""
    return "first" if metric is first else "main" if metric.headline else "aside"


def cell(style: str, value: dict[str, Any], decimals: int, clips: int) -> dict[str, str]:
    """The mean, and below it the interval and, if not all clips have a value, their number."""
    below = ", ".join(part for part in (interval(value, decimals), f"n {value['n']}" * (value["n"] < clips)) if part)
    return {"style": style, "value": number(value["mean"], decimals), "below": below}


def forest(value: dict[str, Any], longest: float) -> dict[str, str] | None:
    """A dot at the mean, on a bar from low to high, in percent of `longest`."""
    if value["mean"] is None:
        return None
    low, middle, high = (100 * value[key] / longest for key in ("low", "mean", "high"))
    return {"low": f"{low:.1f}", "middle": f"{middle:.1f}", "length": f"{high - low:.1f}"}


def sweep(facts: dict[str, Any], metrics: Sequence[Metric]) -> dict[str, Any] | None:
    """Metrics over the values of a sweep, evenly spaced: their means and intervals, and the mean of the base."""
    if not facts["recipe"].get("sweep"):
        return None
    (key,), split = facts["recipe"]["sweep"], facts["rows"][0]["split"]
    prefix = f"{facts['recipe']['method']['name']} "
    rows = [row for row in facts["rows"] if row["split"] == split]
    base = next((row for row in rows if row["model"] == BASE.name), None)
    swept = [row for row in rows if row["model"].startswith(prefix)]
    last, figures = float(max(len(swept) - 1, 1)), list[Figure]()
    for metric in metrics:
        lines: list[tuple[str, list[Point | None]]] = []
        for style, bound in (("c0 faint", "low"), ("c0 faint", "high"), ("c0", "mean")):
            values = [row[metric.key][bound] for row in swept]
            lines.append((style, [None if value is None else (float(i), value) for i, value in enumerate(values)]))
        if base is not None and (mean := base[metric.key]["mean"]) is not None:
            lines.append(("base", [(0.0, mean), (last, mean)]))
        top = max((point[1] for _, points in lines for point in points if point), default=0.0) or 1.0
        x_ticks = [(float(i), row["model"].removeprefix(prefix)) for i, row in enumerate(swept)]
        plot = chart(lines, (0.0, last), (0.0, top), x_ticks, [(y, f"{y:g}") for y in nice_ticks(0.0, top)])
        figures.append((f"{metric.title}, {split} clips ({hint(metric)})", plot))
    return {"key": key, "figures": figures}


def details(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Machine, versions, times."""
    hardware = facts["machine"]
    times = {"training": facts["times"]["train"]} | facts["times"]["evaluate"]
    return {
        "Machine": {
            "processor": hardware["processor"],
            "cores": hardware["cores"],
            "memory": f"{hardware['memory_gib']} GiB",
            "accelerator": hardware["accelerator"] or "none",
            "system": hardware["system"],
        },
        "Versions": facts["versions"],
        "Times": {name: duration(seconds) for name, seconds in times.items() if seconds},
    }


def interval(value: dict[str, Any], decimals: int) -> str:
    if value["low"] is None:
        return ""
    return f"{number(value['low'], decimals)}{' to ' if value['low'] < 0 else '–'}{number(value['high'], decimals)}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """1 h 2 min, 3 min 4 s or 5.6 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"
