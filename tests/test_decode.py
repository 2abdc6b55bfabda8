"""The decoder without hidden state: diffusers' own pixels and gradients, in the memory of one latent frame."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.tiny import TINY_VAE, TINY_VAE_21
from torch import Tensor

from posttrain.core.meter import Meter
from posttrain.models.wan.decode import cache_bytes, clamp, decode

CONFIGS = {"2.1": TINY_VAE_21, "2.2": TINY_VAE}
SIZE = (4, 4)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def vae(config: dict[str, Any]) -> AutoencoderKLWan:
    """Its last layer is small, so that no pixel leaves the range."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKLWan.from_config(config).requires_grad_(False).eval()
    vae.decoder.conv_out.weight *= 0.2
    return vae


def latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    z_BCFHW = torch.randn(batch, 8, frames, *SIZE, generator=torch.Generator().manual_seed(seed))
    return z_BCFHW.requires_grad_()


def stock(vae: AutoencoderKLWan, z_BCFHW: Tensor) -> Tensor:
    return vae.decode(z_BCFHW, return_dict=False)[0]


def gradient(video_BCFHW: Tensor, z_BCFHW: Tensor) -> Tensor:
    """Of a sum over all pixels with different weights."""
    weights = torch.randn(video_BCFHW.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((video_BCFHW * weights).sum() + video_BCFHW.square().sum(), z_BCFHW)[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"offload": True}, {"recompute": False}], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_pixels_and_gradient_are_those_of_diffusers(vae: AutoencoderKLWan, frames: int, how: dict[str, bool]) -> None:
    z = latents(frames, batch=2 if frames == 3 else 1)
    theirs, ours = stock(vae, z), decode(vae, z, **how)
    assert ours.shape[2] == 4 * frames - 3
    assert theirs.abs().max() < 1
    assert torch.equal(ours, theirs)
    found = gradient(ours, z)
    assert torch.equal(found, gradient(theirs, z))
    assert (found.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


def test_clips_do_not_touch_each_other(vae: AutoencoderKLWan) -> None:
    """One is decoded, then another, then diffusers decodes; then the first one's gradient is taken."""
    first, second = latents(3, seed=1), latents(2, seed=2)
    video = decode(vae, first)
    decode(vae, second)
    stock(vae, second.detach())
    assert torch.equal(gradient(video, first), gradient(stock(vae, first), first))


def test_the_bytes_of_the_caches_are_those_that_diffusers_holds(vae: AutoencoderKLWan, config: dict[str, Any]) -> None:
    z, caches, held = latents(4).detach(), [None] * 100, []
    for frame in range(3):
        vae.decoder(z[:, :, frame : frame + 1], feat_cache=caches, feat_idx=[0], first_chunk=frame == 0)
        held.append(sum(cache.nbytes for cache in caches if isinstance(cache, Tensor)))
    assert cache_bytes(config, (1, 8, 4, *SIZE)) == held
    assert held[0] < held[1] == held[2]


def peak(vae: AutoencoderKLWan, frames: int, how: dict[str, bool]) -> int:
    z = latents(frames)
    with Meter() as meter:
        decode(vae, z, **how).sum().backward()
    return meter.peak


@pytest.mark.slow
def test_the_peak_is_one_latent_frame_and_the_caches(vae: AutoencoderKLWan, config: dict[str, Any]) -> None:
    """Six latent frames more cost their caches, their pixels, these pixels' gradients, and little else."""
    pixels = 6 * 4 * 3 * (8 * SIZE[0]) * (8 * SIZE[1]) * 4
    caches = sum(cache_bytes(config, (1, 8, 9, *SIZE))) - sum(cache_bytes(config, (1, 8, 3, *SIZE)))
    more = peak(vae, 9, {}) - peak(vae, 3, {})
    assert more < 1.05 * (caches + 2 * pixels)
    plain = peak(vae, 9, {"recompute": False}) - peak(vae, 3, {"recompute": False})
    assert plain > 3 * more


def test_the_clamp_keeps_the_gradient_that_leads_back() -> None:
    """Of (value, dL/dy): only where |x| > 1 and a descent would go further out is dL/dx 0."""
    x = torch.tensor([0.5, -0.5, 1.0, -1.0, 1.5, 1.5, -1.5, -1.5], requires_grad=True)
    dy = torch.tensor([2.0, -2.0, -3.0, 3.0, 4.0, -4.0, -5.0, 5.0])
    y = clamp(x)
    assert y.tolist() == [0.5, -0.5, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.tolist() == [2.0, -2.0, -3.0, 3.0, 4.0, 0.0, -5.0, 0.0]


def test_a_clip_that_overshot_comes_back(config: dict[str, Any]) -> None:
    """Decoded to nothing but white: diffusers' own decode has no gradient, here descent makes it grey again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKLWan.from_config(config).requires_grad_(False).eval()
    vae.decoder.conv_out.weight *= 0.2
    vae.decoder.conv_out.bias += 1.5
    z = latents(2)
    assert stock(vae, z).min() == 1
    assert gradient(stock(vae, z), z).abs().max() == 0
    assert torch.equal(decode(vae, z), stock(vae, z))
    (up,) = torch.autograd.grad(decode(vae, z).sum(), z)
    (down,) = torch.autograd.grad(-decode(vae, z).sum(), z)
    assert up.abs().max() > 0
    assert down.abs().max() == 0


@pytest.mark.gpu
def test_caches_wait_in_main_memory(vae: AutoencoderKLWan, config: dict[str, Any]) -> None:
    """On a GPU the peak loses them: what is offloaded is gone from the device."""
    vae.cuda()
    found = {}
    for offload in (False, True):
        z = torch.randn(1, 8, 16, 16, 16, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        decode(vae, z, offload=offload).square().sum().backward()
        found[offload] = torch.cuda.max_memory_allocated()
    vae.cpu()
    assert found[False] - found[True] > 0.7 * sum(cache_bytes(config, (1, 8, 16, 16, 16)))
