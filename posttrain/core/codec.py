"""Video files: what is in them, their pictures, and pictures written as one. Every file of video is opened here.

Shape letters: F frames, H W pixels, C channels. Pictures are uint8 RGB, upright, with square pixels.
"""

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np

from posttrain.core import files
from posttrain.core.errors import UserError

ENCODERS = ("libx264", "libx264rgb")  # what files are written with: to be looked at, and without loss


@dataclass(frozen=True)
class Facts:
    """What is in a video file: when each frame is shown, and the upright picture's height and width."""

    sha256: str
    times: np.ndarray  # seconds (F,), ascending, from 0
    marks: tuple[int, ...] | None  # timestamps in the file's own unit, by which frames are found; None: it has none
    size: tuple[int, int]
    turned: int  # degrees counterclockwise that make the picture upright


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
        raise UserError(f"{path}: cannot be read: torn or no video", "damaged") from error
    if len(found) < promised:
        raise UserError(f"{path}: cannot be read: torn, {len(found)} of {promised} frames are there", "damaged")
    stamps = sorted(pts for pts, discard in found if pts is not None and not discard)
    marks = tuple(stamps) if len(stamps) == sum(not discard for _, discard in found) and base else None
    if marks is not None and base is not None:
        times = (np.array(marks) - marks[0]) * float(base)
    elif rate:
        times = np.arange(len(found)) / float(rate)
    else:
        raise UserError(f"{path}: cannot be read: says nothing of its frames' times", "format")
    if len(times) > 1 and not (np.diff(times) > 0).all():
        raise UserError(f"{path}: cannot be read: two frames are shown at the same time", "format")
    turned = round(picture.rotation / 90) * 90 % 360
    upright = (width, height) if turned % 180 else (height, width)
    return Facts(files.sha256(path), times, marks, upright, turned)


def pictures(path: Path, frames: Collection[int], marked: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Some of a video's frames, one by one in the order of the file: (frame, picture (H, W, 3)).

    Args:
        frames: their timestamps in the file's own unit, or, unless `marked`, their places in it.

    Raises:
        UserError: the file is torn, or is not the one that was looked at.
    """
    missing = set(frames)
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                mark = frame.pts if marked else number
                if mark in missing:
                    missing.remove(mark)
                    picture = frame.to_ndarray(format="rgb24", width=_width(frame, stream), height=frame.height)
                    yield mark, np.rot90(picture, round(frame.rotation / 90))
                if not missing:
                    break
    except av.FFmpegError as error:
        raise UserError(f"{path}: is torn ({error}); mend or remove it", "damaged") from error
    if missing:
        raise UserError(f"{path}: {len(missing)} of its frames cannot be decoded; mend or remove it", "damaged")


def read_video(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """All frames of a file of our own, (F, H, W, 3).

    Args:
        content: the file's bytes, where they were read before.

    Raises:
        UserError: the file is missing, torn, or not a video.
    """
    try:
        with av.open(io.BytesIO(files.read_bytes(path) if content is None else content), "r") as container:
            promised = container.streams.video[0].frames
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: is torn or no video; delete it and make it again", "damaged") from error
    if not frames or len(frames) < promised:
        many = f"{len(frames)} of {promised} frames"
        raise UserError(f"{path}: is torn ({many}); delete it and make it again", "damaged")
    return np.stack(frames)


def lossless(frames_FHWC: np.ndarray, fps: float) -> bytes:
    """An H.264 RGB mp4 without loss (High 4:4:4 Predictive, qp 0); same frames, same bytes."""
    buffer, options = io.BytesIO(), {"crf": "0", "preset": "veryfast"}
    _encode(buffer, frames_FHWC, fps, "libx264rgb", "rgb24", options, {"fflags": "+bitexact"}, threads=1)
    return buffer.getvalue()


def write_near_lossless(path: Path, frames_FHWC: np.ndarray, fps: float) -> None:
    """An H.264 mp4 that every browser plays, in yuv420p. H and W must be even."""
    options = {"crf": "10", "preset": "medium"}
    _encode(str(path), frames_FHWC, fps, "libx264", "yuv420p", options, {"movflags": "+faststart"})


def playable(frames_FHWC: np.ndarray, fps: float, crf: int) -> bytes:
    """An H.264 mp4 that every browser plays, small enough for a page: the larger `crf`, the smaller. Sides are cut to
    even ones."""
    _, height, width, _ = frames_FHWC.shape
    even_FHWC, buffer = frames_FHWC[:, : height // 2 * 2, : width // 2 * 2], io.BytesIO()
    _encode(buffer, even_FHWC, fps, "libx264", "yuv420p", {"crf": str(crf), "preset": "slow", "g": "16"})
    return buffer.getvalue()


def _encode(
    file: Any,
    frames_FHWC: np.ndarray,
    fps: float,
    codec: str,
    pixels: str,
    options: dict[str, str],
    muxer: dict[str, str] | None = None,
    threads: int = 0,
) -> None:
    """Write frames to a path or buffer. `fps` may be broken, as 12.5 or 23.976; `threads` 0: as x264 likes."""
    # a path tells its format itself
    with av.open(file, "w", format=None if isinstance(file, str) else "mp4", options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = pixels
        if threads:
            stream.thread_count = threads
        for frame in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def gif(path: Path | str) -> tuple[bytes, tuple[int, int]]:
    """A video file as an endless GIF, and its height and width."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, frames = float(stream.average_rate or 10), [frame.to_image() for frame in container.decode(stream)]
    buffer = io.BytesIO()
    # GIF counts time in hundredths of a second
    duration = round(100 / rate) * 10
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return buffer.getvalue(), (frames[0].height, frames[0].width)


def _stream(container: Any, path: Path) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise UserError(f"{path}: cannot be read: no pictures in it", "format")
    return stream


def _width(frame: Any, stream: Any) -> int:
    """The picture's width on the screen, where pixels may be wider than high."""
    return max(1, round(frame.width * float(stream.sample_aspect_ratio or 1)))
