"""Find the videos that a user brings, and their captions.

What is read, in `<folder>/<split>` or, where that has none, in `<folder>`, a list before the videos themselves:

    metadata.jsonl, metadata.json, metadata.csv   rows with a VIDEO and a CAPTION column (finetrainers, videofolder,
                                                  DiffSynth-Studio); such a file may also be named itself
    videos.txt and prompts.txt                    one file name and one caption per line (finetrainers)
    a.mp4 and a.txt                               the caption beside the video (finetrainers)

File names are relative to the list, or to `<split>` beside it (DiffSynth-Studio). Of a list that names files in
`<split>/`, only these are read: the others are another split's.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.core import files
from posttrain.core.codec import inspect
from posttrain.core.errors import UserError
from posttrain.core.progress import track
from posttrain.data.config import Wanted
from posttrain.data.views import View, see

TABLES = ("metadata.jsonl", "metadata.json", "metadata.csv")
LISTS = ("videos.txt", "video.txt")
PROMPTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO = ("file_name", "video", "video_path", "video_file", "path")  # names of columns, the first that is there counts
CAPTION = ("caption", "prompt", "text")
SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".gif"}
SPLITS = {
    "train",
    "test",
    "test_seen",
    "test_unseen",
    "val",
    "validation",
}  # folders that names may begin with


@dataclass(frozen=True)
class Entry:
    """A video of a list. `name` is relative to `folder`; no caption is None."""

    folder: Path
    name: str
    caption: str | None


def entries(folder: Path | str, split: str) -> list[Entry]:
    """The videos below `folder` in the order of their list (of their names where there is none); [] if none is found.

    Raises:
        UserError: a list cannot be understood, or names a file outside its folder.
    """
    folder = Path(folder)
    if folder.is_file():
        return _of_split(_table(folder), split)
    for place in (folder / split, folder):
        for names, read_list in ((TABLES, _table), (LISTS, _lists)):
            for name in names:
                if (place / name).is_file():
                    return _of_split(read_list(place / name), split)
    for place in (folder / split, folder):
        if place.is_dir():
            videos = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
            if videos:
                return [Entry(place, path.name, _beside(place, path)) for path in videos]
    return []


def _of_split(listed: Sequence[Entry], split: str) -> list[Entry]:
    """A list's files, those found in `split` alone named so; where it names files in there, only these."""
    found = []
    for entry in listed:
        within = f"{split}/{entry.name}"
        lies_within = not (entry.folder / entry.name).exists() and (entry.folder / within).exists()
        found.append(replace(entry, name=within) if lies_within else entry)
    chosen = [entry for entry in found if Path(entry.name).parts[0] == split]
    return chosen or [entry for entry in found if Path(entry.name).parts[0] not in SPLITS]


def _table(path: Path) -> list[Entry]:
    rows: Any
    if path.suffix == ".jsonl":
        rows = files.read_jsonl(path)
    elif path.suffix == ".json":
        rows = files.read_json(path)
        rows = rows.get("data") if isinstance(rows, dict) else rows
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(_text(path))))
    else:
        raise UserError(f"{path}: is no folder and no .jsonl, .json or .csv; name a folder or a list of videos")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise UserError(f"{path}: should hold rows, each a mapping with a video and a caption; write it so")
    there = set().union(*rows)
    name, caption = (next((column for column in columns if column in there), "") for columns in (VIDEO, CAPTION))
    if not name:
        raise UserError(f"{path}: has no column of file names; call it one of {', '.join(VIDEO)}")
    return [_entry(path, number, row.get(name), row.get(caption)) for number, row in enumerate(rows, 1)]


def _lists(path: Path) -> list[Entry]:
    prompts = next((path.parent / name for name in PROMPTS if (path.parent / name).is_file()), None)
    if prompts is None:
        raise UserError(f"{path}: has no captions beside it; write one per line into {path.parent / PROMPTS[0]}")
    names, captions = (_text(file).rstrip("\n").split("\n") for file in (path, prompts))
    if len(names) != len(captions):
        raise UserError(f"{prompts}: has {len(captions)} lines, but {path.name} {len(names)}; write one caption a line")
    return [_entry(path, n, *pair) for n, pair in enumerate(zip(names, captions, strict=True), 1)]


def _entry(path: Path, number: int, name: Any, caption: Any) -> Entry:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}:{number}: names no video; take the row out or name one")
    files.inside(path.parent, name.strip())
    caption = caption.strip() if isinstance(caption, str) else None
    return Entry(path.parent, name.strip(), caption or None)


def _beside(folder: Path, video: Path) -> str | None:
    files.inside(folder, video.name)
    text = files.inside(folder, video.with_suffix(".txt").name)
    return (_text(text).strip() or None) if text.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); captions are UTF-8 text") from error


# ---------------------------------------------------------------- choosing


def choose(
    listed: Sequence[Entry], wanted: Wanted, uncaptioned: str, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[View], list[dict[str, Any]]]:
    """The clips that a list of videos gives.

    Args:
        uncaptioned: what becomes of a video without a caption: "leave_out", or "empty" for an empty one.
        limit: how many clips at most.

    Returns:
        A row per clip (file_name, caption, fps, frames, size, sha256), its view, and for every video of the list a note
        {"file", "used", "notes"} with texts "kind: detail".

    Raises:
        UserError: no video can be used.
    """
    rows: list[dict[str, Any]] = []
    views: list[View] = []
    told: list[dict[str, Any]] = []
    first: dict[tuple[str, str], str] = {}  # the video with this content and caption
    folder = listed[0].folder
    for entry in track(listed, f"looking at the videos of {folder}", len(listed)):
        path = files.inside(folder, entry.name)
        caption = "" if entry.caption is None and uncaptioned == "empty" else entry.caption
        view, notes = None, [""]
        if limit is not None and len(rows) == limit:
            notes = [f"over data.limit: {limit} clips"]
        elif caption is None:
            notes = ["no caption"]
        elif not path.is_file():
            notes = ["does not exist"]
        else:
            try:
                facts = inspect(path)
                view, notes = see(facts, wanted)
            except UserError as error:
                notes = [str(error).removeprefix(f"{path}: ")]
        if view is not None and caption is not None:
            if (facts.sha256, caption) in first:
                view, notes = None, [f"double: {first[facts.sha256, caption]} is the same video with the same caption"]
            else:
                first[facts.sha256, caption] = entry.name
                kind = {"fps": wanted.fps, "frames": wanted.frames, "size": list(wanted.size)}
                rows.append({"file_name": entry.name, "caption": caption, **kind, "sha256": facts.sha256})
                views.append(view)
        told.append({"file": entry.name, "used": view is not None, "notes": notes})
    if not rows:
        raise UserError(f"{folder}: none of its {len(told)} videos can be used ({count(told)}); mend them or data.*")
    return rows, views, told


# ---------------------------------------------------------------- telling


def count(told: Sequence[dict[str, Any]]) -> str:
    """The kinds of notes, most frequent first: "7 too short, 2 no caption"."""
    kinds = Counter(note.split(":")[0] for row in told for note in row["notes"])
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def summary(told: Sequence[dict[str, Any]], lines: int = 5) -> list[str]:
    """What is done to the videos, in a line, and the first of those that are left out, with the reason."""
    used = [row for row in told if row["used"]]
    out = [row for row in told if not row["used"]]
    changes = f" ({count(used)})" if count(used) else ""
    text = [f"{len(used)} of {len(told)} videos are used{changes}, {len(out)} left out"]
    text += [f"left out: {row['file']} ({'; '.join(row['notes'])})" for row in out[:lines]]
    return text + ([f"and {len(out) - lines} more"] if len(out) > lines else [])
