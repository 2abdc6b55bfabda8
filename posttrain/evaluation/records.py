"""Read and sort the records of evaluate.py and score.py; means, intervals, differences and tables of them."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.recipe import resolve
from posttrain.evaluation.benchmarks.base import Benchmark, ClipScore, Metric, mean, merge

NARROWEST = 8  # characters that a printed table leaves for names


@dataclass(frozen=True)
class Record:
    """The measurements of one row of the table on one split.

    Attributes:
        model: a row of the benchmark, or the method of a trained model.
        row: the row's name in the table.
        split: the clips' name in the table; `folder`: in files.
        key: hash of everything that the numbers depend on.
        fps, frames, size: of the videos that were scored; size is height, width.
        seeds: samples of each clip.
        total: the number of clips of the complete record; one with fewer was interrupted.
        seconds: the time that it took.
        settings: settings of the evaluation; records that differ in them are not shown together. None for videos of
            any model.
        sampler: of a model that is trained here.
        videos, given_fps: for videos of any model: their folder, and the rate that the user gave.
        origin: the value of the sweep or the row of the table; "" for a single run.
        samples: the folder of its samples if it is not the run's own.
    """

    model: str
    row: str
    split: str
    folder: str
    key: str
    size: list[int]
    seeds: int
    total: int
    benchmark: str = "pisa"
    fps: float | None = None
    frames: int | None = None
    seconds: float = 0.0
    clips: tuple[ClipScore, ...] = ()
    settings: dict[str, Any] | None = None
    sampler: dict[str, Any] | None = None
    videos: str | None = None
    given_fps: float | None = None
    origin: str = ""
    samples: str | None = None


CLIP = tuple(field.name for field in fields(ClipScore) if field.name != "numbers")
KEPT = tuple(field.name for field in fields(Record) if field.name not in ("row", "clips", "origin", "samples"))


def to_json(record: Record) -> dict[str, Any]:
    """The content of a record's file; there, the metrics of a clip are fields like the others."""
    clips = []
    for clip in record.clips:
        known = {name: value for name in CLIP if (value := getattr(clip, name)) is not None}
        clips.append({"id": clip.id, "caption": clip.caption} | dict(clip.numbers) | known)
    return {name: value for name in KEPT if (value := getattr(record, name)) is not None} | {"clips": clips}


def from_json(value: Any, path: Path) -> Record:
    """The record from the content of a file. Older files lack the fields that have a default.

    Raises:
        UserError: it is not a record.
    """
    try:
        clips = [
            ClipScore(
                numbers={name: number for name, number in clip.items() if name not in CLIP},
                **{name: clip[name] for name in CLIP if name in clip},
            )
            for clip in value["clips"]
        ]
        known = {name: value[name] for name in KEPT if name in value}
        return Record(row=value["model"], clips=tuple(clips), **known)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a record of an evaluation; delete it and evaluate again", "format") from error


def read(path: Path) -> Record | None:
    """The record at `path`, None if there is none.

    Raises:
        UserError: damaged: it does not match its digest; format: it is not a record.
    """
    return from_json(files.read_sealed(path), path) if path.exists() else None


def read_whole(path: Path) -> Record | None:
    """As `read`, but None with a message for a damaged file, which is then measured again."""
    try:
        return read(path)
    except UserError as error:
        print(f"{error}; measured again", file=sys.stderr)
        return None


def write(path: Path, record: Record) -> None:
    files.write_sealed(path, to_json(record))


def named(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        UserError: there is none.
    """
    benchmark: Benchmark = resolve("evaluation.benchmarks", name).BENCHMARK
    return benchmark


def references(record: Record) -> list[str]:
    """Names of the benchmark's rows that no model samples."""
    return [row.name for row in named(record.benchmark).references]


def fixed(record: Record) -> list[str]:
    """Names of the benchmark's rows that are the same for all runs with the same base."""
    return [row.name for row in named(record.benchmark).rows]


def read_records(run: Path | str) -> list[Record]:
    """The finished records of a run in the order of its table: by split, references and base first.

    Raises:
        UserError: there is none, or they come from different evaluations.
    """
    return sorted((part for record in _finished(Path(run)) for part in parts(record)), key=position)


def read_apart(run: Path | str) -> list[Record]:
    """The finished records that are not in the table, such as those of PISA's falls."""
    return sorted((record for record in _finished(Path(run)) if not parts(record)), key=position)


def _finished(run: Path) -> list[Record]:
    folder = run / "evaluation"
    records = [from_json(files.read_sealed(path), path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if len(record.clips) == record.total]
    if not records:
        what = "its evaluation was cut off" if any(folder.glob("*.json")) else "it was not measured yet"
        remedy = f"`posttrain eval {run}` measures it; its recipe must have eval:"
        raise UserError(f"{folder}: {what}; {remedy}", "unfinished")
    first = records[0]
    if any((record.benchmark, record.settings) != (first.benchmark, first.settings) for record in records):
        raise UserError(
            f"{folder}: an evaluation with other settings was cut off; run `posttrain eval` to its end", "unfinished"
        )
    return records


def parts(record: Record) -> list[Record]:
    """The record, divided by the splits under which the table shows its clips: one, several, or none."""
    benchmark = named(record.benchmark)
    splits: dict[str, list[ClipScore]] = {}
    for clip in record.clips:
        if (split := benchmark.split(record.split, clip)) is not None:
            splits.setdefault(split, []).append(clip)
    return [replace(record, split=split, clips=tuple(clips)) for split, clips in sorted(splits.items())]


def gather(runs: Mapping[str, Sequence[Path]]) -> list[Record]:
    """The records of several runs, each with the value of the sweep or the row of the table as `origin`.

    References and base appear once if all runs share them. Runs of the same origin (seeds) are pooled.

    Raises:
        UserError: runs of one origin were measured with different settings, or one was not measured.
    """
    found: dict[tuple[str, str], Record] = {}
    for origin, folders in runs.items():
        alike: dict[tuple[str, str], list[Record]] = {}
        for folder in folders:
            for record in read_records(folder):
                record = replace(record, origin=origin, samples=str(folder / "samples" / record.model))
                alike.setdefault((record.model, record.split), []).append(record)
        for (name, split), records in alike.items():
            first = records[0]
            same = name in fixed(first)
            if len(records) < len(folders):
                raise UserError(
                    f"{folders[0].parent}: not all its runs were measured on {split} clips; run `posttrain eval`",
                    "unfinished",
                )
            for record, folder in zip(records, folders, strict=True):
                if record.settings != first.settings or (same and record.key != first.key):
                    raise UserError(
                        f"{folder}: was measured with other settings than {folders[0]}; "
                        "run `posttrain eval` on both again",
                        "mismatch",
                    )
            record = first if same else pooled(records)
            shared = same and found.get((name, split), record).key == record.key
            label = name if shared else f"{name} {origin}"
            found[label, split] = replace(record, row=label)
    return sorted(found.values(), key=position)


def comparable(records: Sequence[Record], origins: Sequence[str]) -> list[list[Record]]:
    """From the result of `gather`, the trained models' records by split; only splits that all `origins` have.

    Raises:
        UserError: there is no such split, or they were measured on other clips or with other settings.
    """
    labels = {(record.row, record.split) for record in records}
    splits: dict[str, list[Record]] = {}
    for record in records:
        if record.model not in fixed(record):
            splits.setdefault(record.split, []).append(record)
    splits = {split: found for split, found in splits.items() if len(found) == len(origins)}
    if not splits:
        raise UserError(
            f"{', '.join(origins)}: there is no split on which all of them were measured; run `posttrain eval` on each",
            "unfinished",
        )
    for split, (first, *others) in splits.items():
        for record in others:
            # what the tracker finds in the true clips is the same where clips, tracker and the code that measures are
            if (f"{fixed(record)[0]} {record.origin}", split) in labels:
                raise UserError(
                    f"{record.origin}: was measured on other clips than {origins[0]}, by another tracker or older code",
                    "mismatch",
                )
            spans = [{clip.id: clip.numbers.get("span") for clip in each.clips} for each in (first, record)]
            if any(spans[0][clip] != spans[1][clip] for clip in spans[0].keys() & spans[1].keys()):
                raise UserError(
                    f"{record.origin}: its videos show other shares of the {split} clips than those of {origins[0]}; "
                    "sample both as long as the clips",
                    "mismatch",
                )
            here, there = record.settings or {}, first.settings or {}
            if any(here.get(key) != there.get(key) for key in ("seeds", "sampler")):
                raise UserError(
                    f"{record.origin}: was measured with other eval.seeds or eval.sampler than {origins[0]}; measure "
                    "again",
                    "mismatch",
                )
    return list(splits.values())


def pooled(records: Sequence[Record]) -> Record:
    """One record from several runs: for each clip the mean of each number that exists, and the paths of all samples."""
    if len(records) == 1:
        return records[0]
    clips = []
    for same in zip(*(record.clips for record in records), strict=True):
        assert len({clip.id for clip in same}) == 1
        clips.append(merge(same))
    return replace(records[0], clips=tuple(clips), seconds=sum(record.seconds for record in records))


def position(record: Record) -> tuple[bool, str, int]:
    """Sort key of a record: by split, unseen first; references and base before the rest."""
    names = fixed(record)
    return record.split != "unseen", record.split, names.index(record.row) if record.row in names else len(names)


def interval(values: Sequence[float | None], statistic: Literal["mean", "median"] = "mean") -> dict[str, Any]:
    """Mean (or median) of the values that are not None, its 95% bootstrap interval, and their number.

    The interval is the percentile bootstrap with 10,000 resamples and a fixed seed.
    """
    present = np.array([value for value in values if value is not None], dtype=float)
    if not len(present):
        return {statistic: None, "low": None, "high": None, "n": 0}
    low = high = middle = float(getattr(np, statistic)(present))
    if len(present) > 1:
        from scipy.stats import bootstrap  # it takes half a second to import

        resampled = bootstrap(
            (present,),
            getattr(np, statistic),
            n_resamples=10_000,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=1000,
        )
        low, high = resampled.confidence_interval
    return {statistic: middle, "low": float(low), "high": float(high), "n": len(present)}


def summary(record: Record) -> dict[str, Any]:
    """One row of report.json: each metric's interval over clips; "released": those of the released code's convention.

    "physics" is the scorecard, with medians, because fits sometimes fail.
    """
    clips, first = record.clips, record.clips[0]
    # an older record may lack a metric
    means = {metric.key: interval([clip.numbers.get(metric.key) for clip in clips]) for metric in _metrics(record)}
    released = {key: interval([clip.released.get(key) for clip in clips]) for key in first.released}
    pairs = {name: [clip.physics[name] for clip in clips] for name in first.physics}
    card = {name: interval([pair[0] if pair else None for pair in found], "median") for name, found in pairs.items()}
    return {"model": record.row, "split": record.split} | means | {"released": released, "physics": card}


def difference(record: Record, against: Record) -> dict[str, Any]:
    """Each metric of `record` minus that of `against`, clip by clip; paired intervals over the clips in both."""
    others = {clip.id: clip.numbers for clip in against.clips}
    pairs = [(clip.numbers, others[clip.id]) for clip in record.clips if clip.id in others]

    def gap(key: str) -> list[float | None]:
        return [None if (x := a.get(key)) is None or (y := b.get(key)) is None else x - y for a, b in pairs]

    names = {"model": record.row, "against": against.row, "split": record.split}
    return names | {metric.key: interval(gap(metric.key)) for metric in _metrics(record)}


def _metrics(record: Record) -> tuple[Metric, ...]:
    return named(record.benchmark).metrics


def wide() -> Console:
    """A console wide enough for the names of several runs, if the output is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def unequal(records: Sequence[Record]) -> list[str]:
    """Warnings for rows of one split that are not comparable: other spans, or other clips.

    Also the notes on the videos.
    """
    lines = []
    for split in dict.fromkeys(record.split for record in records):
        rows = [record for record in records if record.split == split]
        means = [(record.row, mean([clip.numbers.get("span") for clip in record.clips])) for record in rows]
        spans = [(row, span) for row, span in means if span is not None]
        if spans and min(span for _, span in spans) < 1 - 1e-6:
            shares = ", ".join(f"{row} {span:.2f}" for row, span in spans)
            lines.append(
                f"{split}: the videos show these shares of the true clip: {shares}. The rest counts as vanished, but "
                "is cut in the published code's way."
            )
        if len({tuple(sorted(clip.id for clip in record.clips)) for record in rows}) > 1:
            counts = ", ".join(f"{record.row} {len(record.clips)}" for record in rows)
            lines.append(f"{split}: the rows are not of the same clips: {counts}.")
        for record in rows:
            films = sum(len(clip.paths) for clip in record.clips)
            notes = Counter(note for clip in record.clips for note in clip.notes or ())
            lines += [f"{split}: {record.row}: {count} of {films} videos: {note}." for note, count in notes.items()]
    return lines


def print_table(records: Sequence[Record], console: Console | None = None, released: bool = False) -> None:
    """Print the records' means, the first metric with its interval; `released`: in the released code's convention.

    If not all clips have a number, their count is shown next to it. Columns that do not fit the console are printed in
    a second table below. The warnings of `unequal` follow.
    """
    metrics = named(records[0].benchmark).metrics
    shown = [metric for metric in metrics if not released or metric.key in records[0].clips[0].released]
    titles = [f"{metric.title} [95%]" if metric is shown[0] else metric.title for metric in shown]
    rows = []
    for record in records:
        values = summary(record)["released"] if released else summary(record)
        cells = []
        for metric in shown:
            value = values[metric.key]
            if value["mean"] is None:
                cells.append("-")
                continue
            cell = f"{value['mean']:.{metric.decimals}f}"
            if metric is shown[0]:
                cell += f" [{value['low']:.{metric.decimals}f}, {value['high']:.{metric.decimals}f}]"
            cell += f" {metric.unit}" if metric.unit else ""
            cells.append(cell if value["n"] == len(record.clips) else f"{cell} (of {value['n']})")
        rows.append((record, cells))
    _print("Model", titles, rows, console or Console())
    for line in unequal(records):
        (console or Console()).print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print(title: str, titles: Sequence[str], rows: Sequence[tuple[Record, Sequence[str]]], console: Console) -> None:
    """Print each row's name, split and cells, in as many tables as the console's width requires."""
    splits = max(map(cell_len, ("Clips", *(record.split for record, _ in rows))))
    widths = [max(cell_len(each[i]) for each in (titles, *(cells for _, cells in rows))) for i in range(len(titles))]
    names = max(map(cell_len, (title, *(record.row for record, _ in rows))))
    free = console.width - splits - 4  # two spaces between columns
    names = max(min(names, console.width // 3, free - max(widths) - 2), NARROWEST)  # longer ones go on below
    first = 0
    while first < len(titles):
        end, left = first, free - names
        while end < len(titles) and (end == first or left >= widths[end] + 2 * (end > first)):
            left -= widths[end] + 2 * (end > first)
            end += 1
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(title, width=names, overflow="fold")
        table.add_column("Clips", no_wrap=True)
        for heading in titles[first:end]:
            table.add_column(heading, justify="right", no_wrap=True)
        previous = rows[0][0].split
        for record, cells in rows:
            if record.split != previous:
                table.add_row()
            previous = record.split
            style = "dim" if record.row in references(record) else None
            table.add_row(escape(record.row), record.split, *map(escape, cells[first:end]), style=style)
        console.print(table)
        first = end
        if first < len(titles):
            console.print()


def print_differences(splits: Sequence[Sequence[Record]], console: Console | None = None) -> None:
    """Print the differences of each split's records from its first one: paired means over clips, 95% intervals."""
    shown = named(splits[0][0].benchmark).headlines[:2]
    rows = []
    for first, *others in splits:
        for record in others:
            gaps = [difference(record, first)[metric.key] for metric in shown]
            rows.append((record, [f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" for gap in gaps]))
    _print(f"Minus {splits[0][0].row}", [f"{metric.title} [95%]" for metric in shown], rows, console or Console())
