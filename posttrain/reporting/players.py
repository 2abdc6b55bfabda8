"""The report's players: each model's video of a clip side by side in one film, and the heights over time below it."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core.codec import playable, read_video
from posttrain.core.errors import UserError
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import Record, named
from posttrain.reporting.charts import chart, number, path_d

PLAYERS = {"unseen": 8}  # cards per split, 4 for others: the first clips, not chosen ones
BUDGET = 4_000_000  # bytes of video in the page
SPLITS = {
    "unseen": "Unseen objects and backgrounds",
    "seen": "Seen objects and backgrounds",
    "id": "Depths and heights as in PISA's training clips",
    "ood": "Depths and heights beyond them",
}
# One clip: the records of the models that have it, what each has of it, and its first samples, uint8 (F, H, W, 3).
Shown = tuple[list[Record], list[ClipScore], list[np.ndarray]]


def heading(split: str) -> str:
    return SPLITS.get(split, html.escape(split))


def side_by_side(run: Path, records: Sequence[Record]) -> list[Shown]:
    """The first clips of each split that truth, base and trained models all have."""
    chosen: list[Shown] = []
    unshown = {row.name for row in named(records[0].benchmark).rows if not row.shown}
    for split in dict.fromkeys(record.split for record in records):
        models = [record for record in records if record.split == split and record.row not in unshown]
        models = [record for record in models if (record.fps, record.size) == (models[0].fps, models[0].size)]
        by_name = [{clip.id: clip for clip in record.clips} for record in models]
        common = [name for name in by_name[0] if all(name in clips for clips in by_name)]
        for name in common[: PLAYERS.get(split, 4)]:
            chosen.append((models, [clips[name] for clips in by_name], panels(run, models, name)))
    return chosen


def unlike(records: Sequence[Record]) -> list[str]:
    """Lines on the records that `side_by_side` leaves out, for their videos have another rate or size."""
    lines = []
    unshown = {row.name for row in named(records[0].benchmark).rows if not row.shown}
    for split in dict.fromkeys(record.split for record in records):
        models = [record for record in records if record.split == split and record.row not in unshown]
        out = [record for record in models if (record.fps, record.size) != (models[0].fps, models[0].size)]
        if out:
            told = ", ".join(f"{r.row} ({r.fps or 0:.3g} fps, {r.size[0]} x {r.size[1]})" for r in out)
            first = models[0]
            own = f"{first.row}'s {first.fps or 0:.3g} fps, {first.size[0]} x {first.size[1]}"
            lines.append(f"{split}: {len(out)} of {len(models)} rows are not shown beside {own}: {told}.")
    return lines


def players(chosen: Sequence[Shown], styles: dict[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """Cards of side-by-side clips over their trajectories, and the data that drive them."""
    films = [film(pictures) for _, _, pictures in chosen]
    for crf in range(16, 52, 5):
        videos = [playable(frames, each[0][0].fps or 1.0, crf) for frames, each in zip(films, chosen, strict=True)]
        if sum(map(len, videos)) <= BUDGET:
            break
    cards: dict[str, str] = {}
    data, widest = [], max((len(shown) for shown, _, _ in chosen), default=1)
    for (shown, clips, pictures), video in zip(chosen, videos, strict=True):
        first, frames = shown[0], len(pictures[0])
        cards[first.split] = cards.get(first.split, "") + card(shown, clips, video, styles, frames)
        paths = [clip.paths[0] if clip.paths else [] for clip in clips]
        data.append({"fps": first.fps, "frames": frames, "width": first.size[1], "paths": paths})
    speeds = "".join(
        f'<button value="{speed}" aria-pressed="{str(speed == 1).lower()}">{name}</button>'
        for speed, name in ((1, "1×"), (0.5, "½×"), (0.25, "¼×"))
    )
    note = (
        "The first clips of each split, not chosen ones, and the first of their samples. White line: the true path; "
        "dot: the object as the tracker sees it. Below each: its height in the picture over time, all samples. Click a "
        "picture to pause it, drag over the plot to scrub."
    )
    groups = "".join(f'<h3>{heading(split)}</h3><div class="cards">{group}</div>' for split, group in cards.items())
    return (
        f'<section id="players" style="--panels:{widest}"><h2>Side by side</h2><p class="note">{note}</p>'
        f'<div class="transport"><button id="play">Play</button><span class="speeds">{speeds}</span>'
        f'<label><input type="checkbox" id="trace" checked> paths</label></div>{groups}</section>',
        data,
    )


def card(shown: Sequence[Record], clips: Sequence[ClipScore], video: bytes, styles: dict[str, str], frames: int) -> str:
    """One player: caption, film with traced paths, names, and the heights over time as its scrubber.

    `frames` is how many the film has.
    """
    record, (height, width) = shown[0], shown[0].size
    n, fps, name = len(shown), record.fps, html.escape(clips[0].id)
    assert fps is not None
    benchmark = named(record.benchmark)
    first, truth = benchmark.metrics[0], benchmark.rows[0].name
    overlay, true_path = "", max((clip.true_path for clip in clips), key=len)  # a short video has not all of it
    for i in range(n):
        d = path_d([None if p is None else (p[0] + 0.5 + i * width, p[1] + 0.5) for p in true_path], 1)
        overlay += f'<path class="under" d="{d}"/><path class="over" d="{d}"/><circle r="{height / 40:.2f}"/>'
        overlay += f'<line x1="{i * width}" x2="{i * width}" y1="0" y2="{height}"/>' if i else ""
    names, series = "", []
    for each, clip in zip(shown, clips, strict=True):
        style, value = styles[each.row], number(clip.numbers[first.key], first.decimals)
        error = "" if each.row == truth else f" <small>{first.title} {value}</small>"
        names += f'<span><span class="key {style}"></span>{html.escape(each.row)}{error}</span>'
        for seed, path in enumerate([clip.true_path] if each.row == truth else clip.paths):
            points = [None if p is None else (float(k), p[1]) for k, p in enumerate(path)]
            series.append((f"{style} thin" if seed else style, points))
    seconds = (frames - 1) / fps
    every = 0.5 if seconds <= 3 else math.ceil(seconds / 6)
    ticks = [(k * every * fps, f"{k * every:g} s") for k in range(int(seconds / every + 1e-6) + 1)]
    source = base64.b64encode(video).decode()
    slider = f'<input type="range" min="0" max="{frames - 1}" value="0" aria-label="frame of clip {name}">'
    return (
        f'<figure class="card"><p><span>{html.escape(clips[0].caption)}</span><span>{name}</span></p>'
        f'<div class="stage"><video muted loop playsinline preload="auto" src="data:video/mp4;base64,{source}"></video>'
        f'<svg viewBox="0 0 {n * width} {height}" preserveAspectRatio="none">{overlay}</svg></div>'
        f'<div class="names" style="grid-template-columns:repeat({n},1fr)">{names}</div>'
        + chart(list(reversed(series)), (0, frames - 1), (height, 0), ticks, [], slider)
        + "</figure>"
    )


def panels(run: Path, shown: Sequence[Record], name: str) -> list[np.ndarray]:
    """One clip as each record's model shows it first, uint8 (F, H, W, 3); the shorter ones end in black."""
    found = []
    for record in shown:
        path = Path(record.samples or run / "samples" / record.model) / record.folder / f"{name}-s0.mp4"
        if not path.exists():
            raise UserError(f"{path}: does not exist; delete {run / 'evaluation'} and evaluate again", "missing")
        found.append(read_video(path))
    longest = max(map(len, found))
    return [np.pad(panel, ((0, longest - len(panel)), (0, 0), (0, 0), (0, 0))) for panel in found]


def film(panels_FHWC: Sequence[np.ndarray]) -> np.ndarray:
    """Panels side by side, uint8 (F, H', n W', 3).

    Small pictures are doubled, so that 4:2:0 keeps their colours; large ones are thinned out.
    """
    frames = np.concatenate(panels_FHWC, axis=2)
    height = frames.shape[1]
    if height <= 128:
        return frames.repeat(2, 1).repeat(2, 2)
    return frames[:, :: math.ceil(height / 256), :: math.ceil(height / 256)]
