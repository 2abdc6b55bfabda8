"""Open-Sora's video autoencoder for training: its parts for pictures and for time together, and how it is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.models.opensora.loading import folder_of
from posttrain.models.opensora.vae import OpenSoraVAE


class Reconstruction(nn.Module):
    """Encode, sample, decode in one call, as a distributed wrapper around it needs."""

    def __init__(self, vae: OpenSoraVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x_BCFHW: Tensor, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(y_BCFHW, mean, logvar); `normal(C, F, H, W)` gives standard normal numbers for at least B items."""
        mean, logvar = self.vae.moments(x_BCFHW)
        eps = normal(*mean.shape[1:])[: len(x_BCFHW)].to(mean)
        z_BCFHW = (mean + (0.5 * logvar).exp() * eps - self.vae.shift) / self.vae.scale
        return self.vae.decode(z_BCFHW, x_BCFHW.shape[2], recompute=False), mean, logvar


class Autoencoder:
    """An OpenSoraVAE that is trained, and how it is saved."""

    def __init__(self, vae: OpenSoraVAE) -> None:
        self.vae = vae
        self.module: nn.Module = Reconstruction(vae)

    def means(self, x_BCFHW: Tensor) -> Tensor:
        """Posterior means, not normalised."""
        return self.vae.moments(x_BCFHW)[0]

    def set_statistics(self, z_NC: Tensor) -> None:
        """As nets/vae.py: the latents will be normalised by the mean and the standard deviation of these."""
        std_C, mean_C = torch.std_mean(z_NC.double(), dim=0)
        self.vae.scale.copy_(std_C.view_as(self.vae.scale))
        self.vae.shift.copy_(mean_C.view_as(self.vae.shift))

    def save(self, path: Path) -> None:
        """Write config.json and model.safetensors, which has the latents' mean and std."""
        self.vae.save_published(path)


def load(config: ModelConfig, device: str = "cpu") -> Autoencoder:
    """The autoencoder in the `vae` folder of a model folder; `init: random` uses only its architecture."""
    path = folder_of(config.path) / "vae"
    if not (path / "config.json").exists():
        message = f"{path / 'config.json'}: does not exist; model.path must be a folder with a vae"
        raise UserError(message, "missing", "model.path")
    if config.init == "pretrained":
        vae: OpenSoraVAE = OpenSoraVAE.from_pretrained(path, torch_dtype=torch.float32)
        return Autoencoder(vae.to(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = OpenSoraVAE(**OpenSoraVAE.read_config(path))
    # as nets/vae.py: start nearly without noise
    with torch.no_grad():
        quant: Any = vae.temporal_vae.quant_conv.conv
        quant.weight.chunk(2)[1].mul_(0.1)
        quant.bias.chunk(2)[1].sub_(6)
    return Autoencoder(vae.to(device))
