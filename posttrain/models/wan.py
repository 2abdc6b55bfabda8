"""Wan 2.1 / 2.2 from a diffusers folder, conditioned on the first picture the TI2V way.

The first latent frame is the clean latent of the picture and its tokens carry timestep 0, as in Wan2.2-TI2V-5B
(`expand_timesteps` of WanImageToVideoPipeline). Wan's own time is 1000 t. Text is 512 tokens, zero after the
caption's end.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, UMT5EncoderModel

from posttrain.files import UserError, replacing
from posttrain.models import lora
from posttrain.models.base import ModelConfig
from posttrain.pocket import folder

TEXT_TOKENS = 512
PREPROCESSING = "1"  # raise it when encode or encode_text change, so that cached latents are made again
WHOLE: dict[str, Any] = {"torch_dtype": torch.float32, "output_loading_info": True}


class Wan:
    """A `VideoModel` (see base.py) made of a diffusers folder's parts."""

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        text_encoder: nn.Module,
        tokenizer: Any,
        scheduler: Any,
    ) -> None:
        self.transformer: nn.Module = transformer
        self.config = transformer.config  # kept here: a distributed wrapper hides it
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._scheduler = scheduler
        if transformer.config.image_dim is None and transformer.config.added_kv_proj_dim is None:
            fold_padding(transformer)

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.transformer

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.transformer = module

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        config = self.vae.config
        space, time = config.scale_factor_spatial, config.scale_factor_temporal
        cell_h, cell_w = space * self.config.patch_size[1], space * self.config.patch_size[2]
        if frames % time != 1 or height % cell_h or width % cell_w:
            raise UserError(
                f"data.clips: {frames} frames of {height} x {width} do not fit the model; "
                f"make clips of {time}k + 1 frames with sides in multiples of {cell_h} x {cell_w}"
            )
        return config.z_dim, 1 + (frames - 1) // time, height // space, width // space

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        z_BCFHW = self.vae.encode(video_BCFHW.to(self.device, self.vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(z_BCFHW)
        return (z_BCFHW - mean) / std

    def decode(self, z_BCFHW: Tensor) -> Tensor:
        mean, std = self._statistics(z_BCFHW)
        return self.vae.decode((z_BCFHW * std + mean).to(self.vae.dtype), return_dict=False)[0]

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
        text_BLD = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (text_BLD * tokens.attention_mask[..., None]).float()

    def velocity(self, z_BCFHW: Tensor, t_BF: Tensor, text_BLD: Tensor) -> Tensor:
        """v_BCFHW in the dtype of z. Each token gets its frame's time, 1000 t, in the order of the patches."""
        _, _, _, height, width = z_BCFHW.shape
        patch_f, patch_h, patch_w = self.config.patch_size
        cells = (height // patch_h) * (width // patch_w)
        timestep_BN = (1000 * t_BF[:, ::patch_f]).to(z_BCFHW.dtype).repeat_interleave(cells, dim=1)
        return self.transformer(z_BCFHW, timestep_BN, text_BLD, return_dict=False)[0].to(z_BCFHW.dtype)

    def scheduler(self) -> Any:
        return type(self._scheduler).from_config(self._scheduler.config)

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256(PREPROCESSING.encode())
        digest.update(json.dumps([_shape(self.vae.config), self.tokenizer.get_vocab()], sort_keys=True).encode())
        for part in (self.vae, self.text_encoder):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

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
            trained = _part(WanTransformer3DModel.from_pretrained, path, "transformer", **WHOLE)
            if _shape(trained.config) != _shape(self.config):
                raise UserError(f"{path / 'transformer'}: was trained from another model; name that one in model.path")
            lora.unwrap(self.transformer).load_state_dict(trained.state_dict())
        else:
            lora.load(self.transformer, path)


class FoldedTextAttention(WanAttnProcessor):
    """Text attention that counts equal padding keys instead of visiting each.

    All padded tokens have one key and one value, so n of them weigh softmax(.. + log n) of a single one. The
    log-counts arrive as the last channel of the text (`fold_padding`), so each call carries its own and block
    checkpointing recomputes the same numbers. Softmax in float32: log n is too coarse in bfloat16.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None, rotary_emb: None
    ) -> Tensor:
        text = encoder_hidden_states[..., :-1].type_as(hidden_states)
        bias_BL = encoder_hidden_states[..., -1].detach()  # flash attention takes only a constant bias
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2).to(bias_BL.dtype) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias_BL[:, None, None])
        return attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(hidden_states))


def fold_padding(transformer: WanTransformer3DModel) -> None:
    """Let `transformer` attend to one padded text token per caption instead of hundreds, with equal results."""

    def fold(_: nn.Module, inputs: tuple[Tensor], text_BLE: Tensor) -> Tensor:
        (text_BLD,) = inputs
        place_L = torch.arange(text_BLD.shape[1], device=text_BLD.device)
        real_B = ((text_BLD != 0).any(-1) * (place_L + 1)).amax(1)  # tokens before the zero padding
        kept = min(int(real_B.max()) + 1, text_BLD.shape[1])
        weight_B = (text_BLD.shape[1] - real_B) / (kept - real_B).clamp(min=1)  # equal pads per pad that is kept
        bias_BL = torch.where(place_L[:kept] < real_B[:, None], 0.0, weight_B[:, None].log())
        text_BLE = text_BLE[:, :kept].to(torch.promote_types(text_BLE.dtype, bias_BL.dtype))
        return torch.cat([text_BLE, bias_BL[..., None]], dim=-1)

    transformer.condition_embedder.text_embedder.register_forward_hook(fold)
    for block in transformer.blocks:
        block.attn2.set_processor(FoldedTextAttention())


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    """A diffusers config without what tells where it was loaded from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def initialise(config: dict[str, Any], seed: int) -> WanTransformer3DModel:
    """A transformer of this architecture with weights drawn from `seed`; its output starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel.from_config(config)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def _part(read: Callable[..., Any], root: Path | str, name: str, **options: Any) -> Any:
    """One component of the folder or hub id `root`; whatever is wrong with it becomes a UserError that names it."""
    place = Path(root) / name
    local = isinstance(root, Path)
    if local and not place.is_dir():
        raise UserError(f"{place}: does not exist; model.path must name a whole diffusers folder")
    try:
        part = read(str(root), subfolder=name, local_files_only=local, **options)
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{place}: cannot be loaded ({reason}); get this part of the model again") from error
    if options.get("output_loading_info"):
        part, info = part
        if info["missing_keys"]:  # diffusers would leave these random and only warn
            lacking = sorted(info["missing_keys"])[0]
            raise UserError(f"{place}: its file lacks {lacking}; get this part of the model again")
    return part


def _root(path: str) -> Path | str:
    """The folder or hub id that `model.path` means."""
    root = folder("wan") if path == "pocket" else Path(path)
    if root.is_dir():
        return root
    if len(root.parts) != 2 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path: {root} does not exist; give 'pocket', a diffusers folder or a hub id")
    return path


def _place(config: ModelConfig) -> tuple[Path | str, str]:
    """The folder or hub id below which the transformer's weights lie, and the name of their folder there."""
    start = Path(config.start) if config.start else None
    return (start.parent, start.name) if start and start.is_dir() else (_root(config.path), "transformer")


def bare(config: ModelConfig, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """diffusers' own transformer as training starts from it, before there is an adapter.

    Raises:
        UserError: it cannot be loaded, or `start` or `merge` do not fit it.
    """
    shape = _part(WanTransformer3DModel.load_config, _root(config.path), "transformer")
    if config.init == "random":
        return initialise(shape, config.seed)
    place, name = _place(config)
    transformer = _part(WanTransformer3DModel.from_pretrained, place, name, **(WHOLE | {"torch_dtype": dtype}))
    if any(transformer.config.get(key) != value for key, value in _shape(shape).items()):
        raise UserError(f"model.start: {config.start} was trained from another model; name that one in model.path")
    for adapter in config.merge:
        lora.merge(transformer, adapter.path, adapter.scale)
    return transformer


def save_merged(config: ModelConfig, adapter: Path, path: Path) -> None:
    """Write the diffusers folder `path`: the transformer with `adapter` folded in, in the dtype of its base's files.

    Raises:
        UserError: as `bare` and `lora.load`, or the folder cannot be written.
    """
    place, name = _place(config)
    dtype, probe = torch.float32, "blocks.0.attn1.to_q.weight"
    for file in sorted((Path(place) / name).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if probe in tensors.keys():
                dtype = tensors.get_tensor(probe).dtype
    transformer = bare(config, dtype)
    lora.merge(transformer, adapter)
    with replacing(path) as temporary:
        transformer.save_pretrained(temporary)


def load(config: ModelConfig, device: str | torch.device = "cpu") -> Wan:
    """Load the model that a recipe names; only what will be trained has requires_grad.

    Raises:
        UserError: no such folder, or a part is missing, broken or does not fit the others.
    """
    root = _root(config.path)
    vae = _part(AutoencoderKLWan.from_pretrained, root, "vae", **WHOLE)
    text_encoder = _part(UMT5EncoderModel.from_pretrained, root, "text_encoder", output_loading_info=True)
    tokenizer = _part(AutoTokenizer.from_pretrained, root, "tokenizer")
    schedule = _part(diffusers.UniPCMultistepScheduler.load_config, root, "scheduler")
    scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    transformer = bare(config)

    for field, value, part, expected in (
        ("in_channels", transformer.config.in_channels, "vae z_dim", vae.config.z_dim),
        ("text_dim", transformer.config.text_dim, "text_encoder d_model", text_encoder.config.d_model),
    ):
        if value != expected:
            raise UserError(
                f"{Path(root) / 'transformer' / 'config.json'}: {field} is {value}, but {part} is {expected}; "
                "give a text-to-video or TI2V folder whose parts belong together"
            )

    vae.requires_grad_(False).eval()
    text_encoder.requires_grad_(False).eval()
    if config.adapter is not None:
        adapter = config.adapter
        lora.attach(transformer, adapter.rank, adapter.alpha, adapter.targets, config.seed)
    if config.start and not Path(config.start).is_dir():
        if config.adapter is None:
            raise UserError(f"model.start: {config.start} is an adapter; set model.adapter, or name it in model.merge")
        lora.proceed(transformer, config.start)
    for part in (transformer, vae, text_encoder):
        part.to(device)
    return Wan(transformer, vae, text_encoder, tokenizer, scheduler)
