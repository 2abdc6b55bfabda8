"""The Wan VAE's decoder without hidden state, so that the gradient of a long clip fits into memory.

diffusers decodes latent frame by latent frame and passes the causal convolutions' last inputs ("feature caches") on in
a list that it changes. Here decoding a latent frame is a pure function, (latent, caches) -> (pixels, caches), of the
same layers in the same order, which the backward pass recomputes. Memory is then needed only for the activations of one
latent frame and for the caches between all latent frames; these can be kept in main memory (`offload`).

The pixels equal those of `AutoencoderKLWan.decode` bit for bit, and so does the gradient for pixels in the range. A
pixel outside the range has no gradient in diffusers, so training could not move it back; here see `pixels.clamp`.

Axes: B batch, C channels, F frames (of latents; of pixels where they are called video), H W cells or pixels.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from posttrain.models.pixels import clamp

# what a causal convolution hands on: its last inputs, or None before the first frame, or diffusers' mark after it
Cache = Tensor | str | None


def decode(vae: AutoencoderKLWan, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
    """Pixels video_BCFHW in [-1, 1] of the VAE's own (not normalised) latents; see above.

    Args:
        recompute: False keeps everything for the backward pass, which is faster.
        offload: keep the caches (`cache_bytes` in total) in main memory, pinned if there is a GPU.
    """
    again = partial(checkpoint, _chunk, use_reentrant=False) if recompute else _chunk
    caches: Sequence[Cache] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    pixels = []
    for number, z_BC1HW in enumerate(vae.post_quant_conv(z_BCFHW).split(1, dim=2)):
        with save_on_cpu(pin_memory=z_BCFHW.is_cuda) if offload else nullcontext():
            video_BCFHW, *caches = again(vae, number == 0, z_BC1HW, *caches)
        pixels.append(video_BCFHW)
    return torch.cat(pixels, dim=2)


def _chunk(vae: AutoencoderKLWan, first: bool, z_BC1HW: Tensor, *caches: Cache) -> tuple[Any, ...]:
    """The pictures of one latent frame (one of the first, four of the others), and the caches for the next."""
    after = list(caches)
    out_BCFHW = vae.decoder(z_BC1HW, feat_cache=after, feat_idx=[0], first_chunk=first)
    if vae.config.patch_size is not None:
        out_BCFHW = unpatchify(out_BCFHW, patch_size=vae.config.patch_size)
    return clamp(out_BCFHW), *after


@torch.no_grad()
def cache_bytes(vae_config: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """Bytes of the float32 caches at each boundary between two latent frames, for latents of `shape` (B C F H W).

    Their sum is what `decode` keeps for the backward pass besides one latent frame's own.
    """
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(dict(vae_config))
        caches: Sequence[Cache] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        found = []
        for number, z_BC1HW in enumerate(torch.empty(*shape).split(1, dim=2)):
            found.append(sum(cache.nbytes for cache in caches if isinstance(cache, Tensor)))
            _, *caches = _chunk(vae, number == 0, z_BC1HW, *caches)
    return found[1:]
