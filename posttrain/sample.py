"""From first pictures and captions to video clips, and clips to files that browsers play."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.files import replacing
from posttrain.flow import sample
from posttrain.models.base import VideoModel

Pixels = NDArray[np.uint8]


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
) -> Pixels:
    """Continue each picture into a clip. One batch; a clip depends on its own picture, caption and seed alone.

    The noise of a clip is what `torch.Generator().manual_seed(seed)` gives, as in a stock diffusers pipeline.

    Args:
        pictures: uint8 (N, H, W, 3), the first frames.
        frames: length of the clips in pictures, the first included.

    Returns:
        uint8 (N, F, H, W, 3).
    """
    count, height, width, _ = pictures.shape
    shape = model.latent_shape(frames, height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    video_BCFHW = torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
    z0_BCFHW = sample(
        model,
        model.scheduler(),
        noise.to(model.device),
        model.encode_text(captions),
        model.encode(video_BCFHW.to(model.device)),
        steps,
        guidance,
        model.encode_text([negative] * count) if guidance > 1 else None,
    )
    return to_uint8(model.decode(z0_BCFHW))


def to_uint8(video_BCFHW: torch.Tensor) -> Pixels:
    """Pixels in [-1, 1] (B, C, F, H, W) to uint8 (B, F, H, W, C), rounded."""
    scaled = ((video_BCFHW.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 4, 1).to("cpu", torch.uint8).numpy()


def write_video(path: Path | str, frames: Pixels, fps: float) -> None:
    """Write uint8 (F, H, W, 3) as H.264 in yuv420p, which every browser plays; near-lossless, for looking at.

    H and W must be even.
    """
    with replacing(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "10", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
