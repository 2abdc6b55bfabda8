"""posttrain/pretraining/appearance.py: what is recoloured and degraded, and which clips an autoencoder has seen."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from helpers.tiny import TINY_VAE

from posttrain.pretraining import appearance

VIDEO = torch.rand(3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
BODIES = torch.zeros(5, 16, 16, dtype=torch.bool)
BODIES[:, 4:9, 4:9] = True


def altered(painted: float, worse: float, **config: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    colours, noise = torch.rand(12, generator=generator), torch.randn(3, 5, 16, 16, generator=generator)
    return appearance.altered(
        VIDEO, BODIES, painted, worse, colours, noise, appearance.AppearanceConfig.model_validate(config)
    )


def test_bodies_alone_are_recoloured_or_all() -> None:
    bodies, everything = altered(0.2, 0.9, recolour=0.5), altered(0.3, 0.9, recolour=0.5)
    assert torch.equal(bodies[:, ~BODIES], VIDEO[:, ~BODIES])
    assert (bodies != VIDEO).any(0)[BODIES].all()
    assert (everything != VIDEO).any(0).all()
    assert torch.equal(altered(0.5, 0.9, recolour=0.5), VIDEO)


def test_noise_grows_to_its_largest() -> None:
    """Half of it and half a blur; a grey picture shows the noise alone."""
    assert torch.equal(altered(0.9, 0.0), VIDEO)
    grey = torch.zeros(3, 5, 64, 64)
    noise = torch.randn(grey.shape, generator=torch.Generator().manual_seed(2))
    config = appearance.AppearanceConfig(degrade=0.4, noise=0.1)
    found = appearance.altered(grey, grey[0] > 0, 0.9, 0.2, torch.zeros(12), noise, config)
    torch.testing.assert_close(found, 0.05 * noise)
    dot = torch.zeros(3, 1, 3, 3)
    dot[:, :, 1, 1] = 0.9
    torch.testing.assert_close(appearance.blur(dot, 0.5)[0, 0], torch.full((3, 3), 0.05) + 0.45 * (dot[0, 0] > 0))


@pytest.mark.slow
def test_a_share_of_clips_is_seen_through_the_autoencoder(tmp_path: Path) -> None:
    """Always the same ones, each decoded once; the others as they were filmed."""
    torch.manual_seed(0)
    net = AutoencoderKLWan.from_config(TINY_VAE).eval()
    net.save_pretrained(tmp_path / "vae")
    config, names = appearance.DecodedConfig(path=str(tmp_path), share=0.5), [f"clip{i}" for i in range(40)]
    show, again = (appearance.shown(config, torch.device("cpu")) for _ in range(2))
    seen = [name for name in names if not torch.equal(show(name, VIDEO), VIDEO)]
    assert 12 <= len(seen) <= 28
    assert seen == [name for name in names if not torch.equal(again(name, VIDEO), VIDEO)]
    with torch.no_grad():
        expected = net.decode(net.encode(VIDEO[None]).latent_dist.mode()).sample[0]
    assert (show(seen[0], torch.zeros_like(VIDEO)) - expected).abs().max() < 0.51 / 127.5
    assert appearance.shown(None, torch.device("cpu"))(seen[0], VIDEO) is VIDEO
