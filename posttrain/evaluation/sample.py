"""From first pictures and captions to video clips, and clips to files that browsers play."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.flow import sample
from posttrain.models.base import VideoModel

Pixels = NDArray[np.uint8]


def encode_texts(model: VideoModel, captions: Iterable[str], batch: int = 8) -> dict[str, Tensor]:
    """Each different caption's text_LD, in main memory.

    Done before anything is sampled, for all that will be: then a text encoder, which may be as large as the
    transformer, is never on the device together with it.
    """
    different, found = list(dict.fromkeys(captions)), dict[str, Tensor]()
    for first in range(0, len(different), batch):
        some = different[first : first + batch]
        found |= dict(zip(some, model.encode_text(some).cpu(), strict=True))
    model.release()
    return found


@torch.no_grad()
def sample_clips(
    model: VideoModel,
    pictures: Pixels,
    captions: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    steps: int,
    guidance: float = 1.0,
    negative: str = "",
    guidance_low: float | None = None,
    texts: Mapping[str, Tensor] | None = None,
) -> Pixels:
    """Continue each picture into a clip. One batch; a clip depends on its own picture, caption and seed alone.

    The noise of a clip is what `torch.Generator().manual_seed(seed)` gives, as in a stock diffusers pipeline.

    Args:
        pictures: uint8 (N, H, W, 3), the first frames; a model conditioned on text alone takes their size from them.
        frames: length of the clips in pictures, the first included.
        guidance_low: the guidance where a second expert answers, the one for little noise; None: the same.
        texts: what `encode_texts` made of the captions, and, with guidance, of `negative`; None: it is done now.

    Returns:
        uint8 (N, F, H, W, 3).
    """
    count, height, width, _ = pictures.shape
    shape = model.latent_shape(frames, height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    if guidance_low is not None and not model.boundary:
        raise UserError("sampler.guidance_low: is for a model of two experts, and this one has one; leave it out")
    first_BC1HW = torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None].float().to(model.device) / 127.5 - 1
    low = guidance if guidance_low is None else guidance_low
    unwanted = [negative] * count if max(guidance, low) > 1 else []
    texts = encode_texts(model, [*captions, *unwanted]) if texts is None else texts
    text_BLD = torch.stack([texts[caption] for caption in captions]).to(model.device)
    negative_BLD = torch.stack([texts[caption] for caption in unwanted]).to(model.device) if unwanted else None
    clean_BCFHW = model.encode(first_BC1HW) if model.n_cond_frames else None
    condition = model.condition(first_BC1HW, frames)
    model.release()
    z0_BCFHW = sample(
        model,
        model.scheduler(),
        noise.to(model.device),
        text_BLD,
        clean_BCFHW,
        steps,
        lambda t: guidance if t >= model.boundary else low,
        negative_BLD,
        condition,
    )
    video_BCFHW = model.decode(z0_BCFHW)
    model.release()
    return to_uint8(video_BCFHW)


def clip_seed(seed: int, clip: str) -> int:
    """The seed of a clip's noise: a function of (seed, clip id) alone, whatever batch the clip is in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip}".encode()).digest()[:8], "big") >> 1


def to_uint8(video_BCFHW: Tensor) -> Pixels:
    """Pixels in [-1, 1] (B, C, F, H, W) to uint8 (B, F, H, W, C), rounded."""
    scaled = ((video_BCFHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 4, 1).to("cpu", torch.uint8).numpy()


def write_video(path: Path | str, frames: Pixels, fps: float) -> None:
    """Write uint8 (F, H, W, 3) as H.264 in yuv420p, which every browser plays; near-lossless, for looking at.

    `fps` may be broken, as 12.5 or 23.976.

    H and W must be even.
    """
    with replacing(path) as temporary:
        codec.write_near_lossless(temporary, frames, fps)
