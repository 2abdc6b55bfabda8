"""Pictures and masks of a square, for the tests of rewards."""

import torch
from torch import Tensor

from posttrain.types import Batch

SIZE = 64
GENERATOR = torch.Generator()


def random(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=GENERATOR)


def square(*corners: tuple[int, int] | None, side: int = 8) -> Tensor:
    """Masks (1, F, H, W) of a square whose upper left corner (row, column) is given; None: nothing is there."""
    masks = torch.zeros(1, len(corners), SIZE, SIZE, dtype=torch.bool)
    for t, corner in enumerate(corners):
        if corner is not None:
            masks[0, t, corner[0] : corner[0] + side, corner[1] : corner[1] + side] = True
    return masks


def scene(frames: int) -> Batch:
    """A red square that falls before a wall of coloured waves, with everything that is known of it."""
    masks = square(*[(4 + 2 * t * t, 20) for t in range(frames)])
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    wall = torch.stack([(rows / 7).sin(), (columns / 9).cos(), ((rows + columns) / 8).sin()]) * 0.4
    red = torch.tensor([0.9, -0.7, -0.7]).view(1, 3, 1, 1, 1)
    video = torch.where(masks[:, None], red, wall[None, :, None])
    down = torch.zeros(1, frames, 2, SIZE, SIZE)
    for t in range(frames):
        down[0, t, 1] = masks[0, t] * (4 * t + 2)
    return Batch(
        ids=("square",),
        video_BCFHW=video,
        instances_BFHW=masks.to(torch.uint8),
        target_B=torch.tensor([1]),
        flow_BFCHW=down,
        depth_BFHW=torch.where(masks, 1.5, 3.0),
    )
