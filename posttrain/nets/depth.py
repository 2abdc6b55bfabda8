"""Depth Anything (V2, arXiv 2406.09414) as transformers has it: depth of single pictures, differentiable.

What comes out is inverse depth, 0 for the sky: of the published relative models up to a scale and a shift that may
differ from picture to picture; of the metric ones, and of the embedded one, in 1 / metres.

Under autocast the decoder alone is computed in bf16. With the backbone in bf16 too, the reward's gradient was up to 9
times too long (at the true clip of tests/test_rewards.py); with it in float32 it is off by 1%.
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

NEAREST = 0.01  # metres, where a metric model's answer is turned over


class Depth(nn.Module):
    """A Depth Anything, and how a video is shown to it."""

    def __init__(self, net: DepthAnythingForDepthEstimation) -> None:
        super().__init__()
        self.net = net
        # never asked, for which processes would wait
        self.net.backbone.embeddings.mask_token.requires_grad_(False)
        self.net.neck.fusion_stage.layers[0].residual_layer1.requires_grad_(False)
        self.eval()

    def pictures(self, pictures_NCHW: Tensor) -> Tensor:
        """Inverse depth (N, H, W) of pictures in [-1, 1].

        They are scaled so that the shorter side is what the backbone was made for, in whole patches.
        """
        height, width = pictures_NCHW.shape[-2:]
        patch, side = self.net.config.patch_size, self.net.backbone.config.image_size
        size = [patch * max(1, round(length * side / min(height, width) / patch)) for length in (height, width)]
        shown = (widened(pictures_NCHW) + 1) / 2
        if size != [height, width]:
            shown = F.interpolate(shown, size, mode="bicubic", antialias=True)
        mean, std = (shown.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
        shown = (shown - mean) / std
        with torch.autocast(shown.device.type, enabled=False):  # in bf16 its gradient may point elsewhere
            features = self.net.backbone.forward_with_filtered_kwargs(shown).feature_maps
        grid = [length // patch for length in size]
        found = widened(self.net.head(self.net.neck(features, *grid), *grid))
        if self.net.config.depth_estimation_type == "metric":
            found = 1 / found.clamp_min(NEAREST)
        if size != [height, width]:
            found = F.interpolate(found[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
        return found

    def forward(self, video_BCFHW: Tensor) -> Tensor:
        """Inverse depth (B, F, H, W) of each picture of a video in [-1, 1]."""
        found = self.pictures(video_BCFHW.transpose(1, 2).flatten(0, 1))
        return found.unflatten(0, (len(video_BCFHW), video_BCFHW.shape[2]))


def new(config: DepthAnythingConfig, seed: int = 0) -> Depth:
    """Random weights whose answer is 1 / (2 metres) on the average, where its last ReLU lets a gradient through."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DepthAnythingForDepthEstimation(config)
    nn.init.constant_(net.head.conv3.bias, 0.5)
    return Depth(net)


class Model:
    """A depth network and how it is saved."""

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
    """The Depth Anything in `config.path`: a transformers folder, or a hub id as
    depth-anything/Depth-Anything-V2-Small-hf; "pocket" is the embedded one.

    Raises:
        UserError: it is no DepthAnythingForDepthEstimation, or not a whole one.
    """
    found = network(DepthAnythingForDepthEstimation, config, "depth")
    module = new(found, config.seed) if config.init == "random" else Depth(found)
    return Model(module.to(device))
