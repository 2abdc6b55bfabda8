"""Open-Sora behind the family protocol: the same numbers as in its own terms, in our time and sign."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_opensora import TEXT_TOKENS, TEXT_WIDTH, opensora_folder
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.data.dataset import to_float
from posttrain.evaluation import sample as sampling
from posttrain.flow import SamplerConfig, frame_times, interpolate, sample
from posttrain.methods import oro, psft
from posttrain.models.base import ModelConfig
from posttrain.models.opensora.loading import load
from posttrain.models.opensora.model import OpenSora
from posttrain.models.opensora.rflow import rflow_loss, rflow_sample
from posttrain.rewards.base import total
from posttrain.types import Batch, Random

CAPTIONS = ["a ball falls", "a red ball falls from the table"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opensora_folder(tmp_path_factory.mktemp("tiny") / "model")


def model(folder: Path, **changes: Any) -> OpenSora:
    return load(ModelConfig(path=str(folder), **changes))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(batch: int, fps: float = 8.0, size: tuple[int, int] = (24, 32)) -> dict[str, Tensor]:
    return {
        name: torch.full((batch,), float(v)) for name, v in zip(("fps", "height", "width"), (fps, *size), strict=True)
    }


def lengths(text_BLD: Tensor) -> list[int]:
    return [int((row != 0).any(-1).sum()) for row in text_BLD]


def test_texts_are_zero_behind_their_end(folder: Path) -> None:
    text_BLD = model(folder).encode_text([*CAPTIONS, ""])
    assert text_BLD.shape == (3, TEXT_TOKENS, TEXT_WIDTH)
    assert text_BLD.dtype == torch.float32
    assert lengths(text_BLD) == [4, 8, 0]


@pytest.mark.parametrize("conditioning", ["image", "text"])
def test_velocity_is_the_transformer_turned(folder: Path, conditioning: str) -> None:
    video = model(folder, conditioning=conditioning)
    text_BLD, z = video.encode_text(CAPTIONS), noise(2, 4, 5, 3, 4)
    assert video.n_cond_frames == (conditioning == "image")
    t_BF = frame_times(torch.tensor([0.3, 0.9]), 5, video.n_cond_frames)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[4], [8]])
    clean = torch.tensor([[False, True, True, True, True]] * 2) if video.n_cond_frames else None
    with torch.no_grad():
        v = video.velocity(z, t_BF, text_BLD)
        own = video.transformer(z, torch.tensor([300.0, 900.0]), text_BLD[:, None], mask, clean, **conditions(2))
    torch.testing.assert_close(v, -own[:, :4], rtol=1e-4, atol=1e-5)


def test_no_text_is_the_learned_one(folder: Path) -> None:
    """Whole where it stands alone; where the other half of a batch has texts, as long as these."""
    video = model(folder)
    null_LD, z = video.transformer.y_embedder.y_embedding, noise(2, 4, 5, 3, 4)
    text_BLD, none_BLD = video.encode_text(CAPTIONS), video.encode_text(["", ""])
    t_BF = frame_times(torch.tensor([0.3, 0.9]), 5, 1)
    with torch.no_grad():
        alone = video.velocity(z, t_BF, none_BLD)
        torch.testing.assert_close(alone, video.velocity(z, t_BF, null_LD.expand(2, -1, -1)), rtol=1e-4, atol=1e-5)
        mixed = video.velocity(z, t_BF, torch.stack([text_BLD[0], none_BLD[1]]))
        torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)
        cut_BLD = null_LD * (torch.arange(TEXT_TOKENS) < torch.tensor([[4], [8]]))[..., None]
        twice = video.velocity(torch.cat([z, z]), torch.cat([t_BF, t_BF]), torch.cat([none_BLD, text_BLD]))
        torch.testing.assert_close(twice[:2], video.velocity(z, t_BF, cut_BLD), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twice[2:], video.velocity(z, t_BF, text_BLD), rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_the_learned_text_of_its_length(folder: Path) -> None:
    """As the published class drops it in training: the mask stays the caption's. The learned text has a gradient."""
    video = model(folder)
    z0, text_BLD, empty_1LD = noise(2, 4, 5, 3, 4), video.encode_text(CAPTIONS), video.encode_text([""])
    inner = video.transformer
    inner.y_embedder.y_embedding.requires_grad_()
    batch = Batch(("a", "b"), z0, text_BLD)
    config = psft.Config(drop_caption=1.0)
    loss, _ = psft.psft_loss(video, batch, config, Random(0, 0, [0, 1]), empty_1LD)
    loss.backward()
    longest = max(lengths(text_BLD))
    reached = inner.y_embedder.y_embedding.grad.abs().amax(1) > 0
    assert reached.tolist() == [i < longest for i in range(TEXT_TOKENS)]
    assert inner.x_embedder.proj.weight.grad.abs().max() > 0

    random = Random(0, 0, [0, 1])
    u = torch.sigmoid(random.normal())
    t, eps = 1000 * config.shift * u / (1 + (config.shift - 1) * u), random.normal(*z0.shape[1:])
    frames = torch.tensor([[False] + [True] * 4] * 2)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[4], [8]])
    inner.train()
    inner.y_embedder.dropout = 1.0
    losses = rflow_loss(inner, z0, eps, t, frames, y=text_BLD[:, None], y_mask=mask, **conditions(2))
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=1e-5)

    config = psft.Config(drop_caption=1e-9)  # none is dropped
    inner.y_embedder.y_embedding.grad = None
    inner.eval()
    psft.psft_loss(video, batch, config, Random(0, 0, [0, 1]), empty_1LD)[0].backward()
    assert not inner.y_embedder.y_embedding.grad.any()


def test_oro_is_given_the_first_latent_of_sampling(folder: Path) -> None:
    """The clean frame that the transformer sees in `sample_clips` and in ORO; that of the whole clip is another."""
    video, seen = model(folder), list[Tensor]()
    pixels = np.random.default_rng(0).integers(0, 256, (17, 16, 16, 3), dtype=np.uint8)
    whole = to_float(pixels)[None]
    with torch.no_grad():
        z0 = video.encode(whole)
    video.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, :, :1].detach()))
    sampling.sample_clips(video, pixels[None, 0], CAPTIONS[:1], [0], 17, 1)
    batch = Batch(("a",), z0, video.encode_text(CAPTIONS[:1]), whole)
    bright = total({"bright": (1.0, lambda video_BCFHW, batch: video_BCFHW.flatten(1).mean(1))})
    oro.oro_loss(video, batch, bright, oro.Sampling(sampler=SamplerConfig(steps=1)), Random(0, 0, [0]))
    sampled, rewarded = seen
    assert torch.equal(sampled, rewarded)
    assert (sampled - z0[:, :, :1]).abs().max() > 1e-4


@pytest.mark.parametrize("conditioning", ["image", "text"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_our_sampler_is_open_soras(folder: Path, conditioning: str, guidance: float) -> None:
    video = model(folder, conditioning=conditioning)
    shape = video.latent_shape(32, 24, 32)
    assert shape == (4, 9, 3, 4)
    z, first = noise(2, *shape), noise(2, 4, 1, 3, 4, seed=1)
    text_BLD, negative_BLD = video.encode_text(CAPTIONS), video.encode_text(["", ""])
    clean = first if conditioning == "image" else None
    with torch.no_grad():
        ours = sample(video, video.scheduler(), z, text_BLD, clean, 5, guidance, negative_BLD)

        frame_mask = None
        if clean is not None:
            z[:, :, :1], frame_mask = first, torch.tensor([[0.0] + [1.0] * 8] * 2)
        mask = torch.arange(TEXT_TOKENS) < torch.tensor([[4], [8]])
        told = conditions(2) | {"num_frames": torch.full((2,), 32.0)}
        theirs = rflow_sample(video.transformer, z, 5, guidance, frame_mask, y=text_BLD[:, None], mask=mask, **told)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert float((ours - z).abs().mean()) > 0.1


def test_our_loss_is_open_soras(folder: Path) -> None:
    video = model(folder)
    z0, text_BLD = noise(2, 4, 9, 3, 4), video.encode_text(CAPTIONS)
    batch = Batch(("a", "b"), z0, text_BLD)
    config = psft.Config(shift=0.5 * 5**0.5)  # the transform's r of 256 x 256 pixels and 32 pictures
    loss, _ = psft.psft_loss(video, batch, config, Random(0, 0, [0, 1]))

    random = Random(0, 0, [0, 1])
    u = torch.sigmoid(random.normal())
    t = 1000 * config.shift * u / (1 + (config.shift - 1) * u)
    eps, frames = random.normal(*z0.shape[1:]), torch.tensor([[False] + [True] * 8] * 2)
    mask = torch.arange(TEXT_TOKENS) < torch.tensor([[4], [8]])
    losses = rflow_loss(video.transformer, z0, eps, t, frames, y=text_BLD[:, None], y_mask=mask, **conditions(2))
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=1e-5)


def test_sizes(folder: Path) -> None:
    video = model(folder)
    counts = {1: 1, 16: 4, 17: 5, 18: 6, 32: 9, 34: 10, 51: 15}
    for frames, wanted in counts.items():
        assert video.latent_shape(frames, 16, 24) == (4, wanted, 2, 3)
        assert video.latent_frames(frames) == wanted
        z = noise(1, 4, wanted, 2, 3)
        with torch.no_grad():
            assert video.decode(z).shape == (1, 3, frames, 16, 24)
    with pytest.raises(UserError) as error:
        video.latent_shape(32, 20, 24)
    assert (error.value.code, error.value.field) == ("mismatch", "data.clips")


@pytest.mark.slow
def test_the_first_pictures_of_a_clip(folder: Path) -> None:
    """A piece of 17 pictures begins with 3 zeros, one of 15 (the second of 32) with one."""
    video = model(folder)
    video.latent_shape(32, 16, 16)
    assert [video.latent_frames(n) for n in (1, 2, 5, 6, 17, 18, 20, 21, 32)] == [1, 2, 2, 3, 5, 6, 6, 7, 9]
    decoded = {}
    with torch.no_grad():
        for latents in (1, 2, 5, 6, 7, 9):
            decoded[latents] = video.decode(noise(1, 4, latents, 2, 2)).shape[2]
    assert decoded == {1: 1, 2: 5, 5: 17, 6: 20, 7: 24, 9: 32}


@pytest.mark.slow
def test_what_was_encoded_is_decoded_to_its_length(folder: Path) -> None:
    video = model(folder)
    pixels = torch.rand(2, 3, 31, 16, 16) * 2 - 1
    with torch.no_grad():
        z = video.encode(pixels)
        assert torch.equal(z, video.vae.encode(pixels, sample=False))
        assert torch.equal(z, video.encode(pixels))
        assert torch.equal(video.encode(pixels[:, :, :1]), video.vae.encode(pixels[:, :, :1], sample=False))
        assert video.decode(z).shape == pixels.shape
        assert torch.equal(video.decode(z), video.vae.decode(z, 31).clamp(-1, 1))
    assert video.condition(pixels[:, :, :1], 31) == {}


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_pixels_have_gradients(folder: Path, offload: bool) -> None:
    video = model(folder)
    video.latent_shape(32, 16, 16)
    gradients = []
    for recompute in (True, False):
        z = noise(1, 4, 9, 2, 2).requires_grad_()
        decoded = video.decode(z, recompute, offload)
        decoded.square().mean().backward()
        assert float(decoded.detach().abs().max()) <= 1
        gradients.append(z.grad)
    assert torch.equal(*gradients)
    assert all(parameter.grad is None for parameter in video.vae.parameters())


def test_a_gradient_passes_the_whole_sampler(folder: Path) -> None:
    video = model(folder)
    shape = video.latent_shape(5, 16, 16)
    z = sample(video, video.scheduler(), noise(1, *shape), video.encode_text(CAPTIONS[:1]), noise(1, 4, 1, 2, 2), 2)
    video.decode(z).mean().backward()
    lacking = [n for n, p in video.transformer.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


def test_autocast_is_near_float32(folder: Path) -> None:
    video = model(folder)
    z, text_BLD, t_BF = noise(2, 4, 9, 3, 4), video.encode_text(CAPTIONS), frame_times(torch.tensor([0.5, 0.8]), 9, 1)
    z_t = interpolate(z, noise(2, 4, 9, 3, 4, seed=1), t_BF)
    with torch.no_grad():
        exact = video.velocity(z_t, t_BF, text_BLD)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = video.velocity(z_t, t_BF, text_BLD)
    assert coarse.dtype == torch.float32
    assert float((coarse - exact).abs().mean() / exact.std()) < 0.03


def test_key_of_the_cache(folder: Path) -> None:
    video, again = model(folder), model(folder, init="random")
    assert video.cache_key() == again.cache_key()
    again.text_encoder.shared.weight.data[5] += 1
    del again._key
    assert video.cache_key() != again.cache_key()


@pytest.mark.slow
def test_parts_are_let_go_and_read_again(folder: Path) -> None:
    video = model(folder)
    before = video.vae
    video.release()
    assert video.vae is before
    video.unload()
    assert video.vae is not before
    assert video.weights() == [video.transformer]
