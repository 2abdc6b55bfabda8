"""Augmentation of training clips for the networks (segmenter.py, flow_net.py, depth_net.py).

The networks are used on generated clips. So training frames get other colours, noise and blur, and a fixed share of the
clips is encoded and decoded by a video autoencoder.
"""

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from posttrain.core.recipe import Strict
from posttrain.models.base import ModelConfig
from posttrain.nets import vae
from posttrain.training.checkpoints import start_fingerprint

Show = Callable[[str, Tensor], Tensor]  # (clip id, its video_CFHW) -> the video_CFHW that the network sees


class DecodedConfig(Strict):
    """The share of the clips that is decoded, and the model folder of the autoencoder ("pocket": the embedded one)."""

    path: str = "pocket"
    share: float = 0.3


class AppearanceConfig(Strict):
    """`recolour` and `degrade` are probabilities."""

    recolour: float = 0.5  # of bodies, or of the whole picture
    degrade: float = 0.4  # noise and blur
    noise: float = 0.1  # largest standard deviation, pixels in [-1, 1]
    decoded: DecodedConfig | None = None


def altered(
    video_CFHW: Tensor,
    bodies_FHW: Tensor,
    painted: float,
    worse: float,
    colours: Tensor,
    noise_CFHW: Tensor,
    config: AppearanceConfig,
) -> Tensor:
    """The clip in [-1, 1], recoloured (half of the time only its bodies) and degraded, or unchanged.

    Args:
        bodies_FHW: masks, bool.
        painted: draw in [0, 1) that chooses what is recoloured: the bodies, the whole picture, or nothing.
        worse: draw in [0, 1) that gives the strength of blur and noise, or none.
        colours: 12 draws in [0, 1).
        noise_CFHW: noise of standard deviation 1.
    """
    if painted < config.recolour:
        mask = bodies_FHW if painted < config.recolour / 2 else torch.ones_like(bodies_FHW)
        video_CFHW = recolour(video_CFHW, mask, colours)
    if worse < config.degrade:
        strength = worse / config.degrade
        video_CFHW = blur(video_CFHW, strength) + config.noise * strength * noise_CFHW.to(video_CFHW)
    return video_CFHW.clamp(-1, 1)


def recolour(video_CFHW: Tensor, mask_FHW: Tensor, draws: Tensor) -> Tensor:
    """Multiply the colours under the mask by a random matrix near a permutation, and shift them.

    `draws`: 12 numbers in [0, 1).
    """
    order = draws[:3].argsort()
    draws = draws.to(video_CFHW)
    permutation = torch.eye(3)[order].to(draws)
    matrix = permutation * (0.6 + 0.6 * draws[3:6, None]) + 0.2 * (2 * draws[6:9, None] - 1)
    mixed = torch.einsum("dc,cfhw->dfhw", matrix, video_CFHW) + 0.6 * (draws[9:12].view(3, 1, 1, 1) - 0.5)
    return torch.where(mask_FHW, mixed, video_CFHW)


def blur(video_CFHW: Tensor, strength: float) -> Tensor:
    """Mix each frame with its 3 x 3 average; `strength` in [0, 1] is the share of the average."""
    smooth = F.avg_pool2d(F.pad(video_CFHW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return video_CFHW + strength * (smooth - video_CFHW)


def unchanged(name: str, video_CFHW: Tensor) -> Tensor:
    """The clip itself."""
    return video_CFHW


def shown(config: DecodedConfig | None, device: torch.device) -> Show:
    """A function that encodes and decodes a share of the clips, and leaves the others unchanged.

    Decoding a clip takes longer than a training step, so each decoded clip is stored, as bytes. Clips are decoded whole
    and one by one, so the result does not depend on the batch.
    """
    if config is None:
        return unchanged
    share, loaded = config.share, autoencoder(config).to(device)
    kept: dict[str, Tensor] = {}

    def show(name: str, video_CFHW: Tensor) -> Tensor:
        if zlib.crc32(name.encode()) / 2**32 >= share:  # a number in [0, 1) that depends on the clip only
            return video_CFHW
        if name not in kept:
            with torch.no_grad():
                z = loaded.encode(video_CFHW[None]).latent_dist.mode()
                kept[name] = ((loaded.decode(z).sample[0] + 1) * 127.5).round().to(torch.uint8)
        return kept[name].to(video_CFHW.dtype) / 127.5 - 1

    return show


def autoencoder(config: DecodedConfig) -> AutoencoderKLWan:
    return vae.load(ModelConfig(family="vae", path=config.path)).vae.eval()


def depends(config: AppearanceConfig) -> dict[str, str]:
    """Fingerprints of what the trained weights depend on besides clips and settings: here the autoencoder."""
    return {} if config.decoded is None else {"method.decoded": start_fingerprint(autoencoder(config.decoded))}
