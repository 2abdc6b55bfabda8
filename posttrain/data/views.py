"""See a video as so many frames, at one rate and size.

What is seen of a video: its first frame is at time 0, and frame k of the clip is the one shown nearest to k / fps, of
two equally near the earlier, by the file's own timestamps, so that a varying rate does no harm. The clip is the video's
beginning; a video that does not reach that far is left out, for a picture that is held is not what happened. The
upright picture's largest box of the wanted shape, in its middle or at the side that `crop` names, is scaled to the
wanted size; with `crop: none` a video of another shape is left out. Sound is not read.

Shape letters: F frames, H W pixels, C channels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from posttrain.core import codec
from posttrain.core.codec import Facts
from posttrain.data.config import Crop, Wanted

TIE = 1e-6  # seconds: times this near to each other are the same
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class View:
    """Which frames of a video are seen, which box of its upright picture, and the size (H, W) that box is scaled to."""

    frames: tuple[int, ...]  # the file's marks of them; their places in it where it has none
    marked: bool
    box: Box
    size: tuple[int, int]

    @property
    def key(self) -> str:
        """Changes with what is seen."""
        return json.dumps([self.frames, self.box, self.size])


def see(facts: Facts, wanted: Wanted) -> tuple[View | None, list[str]]:
    """How a video becomes a clip, and what is done to it; None with the reason if it cannot."""
    places, box, notes = plan(facts.times, facts.size, wanted)
    if places is None:
        return None, notes
    if facts.turned:
        notes = [f"turned: by {facts.turned} degrees, as the file says", *notes]
    frames = tuple(int(place) if facts.marks is None else facts.marks[place] for place in places)
    return View(frames, facts.marks is not None, box, wanted.size), notes


def plan(times: np.ndarray, size: tuple[int, int], wanted: Wanted) -> tuple[np.ndarray | None, Box, list[str]]:
    """Which frames (their places, (wanted.frames,) int64) and which box of a video are seen, and what that changes.

    Args:
        times: when its frames are shown, seconds, ascending from 0.
        size: its upright picture's height and width.

    Returns:
        None for the frames where the video is too short, or of another shape and not to be cropped.
    """
    at = np.arange(wanted.frames) / wanted.fps
    box = moved(centred(size, wanted.size), size, wanted.crop)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if at[-1] > times[-1] + step / 2 + TIE:
        reach = f"{wanted.frames} frames at {wanted.fps:g} fps reach {at[-1]:.2f} s"
        return None, box, [f"too short: its last frame is at {times[-1]:.2f} s, {reach}"]
    if wanted.crop == "none" and box[2:] != size:
        return None, box, [f"another shape: {size[0]} x {size[1]} pixels (height x width), and data.crop is none"]
    places = nearest(times, at)
    notes = []
    steady = step == 0 or bool((np.abs(np.diff(times) / step - 1) < 0.5).all())
    if (places != np.arange(wanted.frames)).any() or (step and abs(step * wanted.fps - 1) > 0.005):
        held = int((np.diff(places) == 0).sum())
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
    return places, box, notes


def nearest(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each moment of `at`, the place in `times` (ascending) of the nearest; of two equally near, the earlier."""
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
        UserError: the file is torn, or is not the one that was looked at.
    """
    found = {mark: scale(picture, view) for mark, picture in codec.pictures(path, view.frames, view.marked)}
    return np.stack([found[mark] for mark in view.frames])


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
