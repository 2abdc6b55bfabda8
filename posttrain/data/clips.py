"""Read a dataset folder: `<folder>/<split>/metadata.jsonl`, and beside it a video and an .npz per clip.

Shape letters: B batch, C channels, F frames, H W pixels.
"""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from pydantic import Field

from posttrain import files
from posttrain.files import UserError
from posttrain.progress import track
from posttrain.types import Batch, Strict

SHAPE = ("fps", "frames", "size")  # what all clips of a training or a test have in common


class DataConfig(Strict):
    """Which clips. `make` names the recipes of `sim make` that film them where they are missing."""

    clips: str | list[str]
    split: str = "train"
    limit: int | None = Field(None, ge=1)  # the first clips of each folder
    make: str | list[str] | None = None

    @property
    def folders(self) -> list[str]:
        return [self.clips] if isinstance(self.clips, str) else self.clips


@dataclass(frozen=True)
class Split:
    """The clips of one split, `folder` being the split's own. Clips agree in fps, frames and size."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def fps(self) -> float:
        return float(self.rows[0]["fps"])

    @property
    def frames(self) -> int:
        return int(self.rows[0]["frames"])

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""
        height, width = self.rows[0]["size"]
        return int(height), int(width)

    def video(self, index: int) -> Path:
        return self.folder / self.rows[index]["file_name"]

    def annotations(self, index: int) -> Path:
        return self.folder / self.rows[index]["annotations"]


def open_split(folder: Path | str, split: str) -> Split:
    """The clips of `<folder>/<split>`.

    Raises:
        UserError: no such split, a file of it is missing or outside the folder, or clips differ in fps, frames or size.
    """
    path = Path(folder) / split
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(f"{metadata}: does not exist; film the clips with `python -m sim make RECIPE`")
    rows = files.read_jsonl(metadata)
    if not rows:
        raise UserError(f"{metadata}: has no clips; film them with `python -m sim make RECIPE`")
    for line, row in enumerate(rows, 1):
        if missing := [k for k in (*SHAPE, "file_name", "annotations", "sha256", "caption", "target") if k not in row]:
            raise UserError(f"{metadata}:{line}: {missing[0]}: is missing; make the dataset again")
        for name in (row["file_name"], row["annotations"]):
            if not files.inside(path, name).is_file():
                raise UserError(f"{metadata}:{line}: {name}: does not exist; make the dataset again")
        _agree(f"{metadata}:{line}: {row['file_name']}", row, rows[0], rows[0]["file_name"])
    return Split(path, rows)


def _agree(where: str, row: dict[str, Any], other: dict[str, Any], name: str) -> None:
    for key in SHAPE:
        if row[key] != other[key]:
            raise UserError(
                f"{where}: {key} is {row[key]}, but {other[key]} in {name}; "
                "clips are not retimed or scaled: use clips of one kind"
            )


def check_same_kind(splits: Sequence[Split]) -> None:
    """Refuse splits that differ in fps, frames or size, for instance those of training and of testing."""
    for split in splits[1:]:
        _agree(f"{split.folder / 'metadata.jsonl'}", split.rows[0], splits[0].rows[0], str(splits[0].folder))


def read_video(path: Path | str) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3) RGB.

    Raises:
        UserError: the file is missing, torn, or not a video.
    """
    return _decode(Path(path), _read(Path(path)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _decode(path: Path, content: bytes) -> np.ndarray:
    try:
        with av.open(io.BytesIO(content), "r") as container:
            promised = container.streams.video[0].frames
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: is torn or no video; delete it and make it again") from error
    if not frames or len(frames) < promised:
        raise UserError(f"{path}: is torn ({len(frames)} of {promised} frames); delete it and make it again")
    return np.stack(frames)


def read_annotations(path: Path | str, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays beside a clip (all, or only `keys`): instances uint8 (F, H, W), depth, flow, poses.

    Raises:
        UserError: the file is missing or torn.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in (arrays.files if keys is None else keys)}
    except Exception as error:  # zipfile, zlib, numpy and the system each have their own
        raise UserError(f"{path}: is missing or torn; delete it and make it again") from error


class Clips:
    """Clips in pixels, decoded once and kept in memory as uint8.

    Raises:
        UserError: a clip is missing, torn, changed since it was made, or of another kind than the others.
    """

    def __init__(self, config: DataConfig, preload: bool = True) -> None:
        self.splits = [open_split(folder, config.split) for folder in config.folders]
        check_same_kind(self.splits)
        self._entries = [(split, index) for split in self.splits for index in range(len(split.rows))[: config.limit]]
        several = len(self.splits) > 1
        self.ids = [
            (f"{split.folder.parent.name}/" if several else "") + Path(split.rows[index]["file_name"]).stem
            for split, index in self._entries
        ]
        if len(set(self.ids)) < len(self.ids):
            raise UserError(f"data.clips: {', '.join(config.folders)}: clips share a name; rename one of the folders")
        self._decoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if preload:
            self.preload()

    def preload(self) -> None:
        """Decode every clip now."""
        with ThreadPoolExecutor() as pool:
            videos = track(pool.map(self.read, range(len(self))), "reading clips", len(self))
            self._decoded = dict(enumerate(videos))

    @property
    def key(self) -> str:
        """Changes with the clips' pictures, annotations or order."""
        sums = [[self.row(i)["sha256"], self.row(i).get("annotations_sha256")] for i in range(len(self))]
        return files.sha256_bytes(json.dumps(sums).encode())

    def __len__(self) -> int:
        return len(self._entries)

    def row(self, index: int) -> dict[str, Any]:
        """The clip's row of metadata.jsonl."""
        split, number = self._entries[index]
        return split.rows[number]

    def video(self, index: int) -> Path:
        """Where the clip's video lies."""
        split, number = self._entries[index]
        return split.video(number)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (F, H, W, 3) and instances uint8 (F, H, W) of one clip."""
        if index in self._decoded:
            return self._decoded[index]
        split, number = self._entries[index]
        row, path = split.rows[number], split.video(number)
        content = _read(path)
        video = _decode(path, content)
        if video.shape[:3] != (row["frames"], *row["size"]):
            raise UserError(
                f"{path}: has {len(video)} frames of {video.shape[1:3]}, but its metadata say {row['frames']} of "
                f"{tuple(row['size'])}; delete it and make it again"
            )
        if files.sha256_bytes(content) != row["sha256"]:
            raise UserError(f"{path}: was changed since it was made (sha256); delete it and make it again")
        annotations = split.annotations(number)
        if (sha256 := row.get("annotations_sha256")) and files.sha256(annotations) != sha256:
            raise UserError(f"{annotations}: was changed since it was made (sha256); delete it and make it again")
        instances = read_annotations(annotations, ["instances"])["instances"]
        if instances.shape != video.shape[:3]:
            raise UserError(
                f"{annotations}: instances are {instances.shape}, the video {video.shape[:3]}; make it again"
            )
        return video, instances

    def load(self, indices: Sequence[int]) -> Batch:
        """The clips at `indices`, in pixels; instances and the scored object's instance id beside them."""
        videos, instances = zip(*(self.read(index) for index in indices), strict=True)
        return Batch(
            ids=tuple(self.ids[index] for index in indices),
            video_BCFHW=torch.stack([to_float(video) for video in videos]),
            instances_BFHW=torch.from_numpy(np.stack(instances)),
            target_B=torch.tensor([self.row(index)["target"] + 1 for index in indices]),
        )


def to_float(video_FHWC: np.ndarray) -> torch.Tensor:
    """uint8 (F, H, W, 3) to float32 (3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(video_FHWC).permute(3, 0, 1, 2).float() / 127.5 - 1
