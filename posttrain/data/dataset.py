"""Read a dataset folder: `<folder>/<split>/metadata.jsonl`, and in the same folder a video and an .npz per clip.

All clips of a folder have the same fps, frames and size, and are used as they are. If a recipe sets `frames`, `fps` and
`size`, clips are retimed and cropped to that format; then a folder of any videos (listing.py) can be read too, without
annotations.

Shape letters: B batch, C channels, F frames, H W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from posttrain.core import files
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.core.progress import track
from posttrain.data import listing, schema, views
from posttrain.data.config import DataConfig, Wanted
from posttrain.data.listing import VideoNote
from posttrain.data.schema import ClipRow
from posttrain.data.views import View
from posttrain.types import Batch

FILM = "film the clips with `python -m sim make RECIPE`, or get the dataset again"
MOST_ANNOTATIONS = 3 * 2**30  # bytes of the arrays beside a clip; 81 frames of 720 x 1280 have 1 GiB


class ClipFormat(NamedTuple):
    """The format that all clips of a training or a test share; size is [height, width] in pixels, as in JSON."""

    fps: float
    frames: int
    size: list[int]


@dataclass(frozen=True)
class Split:
    """The clips of one split; all have the same fps, frames and size.

    Attributes:
        folder: the split's folder.
        views: how each clip is retimed and cropped; None for a clip that is used as it is.
        video_notes: how each file is changed or why it is left out, for `listing.summary`.
    """

    folder: Path
    rows: list[ClipRow]
    views: Sequence[View | None]
    annotated: bool = True
    wanted: Wanted | None = None
    video_notes: Sequence[VideoNote] = ()

    @property
    def clip_format(self) -> ClipFormat:
        """fps, frames and size of the clips."""
        return _clip_format(self.rows[0] if self.wanted is None else self.wanted)

    @property
    def fps(self) -> float:
        return float(self.clip_format.fps)

    @property
    def frames(self) -> int:
        return int(self.clip_format.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        height, width = self.clip_format.size
        return int(height), int(width)

    def video(self, index: int) -> Path:
        return self.folder / self.rows[index].file_name

    def annotations(self, index: int) -> Path:
        return self.folder / (self.rows[index].annotations or "")


def open_splits(config: DataConfig) -> list[Split]:
    """The clips of each folder that a recipe names, in the format that the recipe sets.

    Raises:
        UserError: as open_split and listing.choose.
    """
    wanted = config.wanted
    if wanted is None:
        return [open_split(folder, config.split) for folder in config.folders]
    splits = []
    for folder in config.folders:
        if not _annotated(Path(folder) / config.split / "metadata.jsonl"):
            listed = listing.entries(folder, config.split)
            if listed:
                rows, chosen, video_notes = listing.choose(listed, wanted, config.uncaptioned, config.limit)
                splits.append(Split(listed[0].folder, rows, chosen, False, wanted, video_notes))
                continue
        splits.append(_retimed(open_split(folder, config.split), wanted))
    return splits


def _annotated(metadata: Path) -> bool:
    return metadata.is_file() and any("annotations" in row for row in files.read_jsonl(metadata))


def _retimed(split: Split, wanted: Wanted) -> Split:
    """A dataset folder's clips in the format `wanted`. They share one format, so either all are long enough or none."""
    frames, box, notes = views.plan(np.arange(split.frames) / split.fps, split.size, wanted)
    if frames is None:
        raise UserError(
            f"{split.folder / 'metadata.jsonl'}: its clips are {notes[0]}; change data.frames, data.fps or data.crop, "
            "or name other clips",
            "mismatch",
            "data.frames",
        )
    view = View(tuple(frames.tolist()), False, box, wanted.size) if notes else None
    video_notes = [VideoNote(row.file_name, True, notes) for row in split.rows] if notes else []
    return Split(split.folder, split.rows, [view] * len(split.rows), True, wanted, video_notes)


def open_split(folder: Path | str, split: str) -> Split:
    """The clips of `<folder>/<split>`, a dataset folder.

    Raises:
        UserError: the split does not exist, a file is missing or outside the folder, or clips differ in fps, frames or
            size.
    """
    path = Path(folder) / split
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        if listing.entries(folder, split):
            remedy = f"{folder} holds videos: set data.frames, data.fps and data.size to train on them"
            raise UserError(f"{metadata}: does not exist; {remedy}", "missing", "data.frames")
        problem, remedy = listing.remedy(folder, split)
        raise UserError(f"{folder}: {problem}; {remedy}", "missing")
    listed, rows = files.read_jsonl(metadata), list[ClipRow]()
    if not listed:
        raise UserError(f"{metadata}: has no clips; {FILM}", "no_clips")
    for line, written in enumerate(listed, 1):
        if missing := [
            k
            for k in (*ClipFormat._fields, "file_name", "annotations", "sha256", "caption", "target")
            if k not in written
        ]:
            remedy = "make the dataset again"
            if "annotations" not in written:
                remedy = "to train on such clips set data.frames, data.fps and data.size; they cannot be used for tests"
            raise UserError(f"{metadata}:{line}: {missing[0]}: is missing; {remedy}", "format", missing[0])
        row = schema.from_json(written, f"{metadata}:{line}")
        for name in (row.file_name, row.annotations or ""):
            if not files.inside(path, name).is_file():
                raise UserError(f"{metadata}:{line}: {name}: does not exist; {FILM}", "missing")
        rows.append(row)
        _agree(f"{metadata}:{line}: {row.file_name}", _clip_format(row), _clip_format(rows[0]), rows[0].file_name)
    return Split(path, rows, [None] * len(rows))


def _clip_format(of: ClipRow | Wanted) -> ClipFormat:
    return ClipFormat(of.fps, of.frames, list(of.size))


def _agree(where: str, own: ClipFormat, expected: ClipFormat, name: str) -> None:
    for key, value, wanted in zip(ClipFormat._fields, own, expected, strict=True):
        if value != wanted:
            raise UserError(
                f"{where}: {key} is {value}, but {wanted} in {name}; use clips of one format, or set data.frames, "
                "data.fps and data.size, to which clips are then retimed and scaled",
                "mismatch",
                key,
            )


def check_same_format(splits: Sequence[Split]) -> None:
    """Refuse splits that differ in fps, frames or size, for example training and test splits."""
    for split in splits[1:]:
        _agree(f"{split.folder / 'metadata.jsonl'}", split.clip_format, splits[0].clip_format, str(splits[0].folder))


def read_annotations(path: Path | str, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The annotations of a clip (all arrays, or only `keys`): instances uint8 (F, H, W), depth, flow, poses.

    Raises:
        UserError: the file is missing or damaged, or its arrays are larger than MOST_ANNOTATIONS or than the memory.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            wanted = list(arrays.files if keys is None else keys)
            unpacked = sum(arrays.zip.getinfo(f"{key}.npy").file_size for key in wanted)
            if unpacked > MOST_ANNOTATIONS:
                size = f"{unpacked / 2**30:.1f} GiB, more than {MOST_ANNOTATIONS / 2**30:.0f}"
                raise UserError(
                    f"{path}: its arrays would need {size} in memory; make smaller or shorter clips", "format"
                )
            return {key: arrays[key] for key in wanted}
    except UserError:
        raise
    except MemoryError as error:
        message = "there is too little memory for its arrays; free memory, or make smaller or shorter clips"
        raise UserError(f"{path}: {message}", "memory") from error
    except Exception as error:  # zipfile, zlib, numpy and the system each raise their own types
        raise UserError(f"{path}: is missing or damaged; delete it, and {FILM}", "damaged") from error


class Clips:
    """Clips in pixels, decoded once and kept in memory as uint8.

    In a dataset with groups these are the true clips; `violated` adds the clips that break a law.

    Args:
        truths: what batches contain in addition: "flow", "depth" or both. Only for clips that are used as they are.

    Raises:
        UserError: a clip is missing, damaged, changed since it was made, or in another format than the others.
    """

    def __init__(
        self, config: DataConfig, preload: bool = True, violated: bool = False, truths: Sequence[str] = ()
    ) -> None:
        self.splits = open_splits(config)
        for split in self.splits if truths else ():
            if not split.annotated or any(view is not None for view in split.views):
                raise UserError(
                    f"{split.folder}: {' and '.join(truths)} are only known for clips of `sim make` that are not "
                    "retimed or cropped; leave out data.frames, data.fps and data.size, or use such clips",
                    "mismatch",
                    "data.frames",
                )
        self._truths = truths
        check_same_format(self.splits)
        self._entries = [(split, index) for split in self.splits for index in _chosen(split, config.limit, violated)]
        several = len(self.splits) > 1
        self.ids = [
            (f"{split.folder.parent.name}/" if several else "") + _id(split, split.rows[index].file_name)
            for split, index in self._entries
        ]
        if self.annotated and len(set(self.ids)) < len(self.ids):  # a list of videos may name one twice
            raise UserError(
                f"data.clips: {', '.join(config.folders)}: clips with the same name; rename one of the folders",
                "duplicate",
                "data.clips",
            )
        self._decoded: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._annotations: dict[int, dict[str, np.ndarray]] = {}
        if preload:
            self.preload()

    def preload(self) -> None:
        """Decode every clip now."""
        with ThreadPoolExecutor() as pool:
            videos = track(pool.map(self.read, range(len(self))), "reading clips", len(self))
            self._decoded = dict(enumerate(videos))
            self._annotations = dict(enumerate(pool.map(self.read_truths, range(len(self)))))

    @property
    def annotated(self) -> bool:
        """Whether the clips have annotations."""
        return all(split.annotated for split in self.splits)

    @property
    def key(self) -> str:
        """A hash of the clips' pictures, annotations and order."""
        rows = [self.row(i) for i in range(len(self))]
        sums = [[row.sha256, row.annotations_sha256, *self.seen(i)] for i, row in enumerate(rows)]
        return files.sha256_json(sums)

    def __len__(self) -> int:
        return len(self._entries)

    def row(self, index: int) -> ClipRow:
        """The clip's row of metadata.jsonl."""
        split, number = self._entries[index]
        return split.rows[number]

    def video(self, index: int) -> Path:
        """The path of the clip's video."""
        split, number = self._entries[index]
        return split.video(number)

    def seen(self, index: int) -> list[str]:
        """How the file is retimed and cropped, as an extra cache key; [] if it is used as it is."""
        split, number = self._entries[index]
        view = split.views[number]
        return [] if view is None else [view.key]

    def group(self, index: int) -> tuple[Path, Any] | None:
        """A number that clips with the same first frame share; None for a clip without a group."""
        split, number = self._entries[index]
        return None if split.rows[number].group is None else (split.folder, split.rows[number].group)

    def first(self, index: int) -> np.ndarray:
        """The clip's first frame alone, uint8 (H, W, 3)."""
        split, number = self._entries[index]
        view = split.views[number] or View((0,), False, (0, 0, *split.size), split.size)
        return views.read(split.video(number), replace(view, frames=view.frames[:1]))[0]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels uint8 (F, H, W, 3) and instances uint8 (F, H, W), or None, of one clip."""
        if index in self._decoded:
            return self._decoded[index]
        split, number = self._entries[index]
        row, path, view = split.rows[number], split.video(number), split.views[number]
        if not split.annotated:
            assert view is not None
            return views.read(path, view), None
        content = files.read_bytes(path)
        video = read_video(path, content)
        if video.shape[:3] != (row.frames, *row.size):
            raise UserError(
                f"{path}: has {len(video)} frames of {video.shape[1:3]}, but its metadata say {row.frames} of "
                f"{row.size}; delete it, and {FILM}",
                "damaged",
            )
        if files.sha256_bytes(content) != row.sha256:
            raise UserError(f"{path}: was changed since it was made (sha256); delete it, and {FILM}", "damaged")
        annotations = split.annotations(number)
        if (sha256 := row.annotations_sha256) and files.sha256(annotations) != sha256:
            raise UserError(f"{annotations}: was changed since it was made (sha256); delete it, and {FILM}", "damaged")
        instances = read_annotations(annotations, ["instances"])["instances"]
        if instances.shape != video.shape[:3]:
            raise UserError(
                f"{annotations}: instances have shape {instances.shape}, the video {video.shape[:3]}; "
                f"delete it, and {FILM}",
                "damaged",
            )
        if view is not None:
            video = np.stack([views.scale(video[frame], view) for frame in view.frames])
            instances = np.stack([views.scale_ids(instances[frame], view) for frame in view.frames])
        return video, instances

    def read_truths(self, index: int) -> dict[str, np.ndarray]:
        """The `truths` of one clip as stored: flow (F, H, W, 2) in pixels, depth (F, H, W) in metres."""
        if index in self._annotations or not self._truths:
            return self._annotations.get(index, {})
        split, number = self._entries[index]
        path = split.annotations(number)
        arrays = read_annotations(path, self._truths)
        for name, array in arrays.items():
            if array.shape[:3] != (split.frames, *split.size):
                raise UserError(
                    f"{path}: {name} has shape {array.shape}, the video {split.frames, *split.size}; "
                    f"delete it, and {FILM}",
                    "damaged",
                )
        return arrays

    def load(self, indices: Sequence[int]) -> Batch:
        """The clips at `indices` in pixels; with instances and the scored object's id if all clips have them."""
        pixels, instances = zip(*(self.read(index) for index in indices), strict=True)
        truths = [self.read_truths(index) for index in indices]
        stored = {name: torch.from_numpy(np.stack([t[name] for t in truths])).float() for name in self._truths}
        return Batch(
            flow_BFCHW=stored["flow"].movedim(-1, 2) if "flow" in stored else None,
            depth_BFHW=stored.get("depth"),
            ids=tuple(self.ids[index] for index in indices),
            video_BCFHW=torch.stack([to_float(video) for video in pixels]),
            instances_BFHW=torch.from_numpy(np.stack(instances)) if self.annotated else None,
            target_B=targets([self.row(index) for index in indices]),
        )


def _chosen(split: Split, limit: int | None, violated: bool) -> list[int]:
    """Indices of the first `limit` true clips; with `violated` also of the clips of their groups that break a law."""
    true = [i for i, row in enumerate(split.rows) if not row.violation][:limit]
    if not violated:
        return true
    groups = {group for i in true if (group := split.rows[i].group) is not None}
    return sorted({*true, *(i for i, row in enumerate(split.rows) if row.violation and row.group in groups)})


def targets(rows: Sequence[ClipRow]) -> torch.Tensor | None:
    """The instance id of each clip's scored object, int64 (B,); None unless all have one."""
    known = [row.target + 1 for row in rows if row.target is not None]
    return torch.tensor(known) if len(known) == len(rows) else None


def _id(split: Split, name: str) -> str:
    """A clip's name in messages and files; a user's own video keeps its suffix, so a.mp4 and a.mov differ."""
    return Path(name).stem if split.annotated else name


def to_float(video_FHWC: np.ndarray) -> torch.Tensor:
    """uint8 (F, H, W, 3) to float32 (3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(video_FHWC).permute(3, 0, 1, 2).float() / 127.5 - 1
