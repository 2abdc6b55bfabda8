"""A small recurrent U-Net that follows one object. It scores the pocket model; no model is trained on its gradient.

Inputs are the frame, the previous frame with its mask, and frame 0 with the given mask. At each scale, the features of
frame 0, averaged over the given mask, multiply the features of the frame, so pixels like the object stand out. The
only state is the previous frame and its mask, so a clip may have any number of frames.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.files import read_object, replacing, write_json
from posttrain.models.base import ModelConfig
from posttrain.pocket import whole

GIVEN = 10.0  # the logit of frame 0's true mask


class Block(nn.Sequential):
    """Two 3 x 3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.GroupNorm(outputs // 8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.GroupNorm(outputs // 8, outputs),
            nn.SiLU(),
        )


class Tracker(nn.Module):
    """Follows the object that `mask0_BHW` marks in frame 0. H and W are multiples of 2 ** (scales - 1).

    Args:
        widths: channels at each scale, finest first, multiples of 8.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32, 48)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.down = nn.ModuleList(Block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        # inputs: the frame's features; these times the object's; the masks of the previous frame and of frame 0; the
        # features of both (at the finest scale only the colours of frame 0); the coarser scale's output
        inputs = [2 * widths[0] + 2 + 3, *(4 * w + 2 for w in widths[1:])]
        self.up = nn.ModuleList(Block(i + c, w) for i, c, w in zip(inputs, (*widths[1:], 0), widths, strict=True))
        self.head = nn.Conv2d(widths[0], 1, 1)
        self.head.bias = nn.Parameter(torch.tensor([-3.0]))  # most pixels are not the object

    def features(self, frames_NCHW: Tensor) -> list[Tensor]:
        """Features of pictures in [-1, 1] at each scale, finest first: (N, widths[i], H / 2^i, W / 2^i)."""
        features, x = [], frames_NCHW
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.avg_pool2d(x, 2))
            features.append(x)
        return features

    def forward(self, video_BCFHW: Tensor, mask0_BHW: Tensor, teacher_BFHW: Tensor | None = None) -> Tensor:
        """Mask logits (B, F, H, W), differentiable; frame 0's are +-10, from `mask0_BHW`.

        Args:
            video_BCFHW: pixels in [-1, 1].
            mask0_BHW: bool, the object in frame 0.
            teacher_BFHW: bool, true masks to feed back instead of the network's own (training only).
        """
        batch, _, frames, _, _ = video_BCFHW.shape
        features = [f.unflatten(0, (batch, frames)) for f in self.features(video_BCFHW.transpose(1, 2).flatten(0, 1))]
        mask_B1HW = mask0_BHW[:, None].to(video_BCFHW.dtype)
        starts = [shrink(mask_B1HW, f.shape[-2:]) for f in features]
        looks = [
            (f[:, 0] * m).sum((2, 3), keepdim=True) / m.sum((2, 3), keepdim=True).clamp_min(1e-3)
            for f, m in zip(features, starts, strict=True)
        ]
        logits = [GIVEN * (2 * mask_B1HW - 1)]
        for t in range(1, frames):
            x = None
            for i in reversed(range(len(features))):
                f = features[i]
                parts = [f[:, t], f[:, t] * looks[i], shrink(mask_B1HW, f.shape[-2:]), starts[i]]
                parts += [f[:, t - 1], f[:, 0]] if i else [video_BCFHW[:, :, 0]]
                if x is not None:
                    parts.append(F.interpolate(x, scale_factor=2))
                x = self.up[i](torch.cat(parts, 1))
            logits.append(self.head(x))
            mask_B1HW = logits[-1].sigmoid() if teacher_BFHW is None else teacher_BFHW[:, t, None].to(video_BCFHW.dtype)
        return torch.cat(logits, 1)


def shrink(mask_B1HW: Tensor, size: tuple[int, ...]) -> Tensor:
    """The share of each cell of a coarser grid of `size` (H, W) that the mask covers: (B, 1, *size)."""
    return F.avg_pool2d(mask_B1HW, mask_B1HW.shape[-1] // size[-1])


class Model:
    """A tracker. Calling it gives mask logits (B, F, H, W); see `Tracker.forward`."""

    def __init__(self, module: Tracker) -> None:
        self.module: nn.Module = module
        self._config = {"widths": list(module.widths)}

    def __call__(self, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor:
        return self.module(video_BCFHW, mask0_BHW)

    def save(self, path: Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        with replacing(path) as temporary:
            temporary.mkdir()
            write_json(temporary / "config.json", self._config)
            weights = {name: w.contiguous().cpu() for name, w in self.module.state_dict().items()}
            save_file(weights, temporary / "model.safetensors")


def load(config: ModelConfig, device: str = "cpu") -> Model:
    """The tracker in folder `config.path` ("pocket": the embedded one); `init: random` uses only its architecture.

    Raises:
        UserError: the folder has no config.json or no weights, or the weights do not fit.
    """
    path = whole("tracker") if config.path == "pocket" else Path(config.path)
    settings: dict[str, Any] = read_object(path / "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = Tracker(tuple(settings["widths"]))
    if config.init == "pretrained":
        weights = path / "model.safetensors"
        if not weights.exists():
            message = f"{weights}: does not exist; train it, or choose another model.path"
            raise UserError(message, "missing", "model.path")
        try:
            module.load_state_dict(load_file(weights))
        except (RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            message = f"{weights}: does not fit the tracker ({reason}); train it again"
            raise UserError(message, "mismatch", "model.path") from error
    return Model(module.to(device))
