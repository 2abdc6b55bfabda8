"""An Open-Sora without weights, for the dry run of a training step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from posttrain.models import lora
from posttrain.models.base import ModelConfig, Outline
from posttrain.models.opensora.loading import DTYPES, freeze, read_configs
from posttrain.models.opensora.model import OpenSora
from posttrain.models.opensora.scheduler import RFlowScheduler
from posttrain.models.opensora.stdit import TARGETS, STDiT3
from posttrain.models.opensora.vae import OpenSoraVAE


class Timetable(RFlowScheduler):
    """The scheduler, whose times can be read where tensors have no values."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        with unset_fake_temporarily():
            super().set_timesteps(num_inference_steps)
            times = self.timesteps.tolist()
        self.timesteps = [torch.tensor(time) for time in times]


class Shapes(OpenSora):
    """Every text has all of its tokens."""

    whole_text = True

    def scheduler(self) -> RFlowScheduler:
        scheduler = Timetable()
        scheduler.clip = self._clip
        return scheduler


def outline(config: ModelConfig, frames: int, height: int, width: int) -> Outline:
    """The model of `load` without weights, for clips of this size in pixels.

    Raises:
        UserError: there is no such model, or the clips do not fit it.
    """
    return of_configs(config, *read_configs(config.path, config.revision), frames, height, width)


def of_configs(
    config: ModelConfig, transformer: Mapping[str, Any], vae: Mapping[str, Any], frames: int, height: int, width: int
) -> Outline:
    """As `outline`, from the configs of the parts; missing values are as published."""
    with torch.device("meta"):
        body = STDiT3(**transformer).eval()
        nn.Module.to(body, DTYPES[config.dtype])  # diffusers' own warns of parts to keep in float32, and there are none
        freeze(body, config.dtype == "fp32")
        if config.adapter is not None:
            adapter = config.adapter
            lora.attach(body, adapter.rank, adapter.alpha, adapter.targets or TARGETS, config.seed)
        decoder = OpenSoraVAE(**vae).requires_grad_(False).eval()
    model = Shapes(body, decoder, {"vae": lambda: decoder}, None, conditioning=config.conditioning)
    _, latents, rows, columns = model.latent_shape(frames, height, width)
    _, patch_h, patch_w = body.config.patch_size
    tokens = latents * -(-rows // patch_h) * -(-columns // patch_w)
    return Outline(model, decoder, tokens, body.config.caption_channels, {})
