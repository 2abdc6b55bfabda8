"""Grey videos whose brightness says which frame of the file is seen, and lists of them."""

import csv
import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LEVEL = 4  # frame k of a test video is grey of brightness 4 k
WANTED = {"frames": 5, "fps": 8.0, "size": [16, 16]}


def write(
    path: Path,
    times: Sequence[float],
    size: tuple[int, int] = (32, 32),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    mark: int | None = None,
    turned: int = 0,
    aspect: Fraction | None = None,
    sound: bool = False,
    base: int = 12000,
    swapped: bool = False,
) -> Path:
    """A video whose frame k is shown at times[k] seconds; `mark`: a white top left corner of so many pixels.

    `swapped`: frames lie in the file in another order than they are shown in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, base)
        if codec == "libx264":
            stream.options = {"crf": "1", "bf": "2"}
            if swapped:
                stream.options |= {"bf": "3", "b-adapt": "0", "x264-params": "scenecut=0:weightp=0"}
        if turned:
            stream.set_display_rotation(turned)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if sound:
            audio = container.add_stream("aac", rate=44100)
        for k, time in enumerate(times):
            picture = np.full((*size, 3), LEVEL * k, np.uint8)
            picture[::3] += swapped  # what is flat all over is laid in order
            if mark:
                picture[:mark, :mark] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time * base), Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), format="fltp", layout="stereo")
            silence.sample_rate = 44100
            for part in (silence, None):
                container.mux(audio.encode(part))
    return path


def steady(count: int, fps: float) -> list[float]:
    return [k / fps for k in range(count)]


def shown(pictures: np.ndarray) -> list[int]:
    """Which frame of the file each picture is."""
    return [round(float(picture[4:-4, 4:-4].mean()) / LEVEL) for picture in pictures]


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def mine(folder: Path) -> Path:
    """Videos of all kinds, good and bad."""
    write(folder / "same.mp4", steady(5, 8), (16, 16))
    write(folder / "wide.mp4", steady(21, 30), (16, 34), mark=6)
    write(folder / "short.mp4", steady(3, 8))
    write(folder / "torn.mp4", steady(9, 8))
    os.truncate(folder / "torn.mp4", 700)
    (folder / "text.mp4").write_text("not a video")
    write(folder / "mute.mp4", steady(6, 8))
    (folder / "twin.mp4").write_bytes((folder / "same.mp4").read_bytes())
    names = ["same", "wide", "short", "torn", "text", "gone", "twin", "same"]
    rows = [{"file_name": f"{name}.mp4", "caption": f"{name.replace('twin', 'same')} falls"} for name in names]
    rows[-1]["caption"] = "another caption"
    rows.insert(5, {"file_name": "mute.mp4", "caption": " "})
    table(folder / "metadata.jsonl", rows)
    return folder
