"""The report's players: the models' videos of a clip side by side in one film, and the object's path over time."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.core.codec import playable, read_video
from posttrain.core.errors import UserError
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import Record, named
from posttrain.reporting.charts import Point, chart, number, path_d

PLAYERS = {"unseen": 8}  # cards per split (others: 4), for the first clips of the split
BUDGET = 4_000_000  # bytes of video in the page
SPLITS = {
    "unseen": "Unseen objects and backgrounds",
    "seen": "Seen objects and backgrounds",
    "id": "Depths and heights as in PISA's training clips",
    "ood": "Depths and heights beyond them",
}
# One clip: the records of the models that have it, their scores of it, and their first samples, uint8 (F, H, W, 3).
Shown = tuple[list[Record], list[ClipScore], list[np.ndarray]]


def heading(split: str) -> str:
    return SPLITS.get(split, split)


def side_by_side(run: Path, records: Sequence[Record]) -> list[Shown]:
    """The first clips of each split that all shown rows have. Rows of another rate or size are left out (`unlike`)."""
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
    """A line per split about the rows that `side_by_side` leaves out, because their rate or size differs."""
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


def players(
    chosen: Sequence[Shown], styles: dict[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The players by split, see `card`, and the data that the page's script needs for each player.

    The videos are compressed until together they have at most BUDGET bytes, or as far as possible.
    """
    films = [film(pictures) for _, _, pictures in chosen]
    for crf in range(16, 52, 5):
        videos = [playable(frames, each[0][0].fps or 1.0, crf) for frames, each in zip(films, chosen, strict=True)]
        if sum(map(len, videos)) <= BUDGET:
            break
    cards: dict[str, list[dict[str, Any]]] = {}
    data = []
    for (shown, clips, pictures), video in zip(chosen, videos, strict=True):
        first, frames = shown[0], len(pictures[0])
        cards.setdefault(heading(first.split), []).append(card(shown, clips, video, styles, frames))
        paths = [clip.paths[0] if clip.paths else [] for clip in clips]
        data.append({"fps": first.fps, "frames": frames, "width": first.size[1], "paths": paths})
    return cards, data


def card(
    shown: Sequence[Record], clips: Sequence[ClipScore], video: bytes, styles: dict[str, str], frames: int
) -> dict[str, Any]:
    """One player: caption, film with traced paths, names, and a chart of the object's path, which is also the scrubber.

    `frames`: the film's number of frames.
    """
    record, (height, width) = shown[0], shown[0].size
    fps = record.fps
    assert fps is not None
    benchmark = named(record.benchmark)
    first, truth = benchmark.metrics[0], benchmark.rows[0].name
    true_path = max((clip.true_path for clip in clips), key=len)  # a short video's record has only a part of it
    shown_panels: list[dict[str, Any]] = []
    series: list[tuple[str, list[Point | None]]] = []
    for i, (each, clip) in enumerate(zip(shown, clips, strict=True)):
        style, value = styles[each.row], number(clip.numbers[first.key], first.decimals)
        error = "" if each.row == truth else f"{first.title} {value}"
        path = path_d([None if p is None else (p[0] + 0.5 + i * width, p[1] + 0.5) for p in true_path], 1)
        shown_panels.append({"model": each.row, "style": style, "error": error, "path": path})
        for seed, heights in enumerate([clip.true_path] if each.row == truth else clip.paths):
            points = [None if p is None else (float(k), p[1]) for k, p in enumerate(heights)]
            series.append((f"{style} thin" if seed else style, points))
    seconds = (frames - 1) / fps
    every = 0.5 if seconds <= 3 else math.ceil(seconds / 6)
    ticks = [(k * every * fps, f"{k * every:g} s") for k in range(int(seconds / every + 1e-6) + 1)]
    return {
        "clip": clips[0].id,
        "caption": clips[0].caption,
        "video": base64.b64encode(video).decode(),
        "width": width,
        "height": height,
        "radius": f"{height / 40:.2f}",
        "panels": shown_panels,
        "last": frames - 1,
        "plot": chart(list(reversed(series)), (0, frames - 1), (height, 0), ticks, []),
    }


def panels(run: Path, shown: Sequence[Record], name: str) -> list[np.ndarray]:
    """Each model's first sample of a clip, uint8 (F, H, W, 3); black frames follow the shorter samples."""
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

    Frames of up to 128 pixels in height are doubled, so that 4:2:0 keeps their colours. Larger ones are subsampled to
    at most 256.
    """
    frames = np.concatenate(panels_FHWC, axis=2)
    height = frames.shape[1]
    if height <= 128:
        return frames.repeat(2, 1).repeat(2, 2)
    return frames[:, :: math.ceil(height / 256), :: math.ceil(height / 256)]
