"""True clips of a benchmark: PisaBench as published, or a dataset folder of `sim`. A helper of pisa.py.

    <...>/0000/clip_info.json, 00000.jpg, ...                  PisaBench real: 361 clips, 120 fps, clicks on frame 0
    <...>/00/clip_info.json, mask.npz, rgba_00000.jpg, ...     PisaBench simulated (seen and unseen): 16 fps
    <...>/<split>/metadata.jsonl                               ours (data/dataset.py)

PisaBench's files do not contain these rates. For your own clips in this layout, give the rate in clip_info.json
("fps": 24) or as an argument. Without a rate a set is refused, unless it has PisaBench's number of real clips, or its
names of simulated clips.

clip_info.json is {"prompt": "A black eraser falls.", "points": [{"positive": [[x, y], ...], "negative": [...]}, ...]},
an entry of `points` for each object; simulated clips have no `points`. mask.npz holds `mask` (frames, objects, H, W).
Only the object that drops is scored: the last one in simulated clips, the one with the highest positive click in real
clips.

The real set has no masks. SAM 2 makes them from the clicks, at the pictures' own size and rate, for the frames that are
needed; they are cached. If a folder of real pictures has a mask.npz (the authors' own script writes it), that is used.

Shape letters: F frames, H W pixels, P clicks.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from posttrain.core import codec, files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips, read_annotations
from posttrain.data.schema import ClipRow

REAL_FPS, SIM_FPS, REAL_CLIPS = 120.0, 16.0, 361  # from the paper; the files do not have them
CONTEXT = " A video that conforms to the laws of physics."  # the paper adds it to the captions of real clips
NEGATIVE = "no camera motion, no slow-motion"  # the paper's negative prompts; used only with guidance


class Clicks(Protocol):
    """Follows the object clicked on in the first of `frames` pictures, uint8 (H, W, 3); yields bool masks (H, W)."""

    def __call__(
        self, pictures: Iterable[np.ndarray], frames: int, points_P2: np.ndarray, labels_P: np.ndarray
    ) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Truth:
    """A clip of a benchmark.

    Attributes:
        row: caption, fps, size and, if known, drop_height, gravity, camera and distance.
        picture: function that returns the first frame, uint8 (H, W, 3).
        masks: function of n that returns the scored object's first n masks (fewer if the clip ends), bool (F, H, W).
        key: hash of everything that the masks depend on.
        context: text that is added to the caption in a model's prompt.
    """

    id: str
    row: ClipRow
    picture: Callable[[], np.ndarray]
    masks: Callable[[int], np.ndarray]
    key: str
    context: str = ""

    @property
    def caption(self) -> str:
        return self.row.caption


def open_benchmark(
    folder: Path | str,
    clicks: Clicks | None = None,
    follower: str = "",
    cache: Path | None = None,
    fps: float | None = None,
) -> dict[str, list[Truth]]:
    """The clips of a folder by split; a split's name is the path of its folder relative to `folder`.

    Args:
        clicks: SAM 2, for the real set.
        follower: hash of everything that its masks depend on.
        cache: the folder for its masks.
        fps: frames per second of the true clips, if their files do not say it.

    Raises:
        UserError: there is no clip, a file is wrong, clicks need SAM 2 and none is given, or the rate is not known
            (required, --truth-fps), is not a rate (value), or differs from that in the files (conflict).
    """
    folder = Path(folder)
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"--truth-fps: {fps:g} is not a frame rate; give frames per second", "value", "--truth-fps")
    scenes = sorted(path.parent for path in folder.rglob("clip_info.json") if not _hidden(path.relative_to(folder)))
    if scenes:
        split_scenes: dict[str, list[Path]] = {}
        for scene in scenes:
            split = scene.parent.relative_to(folder).as_posix() if scene.parent != folder else folder.name
            split_scenes.setdefault(split, []).append(scene)
        return {
            split: [
                _published(scene, rate, clicks, follower, cache) for scene, rate in _rates(split, each, fps).items()
            ]
            for split, each in split_scenes.items()
        }
    splits = sorted(path.parent.name for path in folder.glob("*/metadata.jsonl"))
    if not splits:
        raise UserError(
            f"{folder}: holds no clips to compare with; name PisaBench's real or sim, or a dataset folder", "no_clips"
        )
    if fps is not None:
        raise UserError(
            f"{folder}: its files already give the frame rate; leave --truth-fps out", "conflict", "--truth-fps"
        )
    tests = [split for split in splits if split.startswith("test")]
    return {split: _ours(folder, split) for split in tests or splits}


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _ours(folder: Path, split: str) -> list[Truth]:
    clips = Clips(DataConfig(clips=str(folder), split=split), preload=False)

    def masks(index: int, n: int) -> np.ndarray:
        instances, target = clips.read(index)[1], clips.row(index).target
        assert instances is not None
        assert target is not None
        return (instances == target + 1)[:n]

    def picture(index: int) -> np.ndarray:
        return clips.read(index)[0][0]

    def truth(index: int) -> Truth:
        row = clips.row(index)
        key = files.sha256_json([row.sha256, row.annotations_sha256, row.target])
        return Truth(clips.ids[index], row, partial(picture, index), partial(masks, index), key)

    return [truth(index) for index in range(len(clips))]


# ---------------------------------------------------------------- PisaBench


def _rates(split: str, scenes: Sequence[Path], asked: float | None) -> dict[Path, float]:
    """The frames per second of each clip of a split: from its file, from the argument, or PisaBench's."""
    infos = {scene: _info(scene) for scene in scenes}
    silent = [scene for scene, info in infos.items() if "fps" not in info]
    assumed = asked
    if silent and asked is None:
        if "points" in infos[silent[0]]:
            assumed = REAL_FPS if len(scenes) == REAL_CLIPS else None
        elif scenes[0].parent.name in ("seen", "unseen") and [*silent[0].glob("rgba_*.jpg")]:
            assumed = SIM_FPS
        if assumed is None:
            raise UserError(
                f"{silent[0] / 'clip_info.json'}: fps: is missing, and these are not PisaBench's own {REAL_CLIPS} real "
                "clips or its simulated ones; write it there, or give --truth-fps (PisaBench: real 120, simulated 16)",
                "required",
                "--truth-fps",
            )
        print(
            f"{split}: the files do not give the frame rate of the true clips; PisaBench's {assumed:g} fps is assumed",
            file=sys.stderr,
        )
    rates: dict[Path, Any] = {scene: info.get("fps", assumed) for scene, info in infos.items()}
    for scene, rate in rates.items():
        path = scene / "clip_info.json"
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise UserError(f"{path}: fps: is {rate!r}, not a rate; write frames per second", "value", "fps")
        if asked is not None and rate != asked:
            raise UserError(f"{path}: fps: is {rate:g}, but --truth-fps {asked:g}", "conflict", "--truth-fps")
    return {scene: float(rate) for scene, rate in rates.items()}


def _info(scene: Path) -> dict[str, Any]:
    path = scene / "clip_info.json"
    info = files.read_object(path)
    if not isinstance(info.get("prompt"), str):
        raise UserError(f"{path}: prompt: is missing; correct it, or unpack PisaBench again", "format", "prompt")
    return info


def _published(scene: Path, fps: float, clicks: Clicks | None, follower: str, cache: Path | None) -> Truth:
    path, archive, info = scene / "clip_info.json", scene / "mask.npz", _info(scene)
    pictures = sorted(scene.glob("*.jpg"))
    if not pictures:
        raise UserError(f"{scene}: has no pictures (.jpg); add them, or unpack PisaBench again", "missing")
    height, width = _picture(pictures[0]).shape[:2]
    real = "points" in info
    target = _dropped(path, info["points"], (height, width)) if real else -1
    first, context = partial(_picture, pictures[0]), CONTEXT if real else ""
    row = ClipRow(scene.name, info["prompt"], fps, len(pictures), (height, width))
    if archive.exists():
        key = files.sha256_json([files.sha256(archive), target])
        masks = partial(_stored, archive, target, len(info["points"]) if real else 1)
        return Truth(scene.name, row, first, masks, key, context)
    if not real:
        raise UserError(f"{archive}: does not exist; make it, or unpack PisaBench again", "missing")
    if clicks is None or cache is None:
        raise UserError(
            f"{scene}: SAM 2 must make its masks from clicks; name one, as in --tracker facebook/sam2.1-hiera-large",
            "required",
            "--tracker",
        )
    # the pictures' names and sizes are hashed instead of their bytes, about 40 GB in total
    sizes = [[picture.name, picture.stat().st_size] for picture in pictures]
    key = files.sha256_json([info["points"][target], sizes, files.sha256(pictures[0]), follower])
    kept = cache / f"{key[:32]}.npz"
    masks = partial(_clicked, pictures, info["points"][target], clicks, kept)
    return Truth(scene.name, row, first, masks, key, context)


def _dropped(path: Path, points: Any, size: tuple[int, int]) -> int:
    """The object with the highest positive click; its clicks are checked."""
    if not isinstance(points, list) or not points:
        raise UserError(
            f"{path}: points: should be a list of objects; correct it, or unpack PisaBench again", "format", "points"
        )
    for number, entry in enumerate(points):
        clicks = [entry.get(sign, []) for sign in ("positive", "negative")] if isinstance(entry, dict) else [None]
        pairs = [pair for points_of in clicks for pair in (points_of if isinstance(points_of, list) else [None])]
        if not clicks[0] or not all(_inside(pair, size) for pair in pairs):
            raise UserError(
                f"{path}: points[{number}]: should have clicks [x, y] inside the picture; "
                "correct it, or unpack PisaBench again",
                "format",
                "points",
            )
    return min(range(len(points)), key=lambda i: min(y for _, y in points[i]["positive"]))


def _inside(pair: Any, size: tuple[int, int]) -> bool:
    numbers = isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, int | float) for v in pair)
    return bool(numbers) and 0 <= pair[0] < size[1] and 0 <= pair[1] < size[0]


def _stored(archive: Path, target: int, objects: int, n: int) -> np.ndarray:
    masks = read_annotations(archive, ["mask"])["mask"]
    masks = masks[:, None] if masks.ndim == 3 else masks
    if masks.ndim != 4 or masks.shape[1] < objects:
        shape = f"(frames, {objects} or more objects, H, W)"
        raise UserError(
            f"{archive}: mask is {masks.shape}, not {shape}; correct it, or unpack PisaBench again", "format"
        )
    return masks[:n, target] > 0


def _clicked(pictures: list[Path], clicked: dict[str, Any], clicks: Clicks, kept: Path, n: int) -> np.ndarray:
    """The first n masks, from the cache file `kept`, or from SAM 2 if the file has fewer."""
    n = min(n, len(pictures))
    if kept.exists():
        arrays = read_annotations(kept, ["shape", "bits"])
        count, height, width = arrays["shape"]
        if count >= n:
            return np.unpackbits(arrays["bits"], count=count * height * width).reshape(count, height, width)[:n] > 0
    positive, negative = clicked["positive"], clicked.get("negative", [])
    labels = np.array([1] * len(positive) + [0] * len(negative))
    shown = (_picture(path) for path in pictures[:n])
    masks = np.stack(list(clicks(shown, len(pictures), np.array(positive + negative, dtype=float), labels)))
    with files.replacing(kept) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, shape=masks.shape, bits=np.packbits(masks))
    return masks


def _picture(path: Path) -> np.ndarray:
    return np.asarray(codec.picture(path))
