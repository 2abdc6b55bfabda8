"""Sample video clips from first frames and captions, and write clips to files that browsers play."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.core.files import note_digest, replacing
from posttrain.flow import sample
from posttrain.models.base import VideoModel

Pixels = NDArray[np.uint8]


def encode_texts(model: VideoModel, captions: Iterable[str], batch: int = 8) -> dict[str, Tensor]:
    """text_LD for each distinct caption, in main memory.

    Encode all captions before sampling: a text encoder may be as large as the transformer, and then the two are never
    on the device together.
    """
    different, encoded = list(dict.fromkeys(captions)), dict[str, Tensor]()
    for first in range(0, len(different), batch):
        batch_captions = different[first : first + batch]
        encoded |= dict(zip(batch_captions, model.encode_text(batch_captions).cpu(), strict=True))
    model.release()
    return encoded


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
    """Continue each picture into a clip, in one batch. A clip depends only on its own picture, caption and seed.

    A clip's noise comes from `torch.Generator().manual_seed(seed)`, as in a stock diffusers pipeline.

    Args:
        pictures: uint8 (N, H, W, 3), the first frames; a model conditioned on text alone takes their size from them.
        frames: length of the clips in frames, including the first.
        guidance_low: guidance of the second expert (low noise); None: the same.
        texts: from `encode_texts`, for the captions and, with guidance, for `negative`; None: encoded now.

    Returns:
        uint8 (N, F, H, W, 3).
    """
    count, height, width, _ = pictures.shape
    shape = model.latent_shape(frames, height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    if guidance_low is not None and not model.boundary:
        raise UserError(
            "sampler.guidance_low: is only for a model with two experts; leave it out",
            "conflict",
            "sampler.guidance_low",
        )
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
    """The seed of a clip's noise: a function of (seed, clip id) alone, not of the batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip}".encode()).digest()[:8], "big") >> 1


def to_uint8(video_BCFHW: Tensor) -> Pixels:
    """Pixels in [-1, 1] (B, C, F, H, W) to uint8 (B, F, H, W, C), rounded."""
    scaled = ((video_BCFHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 4, 1).to("cpu", torch.uint8).numpy()


def write_video(path: Path | str, frames: Pixels, fps: float, noted: bool = False) -> None:
    """Write uint8 (F, H, W, 3) as nearly lossless H.264 in yuv420p, which every browser plays.

    H and W must be even; `fps` need not be whole, as 12.5 or 23.976. `noted`: with its digest, which `intact` looks at.
    """
    with replacing(path) as temporary:
        codec.write_near_lossless(temporary, frames, fps)
        if noted:
            note_digest(Path(path), temporary)
