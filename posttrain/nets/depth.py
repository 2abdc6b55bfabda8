"""Depth Anything (V2, arXiv 2406.09414) from transformers: depth of single pictures, differentiable.

The output is inverse depth, 0 in the sky. The published relative models give it up to a scale and a shift, which may
differ from picture to picture; the metric models and the embedded one give it in 1 / metres.

Under autocast only the decoder is computed in bf16. With the backbone in bf16 too, the reward's gradient was up to 9
times too long (at the true clip of tests/test_rewards.py); with the backbone in float32 its error is 1%.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

from posttrain.core.files import replacing
from posttrain.models.base import ModelConfig
from posttrain.models.folders import network
from posttrain.nets.precision import widened
from posttrain.nets.sam2 import MEAN, STD

NEAREST = 0.01  # metres; a metric model's depth is clamped to this before it is inverted


class Depth(nn.Module):
    """A Depth Anything that scales and normalises its pictures."""

    def __init__(self, net: DepthAnythingForDepthEstimation) -> None:
        super().__init__()
        self.net = net
        # these weights are never used, so they get no gradient, and DDP would wait for one
        self.net.backbone.embeddings.mask_token.requires_grad_(False)
        self.net.neck.fusion_stage.layers[0].residual_layer1.requires_grad_(False)
        self.eval()

    def pictures(self, pictures_NCHW: Tensor) -> Tensor:
        """Inverse depth (N, H, W) of pictures in [-1, 1].

        For the network, the pictures are scaled: the shorter side to the backbone's size, both sides to whole patches.
        """
        height, width = pictures_NCHW.shape[-2:]
        patch, side = self.net.config.patch_size, self.net.backbone.config.image_size
        size = [patch * max(1, round(length * side / min(height, width) / patch)) for length in (height, width)]
        shown = (widened(pictures_NCHW) + 1) / 2
        if size != [height, width]:
            shown = F.interpolate(shown, size, mode="bicubic", antialias=True)
        mean, std = (shown.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
        shown = (shown - mean) / std
        with torch.autocast(shown.device.type, enabled=False):  # in bf16 the gradient may have another direction
            features = self.net.backbone.forward_with_filtered_kwargs(shown).feature_maps
        grid = [length // patch for length in size]
        inverse = widened(self.net.head(self.net.neck(features, *grid), *grid))
        if self.net.config.depth_estimation_type == "metric":
            inverse = 1 / inverse.clamp_min(NEAREST)
        if size != [height, width]:
            inverse = F.interpolate(inverse[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
        return inverse

    def forward(self, video_BCFHW: Tensor) -> Tensor:
        """Inverse depth (B, F, H, W) of each picture of a video in [-1, 1]."""
        inverse = self.pictures(video_BCFHW.transpose(1, 2).flatten(0, 1))
        return inverse.unflatten(0, (len(video_BCFHW), video_BCFHW.shape[2]))


def new(config: DepthAnythingConfig, seed: int = 0) -> Depth:
    """Random weights; the last bias makes the output about 1 / (2 metres), so the last ReLU passes a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DepthAnythingForDepthEstimation(config)
    nn.init.constant_(net.head.conv3.bias, 0.5)
    return Depth(net)


class Model:
    """A depth network. Calling it gives inverse depth (B, F, H, W); see `Depth.forward`."""

    def __init__(self, module: Depth) -> None:
        self.module: nn.Module = module
        self._depth = module

    def __call__(self, video_BCFHW: Tensor) -> Tensor:
        return self.module(video_BCFHW)

    def save(self, path: Path) -> None:
        """Write the transformers folder (config.json, model.safetensors) `path`."""
        with replacing(path) as temporary:
            self._depth.net.save_pretrained(temporary)


def load(config: ModelConfig, device: str = "cpu") -> Model:
    """The Depth Anything in `config.path`: a transformers folder, or a hub id such as
    depth-anything/Depth-Anything-V2-Small-hf; "pocket" is the embedded one.

    Raises:
        UserError: the folder does not hold a DepthAnythingForDepthEstimation, or is incomplete.
    """
    net = network(DepthAnythingForDepthEstimation, config, "depth")
    module = new(net, config.seed) if config.init == "random" else Depth(net)
    return Model(module.to(device))
