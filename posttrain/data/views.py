"""Turn a video into a clip with a given number of frames, rate and size.

The video's first frame is at time 0. Frame k of the clip is the video's frame nearest to k / fps by the file's own
timestamps (the earlier of two equally near ones), so a variable rate is handled. The clip begins at the start of the
video, or at the `start` that a list gives. The last frame counts as shown for one frame interval. A video that is too
short for the clip is left out, because holding its last frame longer would show wrong motion. From the upright
picture, the largest box of the wanted shape is taken, in the middle or at the side that `crop` names, and scaled to
the wanted size. With `crop: none` a video of another shape is left out. Sound is not read.

Shape letters: F frames, H W pixels, C channels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from posttrain.core import codec
from posttrain.core.codec import Facts, Turn
from posttrain.data.config import Crop, Wanted

TIE = 1e-6  # seconds: times that differ by less are equal
GRAIN = 1e-3  # seconds: Matroska rounds its times to multiples of this
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """Which frames of a video are used, which box of its upright picture, and the size (H, W) that it is scaled to."""

    frames: tuple[int, ...]  # their marks in the file, or their positions in it if it has no marks
    marked: bool
    box: Box
    size: tuple[int, int]

    @property
    def key(self) -> str:
        """A key that changes with the frames and the box that are used."""
        return json.dumps([self.frames, self.box, self.size])


@dataclass(frozen=True)
class Part:
    """The part of a video that is used, in its own seconds, and the frames per second at which it was recorded."""

    start: float = 0.0
    end: float | None = None  # None: the video's
    true_fps: float | None = None  # differs from the file's rate for slow motion; None: the file's


WHOLE = Part()


def see(facts: Facts, wanted: Wanted, part: Part = WHOLE) -> tuple[View | None, list[str]]:
    """The view that turns a video into a clip (None if that is impossible), and notes on the changes or the reason."""
    step, _ = pace(facts.times)
    length = facts.times[-1] + step
    end = length if part.end is None else min(part.end, length)
    inside = np.flatnonzero((facts.times > part.start - TIE) & (facts.times < (part.end or np.inf) - TIE))
    if not len(inside):
        return None, [f"too short: it lasts {length:.2f} s, and its part is to start at {part.start:g} s"]
    slow = 1.0
    notes = []
    if part.true_fps and step:
        slow = part.true_fps * step
        notes.append(f"true rate: {part.true_fps:g} fps, shown at {1 / step:.4g} fps")
    clock = (facts.times[inside] - part.start) / slow
    positions, box, done = plan(clock, facts.size, wanted, (end - part.start) / slow)
    if positions is None:
        return None, done
    if facts.turn != Turn():
        notes = [f"{facts.turn}, as the file says", *notes]
    notes = [*notes, *facts.notes]
    positions = inside[positions]
    frames = tuple(int(position) if facts.marks is None else facts.marks[position] for position in positions)
    return View(frames, facts.marks is not None, box, wanted.size), notes + done


def plan(
    times: np.ndarray, size: tuple[int, int], wanted: Wanted, length: float | None = None
) -> tuple[np.ndarray | None, Box, list[str]]:
    """Which frames (their positions, (wanted.frames,) int64) and which box of a video are used, and notes on changes.

    Args:
        times: the times of its frames, seconds, ascending from 0.
        size: its upright picture's height and width.
        length: seconds until its end; None: the last frame is shown as long as the others.

    Returns:
        None for the frames if the video is too short, or has another shape and may not be cropped.
    """
    at = np.arange(wanted.frames) / wanted.fps
    box = moved(centred(size, wanted.size), size, wanted.crop)
    step, steady = pace(times)
    length = times[-1] + step if length is None else length
    if at[-1] > length + GRAIN:
        reach = f"{wanted.frames} frames at {wanted.fps:g} fps reach {at[-1]:.2f} s"
        missing = f"{at[-1] - length:.2f} s are missing"
        fits = int((length + GRAIN) * wanted.fps) // 4 * 4 + 1  # 4 k + 1, as models of video want them
        missing += f"; data.frames={fits} would fit" if fits > 1 else ""
        return None, box, [f"too short: it lasts {length:.2f} s, {reach}: {missing}"]
    if wanted.crop == "none" and box[2:] != size:
        return None, box, [f"another shape: {size[0]} x {size[1]} pixels (height x width), and data.crop is none"]
    frames = nearest(times, at)
    notes = []
    held = int((np.diff(frames) == 0).sum())
    if (frames != np.arange(wanted.frames)).any() or (step and abs(step * wanted.fps - 1) > 0.005):
        rate = f"{1 / step:.4g} fps" if steady and step else "a varying rate"
        notes.append(f"retimed: {rate} to {wanted.fps:g} fps" + (f", {held} pictures are held" if held else ""))
    if times[-1] > at[-1] + 1.5 * step:
        notes.append(f"cut: the first {at[-1]:.2f} of {times[-1]:.2f} s")
    (height, width), (_, _, tall, wide) = size, box
    if (tall, wide) != size:
        notes.append(f"cropped: {height} x {width} to {tall} x {wide} pixels (height x width)")
    if (tall, wide) != wanted.size:
        larger = "enlarged" if wanted.size[0] > tall or wanted.size[1] > wide else "scaled"
        notes.append(f"{larger}: {tall} x {wide} to {wanted.size[0]} x {wanted.size[1]} pixels")
    return frames, box, notes


def pace(times: np.ndarray) -> tuple[float, bool]:
    """(seconds between two frames, whether the rate is constant): the mean if it is, else the median; 0: one frame."""
    steps = np.diff(times)
    middle = float(np.median(steps)) if len(steps) else 0.0
    steady = not middle or bool((np.abs(steps / middle - 1) < 0.5).all())
    return float(steps.mean()) if middle and steady else middle, steady


def nearest(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each time of `at`, the position of the nearest in `times` (ascending); the earlier of two equally near."""
    return np.searchsorted((times[1:] + times[:-1]) / 2, at - TIE, side="left")


def centred(size: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The largest box in the middle of a picture of `size` that has the shape of `shape`; both are (height, width)."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    tall, wide = (min(full, max(1, round(part / scale))) for full, part in zip(size, shape, strict=True))
    return (size[0] - tall) // 2, (size[1] - wide) // 2, tall, wide


def moved(box: Box, size: tuple[int, int], crop: Crop) -> Box:
    """A box of a picture of `size`, at the side that `crop` names."""
    top, left, tall, wide = box
    top = {"top": 0, "bottom": size[0] - tall}.get(crop, top)
    left = {"left": 0, "right": size[1] - wide}.get(crop, left)
    return top, left, tall, wide


def read(path: Path, view: View) -> np.ndarray:
    """The clip that `view` makes of a video file, uint8 (F, H, W, 3). Pictures are decoded and scaled one by one.

    Raises:
        UserError: the file is damaged, or is not the one that was inspected.
    """
    by_mark = {mark: scale(picture, view) for mark, picture in codec.pictures(path, view.frames, view.marked)}
    return np.stack([by_mark[mark] for mark in view.frames])


def scale(picture_HWC: np.ndarray, view: View) -> np.ndarray:
    """The view's box of a picture (uint8), scaled to the view's size."""
    top, left, height, width = view.box
    part = np.ascontiguousarray(picture_HWC[top : top + height, left : left + width])
    if part.shape[:2] == view.size:
        return part
    values = torch.from_numpy(part).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(values, view.size, mode="bilinear", antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def scale_ids(ids_HW: np.ndarray, view: View) -> np.ndarray:
    """The same for a picture of ids: each pixel takes the id at its centre."""
    top, left, height, width = view.box
    rows, columns = (
        start + ((np.arange(n) + 0.5) * full / n).astype(int)
        for start, full, n in zip((top, left), (height, width), view.size, strict=True)
    )
    return ids_HW[rows[:, None], columns]
