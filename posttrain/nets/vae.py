"""The video autoencoder for training: diffusers' AutoencoderKLWan and how it is saved."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.models.base import ModelConfig
from posttrain.pocket import whole


class Reconstruction(nn.Module):
    """Encode, sample and decode in one forward pass, so that DDP can wrap it."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x_BCFHW: Tensor, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(y_BCFHW, mean, logvar); `normal(C, F, H, W)` gives standard normal numbers for at least B items."""
        posterior = self.vae.encode(x_BCFHW).latent_dist
        eps = normal(*posterior.mean.shape[1:])[: len(x_BCFHW)].to(posterior.mean)
        return self.vae.decode(posterior.mean + posterior.std * eps).sample, posterior.mean, posterior.logvar


class Autoencoder:
    """An AutoencoderKLWan to train. `module` is the network that the training loop calls."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.module: nn.Module = Reconstruction(vae)

    def means(self, x_BCFHW: Tensor) -> Tensor:
        """Posterior means, not normalised."""
        mean: Tensor = self.vae.encode(x_BCFHW).latent_dist.mean
        return mean

    def set_statistics(self, z_NC: Tensor) -> None:
        """Store each channel's mean and standard deviation, with which models normalise the latents.

        Args:
            z_NC: raw posterior means, any number of latent cells by channels.
        """
        std_C, mean_C = torch.std_mean(z_NC.double(), dim=0)
        self.vae.register_to_config(
            latents_mean=[round(value, 6) for value in mean_C.tolist()],
            latents_std=[round(value, 6) for value in std_C.tolist()],
        )

    def save(self, path: Path) -> None:
        """Write the diffusers folder (config.json with the latents' mean and std, safetensors)."""
        with replacing(path) as temporary:
            self.vae.save_pretrained(temporary)


def load(config: ModelConfig, device: str = "cpu") -> Autoencoder:
    """The autoencoder in the `vae` folder of a model folder; `init: random` uses only its architecture."""
    path = whole("wan") if config.path == "pocket" else Path(config.path)
    if not (path / "vae" / "config.json").exists():
        message = f"{path / 'vae' / 'config.json'}: does not exist; model.path must be a diffusers folder with a vae"
        raise UserError(message, "missing", "model.path")
    if config.init == "pretrained":
        return Autoencoder(AutoencoderKLWan.from_pretrained(path / "vae").to(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(path / "vae"))
    # the posterior starts with little noise: at a log-variance of 0, noise would hide the small means of a new encoder
    with torch.no_grad():
        mean, logvar = vae.quant_conv.weight.chunk(2)
        mean.mul_(3)
        logvar.mul_(0.1)
        vae.quant_conv.bias.chunk(2)[1].sub_(6)
    return Autoencoder(vae.to(device))
