"""A Wan without weights, for the dry run of a training step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPVisionConfig

from posttrain.models import lora
from posttrain.models.base import ModelConfig, Outline
from posttrain.models.folders import load_part
from posttrain.models.wan.adapters import TARGETS
from posttrain.models.wan.folder import diffusers_folder
from posttrain.models.wan.loading import DTYPES
from posttrain.models.wan.model import Wan
from posttrain.models.wan.precision import keep_float32
from posttrain.models.wan.published import PUBLISHED, read_configs

CLIP_TOKENS = 257  # patches and class token of a picture, in the published Wan2.1 I2V


class Timetable(UniPCMultistepScheduler):
    """The scheduler of Wan's folders, whose times can be read where tensors have no values."""

    timesteps: Any

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            super().set_timesteps(*args, **kwargs)
            times = self.timesteps.tolist()
        self.timesteps = [torch.tensor(time) for time in times]
        self.set_begin_index(0)


def outline(config: ModelConfig, frames: int, height: int, width: int) -> Outline:
    """The model of `load` without weights, for clips of this size in pixels.

    Raises:
        UserError: there is no such model, or the clips do not fit it.
    """
    configs, clip_tokens = read_configs(config.path, config.revision), CLIP_TOKENS
    if config.path not in PUBLISHED or Path(config.path).is_dir():
        root = diffusers_folder(config.path, config.revision)
        if (root / "image_encoder").is_dir():
            vision = load_part(CLIPVisionConfig, root, "image_encoder")
            clip_tokens = 1 + (vision.image_size // vision.patch_size) ** 2
    return of_configs(config, *configs, frames, height, width, clip_tokens)


def of_configs(
    config: ModelConfig,
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    clip_tokens: int = CLIP_TOKENS,
) -> Outline:
    """As `outline`, from the configs of the parts; missing values are diffusers' defaults."""
    with torch.device("meta"):
        body = WanTransformer3DModel.from_config(dict(transformer))
        keep_float32(body)
        for name, parameter in body.named_parameters():
            if not set(name.split(".")) & set(body._keep_in_fp32_modules):
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        if config.adapter is not None:
            adapter = config.adapter
            lora.attach(body, adapter.rank, adapter.alpha, adapter.targets or TARGETS, config.seed)
        decoder = AutoencoderKLWan.from_config(dict(vae)).requires_grad_(False)
    scheduler = Timetable(use_flow_sigmas=True, prediction_type="flow_prediction")
    model = Wan(body, decoder.config, {"vae": lambda: decoder}, None, scheduler, conditioning=config.conditioning)
    shape, patch = model.latent_shape(frames, height, width), body.config.patch_size
    condition: dict[str, tuple[int, ...]] = {}
    if model.concatenates:
        condition["channels"] = (body.config.in_channels - shape[0], *shape[1:])
    if body.config.image_dim is not None:
        condition["image"] = (clip_tokens, body.config.image_dim)
    tokens = (shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2])
    return Outline(model, decoder, tokens, body.config.text_dim, condition)
