"""RAFT (arXiv 2003.12039) from torchvision: optical flow between neighbouring frames, differentiable.

Weights may be `pocket` (embedded), `raft_large` or `raft_small` (torchvision's), a folder written by `Model.save`, or a
file with a state dict (.pth, .safetensors) of torchvision or of the original code (such as raft-things.pth; its
parameter names are mapped to torchvision's).

torchvision's forward stops the gradient before each update, as the paper does for training. The remaining gradient is
not the derivative of the flow and may have another direction. `Flow.see` does not stop the gradient.

Under autocast the encoders and the updates are computed in bf16; coordinates, flow and resized pictures stay float32.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import optical_flow
from torchvision.models.optical_flow import raft
from torchvision.models.optical_flow._utils import upsample_flow

from posttrain.core.errors import UserError, printable
from posttrain.core.files import read_object, replacing, write_json
from posttrain.models.base import ModelConfig
from posttrain.nets.precision import widened
from posttrain.pocket import whole

SMALLEST = 128  # pixels of a side: the coarsest of four correlation volumes is then 2 x 2
PUBLISHED = ("raft_large", "raft_small")
UPDATES = 12  # as published
# prefixes of parameter names: the original code's -> torchvision's
ORIGINAL = {
    "module.": "",
    "fnet.": "feature_encoder.",
    "cnet.": "context_encoder.",
    "update_block.encoder.convc1.": "update_block.motion_encoder.convcorr1.0.",
    "update_block.encoder.convc2.": "update_block.motion_encoder.convcorr2.0.",
    "update_block.encoder.convf1.": "update_block.motion_encoder.convflow1.0.",
    "update_block.encoder.convf2.": "update_block.motion_encoder.convflow2.0.",
    "update_block.encoder.conv.": "update_block.motion_encoder.conv.0.",
    "update_block.gru.": "update_block.recurrent_block.convgru.",
    "update_block.mask.0.": "mask_predictor.convrelu.0.",
    "update_block.mask.2.": "mask_predictor.conv.",
}


class Flow(nn.Module):
    """A RAFT that takes videos of any size."""

    def __init__(self, net: raft.RAFT, updates: int = UPDATES) -> None:
        super().__init__()
        self.net, self.updates = net, updates
        self.eval()

    def train(self, mode: bool = True) -> "Flow":
        """Stays in evaluation mode: batch norm uses the stored statistics."""
        return super().train(False)

    def forward(self, video_BCFHW: Tensor) -> list[Tensor]:
        """The estimates after each update, the best last: flow_BFCHW of F - 1 frames, in pixels (x right, y down).

        The flow goes from each frame of the video (pixels in [-1, 1]) to the next. Frames with sides below 128 pixels,
        or that are no multiples of 8, are enlarged, and the flow is scaled back. This is torchvision's forward, which
        stops gradients; use it for training.
        """
        shown = self._enlarged(video_BCFHW)
        pairs = (shown[:, :-1].flatten(0, 1), shown[:, 1:].flatten(0, 1))
        return [self._scaled(flow, video_BCFHW) for flow in self.net(*pairs, num_flow_updates=self.updates)]

    def see(self, video_BCFHW: Tensor) -> Tensor:
        """The last estimate, flow_BFCHW as in `forward`, with its whole gradient. Each frame is encoded once."""
        shown = self._enlarged(video_BCFHW)
        features = widened(self.net.feature_encoder(shown.flatten(0, 1))).unflatten(0, shown.shape[:2])
        first, second = features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1)
        context = self.net.context_encoder(shown[:, :-1].flatten(0, 1))
        hidden = self.net.update_block.hidden_state_size
        state, context = context[:, :hidden].tanh(), context[:, hidden:].relu()
        with torch.autocast(shown.device.type, enabled=False):  # sums of many products
            self.net.corr_block.build_pyramid(first, second)
        rows, columns = (torch.arange(side).to(first) for side in first.shape[2:])
        start = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(len(first), -1, -1, -1)
        flow = torch.zeros_like(start)
        for _ in range(self.updates):
            seen = self.net.corr_block.index_pyramid(centroids_coords=start + flow)
            state, change = self.net.update_block(state, context, seen, flow)
            flow = flow + change  # in float32 like the coordinates: above 256, bf16 has steps of a pixel or more
        mask = None if self.net.mask_predictor is None else widened(self.net.mask_predictor(state))
        return self._scaled(upsample_flow(flow, mask), video_BCFHW)

    def _enlarged(self, video_BCFHW: Tensor) -> Tensor:
        """The frames in the size that the network needs, (B, F, C, H', W'), float32."""
        batch, _, frames, height, width = video_BCFHW.shape
        times = max(1.0, SMALLEST / min(height, width))
        size = [8 * math.ceil(side * times / 8) for side in (height, width)]
        pictures = widened(video_BCFHW).transpose(1, 2).flatten(0, 1)
        return F.interpolate(pictures, size, mode="bilinear").unflatten(0, (batch, frames))

    def _scaled(self, flow_NCHW: Tensor, video_BCFHW: Tensor) -> Tensor:
        """The flow between enlarged frames (N, 2, H', W'), converted to flow_BFCHW in the video's pixels."""
        flow_NCHW = widened(flow_NCHW)
        batch, _, frames, height, width = video_BCFHW.shape
        tall, wide = flow_NCHW.shape[-2:]
        seen = F.interpolate(flow_NCHW, (height, width), mode="bilinear", antialias=True)
        return (flow_NCHW.new_tensor([width / wide, height / tall]).view(2, 1, 1) * seen).unflatten(
            0, (batch, frames - 1)
        )


def build(sizes: dict[str, Any]) -> raft.RAFT:
    """A RAFT with layers of the given sizes; pocket/raft/config.json shows the keys of `sizes`."""
    hidden = sizes["hidden"]

    def encoder(outputs: int, norm: Any) -> raft.FeatureEncoder:
        layers = (*sizes["encoder"], outputs)
        return raft.FeatureEncoder(block=raft.ResidualBlock, layers=layers, norm_layer=norm)

    corr = raft.CorrBlock(num_levels=sizes["levels"], radius=sizes["radius"])
    motion = raft.MotionEncoder(
        in_channels_corr=corr.out_channels,
        corr_layers=tuple(sizes["motion_corr"]),
        flow_layers=tuple(sizes["motion_flow"]),
        out_channels=sizes["motion"],
    )
    recurrent = raft.RecurrentBlock(
        input_size=sizes["motion"] + sizes["context"], hidden_size=hidden, kernel_size=(3,), padding=(1,)
    )
    head = raft.FlowHead(in_channels=hidden, hidden_size=sizes["head"])
    return raft.RAFT(
        feature_encoder=encoder(sizes["features"], nn.InstanceNorm2d),
        context_encoder=encoder(hidden + sizes["context"], None),
        corr_block=corr,
        update_block=raft.UpdateBlock(motion_encoder=motion, recurrent_block=recurrent, flow_head=head),
        mask_predictor=raft.MaskPredictor(in_channels=hidden, hidden_size=sizes["mask"]),
    )


class Model:
    """A flow network. Calling it gives the last estimate, with its whole gradient; see `Flow.see`."""

    def __init__(self, module: Flow, sizes: dict[str, Any] | None = None) -> None:
        self.module: nn.Module = module
        self.flow, self._sizes = module, sizes

    def __call__(self, video_BCFHW: Tensor) -> Tensor:
        """flow_BFCHW of F - 1 frames, in pixels."""
        return self.flow.see(video_BCFHW)

    def save(self, path: Path) -> None:
        """Write config.json and model.safetensors into the folder `path`."""
        with replacing(path) as temporary:
            temporary.mkdir()
            write_json(temporary / "config.json", self._sizes)
            weights = {name: w.contiguous().cpu() for name, w in self.flow.net.state_dict().items()}
            save_file(weights, temporary / "model.safetensors")


def load(config: ModelConfig, device: str = "cpu") -> Model:
    """The RAFT that `config.path` names (see the module's docstring); `init: random` uses only a folder's sizes.

    Raises:
        UserError: the file or folder does not exist, or does not hold a RAFT; or torchvision's weights cannot be
            downloaded.
    """
    if config.path in PUBLISHED:
        return Model(Flow(_published(config.path)).to(device))
    path = whole("raft") if config.path == "pocket" else Path(config.path).expanduser()
    if path.is_file():
        return Model(Flow(_from_file(path)).to(device))
    if not (path / "config.json").is_file():
        known = ", ".join(PUBLISHED)
        message = f"{path}: is not a RAFT; name pocket, {known}, a folder with config.json, or a file of weights"
        raise UserError(message, "missing", "path")
    sizes = read_object(path / "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = build(sizes)
    if config.init == "pretrained":
        _fill(net, _read(path / "model.safetensors"), path / "model.safetensors")
    return Model(Flow(net, sizes["updates"]).to(device), sizes)


def from_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original code's state dict (github.com/princeton-vl/RAFT) under torchvision's names, for the large RAFT."""
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        for old, new in ORIGINAL.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        parts = name.split(".")
        if parts[0].endswith("_encoder"):
            named[_encoder(parts)] = value
        elif parts[1:2] == ["recurrent_block"]:  # convgru.convz1 is convgru1.convz
            named[".".join([*parts[:2], f"convgru{parts[3][-1]}", parts[3][:-1], parts[4]])] = value
        else:
            named[name] = value
    return named


def _encoder(parts: list[str]) -> str:
    """torchvision's name of an encoder's parameter, from the parts of the original name.

    An encoder has a stem, three layers of two residual blocks, and a last convolution.
    """
    inner = {
        "conv1": "convnormrelu1.0",
        "norm1": "convnormrelu1.1",
        "conv2": "convnormrelu2.0",
        "norm2": "convnormrelu2.1",
    }
    encoder, first, *rest = parts
    if first == "conv2":
        return ".".join([encoder, "conv", *rest])
    if not first.startswith("layer"):
        return ".".join([encoder, inner[first].replace("1.", ".", 1), *rest])
    block, name, *rest = rest
    return ".".join([encoder, first, block, inner.get(name, name), *rest])


def _published(name: str) -> raft.RAFT:
    """torchvision's RAFT `name` with the weights that torchvision recommends, from its cache or the network."""
    try:
        return getattr(optical_flow, name)(weights="DEFAULT", progress=False)
    except OSError as error:
        message = (
            f"{name}: torchvision's weights cannot be downloaded ({error}); download them elsewhere and name the file"
        )
        raise UserError(message, "network", "path") from error


def _from_file(path: Path) -> raft.RAFT:
    weights = _read(path)
    if any(name.removeprefix("module.").startswith("fnet.") for name in weights):
        repeated = ".norm3."  # the original code's shortcuts store their norm twice, as norm3 and as downsample.1
        weights = from_original({name: value for name, value in weights.items() if repeated not in name})
    large = any("convgru2" in name for name in weights)
    net = (optical_flow.raft_large if large else optical_flow.raft_small)(weights=None)
    _fill(net, weights, path)
    return net


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; train it, or choose another path", "missing", "path") from None
    except Exception as error:  # safetensors, pickle, zip and the system each raise their own types
        message = f"{path}: cannot be read as weights ({printable(str(error), 200)}); download the file again"
        raise UserError(message, "damaged", "path") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: does not contain a state dict; name a file of RAFT's weights", "format", "path")
    return weights


def _fill(net: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        net.load_state_dict(weights)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit RAFT ({reason}); name other weights", "mismatch", "path") from error
