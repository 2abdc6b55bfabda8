"""Sample clips from a first frame and a prompt; write clips, a contact sheet and a GIF."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.core.progress import track
from posttrain.data.listing import SUFFIXES
from posttrain.evaluation.sample import Pixels, encode_texts, sample_clips, write_video
from posttrain.models.base import VideoModel

LINE = 14  # pixels of a line of text


@dataclass(frozen=True)
class Wish:
    """The settings of one sampling request; `size` is (height, width) in pixels."""

    prompt: str
    size: tuple[int, int]
    frames: int
    fps: float
    steps: int
    guidance: float
    guidance_low: float | None = None  # of the expert for low noise; None: as `guidance`
    seeds: Sequence[int] = (0,)
    negative: str = ""


def open_picture(path: Path | str | np.ndarray) -> Image.Image:
    """The picture, upright and in RGB, of a picture file, of a video's first frame, or of an array uint8 (H, W, 3).

    Prints how the picture differs from what a player would show of the video (`codec.Facts.notes`).

    Raises:
        UserError: the file cannot be read as a picture or video, or the array has another type or shape.
    """
    if isinstance(path, np.ndarray):
        if path.dtype != np.uint8 or path.ndim != 3 or path.shape[2] != 3 or not path.size:
            raise UserError(f"image: is {path.dtype} {path.shape}; give uint8 (height, width, 3)", "value", "image")
        return Image.fromarray(path)
    if Path(path).suffix.lower() in SUFFIXES - {".gif"} and Path(path).is_file():
        for note in codec.inspect(Path(path)).notes:
            print(f"{path}: {note}", file=sys.stderr)
        return Image.fromarray(codec.first_picture(Path(path)))
    return codec.picture(path)


def natural_size(picture: Image.Image, size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) in multiples of `side`, of about the picture's aspect ratio, with no more pixels than `size`."""
    shrink = min(1.0, (size[0] * size[1] / (picture.width * picture.height)) ** 0.5)
    height, width = (max(side, int(length * shrink) // side * side) for length in (picture.height, picture.width))
    return height, width


def fit(picture: Image.Image, size: tuple[int, int]) -> tuple[Pixels, str]:
    """The picture, cropped around its centre and scaled, uint8 (H, W, 3), and a text that describes the changes."""
    height, width = size
    across = min(picture.width, round(picture.height * width / height))
    down = min(picture.height, round(picture.width * height / width))
    done = [f"{picture.width} x {picture.height}"]
    done += [f"its middle {across} x {down} kept"] if (across, down) != picture.size else []
    done += [f"resized to {width} x {height}"] if (across, down) != (width, height) else []
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted), ", ".join(done)


def blank(size: tuple[int, int]) -> tuple[Pixels, str]:
    """As `fit`, but black: text-to-video models use only the size of the result."""
    return np.zeros((*size, 3), np.uint8), f"{size[1]} x {size[0]}"


def slug(prompt: str) -> str:
    """The first words of a prompt as a file name: "A red ball falls." becomes "a-red-ball-falls"."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-") or "clip"


def sample_side_by_side(
    models: Mapping[str, Callable[[], AbstractContextManager[VideoModel]]], picture: Pixels, wish: Wish, stem: Path
) -> list[Path]:
    """Sample one clip per model and seed, with first frame `picture`; returns the paths of clips, sheet and GIF.

    Args:
        models: label -> function that returns a context manager with the model.
        picture: uint8 (H, W, 3).
        stem: the beginning of the files' paths: <stem>-s<seed>-<label>.mp4, <stem>.png and <stem>.gif.

    Raises:
        UserError: the size or length does not fit a model, or the files cannot be written.
    """
    clips: dict[int, dict[str, Pixels]] = {seed: {} for seed in wish.seeds}
    written = []
    for label, ready in models.items():
        with ready() as model:
            try:
                model.latent_shape(wish.frames, *wish.size)
            except UserError as error:
                reason = str(error).partition(": ")[2]
                raise UserError(f"--frames, --height, --width: {reason}", error.code, error.field) from error
            texts = encode_texts(model, [wish.prompt, wish.negative])
            for seed in track(clips, label, len(clips)):
                clip = sample_clips(
                    model,
                    picture[None],
                    [wish.prompt],
                    [seed],
                    wish.frames,
                    wish.steps,
                    wish.guidance,
                    wish.negative,
                    wish.guidance_low,
                    texts,
                )[0]
                written.append(stem.with_name(f"{stem.name}-s{seed}-{label.replace(' ', '-')}.mp4"))
                write_video(written[-1], clip, wish.fps)
                clips[seed][label] = clip
        del model  # free its memory before the next one is loaded
    named = {f"seed {seed}, {label}": clip for seed, row in clips.items() for label, clip in row.items()}
    written += [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.gif")]
    contact_sheet(written[-2], named)
    animation(written[-1], [list(row.values()) for row in clips.values()], wish.fps, list(models))
    return written


def contact_sheet(path: Path | str, clips: Mapping[str, Pixels], columns: int = 8) -> None:
    """Write a .png or .jpg with a strip for each clip: `columns` frames from first to last, and the name below."""
    rows = []
    for name, clip in clips.items():
        chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        strip = np.concatenate(_legible(clip[chosen]), axis=1)
        row = Image.new("RGB", (strip.shape[1], strip.shape[0] + LINE), "white")
        row.paste(Image.fromarray(strip))
        ImageDraw.Draw(row).text((2, strip.shape[0] + 1), name, fill="black")
        rows.append(np.asarray(row))
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


def animation(path: Path | str, rows: Sequence[Sequence[Pixels]], fps: float, labels: Sequence[str]) -> None:
    """Write an endless GIF of clips side by side: each of `rows` has one clip per label, all of equal length.

    GIF counts time in hundredths of a second, so 16 frames per second become 16.7.
    """
    columns = [np.concatenate([_legible(row[i]) for row in rows], axis=1) for i in range(len(labels))]
    head = Image.new("RGB", (sum(column.shape[2] for column in columns), LINE), "white")
    for i, label in enumerate(labels):
        ImageDraw.Draw(head).text((2 + i * columns[0].shape[2], 1), label, fill="black")
    video = np.concatenate(columns, axis=2)
    frames = [Image.fromarray(np.concatenate([np.asarray(head), frame])) for frame in video]
    # all frames share one palette, else still surfaces flicker
    colours = np.concatenate([np.asarray(frames[i]) for i in np.linspace(0, len(frames) - 1, 4).astype(int)])
    palette = Image.fromarray(colours).quantize(256)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with replacing(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=round(100 / fps) * 10, loop=0)


def _legible(clip: Pixels) -> Pixels:
    """The clip (F, H, W, 3) scaled to a height of 128 to 256 pixels; small pictures by a whole number."""
    height, width = clip.shape[1:3]
    if height <= 256:
        times = max(1, 128 // height)
        return clip.repeat(times, axis=1).repeat(times, axis=2)
    size = (round(width * 256 / height), 256)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in clip])
