"""Clips whose truth is known, from PisaBench as it was published or from a dataset folder of ours. A helper of pisa.py.

    <...>/0000/clip_info.json, 00000.jpg, ...                  PisaBench real: 361 clips, 120 fps, clicks on frame 0
    <...>/00/clip_info.json, mask.npz, rgba_00000.jpg, ...     PisaBench simulated (seen and unseen): 16 fps
    <...>/<split>/metadata.jsonl                               ours (data/dataset.py)

clip_info.json is {"prompt": "A black eraser falls.", "points": [{"positive": [[x, y], ...], "negative": [...]}, ...]},
an entry of `points` for each object; simulated clips have no `points`. mask.npz holds `mask` (frames, objects, H, W).
Only the object that drops is scored: the last one in simulated clips, the one with the highest positive click in real
clips.

The real set has no masks. SAM 2 makes them from the clicks, at the pictures' own size and rate, for the frames that are
needed; they are cached. A mask.npz beside real pictures (the authors' own script writes it) is used instead.

Shape letters: F frames, H W pixels, P clicks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips, read_annotations
from posttrain.data.schema import ClipRow

REAL_FPS, SIM_FPS = 120.0, 16.0  # from the paper; the files do not have them
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
        row: caption, fps, size, and if known drop_height, gravity, camera and distance.
        picture: returns its first picture, uint8 (H, W, 3).
        masks: takes n, returns the first n masks of the scored object (fewer if the clip ends), bool (F, H, W).
        key: changes with everything that the masks depend on.
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
    folder: Path | str, clicks: Clicks | None = None, follower: str = "", cache: Path | None = None
) -> dict[str, list[Truth]]:
    """The clips of a folder by split; a split's name is the path of its folder relative to `folder`.

    Args:
        clicks: SAM 2, for the real set.
        follower: changes with everything that its masks depend on.
        cache: the folder for its masks.

    Raises:
        UserError: there is no clip, a file of one is wrong, or clicks need SAM 2 and there is none.
    """
    folder = Path(folder)
    scenes = sorted(path.parent for path in folder.rglob("clip_info.json") if not _hidden(path.relative_to(folder)))
    if scenes:
        truths: dict[str, list[Truth]] = {}
        for scene in scenes:
            split = scene.parent.relative_to(folder).as_posix() if scene.parent != folder else folder.name
            truths.setdefault(split, []).append(_published(scene, clicks, follower, cache))
        return truths
    splits = sorted(path.parent.name for path in folder.glob("*/metadata.jsonl"))
    if not splits:
        raise UserError(f"{folder}: holds no clips to compare with; name PisaBench's real or sim, or a dataset folder")
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


def _published(scene: Path, clicks: Clicks | None, follower: str, cache: Path | None) -> Truth:
    path, archive = scene / "clip_info.json", scene / "mask.npz"
    info = files.read_json(path)
    pictures = sorted(scene.glob("*.jpg"))
    if not isinstance(info, dict) or not isinstance(info.get("prompt"), str):
        raise UserError(f"{path}: prompt: is missing; unpack PisaBench again")
    if not pictures:
        raise UserError(f"{scene}: has no pictures (.jpg); unpack PisaBench again")
    with Image.open(pictures[0]) as picture:
        width, height = picture.size
    real = "points" in info
    target = _dropped(path, info["points"], (height, width)) if real else -1
    first, context = partial(_picture, pictures[0]), CONTEXT if real else ""
    fps, size = REAL_FPS if real else SIM_FPS, (height, width)
    row = ClipRow(scene.name, info["prompt"], fps, len(pictures), size)
    if archive.exists():
        key = files.sha256_json([files.sha256(archive), target])
        masks = partial(_stored, archive, target, len(info["points"]) if real else 1)
        return Truth(scene.name, row, first, masks, key, context)
    if not real:
        raise UserError(f"{archive}: does not exist; unpack PisaBench again")
    if clicks is None or cache is None:
        raise UserError(
            f"{scene}: its masks come from clicks through SAM 2; name one, as in --tracker facebook/sam2.1-hiera-large"
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
        raise UserError(f"{path}: points: should be a list of objects; unpack PisaBench again")
    for number, entry in enumerate(points):
        clicks = [entry.get(sign, []) for sign in ("positive", "negative")] if isinstance(entry, dict) else [None]
        pairs = [pair for points_of in clicks for pair in (points_of if isinstance(points_of, list) else [None])]
        if not clicks[0] or not all(_inside(pair, size) for pair in pairs):
            raise UserError(
                f"{path}: points[{number}]: should have clicks [x, y] inside the picture; unpack PisaBench again"
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
        raise UserError(f"{archive}: mask is {masks.shape}, not {shape}; make it again")
    return masks[:n, target] > 0


def _clicked(pictures: list[Path], clicked: dict[str, Any], clicks: Clicks, kept: Path, n: int) -> np.ndarray:
    """The first n masks, from the file `kept`, or from SAM 2 if that has fewer."""
    n = min(n, len(pictures))
    if kept.exists():
        with np.load(kept, allow_pickle=False) as arrays:
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
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path}: is torn or no picture; unpack PisaBench again") from error
