"""Open-Sora v1.2 as a `VideoModel`. Converts its own time (0 to 1000) and sign (data - noise) to ours.

The first frame is a clean latent frame, marked as clean by the transformer's `x_mask`, as in the published model. Texts
are encoded unchanged, in training and in sampling; `prompt` in text.py does what the published sampling script does to
a prompt first. The text "" stands for the learned null text: it is all zeros here, and is replaced when the transformer
is called. If the first half of a batch has no text, the null text is cut to the lengths of the other half, as in the
published guidance.

Latents are the means of both posteriors (the published code samples them). The number of latent frames does not
determine the number of frames: 9 stand for 30 to 33. The number of the clip last passed to `latent_shape`, `encode` or
`condition` is used.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from posttrain.core.errors import UserError
from posttrain.models import lora
from posttrain.models.base import text_lengths
from posttrain.models.opensora import text
from posttrain.models.opensora.conditioning import IMAGE_FPS
from posttrain.models.opensora.rflow import TIMES
from posttrain.models.opensora.scheduler import RFlowScheduler
from posttrain.models.opensora.stdit import STDiT3
from posttrain.models.opensora.vae import OpenSoraVAE, count_latents
from posttrain.models.parts import Parts
from posttrain.models.pixels import clamp

FPS = 16.0  # of PISA's clips
PREPROCESSING = "1"  # raise it when encode, encode_text or condition change, so that cached latents are made again


class OpenSora:
    """A `VideoModel` (see base.py).

    Args:
        vae: used only for its shape; its weights may be on the meta device.
        read: function that reads "vae" and "text_encoder", called when first needed, and again after `unload`.
        scheduler: arguments of RFlowScheduler; None: the published ones.
        fps: the transformer's fps input for clips of more than one frame.
    """

    times = (0.0, 1.0)
    boundary = 0.0
    whole_text = False  # True: every text has all tokens, and its values are not asked

    def __init__(
        self,
        transformer: STDiT3,
        vae: OpenSoraVAE,
        read: Mapping[str, Callable[[], nn.Module]],
        tokenizer: Any,
        *,
        conditioning: Literal["image", "text"] = "image",
        scheduler: Mapping[str, Any] | None = None,
        fps: float = FPS,
        device: str | torch.device = "cpu",
    ) -> None:
        self.transformer: nn.Module = transformer
        self.config = transformer.config  # kept here: a distributed wrapper hides it
        self.dtype = transformer.dtype
        self.vae_config = dict(vae.config)
        self.channels, self.space = vae.channels, vae.space_factor
        self.piece, self.time = vae.micro_frame_size, vae.temporal_vae.time_factor
        self.tokenizer = tokenizer
        self.device = torch.empty(0, device=device).device  # with its number, as tensors give it
        self._parts = Parts(read, self.device)
        self.n_cond_frames = int(conditioning == "image")
        self.text_tokens: int = self.config.model_max_length
        self.fps, self._scheduler = fps, dict(scheduler or {})
        self._clip: tuple[int, int, int] | None = None  # pictures, height, width of the clips that are worked on

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.transformer

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.transformer = module

    vae = property(lambda self: self._parts["vae"])
    text_encoder = property(lambda self: self._parts["text_encoder"])

    def weights(self) -> list[nn.Module]:
        return [self.transformer]

    def release(self) -> None:
        """The parts beside the transformer go to main memory, until they are used again."""
        self._parts.release()

    def unload(self) -> None:
        """Free the main memory of the same parts too; each is read from its file again when it is next used."""
        self._parts.unload()

    # --------------------------------------------------------------------------------------------- clips

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if frames < 1 or height % self.space or width % self.space:
            raise UserError(
                f"data.clips: {frames} frames of {height} x {width} do not fit the model; "
                f"make clips with sides in multiples of {self.space}",
                "mismatch",
                "data.clips",
            )
        self._clip = frames, height, width
        return self.channels, count_latents(frames, self.piece, self.time), height // self.space, width // self.space

    def _piece(self, first: int) -> tuple[int, int]:
        """Pictures of the piece of the clip that begins at picture `first`, and zeros that the VAE puts before them."""
        left = self._clip[0] - first if self._clip else 0
        whole = self.piece or max(left, 1)
        length = min(whole, left) if left > 0 else whole
        return length, -length % self.time

    def latent_frames(self, frames: int) -> int:
        """Latent frames for so many first frames of the current clip (or of a clip of that length, if it is longer)."""
        if self._clip is None or frames > self._clip[0]:
            return count_latents(frames, self.piece, self.time)
        pieces, rest = divmod(frames, self.piece) if self.piece else (0, frames)
        before = pieces * math.ceil((self.piece or 0) / self.time)
        return before + math.ceil((rest + self._piece(frames - rest)[1]) / self.time) * (rest > 0)

    def _pictures(self, latents: int) -> int:
        """The number of frames that the first so many latent frames stand for."""
        pieces, rest = divmod(latents, math.ceil(self.piece / self.time)) if self.piece else (0, latents)
        before = pieces * (self.piece or 0)
        if not rest:
            return before
        padding = self._piece(before)[1] if self.piece or self._clip else 0
        return before + rest * self.time - padding

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        frames, *size = video_BCFHW.shape[2:]
        if frames > 1:
            self._clip = frames, size[0], size[1]
        vae = self._parts.here(self.vae)
        z_BCFHW: Tensor = vae.encode(video_BCFHW.to(self.device, vae.dtype), sample=False)
        return z_BCFHW

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        """Pixels in the dtype of z, clamped; for the gradient see pixels.py."""
        vae, keeps = self._parts.here(self.vae), torch.is_grad_enabled() and z_BCFHW.requires_grad
        with save_on_cpu(pin_memory=z_BCFHW.is_cuda) if offload and keeps else nullcontext():
            video_BCFHW = vae.decode(z_BCFHW.to(vae.dtype), self._pictures(z_BCFHW.shape[2]), recompute)
            return clamp(video_BCFHW).to(z_BCFHW.dtype)

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        """Empty: the first frame is a clean latent frame."""
        self._clip = frames, first_BC1HW.shape[3], first_BC1HW.shape[4]
        return {}

    # ---------------------------------------------------------------------------------------------- text

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """text_BLD float32: (B, 300, D), zero after each caption's last token; all zeros for ""."""
        text_BLD, mask_BL = text.encode(self.tokenizer, self._parts.here(self.text_encoder), captions, self.text_tokens)
        given_B = torch.tensor([bool(caption) for caption in captions], device=text_BLD.device)
        return (text_BLD * (mask_BL * given_B[:, None])[..., None]).float()

    def _null(self, text_BLD: Tensor) -> Tensor:
        """The learned text that stands for none, (L, D)."""
        return lora.unwrap(self.transformer).y_embedder.y_embedding[: text_BLD.shape[1]].to(text_BLD)

    def without_caption(self, text_BLD: Tensor, empty_1LD: Tensor) -> Tensor:
        """The learned text, cut to each caption's length: published training and guidance keep the caption's mask."""
        place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
        return self._null(text_BLD) * (place_L < text_lengths(text_BLD)[:, None])[..., None]

    def _text(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """y_B1LD with the learned text where there is none, and its mask_BL, both cut to the longest."""
        batch, length, _ = text_BLD.shape
        if self.whole_text:
            return text_BLD[:, None], torch.ones(batch, length, dtype=torch.bool, device=text_BLD.device)
        lengths_B = text_lengths(text_BLD)
        none_B = lengths_B == 0
        if bool(none_B.any()):
            text_BLD = torch.where(none_B[:, None, None], self._null(text_BLD), text_BLD)
            half = batch // 2
            guided = batch == 2 * half and bool(none_B[:half].all()) and not bool(none_B[half:].any())
            lengths_B = lengths_B[half:].repeat(2) if guided else lengths_B.masked_fill(none_B, length)
        kept = int(lengths_B.max())
        return text_BLD[:, None, :kept], torch.arange(kept, device=text_BLD.device) < lengths_B[:, None]

    # -------------------------------------------------------------------------------------------- sampling

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """v_BCFHW in the dtype of z. A clip's time is that of its last frame; given frames are known by position."""
        transformer = self._parts.here(self.transformer)
        batch, channels, frames, *cells = z_BCFHW.shape
        y_B1LD, mask_BL = self._text(text_BLD)
        x_mask = None
        if self.n_cond_frames:
            x_mask = (torch.arange(frames, device=z_BCFHW.device) >= self.n_cond_frames).expand(batch, -1)

        def each(value: float) -> Tensor:
            return torch.full((batch,), value, device=z_BCFHW.device)

        v_BCFHW = transformer(
            z_BCFHW.to(self.dtype),
            TIMES * t_BF[:, -1],
            y_B1LD,
            mask_BL,
            x_mask,
            fps=each(IMAGE_FPS if self._pictures(frames) == 1 else self.fps),
            height=[self.space * cells[0]],  # as numbers: a device would have to be asked for them
            width=[self.space * cells[1]],
        )
        return -v_BCFHW[:, :channels].to(z_BCFHW.dtype)

    def scheduler(self) -> RFlowScheduler:
        """The scheduler for the current clips."""
        scheduler = RFlowScheduler(**self._scheduler)
        scheduler.clip = self._clip
        return scheduler

    # ---------------------------------------------------------------------------------------------- files

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256(PREPROCESSING.encode())
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        passing = ("truncation", "padding", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
        facts = [self.vae_config, words, self.text_encoder.config.to_dict()]
        facts = [{k: v for k, v in fact.items() if k not in passing} for fact in facts]
        digest.update(json.dumps([*facts, self.text_tokens], sort_keys=True).encode())
        for part in (self._parts[name] for name in ("vae", "text_encoder")):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def cache_key(self) -> str:
        return self._key

    def save(self, path: Path) -> list[Path]:
        """`path`/pytorch_lora_weights.safetensors; when all weights are trained, `path`/transformer as published."""
        if lora.attached(self.transformer):
            return [lora.save(self.transformer, path)]
        lora.unwrap(self.transformer).save_published(path / "transformer")
        return [path / "transformer"]

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote. Raises UserError when it is absent or of another shape."""
        if not (path / "transformer").is_dir():
            lora.load(self.transformer, path)
            return
        trained, inner = STDiT3.from_pretrained(path / "transformer"), lora.unwrap(self.transformer)
        ours, theirs = (
            {name: value for name, value in config.items() if not name.startswith("_")}
            for config in (self.config, trained.config)
        )
        if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            raise UserError(
                f"{path / 'transformer'}: was trained from another model; name that one in model.path",
                "mismatch",
                "model.path",
            )
        inner.load_state_dict(trained.state_dict())
