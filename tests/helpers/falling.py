"""A world whose true values are all known, for the tests of evaluation: a square falls in front of a grey wall."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

FPS, SIZE, SIDE = 16, 32, 6
GRAVITY = 64.0  # pixels per second squared


def rows_of(start: int, frames: int) -> np.ndarray:
    """The top row of the square in each frame; the square falls from rest and stays on the floor."""
    t = np.arange(frames) / FPS
    return np.minimum(np.round(start + GRAVITY * t**2 / 2), SIZE - SIDE).astype(int)


def film(rows: Sequence[int], column: int, red: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (F, H, W, 3) and instances uint8 (F, H, W) of a square whose top rows are `rows`."""
    video = np.full((len(rows), SIZE, SIZE, 3), 90, np.uint8)
    instances = np.zeros((len(rows), SIZE, SIZE), np.uint8)
    for k, row in enumerate(rows):
        video[k, row : row + SIDE, column : column + SIDE] = (red, 20, 20)
        instances[k, row : row + SIDE, column : column + SIDE] = 1
    return video, instances


def write_dataset(
    folder: Path,
    splits: Sequence[str] = ("test_seen", "test_unseen"),
    clips: int = 3,
    frames: int = 17,
    scorecard: bool = True,
) -> None:
    """A dataset folder of falling squares.

    `scorecard`: whether rows have a distance, without which no scorecard is computed. The scorecard takes half of an
    evaluation's time here. Clips of up to 6 frames have no scorecard, because its fit has more parameters.
    """
    for number, split in enumerate(splits):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(clips):
            start = 2 + 2 * (i % 10) + number
            video, instances = film(rows_of(start, frames), 4 + 5 * (i % 5), 200 + 10 * (i % 5))
            contact = (2 * (SIZE - SIDE - start) / GRAVITY) ** 0.5
            lines.append(
                {
                    **write_clip(folder / split / f"{i:05d}.mp4", video, instances),
                    "caption": f"square {number}{i} falls.",
                    "gravity": [0, 0, -9.81],
                    "drop_height": 9.81 * contact**2 / 2,
                    "contact_time": contact,
                    "camera": {
                        "position": [0, 0, 1],
                        "intrinsics": [[5.0 * GRAVITY / 9.81, 0, SIZE / 2], [0, 0, 0], [0, 0, 1]],
                    },
                    **({"distance": 5.0} if scorecard and frames > 6 else {}),
                }
            )
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


AMBIGUOUS = {  # the additional fields of a row of sim/worlds/ambiguous.py
    "group": 5,
    "beta": 0.2,
    "depths": [2.0, 18.0],
    "camera": {"position": [0.0, 0.0, 0.5], "intrinsics": [[70.0, 0, 32], [0, 70.0, 32], [0, 0, 1]]},
}


def tell(data: Path, folder: Path, rows: Callable[[int], dict[str, Any]]) -> Path:
    """Copy a dataset to `folder`, and add the fields `rows(i)` to row i of test_unseen."""
    shutil.copytree(data, folder)
    path = folder / "test_unseen" / "metadata.jsonl"
    told = [json.loads(line) | rows(i) for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder


def write_clip(path: Path, video: np.ndarray, instances: np.ndarray) -> dict[str, Any]:
    """Write a clip's lossless video and its annotations; returns the fields of its row."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "rgb24"
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    np.savez(path.with_suffix(".npz"), instances=instances)
    return {
        "file_name": path.name,
        "annotations": path.with_suffix(".npz").name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "fps": FPS,
        "frames": len(video),
        "size": [SIZE, SIZE],
        "target": 0,
    }


def write_groups(folder: Path, split: str = "train", groups: int = 2, losers: int = 3, frames: int = 5) -> None:
    """A dataset folder of groups, each a true fall and faster falls from the same height, of known severity."""
    (folder / split).mkdir(parents=True)
    lines = []
    for group in range(groups):
        for i in range(1 + losers):
            rows = rows_of(2, frames) + np.arange(frames) * i
            video, instances = film(np.minimum(rows, SIZE - SIDE), 4 + 12 * group, 200)
            severity = i / (losers + 1)
            violation = {"kind": "strong_gravity", "value": 1.0 + i, "meaning": "of g", "severity": severity}
            lines.append(
                {
                    **write_clip(folder / split / f"{group:05d}-{i}.mp4", video, instances),
                    "caption": f"square {group} falls.",
                    "group": group,
                    "violation": violation if i else None,
                }
            )
    (folder / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class RedTracker:
    """A tracker that finds the red pixels, which is exact here. `calls` counts the clips that it has seen.

    After `give_up_after` clips it raises KeyboardInterrupt.
    """

    def __init__(self, give_up_after: int | None = None) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.ones_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.calls, self.give_up_after = 0, give_up_after

    def __call__(self, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
        self.calls += len(video_BCFHW)
        if self.give_up_after is not None and self.calls > self.give_up_after:
            raise KeyboardInterrupt
        return video_BCFHW[:, 0] - video_BCFHW[:, 1] - 0.5


class Oracle:
    """A rectified-flow model in pixels that knows each caption's video: its velocity leads to it from any noise."""

    device = torch.device("cpu")
    n_cond_frames, times, boundary, text_tokens = 1, (0.0, 1.0), 0.0, 1

    def __init__(self, videos: dict[str, np.ndarray]) -> None:
        self.captions = list(videos)
        self.transformer: nn.Module = nn.Linear(1, 1)
        stack = torch.stack([torch.from_numpy(video) for video in videos.values()])
        self.videos_NCFHW = stack.permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return 3, frames, height, width

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        return video_BCFHW

    def decode(self, z_BCFHW: Tensor) -> Tensor:
        return z_BCFHW

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self.captions.index(caption) for caption in captions]).view(-1, 1, 1)

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        return {}

    def weights(self) -> list[nn.Module]:
        return [self.transformer]

    def release(self) -> None: ...

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        t = t_BF[:, None, :, None, None].float()
        return (z_BCFHW - self.videos_NCFHW[text_BLD[:, 0, 0]]) / t.clamp_min(1e-6)

    def scheduler(self) -> Any:
        return FlowMatchEulerDiscreteScheduler()

    def cache_key(self) -> str:
        return "pixels"
