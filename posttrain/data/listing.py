"""Find a user's own videos and their captions.

They are searched in `<folder>/<split>`, then in `<folder>`. If there is a list, it is used; else the video files:

    metadata.jsonl, .json, .csv, .tsv   rows with a VIDEO and a CAPTION column (finetrainers, videofolder,
                                        DiffSynth-Studio); the recipe may also name such a file. Of several
                                        caption columns the first that is filled in a row counts
    videos.txt and prompts.txt          one file name and one caption per line (finetrainers)
    a.mp4 and a.txt                     a text file next to each video (finetrainers), in folders of any depth

File names are relative to the folder of the list, or to its subfolder `<split>` (DiffSynth-Studio). If a list names
files in `<split>/`, only those are read: the others belong to other splits. A list may have the columns `start` and
`end`, the part of a video that is used, in seconds (so one file can give several clips), and `true_fps`, the frame rate
at which slow motion was recorded. The cells of a CSV are separated by commas, semicolons or tabs.

No name may lead out of the folder, not even through a link. The only exception is a snapshot in the hub's cache, whose
files are links to blobs of the same repository.
"""

import csv
import difflib
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.core import codec, files
from posttrain.core.errors import UserError, printable
from posttrain.core.progress import track
from posttrain.data.config import Wanted
from posttrain.data.schema import ClipRow
from posttrain.data.views import WHOLE, Part, View, see

TABLES = ("metadata.jsonl", "metadata.json", "metadata.csv", "metadata.tsv")
LISTS = ("videos.txt", "video.txt")
PROMPTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
# Names of columns, ignoring case, spaces, "_" and "-"; the first one that exists is used.
VIDEO = ("filename", "video", "videopath", "videofile", "path", "filepath", "mediapath")
CAPTION = ("caption", "prompt", "text")
PART = ("start", "end", "true_fps")
UNREAD = re.compile("(start|end|begin)")  # columns that begin so, and are none of PART, probably mean a part
EMPTY = {"nan", "none", "null", "n/a"}  # what programs write into a cell of text for no value
SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".gif"),
    *(".ogv", ".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".f4v", ".vob", ".asf", ".mxf", ".m2v", ".dv", ".qt"),
}
SPLITS = {"train", "test", "test_seen", "test_unseen", "val", "validation"}  # folders that names may begin with


@dataclass(frozen=True)
class Entry:
    """A video of a list. `name` is relative to `folder`; `caption` is the first of `captions`, or None."""

    folder: Path
    name: str
    caption: str | None
    part: Part = WHOLE
    captions: int = 1
    notes: tuple[str, ...] = ()


class VideoNote(NamedTuple):
    """Whether a video is used, and notes on how it is changed or why it is left out, each "what" or "what: detail"."""

    file: str
    used: bool
    notes: list[str]


# ---------------------------------------------------------------- finding


def entries(folder: Path | str, split: str) -> list[Entry]:
    """The videos below `folder` in the order of their list, or of their names without one; [] if there are none.

    Raises:
        UserError: a list cannot be understood, or names a file outside its folder.
    """
    folder = Path(folder)
    if folder.is_file():
        return _of_split(_table(folder), split)
    for home in (folder / split, folder):
        if lists := [home / name for name in (*TABLES, *LISTS) if (home / name).is_file()]:
            if len(lists) > 1:
                print(f"{home}: {lists[0].name} is read; {lists[1].name} is not", file=sys.stderr)
            return _of_split(_lists(lists[0]) if lists[0].name in LISTS else _table(lists[0]), split)
    for home in (folder / split, folder):
        videos = videos_in(home)
        if not _lists_below(home):
            videos += [path for path in _walk(home) if path.suffix.lower() in SUFFIXES and path.parent != home]
        if videos:
            listed = [Entry(home, str(path.relative_to(home)), _beside(home, path)) for path in videos]
            return _of_split(listed, split)
    return []


def _others(folder: Path, listed: Sequence[Entry]) -> list[VideoNote]:
    """A note on each file with a caption beside it that is no video by its name; none in a folder with a list."""
    if _lists_below(folder):
        return []
    stems = {(folder / entry.name).with_suffix("") for entry in listed}
    captioned = {path.with_suffix("") for path in _walk(folder) if path.suffix == ".txt"} - stems
    return [
        VideoNote(str(path.relative_to(folder)), False, ["no video: its name does not end as one of a video does"])
        for path in _walk(folder)
        if path.with_suffix("") in captioned and path.suffix.lower() not in (".txt", *SUFFIXES)
    ]


def videos_in(folder: Path) -> list[Path]:
    """The videos directly in a folder, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def _unread(folder: Path) -> list[Path]:
    """The one table in a folder, if it is not called as those that are looked for."""
    tables = [path for path in folder.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    return sorted(path for path in tables if path.name not in TABLES) if len(tables) == 1 else []


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, in the order of their names."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name[0] != ".":
            yield from _walk(path) if path.is_dir() and not path.is_symlink() else [path]


def _lists_below(folder: Path) -> list[Path]:
    """The folders below this one that have a list of their own."""
    return sorted({path.parent for path in _walk(folder) if path.name in (*TABLES, *LISTS)})


def remedy(folder: Path | str, split: str) -> tuple[str, str]:
    """(problem, remedy) for a `folder` that has no clips of `split`."""
    folder, film = Path(folder), "film the clips with `python -m sim make RECIPE`"
    if folder.is_dir():
        if lists := _lists_below(folder):
            names = ", ".join(str(path.relative_to(folder)) for path in lists[:5])
            return f"has no split {split}, but {names}", f"{film}, ask for another split, or name such a folder itself"
        if not any(_walk(folder)):
            return "is empty", f"put videos there, or {film}"
        ends = ", ".join(sorted({path.suffix or path.name for path in _walk(folder)})[:5])
        return f"holds no videos (but {ends})", "name the folder that holds them"
    if url := re.match(r"(?:hf|https?):/.*?([\w.-]+)/([\w.-]+)$", str(folder)):
        return "is not on this disk", f"`hf download --repo-type dataset {url[1]}/{url[2]} --local-dir data/{url[2]}`"
    home = folder.parent
    close = difflib.get_close_matches(folder.name, [path.name for path in home.iterdir()], 1) if home.is_dir() else []
    if close:
        return "does not exist", f"did you mean {home / close[0]}? or {film}"
    if len(folder.parts) == 2 and not home.exists():
        hub = f"`hf download --repo-type dataset {folder} --local-dir data/{folder.name}` if it is on the hub"
        return "does not exist", f"{film}, or {hub}"
    return "does not exist", film


def _of_split(listed: Sequence[Entry], split: str) -> list[Entry]:
    """The files of a list that belong to `split`. A file that exists only in the subfolder `split` gets that path."""
    placed = []
    for entry in listed:
        within = f"{split}/{entry.name}"
        lies_within = not (entry.folder / entry.name).exists() and (entry.folder / within).exists()
        placed.append(replace(entry, name=within) if lies_within else entry)
    chosen = [entry for entry in placed if Path(entry.name).parts[0] == split]
    return chosen or [entry for entry in placed if Path(entry.name).parts[0] not in SPLITS]


def _table(path: Path) -> list[Entry]:
    """The rows of a table, by its suffix."""
    rows: Any
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = list(enumerate(files.read_jsonl(path), 1))
    elif suffix == ".json":
        rows = files.read_json(path)
        rows = rows.get("data") if isinstance(rows, dict) else rows
        rows = list(enumerate(rows, 1)) if isinstance(rows, list) else []
    elif suffix in (".csv", ".tsv"):
        rows = _csv(path)
    else:
        raise UserError(
            f"{path}: is neither a folder nor a .jsonl, .json, .csv or .tsv; name a folder or a list of videos",
            "format",
        )
    if not rows or not all(isinstance(row, dict) for _, row in rows):
        raise UserError(f"{path}: should hold rows, each a mapping with a video and a caption; write it so", "format")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    for line, row in rows:
        if twice := [name for name, times in Counter(map(_column, row)).items() if times > 1]:
            raise UserError(f"{path}:{line}: has two columns called {twice[0]}; rename one", "duplicate", twice[0])
    rows = [(line, {_column(name): value for name, value in row.items()}) for line, row in rows]
    there = set().union(*(row for _, row in rows))
    name = next((column for column in VIDEO if column in there), "")
    if not name:
        has = ", ".join(printable(column) for column in columns[:8])
        raise UserError(f"{path}: has no column of file names, but {has}; call it file_name, video or path", "format")
    unread = [column for column in columns if UNREAD.match(_column(column)) and _column(column) not in PART]
    notes = tuple(f"{printable(column)} is not read: only start and end, in seconds, are" for column in unread)
    if not there & set(CAPTION):
        notes += (f"no caption column: {path.name} has none called caption, prompt or text",)
    return [
        replace(
            _entry(path, line, row.get(name), _caption(row), *(row.get(_column(number)) for number in PART)),
            notes=notes,
        )
        for line, row in rows
    ]


def _caption(row: dict[str, Any]) -> Any:
    """What the first caption column of a row says that says anything; None: none does."""
    cells = [row[column] for column in CAPTION if column in row]
    return next(
        (cell for cell in cells if cell and not (isinstance(cell, str) and cell.strip().lower() in EMPTY)), None
    )


def _column(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV. A row with more cells than the header is refused."""
    text = files.read_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    # a quote after a comma and a space opens a cell too; spaces in a TSV are left, for a tab is one of them
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
    rows, columns = list[tuple[int, dict[str, str]]](), list[str]()
    try:
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return rows
            if not cells:
                continue
            if not columns:
                columns = cells
                if not {_column(cell) for cell in cells} & set(VIDEO):
                    return [(line, dict.fromkeys(cells, ""))]  # its caller names what is missing
                if len(set(map(_column, cells))) < len(cells):
                    raise UserError(f"{path}:{line}: two columns have one name; rename one", "duplicate")
                continue
            if len(cells) > len(columns):
                many = f"has {len(cells)} cells, but the header {len(columns)}"
                raise UserError(f'{path}:{line}: {many}; put captions with commas into quotes ("...")', "format")
            if any(re.search(r"\n[^\n]*\.(mp4|mov|mkv|webm|avi)\W", cell) for cell in cells):
                raise UserError(
                    f"{path}:{line}: a quote is not closed, so the next rows become part of it; close or double it",
                    "format",
                )
            rows.append((line, dict(zip(columns, cells, strict=False))))
    except csv.Error as error:
        raise UserError(f"{path}:{line}: cannot be read ({error}); fix its quotes", "format") from error


def _lists(path: Path) -> list[Entry]:
    prompts = next((path.parent / name for name in PROMPTS if (path.parent / name).is_file()), None)
    if prompts is None:
        raise UserError(
            f"{path}: has no captions beside it; write one per line into {path.parent / PROMPTS[0]}", "missing"
        )
    names = files.read_text(path).rstrip("\n").split("\n")
    captions = files.read_text(prompts).removesuffix("\n").split("\n")  # the last ones may be empty
    while len(captions) > len(names) and not captions[-1].strip():
        captions.pop()
    if len(names) != len(captions):
        many = f"{len(captions)} lines, but {path.name} {len(names)}"
        raise UserError(f"{prompts}: has {many}; write one caption a line", "mismatch")
    return [_entry(path, n, *pair) for n, pair in enumerate(zip(names, captions, strict=True), 1)]


def _entry(path: Path, line: int, name: Any, caption: Any, *part: Any) -> Entry:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{path}:{line}: names no video; remove the row or name a video", "format")
    within(path.parent, name.strip())
    captions = [text for text in (caption if isinstance(caption, list) else [caption]) if isinstance(text, str)]
    text = captions[0].strip() if captions else ""
    numbers = {column: _number(path, line, column, cell) for column, cell in zip(PART, part, strict=False)}
    start, end, rate = numbers.get("start") or 0.0, numbers.get("end"), numbers.get("true_fps")
    if end is not None and end <= start:
        raise UserError(f"{path}:{line}: ends before it starts; give start and end in seconds", "value", "end")
    if rate == 0:
        raise UserError(f"{path}:{line}: true_fps is 0; give frames per second, or leave it empty", "value", "true_fps")
    return Entry(path.parent, name.strip(), text or None, Part(start, end, rate), max(1, len(captions)))


def _number(path: Path, line: int, column: str, value: Any) -> float | None:
    """The number in a cell; None if it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{path}:{line}: {column} is {str(value)[:80]!r}, not a number from 0 on", "value", column)
    return number


def _beside(folder: Path, video: Path) -> str | None:
    within(folder, str(video.relative_to(folder)))
    text = within(folder, str(video.with_suffix(".txt").relative_to(folder)))
    return (files.read_text(text).strip() or None) if text.is_file() else None


def within(folder: Path, name: str) -> Path:
    """The path of `name` below `folder`, which may be a snapshot in the hub's cache: all its files are links.

    Raises:
        UserError: it leads out of the folder, and is not a blob of the snapshot's own repository.
    """
    try:
        return files.inside(folder, name)
    except UserError as error:
        path, home = folder / name, folder.resolve()
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_symlink():
            raise
        blobs = [above.parent / "blobs" for above in (home, *home.parents) if above.name == "snapshots"]
        if path.resolve().parent in blobs[:1]:
            return path
        remedy = "copy the file, or name the folder that holds it"
        raise UserError(f"{path}: is a link to a file outside the folder; {remedy}", "outside") from error


# ---------------------------------------------------------------- choosing


def choose(
    listed: Sequence[Entry], wanted: Wanted, uncaptioned: str, limit: int | None = None
) -> tuple[list[ClipRow], list[View], list[VideoNote]]:
    """The clips of a list of videos. Each video is decoded once, so damage is detected before anything is encoded.

    Args:
        uncaptioned: what to do with a video without a caption: "leave_out", or "empty" for an empty caption.
        limit: the largest number of clips.

    Returns:
        A row per clip (file_name, caption, fps, frames, size, sha256), its view, and a note on every video of the list.

    Raises:
        UserError: no video can be used.
    """
    rows: list[ClipRow] = []
    views: list[View] = []
    video_notes: list[VideoNote] = []
    first: dict[tuple[str, str, Part], str] = {}  # the video with this content, caption and part
    folder = listed[0].folder
    pool = ThreadPoolExecutor()
    with codec.complaints():
        try:
            looked = pool.map(partial(_look, wanted=wanted, uncaptioned=uncaptioned), listed)
            for entry in track(listed, f"looking at the videos of {folder}", len(listed)):
                if limit is not None and len(rows) == limit:
                    video_notes.append(VideoNote(entry.name, False, [f"over data.limit: {limit} clips"]))
                    continue
                sha256, view, notes = next(looked)
                caption = entry.caption or ""
                if view is not None and (clip := (sha256, caption, entry.part)) in first:
                    view, notes = None, [f"double: {first[clip]} is the same video with the same caption"]
                elif view is not None:
                    first[clip] = entry.name
                    rows.append(ClipRow(entry.name, caption, wanted.fps, wanted.frames, wanted.size, sha256))
                    views.append(view)
                video_notes.append(VideoNote(entry.name, view is not None, notes))
        finally:
            pool.shutdown(cancel_futures=True)  # those over the limit, or all after Ctrl-C
    video_notes += _others(folder, listed)
    if not rows:
        remedy = "fix them or data.*"
        if all("no caption" in video.notes for video in video_notes) and (tables := _unread(folder)):
            remedy = f"to read their captions from {tables[0].name}, name it: data.clips={tables[0]}"
        first_note = f"{video_notes[0].file}: {'; '.join(video_notes[0].notes)}"
        raise UserError(
            f"{folder}: none of its {len(video_notes)} videos can be used ({count(video_notes)}), for example "
            f"{first_note}; {remedy}",
            "no_clips",
        )
    return rows, views, video_notes


def _look(entry: Entry, wanted: Wanted, uncaptioned: str) -> tuple[str, View | None, list[str]]:
    """A video's digest, how it becomes a clip (None if it cannot), and the notes."""
    path = within(entry.folder, entry.name)
    if entry.caption is None and uncaptioned != "empty":
        return "", None, ["no caption", *entry.notes]
    if not path.is_file():
        return "", None, ["does not exist"]
    try:
        facts = codec.inspect(path)
        view, notes = see(facts, wanted, entry.part)
        if view is not None:
            codec.check(path, view.frames, view.marked)
    except UserError as error:
        return "", None, [str(error).removeprefix(f"{path}: ").removesuffix("; fix or remove it")]
    if view is not None and entry.captions > 1:
        notes = [*notes, f"several captions: the first of {entry.captions} is taken"]
    notes = [*notes, *entry.notes]
    return facts.sha256, view, notes


# ---------------------------------------------------------------- reporting


def count(video_notes: Sequence[VideoNote]) -> str:
    """How often each note occurs, most frequent first: "7 too short, 2 no caption"."""
    counts = Counter(note.split(":")[0] for video in video_notes for note in video.notes)
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


def summary(video_notes: Sequence[VideoNote], lines: int = 5) -> list[str]:
    """A line on how the videos are used, then a line for each of the first `lines` that are left out, and why."""
    used = [video for video in video_notes if video.used]
    out = [video for video in video_notes if not video.used]
    changes = f" ({count(used)})" if count(used) else ""
    text = [f"{len(used)} of {len(video_notes)} videos are used{changes}, {len(out)} left out"]
    text += [f"left out: {video.file} ({'; '.join(video.notes)})" for video in out[:lines]]
    return text + ([f"and {len(out) - lines} more"] if len(out) > lines else [])
