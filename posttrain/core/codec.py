"""Read and write video files, and read picture files. No other module opens such files.

Files are not trusted: FFmpeg and Pillow may only try the formats listed here (other formats can open network ports or
other files, or run programs), and files with very large pictures are refused before they are decoded.

Shape letters: F frames, H W pixels, C channels. Pictures are uint8 RGB, upright, with square pixels.
"""

import io
import math
import struct
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np
from PIL import Image, ImageOps

from posttrain.core import files
from posttrain.core.errors import UserError

# FFmpeg's names of the formats whose suffixes are in data/listing.py: MP4 and MOV, MKV and WebM, AVI, WMV, FLV, ...
CONTAINERS = ("mov", "matroska", "avi", "asf", "flv", "mpeg", "mpegvideo", "mpegts", "ogg", "gif", "mxf", "dv")
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow's names
MOST_PIXELS = 8192 * 4320  # of a video's picture: 8K
MOST_IN_MEMORY = 2**29  # pixels of a video that is held whole, 1.6 GB: 259 pictures of 1080 x 1920
ENCODERS = ("libx264", "libx264rgb")  # for files to look at, and for files without loss


ATTACHED = 0x400  # FFmpeg's mark of a cover picture
HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of transfer functions


class Turn(NamedTuple):
    """Steps that make a picture upright: transpose, then flip left-right, then flip top-bottom.

    Read from the file's display matrix, which has one of eight values for rotated and mirrored videos.
    """

    transposed: bool = False
    left_right: bool = False
    top_bottom: bool = False

    def __call__(self, picture_HWC: np.ndarray) -> np.ndarray:
        picture_HWC = picture_HWC.swapaxes(0, 1) if self.transposed else picture_HWC
        return picture_HWC[:: -1 if self.top_bottom else 1, :: -1 if self.left_right else 1]

    def __str__(self) -> str:
        if self.transposed and self.left_right == self.top_bottom:
            return "mirrored: and turned"
        if self.transposed:
            return f"turned: by {90 if self.top_bottom else 270} degrees"
        if self.left_right and self.top_bottom:
            return "turned: by 180 degrees"
        return "mirrored: left to right" if self.left_right else "mirrored: upside down"


@dataclass(frozen=True)
class Facts:
    """Facts about a video file: the time of each frame, and the height and width of the upright picture."""

    sha256: str
    times: np.ndarray  # seconds (F,), ascending, from 0
    marks: tuple[int, ...] | None  # timestamps in the file's own unit, which identify frames; None: it has none
    size: tuple[int, int]
    turn: Turn
    notes: tuple[str, ...] = ()  # differences from what a player shows, each "what: detail"


def inspect(path: Path) -> Facts:
    """The facts of the video file `path`. For most files only the first frame is decoded.

    Raises:
        UserError: it is not a video of a known format, it is damaged or too large, or its picture is rotated by an
            angle that is not a multiple of 90 degrees.
    """
    return _inspect(path, *_state(path))


@cache  # a run needs the facts twice: when it checks the recipe, and when it trains
def _inspect(path: Path, size: int, changed: int) -> Facts:
    try:
        with _open(path) as container:
            stream = _stream(container, path)
            packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
            promised = stream.frames if "mp4" in container.format.name else 0  # other containers count wrongly
            time_base, rate = stream.time_base, stream.average_rate
        stamps = [pts for pts, discard in packets if not discard]
        with _open(path) as container:
            stream = _stream(container, path)
            frames = container.decode(stream)
            picture = next(frames)
            (height, width), turn = (picture.height, _width(picture, stream)), _turn(picture, path)
            notes = _notes(picture, stream, container)
            if stream.codec_context.has_b_frames and None not in stamps and stamps == sorted(stamps):
                # B-frames are stored in another order than shown, so ascending stamps may be packet numbers (AVI)
                shown = [picture.pts, *(frame.pts for frame in frames)]
                if None in shown or shown != sorted(shown):
                    stamps = [None]
    except MemoryError as error:
        raise _memory(path) from error
    except (av.FFmpegError, StopIteration) as error:
        raise UserError(f"{path}: cannot be read: damaged or not a video", "damaged") from error
    if len(packets) < promised:
        raise UserError(f"{path}: cannot be read: damaged, it has {len(packets)} of {promised} frames", "damaged")
    # times are rounded to the file's unit; if two frames have the same time, the first is used
    marks = tuple(sorted(set(stamps))) if stamps and None not in stamps and time_base else None
    if marks is not None and time_base is not None:
        times = (np.array(marks) - marks[0]) * float(time_base)
    elif rate:
        times = np.arange(len(packets)) / float(rate)
    else:
        raise UserError(f"{path}: cannot be read: its frames have no time stamps", "format")
    upright = (width, height) if turn.transposed else (height, width)
    return Facts(files.sha256(path), times, marks, upright, turn, notes)


def _notes(picture: Any, stream: Any, container: Any) -> tuple[str, ...]:
    notes = []
    if picture.interlaced_frame:
        notes.append("interlaced: what moves may have combs; deinterlace it, for example by ffmpeg's bwdif")
    if transfer := HDR.get(picture.color_trc):
        notes.append(f"HDR: the colours of {transfer} are used as stored, too flat; map them to BT.709")
    alpha = any(part.is_alpha for part in picture.format.components)  # every GIF's has; most are opaque
    if stream.metadata.get("alpha_mode") == "1" or (alpha and picture.to_ndarray(format="rgba")[..., 3].min() < 255):
        notes.append("transparent: its alpha is not used, so colours that it hides are shown")
    if "STEREO3D" in {data.type.name for data in picture.side_data}:
        notes.append("stereo: the views of both eyes are shown as they are stored")
    others = [other for other in container.streams.video if not int(other.disposition) & ATTACHED]
    if len(others) > 1:
        notes.append(f"several streams: stream {stream.index} of its {len(others)} videos is used")
    return tuple(notes)


def _state(path: Path) -> tuple[int, int]:
    """A file's size and modification time, which change when it is written again."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def check(path: Path, frames: tuple[int, ...], marked: bool) -> None:
    """Decode the frames that `pictures` would decode, and refuse the video if the decoder reports an error.

    A flipped bit is detected mostly in H.264, MPEG-2 and MPEG-4, always in FFV1, and seldom in VP9 and HEVC.

    Raises:
        UserError: as `pictures`.
    """
    _check(path, *_state(path), frames, marked)


@cache
def _check(path: Path, size: int, changed: int, frames: tuple[int, ...], marked: bool) -> None:
    for _ in _decode(path, frames, marked, threads="NONE"):
        pass


@contextmanager
def complaints() -> Iterator[None]:
    """Context in which `check` also uses FFmpeg's own log messages, except those of its decoding threads."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False):  # messages while a file is opened or closed are dropped
            yield
    finally:
        av.logging.set_level(None)


def pictures(path: Path, frames: Collection[int], marked: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame, picture (H, W, 3)) for the chosen frames of a video, in the order of the file.

    Args:
        frames: timestamps in the file's own unit if `marked`, else frame numbers.

    Raises:
        UserError: the file is damaged before the last chosen frame, or is not the one that was inspected.
    """
    turn: Turn | None = None
    for mark, frame, stream in _decode(path, frames, marked):
        # for the first frame only: reading `side_data` makes a reference cycle, which keeps the frame's memory for long
        turn = _turn(frame, path) if turn is None else turn
        try:
            picture = frame.to_ndarray(format="rgb24", width=_width(frame, stream), height=frame.height)
        except MemoryError as error:
            raise _memory(path) from error
        yield mark, turn(picture)


def _decode(path: Path, frames: Collection[int], marked: bool, threads: str = "AUTO") -> Iterator[tuple[int, Any, Any]]:
    """As `pictures`, but yields (frame, PyAV's frame, its stream)."""
    missing, number, last, size = set(frames), 0, None, None
    try:
        with _open(path) as container:
            stream = _stream(container, path, {"err_detect": "crccheck+bitstream+buffer+explode"})
            stream.thread_type = threads
            decoded = container.decode(stream)
            while missing:
                with av.logging.Capture() as messages:
                    frame = next(decoded, None)
                if frame is None:
                    break
                if messages or frame.is_corrupt:
                    reason = messages[0][2].strip() if messages else f"frame {number} is corrupt"
                    raise UserError(f"{path}: damaged: the decoder says: {reason}; fix or remove it", "damaged")
                if marked and None not in (last, frame.pts) and frame.pts < last:
                    raise UserError(f"{path}: damaged: its time stamps go back; fix or remove it", "damaged")
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    change = f"its pictures change from {size[0]} x {size[1]} pixels to {frame.height} x {frame.width}"
                    raise UserError(f"{path}: damaged: {change}; fix or remove it", "damaged")
                mark, last = frame.pts if marked else number, frame.pts
                if mark in missing:
                    missing.remove(mark)
                    yield mark, frame, stream
                number += 1
    except MemoryError as error:
        raise _memory(path) from error
    except av.FFmpegError as error:
        raise UserError(f"{path}: damaged: {error.strerror}; fix or remove it", "damaged") from error
    if missing:
        complaint = f"{len(missing)} of its frames cannot be decoded"
        raise UserError(f"{path}: damaged: {complaint}; fix or remove it", "damaged")


def first_picture(path: Path) -> np.ndarray:
    """A video's first frame, (H, W, 3). Raises UserError if the file is not a video."""
    return next(pictures(path, (0,), False))[1]


def picture(path: Path | str) -> Image.Image:
    """The picture in a file (the first one of several), upright and in RGB.

    Raises:
        UserError: missing; format: it is not a picture, not in one of the formats PICTURES, too large, or transparent;
            memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURES) as opened:
                upright = ImageOps.exif_transpose(opened)
                if upright.mode in ("I", "F"):
                    raise UserError(f"{path}: has pixels of 32 bits; save it with 8 or 16", "format")
                if upright.mode.startswith("I;16"):  # Pillow would make all above 255 white
                    upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
                if upright.has_transparency_data and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
                    raise UserError(f"{path}: is transparent in parts; flatten it onto a background", "format")
                return upright.convert("RGB")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; name a picture", "missing") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        most = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
        raise UserError(f"{path}: is larger than {most}; scale the picture down", "format") from error
    except MemoryError as error:
        raise _memory(path) from error
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise UserError(f"{path}: cannot be read as a picture; give a PNG, JPEG or WebP file", "format") from error


def read_video(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """All frames of a file that this module wrote, (F, H, W, 3).

    Args:
        content: the file's bytes, if they were read already.

    Raises:
        UserError: the file is missing, damaged, not a video, or larger than MOST_IN_MEMORY.
    """
    frames: list[np.ndarray] = []
    try:
        with _open(path, io.BytesIO(files.read_bytes(path) if content is None else content)) as container:
            stream = _stream(container, path)
            for frame in container.decode(stream):
                if (len(frames) + 1) * frame.height * frame.width > MOST_IN_MEMORY:
                    most = f"{MOST_IN_MEMORY // (frame.height * frame.width)} pictures of its size"
                    raise UserError(f"{path}: is longer than {most}; cut it, or scale it down", "format")
                frames.append(frame.to_ndarray(format="rgb24"))
            promised = stream.frames
    except MemoryError as error:
        raise _memory(path) from error
    except av.FFmpegError as error:
        raise UserError(f"{path}: is damaged or not a video; delete it and make it again", "damaged") from error
    if not frames or len(frames) < promised or any(frame.shape != frames[0].shape for frame in frames):
        complaint = f"{len(frames)} of {promised} frames, or of several sizes"
        raise UserError(f"{path}: is damaged ({complaint}); delete it and make it again", "damaged")
    return np.stack(frames)


def lossless(frames_FHWC: np.ndarray, fps: float) -> bytes:
    """A lossless H.264 RGB mp4 (High 4:4:4 Predictive, qp 0); the same frames give the same bytes."""
    buffer, options = io.BytesIO(), {"crf": "0", "preset": "veryfast"}
    _encode(buffer, frames_FHWC, fps, "libx264rgb", "rgb24", options, {"fflags": "+bitexact"}, threads=1)
    return buffer.getvalue()


def write_near_lossless(path: Path, frames_FHWC: np.ndarray, fps: float) -> None:
    """An H.264 mp4 that every browser plays, in yuv420p. H and W must be even."""
    options = {"crf": "10", "preset": "medium"}
    _encode(str(path), frames_FHWC, fps, "libx264", "yuv420p", options, {"movflags": "+faststart"})


def playable(frames_FHWC: np.ndarray, fps: float, crf: int) -> bytes:
    """An H.264 mp4 that every browser plays; a larger `crf` makes it smaller. Odd sides lose one pixel."""
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
    """Write frames to a path or buffer. `fps` need not be whole, as 12.5 or 23.976; `threads` 0: x264 chooses."""
    # a path's suffix gives the format
    with av.open(file, "w", format=None if isinstance(file, str) else "mp4", options=muxer or {}) as container:
        # the macroblock tree of x264 reads uninitialised memory: with it the same frames give different bytes
        options = {**options, "x264-params": "mbtree=0"}
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = pixels
        if threads:
            stream.thread_count = threads
        for frame in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def gif(path: Path | str) -> tuple[bytes, tuple[int, int]]:
    """(endless GIF, (height, width)) of a video file that this module wrote. Raises as `read_video`."""
    try:
        with _open(path) as container:
            rate = float(_stream(container, path).average_rate or 10)
    except av.FFmpegError as error:
        raise UserError(f"{path}: is damaged or not a video; delete it and make it again", "damaged") from error
    frames = [Image.fromarray(frame) for frame in read_video(path)]
    buffer = io.BytesIO()
    # GIF counts time in hundredths of a second
    duration = round(100 / rate) * 10
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return buffer.getvalue(), (frames[0].height, frames[0].width)


def _open(path: Path | str, content: io.BytesIO | None = None) -> Any:
    """Open a video file, or its `content`, for reading. Metadata that are not Unicode cause no error."""
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    limits = {"max_pixels": str(MOST_PIXELS)}  # for decoders that run while the file is opened
    try:
        return av.open(content or f"file:{path}", "r", metadata_errors="replace", options=allowed | limits)
    except av.error.ArgumentError as error:
        remedy = "convert it to MP4, MOV, MKV, WebM or AVI"
        raise UserError(f"{path}: cannot be read: it is not in a supported video format; {remedy}", "format") from error


def _memory(path: Path | str) -> UserError:
    message = "there is too little memory to decode it (the file may be intact); free memory, or scale its frames down"
    return UserError(f"{path}: {message}", "memory")


def _turn(frame: Any, path: Path) -> Turn:
    """The steps that make a frame upright, from its display matrix: x' = a x + c y, y' = b x + d y, x right, y down."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    a, b, _, c, d = struct.unpack("=9i", bytes(data))[:5]
    size = max(abs(a), abs(b), abs(c), abs(d))
    a, b, c, d = (value / size if size else 0.0 for value in (a, b, c, d))
    if min(abs(a), abs(d)) > 0.999 and max(abs(b), abs(c)) < 0.02:
        return Turn(False, a < 0, d < 0)
    if min(abs(b), abs(c)) > 0.999 and max(abs(a), abs(d)) < 0.02:
        return Turn(True, c < 0, b < 0)
    angle = math.degrees(math.atan2(-b, a))
    raise UserError(f"{path}: is not upright: its picture is rotated by {angle:.0f} degrees or stretched", "format")


def _stream(container: Any, path: Path | str, options: dict[str, str] | None = None) -> Any:
    """The video stream of an open file, with decoder options set. Raises UserError if its pictures are too large."""
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise UserError(f"{path}: cannot be read: it has no frames", "format")
    height, width = stream.codec_context.height, stream.codec_context.width
    if not height * width:
        most = f"{MOST_PIXELS / 1e6:.0f} million pixels"
        raise UserError(f"{path}: cannot be read: it is damaged, or its pictures have more than {most}", "damaged")
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{path}: cannot be read: its pictures have {height} x {width} pixels, more than {MOST_PIXELS / 1e6:.0f} "
            "million; scale it down",
            "format",
        )
    # pictures may grow later in the file; then the decoder itself refuses
    stream.codec_context.options = {**(options or {}), "max_pixels": str(MOST_PIXELS)}
    return stream


def _width(frame: Any, stream: Any) -> int:
    """The picture's width after scaling the file's pixels, which may be oblong, to squares."""
    return max(1, round(frame.width * float(stream.sample_aspect_ratio or 1)))
