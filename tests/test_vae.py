"""The autoencoder's training page: its loss, its crops, how it starts, and that it learns."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.tiny import wan_folder

from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.nets import vae
from posttrain.pretraining.vae import Config, crop, fly, vae_loss
from posttrain.types import Batch, Random


class Known(torch.nn.Module):
    """Its answer is known: latents of mean m and log-variance l, pictures `by` too bright."""

    def __init__(self, m: float, logvar: float, by: float | torch.Tensor) -> None:
        super().__init__()
        self.m, self.logvar, self.by = m, logvar, by

    def forward(self, x, normal):
        return x + self.by, torch.full((2,), self.m), torch.full((2,), self.logvar)


def clips(frames: int = 9, size: int = 16) -> Batch:
    """Clip i's frame t has the value (t + i) / 100 everywhere; a body covers the left half in frame 0 alone."""
    values = (torch.arange(frames) + torch.arange(3)[:, None]) / 100
    instances = torch.zeros(3, frames, size, size, dtype=torch.uint8)
    instances[:, 0, :, : size // 2] = 1
    video = values[:, None, :, None, None].expand(3, 3, frames, size, size)
    return Batch(ids=("a", "b", "c"), video_BCFHW=video, instances_BFHW=instances)


def test_loss_by_hand() -> None:
    """|e| = 0.5 everywhere: pixels 0.5 + 2 * 0.25 = 1; no edges; KL of N(2, 1) is 2."""
    x = torch.rand(2, 3, 5, 8, 8)
    config = Config(kl=0.1, difference=0.7)
    loss, metrics = vae_loss(Known(2.0, 0.0, 0.5), x, torch.ones(2, 1, 5, 8, 8), config, Random(0, 0, [0, 1]))
    assert loss.item() == pytest.approx(1 + 0.1 * 2, abs=1e-5)
    assert metrics["kl"] == pytest.approx(2)
    assert metrics["psnr"] == pytest.approx(10 * torch.log10(torch.tensor(4 / 0.25)).item(), abs=1e-4)


def test_objects_weigh_more() -> None:
    """An error on a quarter of the pixels, of weight 7 there and 1 elsewhere: 7 / (7 + 3) of the sum, not a quarter."""
    by, weight = torch.zeros(1, 3, 1, 8, 8), torch.ones(1, 1, 1, 8, 8)
    by[..., :2], weight[..., :2] = 1, 7
    config = Config(kl=0, difference=0)
    loss, _ = vae_loss(Known(0, 0, by), torch.zeros(1, 3, 1, 8, 8), weight, config, Random(0, 0, [0]))
    assert loss.item() == pytest.approx(3 * 7 / 10)


def test_crops_run_to_and_fro_through_the_clip() -> None:
    config = Config(lengths=(9,), weights=(1.0,), frames=27, max_stride=6, flying=0)
    strides = set()
    for step in range(40):
        video, weight = crop(clips(), config, Random(0, step, range(3)), still=False)
        assert video.shape == (3, 3, 9, 16, 16)
        for i in range(3):
            frames = (video[i, 0, :, 0, 0] * 100).round().long() - i
            assert ((frames >= 0) & (frames <= 8)).all()
            moves = frames.diff().abs()
            strides.add(int(moves.max()))
            # object or not, its surroundings in time weigh the object's weight, on half of the picture
            weighty = (weight[i, 0] > 1).float().mean((1, 2))
            assert set(weighty.tolist()) <= {0.0, 0.5}
            assert (weighty[frames == 0] == 0.5).all()
    assert {1, 2, 3, 4, 5, 6} <= strides


def test_every_weight_has_a_gradient_on_pictures_too(tmp_path: Path) -> None:
    """Several processes, of which one sees pictures alone, would wait for the gradients along time forever."""
    module = vae.load(ModelConfig(family="vae", path=str(wan_folder(tmp_path / "wan")), init="random")).module
    x = torch.rand(1, 3, 1, 16, 16)
    loss, _ = vae_loss(module, x, torch.ones_like(x[:, :1]), Config(), Random(0, 0, [0]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_flying_bodies_keep_their_looks_and_speed() -> None:
    """A body of one bright pixel at (0, 0), sent from (2, 3) to the right at 1.5 pixels a frame."""
    video, other = torch.zeros(3, 3, 8, 8), torch.zeros(3, 3, 8, 8)
    none, bodies = torch.zeros(3, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool)
    other[:, :, 0, 0], bodies[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0])[:, None], True
    pictures, objects = fly(video, none, other, bodies, 3.0, torch.tensor([2 / 8, 3 / 8, 0.0, 0.5]))
    assert objects.nonzero().tolist() == [[0, 2, 3], [1, 2, 4], [2, 2, 6]]  # 3, 4.5 (to even), 6
    for c, value in enumerate((1, 2, 3)):
        assert torch.equal(pictures[c], value * objects.float())
    pictures, objects = fly(video, none, other, bodies, 3.0, torch.tensor([7 / 8, 0.0, 0.25, 1.0]))
    assert objects.nonzero().tolist() == [[0, 7, 0], [1, 2, 0], [2, 5, 0]]  # down, and in again above


def test_pictures_and_budget() -> None:
    video, _ = crop(clips(), Config(), Random(0, 0, range(3)), still=True)
    assert video.shape == (3, 3, 1, 16, 16)
    video, _ = crop(clips(), Config(lengths=(5,), weights=(1.0,), frames=10), Random(0, 0, range(3)), still=False)
    assert video.shape == (2, 3, 5, 16, 16)


@pytest.mark.slow
def test_it_starts_nearly_without_noise_and_learns(tmp_path: Path) -> None:
    folder = wan_folder(tmp_path / "wan")
    model = vae.load(ModelConfig(family="vae", path=str(folder), init="random"))
    module = model.module
    size = 4 * model.vae.config.scale_factor_spatial
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size)[:, :, None]
    assert model.vae.encode(x).latent_dist.std.max() < 0.1
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    psnr = []
    for step in range(40):
        loss, metrics = vae_loss(module, x, torch.ones_like(x[:, :1]), Config(), Random(0, step, [0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        psnr.append(metrics["psnr"])
    assert psnr[-1] > psnr[0] + 2


def test_statistics_normalise_the_latents(tmp_path: Path) -> None:
    folder = wan_folder(tmp_path / "wan")
    model = vae.load(ModelConfig(family="vae", path=str(folder)))
    z_NC = torch.randn(5000, model.vae.config.z_dim) * 3 + 1
    model.set_statistics(z_NC)
    model.save(tmp_path / "out")
    read = AutoencoderKLWan.from_pretrained(tmp_path / "out").config
    normal = (z_NC - torch.tensor(read.latents_mean)) / torch.tensor(read.latents_std)
    assert normal.mean(0).abs().max() < 1e-5
    assert (normal.std(0) - 1).abs().max() < 1e-5


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae/config\.json: does not exist"):
        vae.load(ModelConfig(family="vae", path=str(tmp_path)))
