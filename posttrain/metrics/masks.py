"""Follow one object through clips, from its mask in the first frame."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Track = Callable[[Tensor, Tensor], Tensor]  # (video_BCFHW in [-1, 1], mask0_BHW bool) -> logits_BFHW


@torch.no_grad()
def segment(track: Track, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
    """Masks (B, F, H, W), bool; frame 0's is `mask0_BHW`.

    Args:
        track: a segmenter (nets/tracker.py, nets/sam2.py).
        video_BCFHW: pixels in [-1, 1].
        mask0_BHW: bool, the object in frame 0, on the video's device.
    """
    masks_BFHW = track(video_BCFHW, mask0_BHW) > 0
    masks_BFHW[:, 0] = mask0_BHW
    return masks_BFHW


def iou(a_FHW: np.ndarray, b_FHW: np.ndarray) -> np.ndarray:
    """Intersection over union of bool masks, frame by frame (F,); 1 where both are empty."""
    union = (a_FHW | b_FHW).sum((1, 2))
    return np.where(union > 0, (a_FHW & b_FHW).sum((1, 2)) / np.maximum(union, 1), 1.0)
