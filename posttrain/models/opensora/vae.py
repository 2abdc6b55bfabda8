"""The autoencoder of Open-Sora v1.2: diffusers' image autoencoder frame by frame, then one along time on its latents.

Time is cut into pieces of 17 frames (5 latents). A last piece of r frames has ceil(r / 4) latents: in the encoder it is
padded with zeros in front to a multiple of 4, and the decoder drops as many frames there.

Shapes: B clips, C channels, T frames, H W pixels or cells. Latents are normalised: (z - shift) / scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.models.opensora.weights import Published

# of the published image autoencoder, in diffusers' terms
SPATIAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
SCALE = (3.85, 2.32, 2.33, 3.06)
SHIFT = (-0.10, 0.34, 0.27, 0.98)


def statistics(scale: Sequence[float] | None, shift: Sequence[float] | None, channels: int) -> tuple[Tensor, Tensor]:
    """scale and shift as (1, C, 1, 1, 1); None: the published ones for their number of channels, else 1 and 0."""
    published = channels == len(SCALE)
    scale = scale or (SCALE if published else (1.0,) * channels)
    shift = shift or (SHIFT if published else (0.0,) * channels)
    return torch.tensor(scale).view(1, -1, 1, 1, 1), torch.tensor(shift).view(1, -1, 1, 1, 1)


def count_latents(frames: int, piece: int | None = 17, factor: int = 4) -> int:
    """How many latent frames so many frames have: 1 -> 1, 16 -> 4, 17 -> 5, 32 -> 9, 34 -> 10."""
    if piece is None:
        return math.ceil(frames / factor)
    return frames // piece * math.ceil(piece / factor) + math.ceil(frames % piece / factor)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: time is padded with zeros in front alone, space on both sides."""

    def __init__(self, channels: int, out: int, size: int, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.padding = (*(size // 2,) * 4, size - 1 + 1 - time_stride, 0)
        self.conv = nn.Conv3d(channels, out, size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCTHW, self.padding))


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv3d(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = CausalConv3d(out, out, 3, bias=False)
        if channels != out:
            self.conv3 = CausalConv3d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv3(x) if hasattr(self, "conv3") else x)


def _blocks(channels: int, out: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(channels if j == 0 else out, out, groups) for j in range(count))


def _through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class Encoder(nn.Module):
    """Levels of residual blocks; behind a level, time is halved where `downsample` says so."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], count: int, downsample: Sequence[bool], groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[0], 3, bias=False)
        before = [widths[0], *widths[:-1]]
        self.block_res_blocks = nn.ModuleList(
            _blocks(channels, width, count, groups) for channels, width in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if halved else nn.Identity()
            for width, halved in zip(widths[:-1], downsample, strict=True)
        )
        self.res_blocks = _blocks(widths[-1], widths[-1], count, groups)
        self.norm1 = nn.GroupNorm(groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = _through(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        return self.conv2(F.silu(self.norm1(_through(self.res_blocks, x))))


class Decoder(nn.Module):
    """The levels of the encoder backwards; where that halved time, twice the channels become twice the frames."""

    def __init__(
        self, channels: int, out: int, widths: Sequence[int], count: int, downsample: Sequence[bool], groups: int
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, widths[-1], 3)
        self.res_blocks = _blocks(widths[-1], widths[-1], count, groups)
        before = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            _blocks(channels, width, count, groups) for channels, width in zip(before, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width, 3) if doubled else nn.Identity()
            for width, doubled in zip(widths[1:], downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], out, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = _through(self.res_blocks, self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _through(self.block_res_blocks[level], x)
            if level > 0:
                conv = self.conv_blocks[level - 1]
                x = conv(x)
                if isinstance(conv, CausalConv3d):  # channels (c, 2) to frames (t, 2)
                    x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Clips of image latents to a quarter of their frames and back; the defaults are those of the published model.

    Args:
        in_out_channels: of the image latents.
        latent_embed_dim: channels between encoder and `quant_conv`, and between `post_quant_conv` and decoder.
        embed_dim: channels of the latents.
        filters: channels of the first level; the others have `channel_multipliers` times as many.
        temporal_downsample: whether time is halved behind each level but the last.
    """

    def __init__(
        self,
        in_out_channels: int = 4,
        latent_embed_dim: int = 4,
        embed_dim: int = 4,
        filters: int = 128,
        num_res_blocks: int = 4,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        temporal_downsample: Sequence[bool] = (False, True, True),
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.time_factor = 2 ** sum(temporal_downsample)
        widths = [filters * multiplier for multiplier in channel_multipliers]
        shape = widths, num_res_blocks, temporal_downsample, num_groups
        self.encoder = Encoder(in_out_channels, 2 * latent_embed_dim, *shape)
        self.quant_conv = CausalConv3d(2 * latent_embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = CausalConv3d(embed_dim, latent_embed_dim, 1)
        self.decoder = Decoder(latent_embed_dim, in_out_channels, *shape)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar), each (B, embed_dim, ceil(T / 4), H, W), of x (B, in_out_channels, T, H, W)."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time_factor, 0))
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """(B, in_out_channels, num_frames, H, W) of z with ceil(num_frames / 4) latent frames."""
        if math.ceil(num_frames / self.time_factor) != z.shape[2]:
            raise ValueError(f"{num_frames} frames do not have {z.shape[2]} latents")
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.time_factor :]


class SpatialVAE(nn.Module):
    """diffusers' AutoencoderKL under the published name of its parameters."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = AutoencoderKL(**config)


class OpenSoraVAE(Published):
    """Pixels in [-1, 1] to normalised latents and back; the defaults are those of the published model.

    Args:
        temporal: arguments of TemporalVAE.
        spatial: arguments of diffusers' AutoencoderKL; None: the published ones.
        scale, shift: per channel; where the weights' file has them, these count. None: see `statistics`.
        spatial_scaling_factor: what the image latents are multiplied by.
        micro_frame_size: frames that go through the temporal autoencoder at once; None: all.
        micro_batch_size: frames that go through the image autoencoder at once, for memory alone; None: all.
    """

    ignore_for_config = ("scale", "shift")  # they are buffers, and diffusers would give the config's for those

    @register_to_config
    def __init__(
        self,
        temporal: dict[str, Any] | None = None,
        spatial: dict[str, Any] | None = None,
        scale: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
        spatial_scaling_factor: float = 0.18215,
        micro_frame_size: int | None = 17,
        micro_batch_size: int | None = 4,
    ) -> None:
        super().__init__()
        self.spatial_vae = SpatialVAE(SPATIAL if spatial is None else spatial)
        self.temporal_vae = TemporalVAE(**(temporal or {}))
        scale_1C111, shift_1C111 = statistics(scale, shift, self.channels)
        self.register_buffer("scale", scale_1C111)
        self.register_buffer("shift", shift_1C111)
        self.spatial_scaling_factor = spatial_scaling_factor
        self.micro_frame_size, self.micro_batch_size = micro_frame_size, micro_batch_size

    @classmethod
    def constants(cls, config: dict[str, Any]) -> dict[str, Tensor]:
        channels = (config.get("temporal") or {}).get("embed_dim", len(SCALE))
        scale, shift = statistics(config.get("scale"), config.get("shift"), channels)
        return {"scale": scale, "shift": shift}

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.temporal_vae.post_quant_conv.conv.in_channels

    @property
    def space_factor(self) -> int:
        """Pixels along each side of a latent cell."""
        return 2 ** (len(self.spatial_vae.module.config.block_out_channels) - 1)

    def encode(self, video: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, T', H // 8, W // 8) of pixels (B, 3, T, H, W).

        Args:
            sample: draw from both posteriors, first the image latents, `micro_batch_size` frames at a time, then the
                pieces in turn; else take their means.
        """
        latents = []
        for mean, logvar in self._posteriors(video, sample, generator):
            posterior = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
            latents.append(posterior.sample(generator) if sample else mean)
        return (torch.cat(latents, dim=2) - self.shift) / self.scale

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents, not normalised; of the image latents their means are taken."""
        means, logvars = zip(*self._posteriors(video, sample=False), strict=True)
        return torch.cat(means, dim=2), torch.cat(logvars, dim=2)

    def _posteriors(
        self, video: Tensor, sample: bool, generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(mean, logvar) of each piece along time."""
        frames = video.transpose(1, 2).flatten(0, 1)
        drawn = []
        for some in frames.split(self.micro_batch_size or len(frames)):
            posterior = self.spatial_vae.module.encode(some).latent_dist
            drawn.append(posterior.sample(generator) if sample else posterior.mode())
        x = torch.cat(drawn).unflatten(0, video.shape[:1] + video.shape[2:3]).transpose(1, 2)
        x = x * self.spatial_scaling_factor
        return [self.temporal_vae.encode(piece) for piece in x.split(self.micro_frame_size or x.shape[2], dim=2)]

    def decode(self, z: Tensor, num_frames: int, recompute: bool = True) -> Tensor:
        """Pixels (B, 3, num_frames, 8 H, 8 W) of latents; differentiable, not clamped.

        Args:
            recompute: the backward pass computes again what it needs, piece by piece, with the same gradient.
        """
        wanted = count_latents(num_frames, self.micro_frame_size, self.temporal_vae.time_factor)
        if wanted != z.shape[2]:
            raise ValueError(f"{num_frames} frames have {wanted} latents, not {z.shape[2]}")
        z = z * self.scale + self.shift
        piece = self.micro_frame_size or num_frames
        lengths = [min(piece, num_frames - first) for first in range(0, num_frames, piece)]
        parts = z.split(math.ceil(piece / self.temporal_vae.time_factor), dim=2)
        again = recompute and torch.is_grad_enabled() and z.requires_grad
        x = torch.cat(
            [
                _run(partial(self.temporal_vae.decode, num_frames=length), part, again)
                for part, length in zip(parts, lengths, strict=True)
            ],
            dim=2,
        )
        frames = (x / self.spatial_scaling_factor).transpose(1, 2).flatten(0, 1)
        pixels = [_run(self._pixels, some, again) for some in frames.split(self.micro_batch_size or len(frames))]
        return torch.cat(pixels).unflatten(0, (len(z), num_frames)).transpose(1, 2)

    def _pixels(self, z_NCHW: Tensor) -> Tensor:
        pixels: Tensor = self.spatial_vae.module.decode(z_NCHW, return_dict=False)[0]
        return pixels


def _run(function: Callable[[Tensor], Tensor], x: Tensor, again: bool) -> Tensor:
    out: Tensor = checkpoint(function, x, use_reentrant=False) if again else function(x)
    return out
