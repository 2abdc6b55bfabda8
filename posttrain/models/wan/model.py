"""Wan 2.1 / 2.2, every size, from a diffusers folder or a hub id. Its config decides which kind of model it is:

in_channels = the VAE's            text-to-video and TI2V. The first frame is given the TI2V way: latent frame 0 is
                                   its clean latent and has timestep 0, as in Wan2.2-TI2V-5B (`expand_timesteps` of
                                   WanImageToVideoPipeline). The transformers of text-to-video models take this too and
                                   learn it from post-training.
in_channels = 2 x the VAE's + 4    image-to-video. The latents of a clip that holds the picture and then grey, and a
                                   mask of the given pictures, are further channels; all latent frames are noisy.
image_dim                          (Wan2.1 I2V) CLIP's view of the picture is attended to beside the text.
transformer_2, boundary_ratio      (Wan2.2 A14B) two experts: `transformer` for t >= boundary, `transformer_2` below.

With `conditioning: text` no picture is given: all frames are noisy, and an image-to-video model gets the mask 0.
Wan's own time is 1000 t. Text is 512 tokens, zero after the caption's end.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.models import lora
from posttrain.models.folders import load_part
from posttrain.models.parts import Parts
from posttrain.models.wan import adapters
from posttrain.models.wan.decode import decode

TEXT_TOKENS = 512
PREPROCESSING = "1"  # raise it when encode, encode_text or condition change, so that cached latents are made again


class Wan:
    """A `VideoModel` (see base.py) made of a diffusers folder's parts.

    Args:
        transformer: what is trained; of two experts, the one that `expert` names.
        vae_config: the VAE's config including defaults.
        read: function that reads "vae", "text_encoder", for Wan2.1 I2V "image_encoder", and with two experts "other",
            the one that is not trained. Called when a part is first needed, and again after `unload`.
        image_processor: of Wan2.1 I2V, else None.
        boundary: from this t on, the high-noise expert answers.
    """

    text_tokens = TEXT_TOKENS

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae_config: Any,
        read: Mapping[str, Callable[[], nn.Module]],
        tokenizer: Any,
        scheduler: Any,
        *,
        image_processor: Any = None,
        conditioning: Literal["image", "text"] = "image",
        expert: Literal["high", "low"] = "high",
        boundary: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.transformer: nn.Module = transformer
        self.config = transformer.config  # kept here: a distributed wrapper hides it
        self.dtype = transformer.dtype
        self.vae_config = vae_config
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self._scheduler = scheduler
        self.device = torch.empty(0, device=device).device  # with its number, as tensors give it
        self._parts = Parts(read, self.device)
        self.concatenates = self.config.in_channels != vae_config.z_dim
        self.image_conditioned = conditioning == "image"
        self.n_cond_frames = int(self.image_conditioned and not self.concatenates)
        self.expert, self.boundary = expert, boundary
        self.times = (0.0, 1.0) if "other" not in read else (boundary, 1.0) if expert == "high" else (0.0, boundary)

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.transformer

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.transformer = module

    vae = property(lambda self: self._parts["vae"])
    text_encoder = property(lambda self: self._parts["text_encoder"])
    image_encoder = property(lambda self: self._parts["image_encoder"])
    other = property(lambda self: self._parts["other"])  # the expert that is not trained

    def weights(self) -> list[nn.Module]:
        if "other" not in self._parts:
            return [self.transformer]
        return [self.transformer, self.other] if self.expert == "high" else [self.other, self.transformer]

    def release(self) -> None:
        """The parts beside the transformer go to main memory, until they are used again."""
        self._parts.release()

    def unload(self) -> None:
        """Free the main memory of the same parts too; each is read from its file again when it is next used."""
        self._parts.unload()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        config = self.vae_config
        space, time = config.scale_factor_spatial, config.scale_factor_temporal
        cell_h, cell_w = space * self.config.patch_size[1], space * self.config.patch_size[2]
        if frames % time != 1 or height % cell_h or width % cell_w:
            raise UserError(
                f"data.clips: {frames} frames of {height} x {width} do not fit the model; "
                f"make clips of {time}k + 1 frames with sides in multiples of {cell_h} x {cell_w}",
                "mismatch",
                "data.clips",
            )
        return config.z_dim, self.latent_frames(frames), height // space, width // space

    def latent_frames(self, frames: int) -> int:
        return 1 + math.ceil((frames - 1) / self.vae_config.scale_factor_temporal)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae_config
        mean, std = (like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def _vae(self) -> Any:
        """The VAE as an object of its own with the same weights.

        diffusers keeps what is left over from the pictures before as attributes of the VAE, so two threads need two.
        """
        return copy.copy(self._parts.here(self.vae))

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        vae = self._vae()
        z_BCFHW = vae.encode(video_BCFHW.to(self.device, vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(z_BCFHW)
        return (z_BCFHW - mean) / std

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        """Pixels in the dtype of z. If gradients are needed, by decode.py: the same pixels with less memory."""
        mean, std = self._statistics(z_BCFHW)
        vae = self._vae()
        raw_BCFHW = (z_BCFHW * std + mean).to(vae.dtype)
        if torch.is_grad_enabled() and z_BCFHW.requires_grad:
            return decode(vae, raw_BCFHW, recompute, offload).to(z_BCFHW.dtype)
        return vae.decode(raw_BCFHW, return_dict=False)[0].to(z_BCFHW.dtype)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """text_BLD float32: (B, 512, D), zero after each caption's last token, cleaned as the stock pipeline does."""
        tokens = self.tokenizer(
            [prompt_clean(caption) for caption in captions],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        text_BLD = self._parts.here(self.text_encoder)(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (text_BLD * tokens.attention_mask[..., None]).float()

    def without_caption(self, text_BLD: Tensor, empty_1LD: Tensor) -> Tensor:
        """The encoded "", from which the stock pipeline's guidance leads too."""
        return empty_1LD.to(text_BLD).expand_as(text_BLD)

    @torch.no_grad()
    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        """Empty for models that take the picture as a clean latent. For the others, float32:

        "channels": (B, 4 + C, F, H, W), a mask of the given pictures (latent frame 0 stands for one picture, repeated,
            and each later one for four) and the latents of the picture followed by grey ones.
        "image": (B, 257, 1280), the last but one layer of CLIP's vision tower (Wan2.1 alone).
        """
        if not self.concatenates:
            return {}
        if not self.image_conditioned:
            first_BC1HW = torch.zeros_like(first_BC1HW)
        z_BCFHW = self.encode(F.pad(first_BC1HW, (0, 0, 0, 0, 0, frames - 1)))
        batch, _, *size = z_BCFHW.shape
        mask_BCFHW = z_BCFHW.new_zeros(batch, self.vae_config.scale_factor_temporal, *size)
        mask_BCFHW[:, :, 0] = float(self.image_conditioned)
        condition = {"channels": torch.cat([mask_BCFHW, z_BCFHW], dim=1).float()}
        if self.image_processor is not None:
            pictures = ((first_BC1HW[:, :, 0].float() + 1) * 127.5).round().to("cpu", torch.uint8)
            pixels = self.image_processor(images=list(pictures), return_tensors="pt").pixel_values.to(self.device)
            states = self._parts.here(self.image_encoder)(pixels, output_hidden_states=True).hidden_states
            condition["image"] = states[-2].float()
        return condition

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """v_BCFHW in the dtype of z.

        With a clean frame, each token gets its frame's time, 1000 t, in the order of the patches. Without, all frames
        of a clip must have one time, and the transformer gets that (it is quicker, and equal).
        """
        condition = condition or {}
        if self.n_cond_frames:
            patch_f, patch_h, patch_w = self.config.patch_size
            cells = (z_BCFHW.shape[3] // patch_h) * (z_BCFHW.shape[4] // patch_w)
            timestep = (1000 * t_BF[:, ::patch_f]).to(z_BCFHW.dtype).repeat_interleave(cells, dim=1)
        else:
            timestep = (1000 * t_BF[:, 0]).to(z_BCFHW.dtype)
        x_BCFHW = torch.cat([z_BCFHW, condition["channels"]], dim=1) if self.concatenates else z_BCFHW
        image = condition["image"].to(self.dtype) if "image" in condition else None
        transformer = self._parts.here(self._expert(t_BF))
        v_BCFHW = transformer(x_BCFHW.to(self.dtype), timestep, text_BLD.to(self.dtype), image, return_dict=False)[0]
        return v_BCFHW.to(z_BCFHW.dtype)

    def _expert(self, t_BF: Tensor) -> nn.Module:
        """Which transformer answers for these times, all of a batch on one side of the boundary."""
        if "other" not in self._parts:
            return self.transformer
        high_B = t_BF.amax(dim=1) >= self.boundary
        if high_B.any() != high_B.all():
            raise ValueError(f"times on both sides of {self.boundary} in one batch: {t_BF.amax(dim=1).tolist()}")
        return self.transformer if bool(high_B[0]) == (self.expert == "high") else self.other

    def scheduler(self) -> Any:
        return type(self._scheduler).from_config(self._scheduler.config)

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256(PREPROCESSING.encode())
        digest.update(json.dumps([architecture(self.vae_config), *self._reading()], sort_keys=True).encode())
        if self.concatenates:
            digest.update(json.dumps(["channels", self.image_conditioned]).encode())
        if self.image_processor is not None:
            digest.update(self.image_processor.to_json_string().encode())
        for part in (self._parts[name] for name in ("vae", "text_encoder", "image_encoder") if name in self._parts):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _reading(self) -> list[dict[str, Any]]:
        """Configs of tokenizer and text encoder without paths and per-call settings, for the cache key of captions."""
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        encoder = self.text_encoder.config.to_dict()
        passing = ("truncation", "padding", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
        return [{name: value for name, value in part.items() if name not in passing} for part in (words, encoder)]

    def cache_key(self) -> str:
        return self._key

    def save(self, path: Path) -> list[Path]:
        """`path`/pytorch_lora_weights.safetensors, or `path`/transformer when all weights are trained."""
        if lora.attached(self.transformer):
            return [lora.save(self.transformer, path)]
        with replacing(path / "transformer") as temporary:
            lora.unwrap(self.transformer).save_pretrained(temporary)
        return [path / "transformer"]

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote. Raises UserError when it is absent or of another shape."""
        if (path / "transformer").is_dir():
            trained = load_part(WanTransformer3DModel, path, "transformer", torch_dtype=self.dtype)
            if architecture(trained.config) != architecture(self.config):
                raise UserError(
                    f"{path / 'transformer'}: was trained from another model; name that one in model.path",
                    "mismatch",
                    "model.path",
                )
            lora.unwrap(self.transformer).load_state_dict(trained.state_dict())
        else:
            lora.load(self.transformer, path, adapters.read)


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without the fields that depend on where it was loaded from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
