"""Which frames are given, and which sizes and lengths clips have, in Open-Sora v1.2's own terms.

A mask strategy is text: groups "loop,reference,reference_start,target_start,length,edit" separated by ";". A group puts
`length` latent frames of a reference into the latents, from latent frame `target_start` on. `edit` is their strength: 0
keeps them, 1 makes them anew. What is left out at a group's end is 0,0,0,0,1,0, so "0" gives the first frame.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.core.errors import UserError

IMAGE_FPS = 120  # the model's fps input for clips of one picture

# Pictures of a clip by the name of its length: seconds at 25.5 a second, or multiples of 51.
NUM_FRAMES = {f"{2 * n}s": 51 * n for n in (1, 2, 4, 8, 16)} | {f"{n}x": 51 * n for n in (1, 2, 4, 8, 16)}

# (height, width) by resolution and aspect ratio "height:width". The specification names this size alone; others are
# given as numbers.
IMAGE_SIZES = {("240p", "9:16"): (240, 426)}


class Strategy(NamedTuple):
    """One group of a mask strategy; see above. Negative starts count from the end."""

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit: float = 0.0


def parse_mask_strategy(text: str | None) -> list[Strategy]:
    """The groups of a mask strategy; none for "" or None. Raises UserError: a group is no list of up to 6 numbers."""
    groups = []
    for group in text.split(";") if text else []:
        parts = group.split(",")
        try:
            numbers = [*map(int, parts[:5]), *map(float, parts[5:])]
            groups.append(Strategy(*numbers))  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"mask_strategy: {group!r} in {text!r} is not loop,reference,reference_start,target_start,length,edit; "
                "give one to six numbers",
                "value",
                "mask_strategy",
            ) from error
    return groups


def _snap(start: int, align: int, frames: int) -> int:
    """The multiple of `align` next to `start`; rounded up only where a whole piece of `align` frames follows."""
    piece = start // align
    if start % align > align / 2 and piece < frames // align - 1:
        piece += 1
    return piece * align


def apply_mask_strategy(
    z: Tensor,
    references: Sequence[Sequence[Tensor]],
    strategies: Sequence[str | None],
    align: int | None = None,
    loop: int = 0,
) -> tuple[Tensor, Tensor]:
    """z with the given frames put in, and the mask (B, T) of how strongly each frame is made: 1, or a group's `edit`.

    Args:
        z: noise (B, C, T, H, W).
        references: of each clip, latents (C, T', H, W).
        strategies: of each clip, see above.
        align: starts are snapped to multiples of this many latent frames (5 are one piece of the autoencoder).
        loop: which of the clips that continue each other this is; groups of other loops do not count.
    """
    z, frames = z.clone(), z.shape[2]
    mask = torch.ones(z.shape[0], frames, device=z.device)
    for clip, text in enumerate(strategies):
        for group in parse_mask_strategy(text):
            if group.loop != loop:
                continue
            if not 0 <= group.reference < len(references[clip]):
                raise UserError(
                    f"mask_strategy: {text!r} names reference {group.reference} of {len(references[clip])}; "
                    "count from 0, or give more references",
                    "value",
                    "mask_strategy",
                )
            given = references[clip][group.reference]
            starts = (group.reference_start, given.shape[1]), (group.target_start, frames)
            source, target = (start + length if start < 0 else start for start, length in starts)
            if align is not None:
                source, target = _snap(source, align, given.shape[1]), _snap(target, align, frames)
            length = min(group.length, frames - target, given.shape[1] - source)
            z[clip, :, target : target + length] = given[:, source : source + length].to(z)
            mask[clip, target : target + length] = group.edit
    return z, mask


# ---------------------------------------------------------------------------------------------- training masks

# With which probability a clip gets which `frame_mask` in stage 3 of the published training; the others are identity.
# PISA's is {"image_head": 1.0}, the first frame of every clip, which `model.conditioning: image` means too.
MASK_RATIOS = {
    "random": 0.01,
    "intepolate": 0.002,
    "quarter_random": 0.002,
    "quarter_head": 0.002,
    "quarter_tail": 0.002,
    "quarter_head_tail": 0.002,
    "image_head": 0.22,
    "image_tail": 0.005,
    "image_head_tail": 0.005,
}


def frame_mask(kind: str, T: int, rng: np.random.Generator) -> Tensor:
    """A training mask (T,) bool, True where a latent frame is noised and predicted.

    identity          all frames; so are clips of one latent frame, whatever the kind
    quarter_*, image_* given are 1 to T // 4 frames (at least 1, where the published code fails), or 1 frame: somewhere,
                      at the head, at the tail, or as many at both ends
    intepolate        every second frame is given, from the first or the second on (the published spelling)
    random            each frame is noised with probability 1 - U(0.1, 0.9)

    Where nothing would be left to predict, the last frame is noised.
    """
    noised = torch.ones(T, dtype=torch.bool)
    if T == 1 or kind == "identity":
        return noised
    size, _, where = kind.partition("_")
    if kind == "random":
        noised = torch.from_numpy(rng.random(T) > rng.uniform(0.1, 0.9))
    elif kind == "intepolate":
        noised[int(rng.integers(2)) :: 2] = False
    elif size in ("quarter", "image") and where in ("random", "head", "tail", "head_tail"):
        count = int(rng.integers(1, max(1, T // 4) + 1)) if size == "quarter" else 1
        if where == "random":
            first = int(rng.integers(T - count + 1))
            noised[first : first + count] = False
        if where.startswith("head"):
            noised[:count] = False
        if where.endswith("tail"):
            noised[-count:] = False
    else:
        raise UserError(f"{kind!r} is no training mask; give identity, random, intepolate, quarter_* or image_*")
    if not noised.any():
        noised[-1] = True
    return noised


def draw_frame_mask(ratios: Mapping[str, float], T: int, rng: np.random.Generator) -> Tensor:
    """`frame_mask` of a kind drawn with these probabilities; what they lack to 1 is identity's."""
    drawn, passed = rng.random(), 0.0
    for kind, ratio in ratios.items():
        passed += ratio
        if drawn < passed:
            return frame_mask(kind, T, rng)
    return frame_mask("identity", T, rng)


# ------------------------------------------------------------------------------------------- lengths and sizes


def num_frames(name: str | int) -> int:
    """Pictures of a clip: of a name in NUM_FRAMES, or the number itself."""
    text = str(name)
    if text not in NUM_FRAMES and not (text.isdecimal() and int(text)):
        raise UserError(f"num_frames: {name!r} is neither a number nor one of {', '.join(NUM_FRAMES)}")
    return NUM_FRAMES[text] if text in NUM_FRAMES else int(text)


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) of a resolution and "height:width". Raises UserError: the size is not in IMAGE_SIZES."""
    if (resolution, aspect_ratio) not in IMAGE_SIZES:
        raise UserError(
            f"the size of {resolution} at {aspect_ratio} is not known here; give height and width", "unknown_name"
        )
    return IMAGE_SIZES[resolution, aspect_ratio]


class Bucket(NamedTuple):
    resolution: str
    frames: int
    batch: int | None  # clips of a batch


Odds = float | tuple[float, float]
BucketConfig = Mapping[str, Mapping[int, tuple[Odds, int | None]]]


def choose_bucket(
    config: BucketConfig,
    areas: Mapping[str, int],
    frames: int,
    area: int,
    rng: np.random.Generator,
    interval: int = 1,
) -> Bucket | None:
    """The bucket of a clip, None where none takes it.

    Resolutions are tried from the largest down; one whose area is at most that of the clip / 0.8 is eligible. In it,
    lengths are tried from the longest down: a clip must have more than length x interval pictures, and then the length
    is taken with probability p_time, the bucket with p. A single picture goes into a bucket of length 1 alone.

    Args:
        config: resolution -> length -> (p or (p, p_time), clips of a batch).
        areas: pixels of each resolution.
        frames, area: of the clip.
        interval: one in so many pictures is used.
    """
    for resolution in sorted(config, key=lambda name: areas[name], reverse=True):
        if area < 0.8 * areas[resolution]:
            continue
        for length, (odds, batch) in sorted(config[resolution].items(), reverse=True):
            if (length == 1) != (frames == 1) or (length > 1 and frames <= length * interval):
                continue
            p, p_time = odds if isinstance(odds, tuple) else (odds, 1.0)
            if rng.random() >= p_time:
                continue
            if rng.random() < p:
                return Bucket(resolution, length, batch)
            break
    return None
