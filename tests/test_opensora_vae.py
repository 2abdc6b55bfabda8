"""The autoencoder of Open-Sora against its published names, and against the specification worked piece by piece."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.models.opensora.vae import SPATIAL, CausalConv3d, OpenSoraVAE, TemporalVAE, count_latents

TEMPORAL: dict[str, Any] = {"filters": 8, "num_res_blocks": 1, "channel_multipliers": (1, 2, 2, 2), "num_groups": 4}
TINY = {"temporal": TEMPORAL, "spatial": SPATIAL | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}}
TINY["spatial"] |= {"layers_per_block": 1}
LENGTHS = {1: 1, 16: 4, 17: 5, 18: 6, 32: 9, 34: 10, 51: 15, 68: 20, 102: 30, 204: 60, 408: 120}


def vae(**changes: Any) -> OpenSoraVAE:
    torch.manual_seed(1)
    return OpenSoraVAE(**TINY | changes).double().eval()


def test_names_and_shapes_are_the_published_ones() -> None:
    keys = json.loads((Path(__file__).parent / "helpers" / "opensora_keys.json").read_text())["vae"]
    with torch.device("meta"):
        made = OpenSoraVAE()
    assert {name: list(tensor.shape) for name, tensor in made.state_dict().items()} == keys
    assert sum(tensor.numel() for tensor in made.state_dict().values()) == 393_341_015
    assert sum(p.numel() for p in made.temporal_vae.parameters()) == 309_687_144
    assert sum(p.numel() for p in made.spatial_vae.parameters()) == 83_653_863


@pytest.mark.parametrize("frames", LENGTHS)
def test_latent_counts(frames: int) -> None:
    assert count_latents(frames) == LENGTHS[frames]


@pytest.mark.parametrize("frames", [1, 16, 17, 18, 32, 34, 51])
def test_lengths(frames: int) -> None:
    made = vae().float()
    video = torch.rand(1, 3, frames, 16, 27) * 2 - 1
    with torch.no_grad():
        z = made.encode(video, sample=False)
        assert z.shape == (1, 4, LENGTHS[frames], 2, 3)
        assert made.decode(z, frames).shape == (1, 3, frames, 16, 24)
        with pytest.raises(ValueError, match="latents"):
            made.decode(z, frames + 4)


def test_pieces_are_worked_alone() -> None:
    """32 frames: 17 and 15; the second is padded with one zero frame, which decoding drops again."""
    made = vae()
    video = torch.rand(2, 3, 32, 16, 16, dtype=torch.float64) * 2 - 1
    scale, shift = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in ((3.85, 2.32, 2.33, 3.06), (-0.10, 0.34, 0.27, 0.98)))
    with torch.no_grad():
        frames = [made.spatial_vae.module.encode(video[:, :, f]).latent_dist.mode() * 0.18215 for f in range(32)]
        x = torch.stack(frames, dim=2)
        time = made.temporal_vae
        padded = F.pad(x[:, :, 17:], (0, 0, 0, 0, 1, 0))
        z = torch.cat([time.encode(x[:, :, :17])[0], time.encode(padded)[0]], dim=2)
        torch.testing.assert_close(made.encode(video, sample=False), (z - shift) / scale, rtol=1e-6, atol=1e-6)

        back = torch.cat([time.decode(z[:, :, :5], 17), time.decode(z[:, :, 5:], 16)[:, :, 1:]], dim=2) / 0.18215
        pixels = [made.spatial_vae.module.decode(back[:, :, f]).sample for f in range(32)]
        decoded = made.decode((z - shift) / scale, 32)
        torch.testing.assert_close(decoded, torch.stack(pixels, dim=2), rtol=1e-5, atol=1e-5)


def test_samples_are_drawn_from_both_posteriors() -> None:
    made, video = vae().float(), torch.rand(1, 3, 17, 16, 16)
    with torch.no_grad():
        mean = made.encode(video, sample=False)
        drawn = [made.encode(video, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], mean)
        torch.manual_seed(7)
        frames = video[0].transpose(0, 1)
        x = torch.cat([made.spatial_vae.module.encode(some).latent_dist.sample() for some in frames.split(4)]) * 0.18215
        mean, logvar = made.temporal_vae.encode(x.transpose(0, 1)[None])
        by_hand = mean + (0.5 * logvar).exp() * torch.randn(mean.shape)
        torch.manual_seed(7)
        torch.testing.assert_close(made.encode(video), (by_hand - made.shift) / made.scale)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_see_no_later_frame(stride: int) -> None:
    """Output j sees inputs up to stride j + stride - 1: with stride 2, one zero is put in front."""
    made = CausalConv3d(1, 1, 3, time_stride=stride).double()
    x = torch.randn(1, 1, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    out = made(x)
    assert out.shape[2] == 8 // stride
    (gradient,) = torch.autograd.grad(out[0, 0, 2].sum(), x)
    seen = gradient.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist()
    assert seen == ([0, 1, 2] if stride == 1 else [3, 4, 5])


def test_channels_become_frames() -> None:
    """Of (c, 2) channels the outer number is the channel, the inner the frame of a pair."""
    made = TemporalVAE(**TEMPORAL | {"channel_multipliers": (1, 1), "temporal_downsample": (True,)}).double()
    decoder = made.decoder
    seen: list[Tensor] = []
    decoder.conv_blocks[0].register_forward_hook(lambda _, __, out: seen.append(out))
    decoder.block_res_blocks[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        made.decode(torch.randn(1, 4, 3, 2, 2, dtype=torch.float64), 6)
    wide, long = seen
    assert wide.shape[1:3] == (16, 3)
    assert long.shape[1:3] == (8, 6)
    for channel in range(8):
        for frame in range(6):
            assert torch.equal(long[0, channel, frame], wide[0, 2 * channel + frame % 2, frame // 2])


def test_gradient_of_what_is_computed_again() -> None:
    made = vae().requires_grad_(False).float()
    z = torch.randn(1, 4, 9, 2, 2)
    weights = torch.randn(1, 3, 32, 16, 16)
    gradients = []
    for recompute in (True, False):
        given = z.clone().requires_grad_()
        (made.decode(given, 32, recompute) * weights).sum().backward()
        assert given.grad is not None
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    assert float(gradients[0].abs().amin()) > 0


def test_gradient_is_the_slope_in_float64() -> None:
    made = vae().requires_grad_(False)
    z = torch.randn(1, 4, 2, 2, 2, dtype=torch.float64)
    direction, step = torch.randn(z.shape).double(), 1e-5
    given = z.clone().requires_grad_()
    made.decode(given, 6).square().mean().backward()
    assert given.grad is not None
    with torch.no_grad():
        values = [made.decode(z + sign * step * direction, 6).square().mean() for sign in (1, -1)]
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((given.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9)


def test_save_and_load(tmp_path: Path) -> None:
    made = vae(scale=(1.0, 2.0, 3.0, 4.0), micro_frame_size=None).float()
    made.save_pretrained(tmp_path)
    again = OpenSoraVAE.from_pretrained(tmp_path)
    assert again.scale.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]
    assert again.micro_frame_size is None
    video = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.encode(video, sample=False), made.encode(video, sample=False))
