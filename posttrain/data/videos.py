"""Videos that a user brings: find them and their captions, and see each as so many frames, at one rate and size.

What is read, in `<folder>/<split>` or, where that has none, in `<folder>`, a list before the videos themselves:

    metadata.jsonl, metadata.json, metadata.csv   rows with a VIDEO and a CAPTION column (finetrainers, videofolder,
                                                  DiffSynth-Studio); such a file may also be named itself
    videos.txt and prompts.txt                    one file name and one caption per line (finetrainers)
    a.mp4 and a.txt                               the caption beside the video (finetrainers)

File names are relative to the list, or to `<split>` beside it (DiffSynth-Studio). Of a list that names files in
`<split>/`, only these are read: the others are another split's.

What is seen of a video: its first frame is at time 0, and frame k of the clip is the one shown nearest to k / fps, of
two equally near the earlier, by the file's own timestamps, so that a varying rate does no harm. The clip is the video's
beginning; a video that does not reach that far is left out, for a picture that is held is not what happened. The
upright picture's largest box of the wanted shape, in its middle or at the side that `crop` names, is scaled to the
wanted size; with `crop: none` a video of another shape is left out. Sound is not read.

Shape letters: F frames, H W pixels, C channels.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import torch.nn.functional as F

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.progress import track
from posttrain.data.schema import ClipRow

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
TIE = 1e-6  # seconds: times this near to each other are the same
Box = tuple[int, int, int, int]  # top, left, height, width
Crop = Literal["center", "top", "bottom", "left", "right", "none"]


@dataclass(frozen=True)
class Entry:
    """A video of a list. `name` is relative to `folder`; no caption is None."""

    folder: Path
    name: str
    caption: str | None


@dataclass(frozen=True)
class Wanted:
    """What every clip shall be: so many frames, at frames per second, of (height, width) pixels.

    `crop` says which part of a picture of another shape is seen; none: such videos are left out.
    """

    frames: int
    fps: float
    size: tuple[int, int]
    crop: Crop = "center"


@dataclass(frozen=True)
class Facts:
    """What is in a video file: when each frame is shown, and the upright picture's height and width."""

    sha256: str
    times: np.ndarray  # seconds (F,), ascending, from 0
    marks: tuple[int, ...] | None  # timestamps in the file's own unit, by which frames are found; None: it has none
    size: tuple[int, int]
    turned: int  # degrees counterclockwise that make the picture upright


@dataclass(frozen=True)
class View:
    """Which frames of a video are seen, which box of its upright picture, and the size (H, W) that box is scaled to."""

    frames: tuple[int, ...]  # the file's marks of them; their places in it where it has none
    marked: bool
    box: Box
    size: tuple[int, int]

    @property
    def key(self) -> str:
        """Changes with what is seen."""
        return json.dumps([self.frames, self.box, self.size])


# ---------------------------------------------------------------- finding


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
) -> tuple[list[ClipRow], list[View], list[dict[str, Any]]]:
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
    rows: list[ClipRow] = []
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
                rows.append(ClipRow(entry.name, caption, wanted.fps, wanted.frames, wanted.size, facts.sha256))
                views.append(view)
        told.append({"file": entry.name, "used": view is not None, "notes": notes})
    if not rows:
        raise UserError(f"{folder}: none of its {len(told)} videos can be used ({count(told)}); mend them or data.*")
    return rows, views, told


def inspect(path: Path) -> Facts:
    """What is in the video file `path`; nothing but its first picture is decoded.

    Raises:
        UserError: it is no video, or a torn one.
    """
    state = path.stat()
    return _inspect(path, state.st_size, state.st_mtime_ns)


@cache  # a run asks twice: when it checks the recipe, and when it trains
def _inspect(path: Path, size: int, changed: int) -> Facts:
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            found = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
            promised = stream.frames if "mp4" in container.format.name else 0  # others count what is not there
            base, rate = stream.time_base, stream.average_rate
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            picture = next(container.decode(stream))
            height, width = picture.height, _width(picture, stream)
    except (av.FFmpegError, StopIteration) as error:
        raise UserError(f"{path}: cannot be read: torn or no video") from error
    if len(found) < promised:
        raise UserError(f"{path}: cannot be read: torn, {len(found)} of {promised} frames are there")
    stamps = sorted(pts for pts, discard in found if pts is not None and not discard)
    marks = tuple(stamps) if len(stamps) == sum(not discard for _, discard in found) and base else None
    if marks is not None and base is not None:
        times = (np.array(marks) - marks[0]) * float(base)
    elif rate:
        times = np.arange(len(found)) / float(rate)
    else:
        raise UserError(f"{path}: cannot be read: says nothing of its frames' times")
    if len(times) > 1 and not (np.diff(times) > 0).all():
        raise UserError(f"{path}: cannot be read: two frames are shown at the same time")
    turned = round(picture.rotation / 90) * 90 % 360
    upright = (width, height) if turned % 180 else (height, width)
    return Facts(files.sha256(path), times, marks, upright, turned)


def see(facts: Facts, wanted: Wanted) -> tuple[View | None, list[str]]:
    """How a video becomes a clip, and what is done to it; None with the reason if it cannot."""
    places, box, notes = plan(facts.times, facts.size, wanted)
    if places is None:
        return None, notes
    if facts.turned:
        notes = [f"turned: by {facts.turned} degrees, as the file says", *notes]
    frames = tuple(int(place) if facts.marks is None else facts.marks[place] for place in places)
    return View(frames, facts.marks is not None, box, wanted.size), notes


def plan(times: np.ndarray, size: tuple[int, int], wanted: Wanted) -> tuple[np.ndarray | None, Box, list[str]]:
    """Which frames (their places, (wanted.frames,) int64) and which box of a video are seen, and what that changes.

    Args:
        times: when its frames are shown, seconds, ascending from 0.
        size: its upright picture's height and width.

    Returns:
        None for the frames where the video is too short, or of another shape and not to be cropped.
    """
    at = np.arange(wanted.frames) / wanted.fps
    box = moved(centred(size, wanted.size), size, wanted.crop)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if at[-1] > times[-1] + step / 2 + TIE:
        reach = f"{wanted.frames} frames at {wanted.fps:g} fps reach {at[-1]:.2f} s"
        return None, box, [f"too short: its last frame is at {times[-1]:.2f} s, {reach}"]
    if wanted.crop == "none" and box[2:] != size:
        return None, box, [f"another shape: {size[0]} x {size[1]} pixels (height x width), and data.crop is none"]
    places = nearest(times, at)
    notes = []
    steady = step == 0 or bool((np.abs(np.diff(times) / step - 1) < 0.5).all())
    if (places != np.arange(wanted.frames)).any() or (step and abs(step * wanted.fps - 1) > 0.005):
        held = int((np.diff(places) == 0).sum())
        rate = f"{1 / step:.4g} fps" if steady and step else "a varying rate"
        notes.append(f"retimed: {rate} to {wanted.fps:g} fps" + (f", {held} pictures are held" if held else ""))
    if times[-1] > at[-1] + 1.5 * step:
        notes.append(f"cut: the first {at[-1]:.2f} of {times[-1]:.2f} s")
    (height, width), (_, _, tall, wide) = size, box
    if (tall, wide) != size:
        notes.append(f"cropped: {height} x {width} to {tall} x {wide} pixels (height x width)")
    if (tall, wide) != wanted.size:
        larger = "enlarged" if wanted.size[0] > tall or wanted.size[1] > wide else "scaled"
        notes.append(f"{larger}: {tall} x {wide} to {wanted.size[0]} x {wanted.size[1]} pixels")
    return places, box, notes


def nearest(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each moment of `at`, the place in `times` (ascending) of the nearest; of two equally near, the earlier."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, at - TIE, side="left")


def centred(size: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The largest box in the middle of a picture of `size` that has the shape of `shape`; both are (height, width)."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    tall, wide = (min(full, max(1, round(part / scale))) for full, part in zip(size, shape, strict=True))
    return (size[0] - tall) // 2, (size[1] - wide) // 2, tall, wide


def moved(box: Box, size: tuple[int, int], crop: Crop) -> Box:
    """A box of a picture of `size`, at the side that `crop` names."""
    top, left, tall, wide = box
    top = {"top": 0, "bottom": size[0] - tall}.get(crop, top)
    left = {"left": 0, "right": size[1] - wide}.get(crop, left)
    return top, left, tall, wide


# ---------------------------------------------------------------- reading


def read(path: Path, view: View) -> np.ndarray:
    """The clip that `view` makes of a video file, uint8 (F, H, W, 3). Pictures are decoded and scaled one by one.

    Raises:
        UserError: the file is torn, or is not the one that was looked at.
    """
    found: dict[int, np.ndarray] = {}
    missing = set(view.frames)
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            stream.thread_type = "AUTO"
            for place, frame in enumerate(container.decode(stream)):
                mark = frame.pts if view.marked else place
                if mark in missing:
                    missing.remove(mark)
                    picture = frame.to_ndarray(format="rgb24", width=_width(frame, stream), height=frame.height)
                    found[mark] = scale(np.rot90(picture, round(frame.rotation / 90)), view)
                if not missing:
                    break
    except av.FFmpegError as error:
        raise UserError(f"{path}: is torn ({error}); mend or remove it") from error
    if missing:
        raise UserError(f"{path}: {len(missing)} of its frames cannot be decoded; mend or remove it")
    return np.stack([found[mark] for mark in view.frames])


def scale(picture_HWC: np.ndarray, view: View) -> np.ndarray:
    """The view's box of a picture (uint8), scaled to the view's size."""
    top, left, height, width = view.box
    part = np.ascontiguousarray(picture_HWC[top : top + height, left : left + width])
    if part.shape[:2] == view.size:
        return part
    values = torch.from_numpy(part).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(values, view.size, mode="bilinear", antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def scale_ids(ids_HW: np.ndarray, view: View) -> np.ndarray:
    """The same for a picture of ids: each pixel takes the id at its centre."""
    top, left, height, width = view.box
    rows, columns = (
        start + ((np.arange(n) + 0.5) * full / n).astype(int)
        for start, full, n in zip((top, left), (height, width), view.size, strict=True)
    )
    return ids_HW[rows[:, None], columns]


def _stream(container: Any, path: Path) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise UserError(f"{path}: cannot be read: no pictures in it")
    return stream


def _width(frame: Any, stream: Any) -> int:
    """The picture's width on the screen, where pixels may be wider than high."""
    return max(1, round(frame.width * float(stream.sample_aspect_ratio or 1)))


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
