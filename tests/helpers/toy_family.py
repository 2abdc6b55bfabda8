"""A family of video models with all that CONTRIBUTING.md asks of a family, in one file, without code of other families.

Its conventions differ from Wan's: the transformer takes latents with channels last, times of 1 at the data and 0 at
noise, and text with a mask; its velocities point from noise to data; the scheduler is not from diffusers. There is no
stock pipeline.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from posttrain.core.errors import UserError
from posttrain.core.files import replacing
from posttrain.models import lora
from posttrain.models.base import Defaults, ModelConfig, Outline, text_lengths
from posttrain.models.folders import find, load_part

SIDE, FRAMES = 8, 5
TARGETS = ("query", "key", "value", "out")
CHANNELS, PATCH, PAIR, TOKENS, WORDS = 6, 8, 2, 7, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context, width), nn.Linear(context, width)

    def forward(self, x_BNE: Tensor, context_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        q, k, v = (part[:, None] for part in (self.query(x_BNE), self.key(context_BLD), self.value(context_BLD)))
        mask = None if mask_BL is None else mask_BL[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0])


class Block(nn.Module):
    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.over_clip, self.over_text = Attention(width, width), Attention(width, text_width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BNE: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        x_BNE = x_BNE + self.over_clip(x_BNE, x_BNE)
        x_BNE = x_BNE + self.over_text(x_BNE, text_BLD, mask_BL)
        return x_BNE + self.feed(x_BNE)


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """From a clip, the time of each frame (0 noise, 1 data) and text with its mask to data minus noise."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, width: int = 12, text_width: int = 10, layers: int = 2) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)
        self.time = nn.Linear(2, width)
        self.blocks = nn.ModuleList(Block(width, text_width) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(self, x_BFHWC: Tensor, s_BF: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        waves_BF2 = torch.stack([(3 * s_BF).sin(), (3 * s_BF).cos()], dim=-1)
        x_BFHWE = self.inward(x_BFHWC) + self.time(waves_BF2)[:, :, None, None]
        x_BNE = x_BFHWE.flatten(1, 3)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x_BNE = self._gradient_checkpointing_func(block, x_BNE, text_BLD, mask_BL)
            else:
                x_BNE = block(x_BNE, text_BLD, mask_BL)
        return self.outward(x_BNE).view_as(x_BFHWC)


class ToyCodec(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Two frames of a patch of 8 x 8 pixels are one latent cell; the first frame of a clip counts twice."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.Linear(*sizes) for sizes in ((384, CHANNELS), (CHANNELS, 384)))


class ToyWords(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A vector for each word, chosen by the word's hash."""

    @register_to_config
    def __init__(self, text_width: int = 10) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, text_width)


class Steps:
    """A scheduler with Euler steps between the times t_i = (1 - i / n)^2, without code of diffusers."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(num_train_timesteps=1)
        self.times: list[float] = []
        self.timesteps: list[Tensor] = []
        self.number = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        self.times = [(1 - i / num_inference_steps) ** 2 for i in range(num_inference_steps + 1)]
        self.timesteps = [torch.tensor(t, dtype=torch.float64, device=device) for t in self.times[:-1]]
        self.number = 0

    def step(self, v_BCFHW: Tensor, timestep: Tensor, z_BCFHW: Tensor, return_dict: bool) -> tuple[Tensor]:
        t, after = self.times[self.number : self.number + 2]
        self.number += 1
        return (z_BCFHW + (after - t) * v_BCFHW,)


class Toy:
    """A `VideoModel`, see posttrain/models/base.py."""

    times, boundary, text_tokens = (0.0, 1.0), 0.0, TOKENS

    def __init__(self, transformer: Any, codec: Any, words: Any, config: ModelConfig, device: Any = "cpu") -> None:
        self.transformer: nn.Module = transformer
        self.dtype = transformer.dtype
        self.codec, self.words = codec, words
        self.n_cond_frames = int(config.conditioning == "image")
        self.device = torch.empty(0, device=device).device

    @property
    def module(self) -> nn.Module:
        return self.transformer

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.transformer = module

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        if frames % PAIR != 1 or height % PATCH or width % PATCH:
            raise UserError(
                f"data.clips: {frames} frames of {height} x {width} do not fit the model; make clips of 2k + 1 frames "
                "with sides in multiples of 8",
                "mismatch",
                "data.clips",
            )
        return CHANNELS, self.latent_frames(frames), height // PATCH, width // PATCH

    def latent_frames(self, frames: int) -> int:
        return 1 + -(-(frames - 1) // PAIR)

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        pixels = torch.cat([video_BCFHW[:, :, :1], video_BCFHW], dim=2).to(self.device)
        cells = pixels.unflatten(2, (-1, PAIR)).unflatten(4, (-1, PATCH)).unflatten(6, (-1, PATCH))  # B C F 2 H 8 W 8
        return self._here(self.codec).encoder(cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).permute(0, 4, 1, 2, 3)

    def decode(self, z_BCFHW: Tensor, recompute: bool = True, offload: bool = False) -> Tensor:
        cells = self._here(self.codec).decoder(z_BCFHW.permute(0, 2, 3, 4, 1)).unflatten(4, (3, PAIR, PATCH, PATCH))
        pixels = cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return pixels[:, :, 1:].tanh()  # in range, and every pixel has a gradient

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        table = self._here(self.words).table
        text_BLD = torch.zeros(len(captions), TOKENS, table.embedding_dim, device=self.device)
        for row_LD, caption in zip(text_BLD, captions, strict=True):
            words = [*caption.split()[: TOKENS - 1], "<end>"]
            numbers = [int(hashlib.sha256(word.encode()).hexdigest(), 16) % WORDS for word in words]
            row_LD[: len(words)] = table(torch.tensor(numbers, device=self.device))
        return text_BLD

    def without_caption(self, text_BLD: Tensor, empty_1LD: Tensor) -> Tensor:
        return empty_1LD.expand_as(text_BLD)

    def condition(self, first_BC1HW: Tensor, frames: int) -> dict[str, Tensor]:
        return {}

    def velocity(
        self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
        mask_BL = place_L < text_lengths(text_BLD)[:, None]
        # contiguous, because torch may use another product for other tensors if weights are frozen, and round otherwise
        x_BFHWC, s_BF = z_BCFHW.permute(0, 2, 3, 4, 1).contiguous().to(self.dtype), (1 - t_BF).to(self.dtype)
        u_BFHWC = self._here(self.transformer)(x_BFHWC, s_BF, text_BLD.to(self.dtype), mask_BL)
        return -u_BFHWC.permute(0, 4, 1, 2, 3).to(z_BCFHW.dtype)

    def _here(self, part: Any) -> Any:
        return part.to(self.device) if next(part.parameters()).device != self.device else part

    def weights(self) -> list[nn.Module]:
        return [self.transformer]

    def release(self) -> None: ...

    def unload(self) -> None: ...

    def scheduler(self) -> Steps:
        return Steps()

    def cache_key(self) -> str:
        digest = hashlib.sha256(b"toy 1")
        for part in (self.codec, self.words):
            for tensor in part.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> list[Path]:
        if lora.attached(self.transformer):
            return [lora.save(self.transformer, path)]
        with replacing(path / "transformer") as temporary:
            lora.unwrap(self.transformer).save_pretrained(temporary)
        return [path / "transformer"]

    def restore(self, path: Path) -> None:
        if (path / "transformer").is_dir():
            trained = load_part(ToyTransformer, path, "transformer", torch_dtype=self.dtype)
            lora.unwrap(self.transformer).load_state_dict(trained.state_dict())
        else:
            lora.load(self.transformer, path)


def bare(config: ModelConfig) -> ToyTransformer:
    root = find(config.path, config.revision)
    if config.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return ToyTransformer.from_config(load_part(ToyTransformer.load_config, root, "transformer"))
    start = Path(config.start) if config.start and Path(config.start).is_dir() else root / "transformer"
    transformer = load_part(ToyTransformer, start.parent, start.name, torch_dtype=DTYPES[config.dtype])
    for adapter in config.merge:
        lora.merge(transformer, adapter.path, adapter.scale)
    return transformer


def load(config: ModelConfig, device: str | torch.device = "cpu") -> Toy:
    root = find(config.path, config.revision)
    transformer = bare(config).requires_grad_(config.dtype == "fp32")
    if config.adapter is not None:
        adapter = config.adapter
        lora.attach(transformer, adapter.rank, adapter.alpha, adapter.targets or TARGETS, config.seed)
    if config.start and not Path(config.start).is_dir():
        lora.proceed(transformer, config.start)
    codec, words = (load_part(kind, root, name) for kind, name in ((ToyCodec, "vae"), (ToyWords, "text_encoder")))
    return Toy(transformer, codec.requires_grad_(False), words.requires_grad_(False), config, device)


def save_merged(config: ModelConfig, adapter: Path, path: Path) -> None:
    transformer = bare(config)
    lora.merge(transformer, adapter)
    with replacing(path) as temporary:
        transformer.save_pretrained(temporary)


def outline(config: ModelConfig, frames: int, height: int, width: int) -> Outline:
    root = find(config.path, config.revision)
    with torch.device("meta"):
        transformer = ToyTransformer.from_config(load_part(ToyTransformer.load_config, root, "transformer"))
        transformer.to(DTYPES[config.dtype])
        codec, words = ToyCodec().requires_grad_(False), ToyWords()
        if config.adapter is not None:
            adapter = config.adapter
            lora.attach(transformer, adapter.rank, adapter.alpha, adapter.targets or TARGETS, config.seed)
    model = Toy(transformer, codec, words, config)
    _, *cells = model.latent_shape(frames, height, width)
    return Outline(model, codec, cells[0] * cells[1] * cells[2], transformer.config.text_width, {})


def defaults(path: str) -> Defaults:
    return Defaults(frames=5, size=(32, 32), fps=16, steps=4, guidance=1.0)


def needs_picture(path: str, revision: str | None = None) -> bool:
    return False


def original_name(layer: str) -> str | None:
    return None  # ComfyUI does not have this family


def load_stock_adapter(transformer: nn.Module, file: Path) -> None:
    """With diffusers' own loader, which needs alpha in the metadata."""
    loads: Any = transformer
    weights, metadata = lora.read(file)
    loads.load_lora_adapter(weights, prefix="transformer", metadata=metadata)


def pipeline_code(
    config: ModelConfig, adapter: bool, clip: Mapping[str, Any], sampler: Mapping[str, Any]
) -> str | None:
    return None


def make(folder: Path) -> Path:
    """Write a model of random weights to `folder`; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, part in {"transformer": ToyTransformer(), "vae": ToyCodec(), "text_encoder": ToyWords()}.items():
            part.save_pretrained(folder / name)
    return folder
