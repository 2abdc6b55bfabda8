"""PisaBench's layouts with falling squares, and a tracker that takes clicks."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from helpers.falling import FPS, SIZE, RedTracker, film, rows_of
from PIL import Image

from posttrain.evaluation.benchmarks.pisabench import open_benchmark

COLUMN = 12


class ClickTracker(RedTracker):
    """Finds the red pixels, also of what is clicked on; notes the clicks and how many pictures it was shown."""

    def __init__(self, give_up_after: int | None = None) -> None:
        super().__init__(give_up_after)
        self.clicked: list[tuple[int, int, Any, Any]] = []

    def clicks(
        self, pictures: Iterable[np.ndarray], frames: int, points_P2: np.ndarray, labels_P: np.ndarray
    ) -> Iterator[np.ndarray]:
        masks = [picture[..., 0].astype(int) - picture[..., 1] > 60 for picture in pictures]
        self.clicked.append((len(masks), frames, points_P2.tolist(), labels_P.tolist()))
        yield from masks


def write_video(path: Path, pictures: np.ndarray, fps: float = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=round(fps), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "rgb24"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def square(rows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    return film(list(rows), COLUMN, 220)


def write_pictures(scene: Path, pictures: np.ndarray, prefix: str = "") -> None:
    scene.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(scene / f"{prefix}{i:05d}.jpg", quality=95, subsampling=0)


def write_real(folder: Path, rows: list[list[int]]) -> Path:
    """PisaBench real: a square falls above one that lies still, which is clicked on first."""
    for i, path in enumerate(rows):
        write_pictures(folder / f"{i:04d}", square(path)[0])
        points = [
            {"positive": [[3, SIZE - 2]], "negative": []},
            {"positive": [[COLUMN + 2, path[0] + 4], [COLUMN + 3, path[0] + 2]], "negative": [[1, 1]]},
        ]
        info = {"points": points, "prompt": f"A red square {i} falls.", "fps": 120}
        (folder / f"{i:04d}" / "clip_info.json").write_text(json.dumps(info))
    return folder


def write_sim(folder: Path, clips: int = 2, frames: int = 9) -> Path:
    """PisaBench simulated: masks of two objects, of which the last one drops."""
    for split in ("seen", "unseen"):
        for i in range(clips):
            scene = folder / split / f"{i:02d}"
            pictures, instances = square(rows_of(2 + i, frames))
            write_pictures(scene, pictures, "rgba_")
            other = np.zeros_like(instances)
            other[:, -3:, :3] = 1
            np.savez_compressed(scene / "mask.npz", mask=np.stack([other, instances], 1))
            (scene / "clip_info.json").write_text(json.dumps({"prompt": f"Square {i} falls."}))
    return folder


LINE = list(range(20))  # one pixel for each frame at 120 per second


def open_real(folder: Path, tracker: Any, cache: Path) -> Any:
    return open_benchmark(folder, tracker.clicks, "tracker", cache)
