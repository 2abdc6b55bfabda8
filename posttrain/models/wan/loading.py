"""From a diffusers folder or a hub id to a `Wan`, and back to a folder with an adapter folded in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from posttrain.core.errors import UserError, printable
from posttrain.core.files import read_object, replacing
from posttrain.models import lora
from posttrain.models.base import ModelConfig
from posttrain.models.folders import check_files, load_part, load_tokenizer
from posttrain.models.wan import adapters
from posttrain.models.wan.folder import EXPERTS, diffusers_folder
from posttrain.models.wan.model import Wan, architecture
from posttrain.models.wan.padding import fold_padding
from posttrain.models.wan.precision import keep_float32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def initialise(config: dict[str, Any], seed: int) -> WanTransformer3DModel:
    """A transformer of this architecture with weights drawn from `seed`; its output starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel.from_config(config)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def _source(config: ModelConfig) -> tuple[Path, str]:
    """(folder, subfolder name) of the transformer to train."""
    start = Path(config.start) if config.start else None
    if start and start.is_dir():
        return start.parent, start.name
    return diffusers_folder(config.path, config.revision), EXPERTS[config.expert or "high"]


def bare(config: ModelConfig, dtype: torch.dtype | None = None) -> WanTransformer3DModel:
    """diffusers' transformer from which training starts, without a new adapter; dtype None: `config.dtype`.

    Raises:
        UserError: it cannot be loaded, or `start` or `merge` do not fit it.
    """
    root = diffusers_folder(config.path, config.revision)
    shape = load_part(WanTransformer3DModel.load_config, root, EXPERTS[config.expert or "high"])
    if config.init == "random":
        return initialise(shape, config.seed)
    parent, name = _source(config)
    transformer = load_part(WanTransformer3DModel, parent, name, torch_dtype=dtype or DTYPES[config.dtype])
    if any(transformer.config.get(key) != value for key, value in architecture(shape).items()):
        raise UserError(
            f"model.start: {config.start} was trained from another model; name that one in model.path",
            "mismatch",
            "model.start",
        )
    for adapter in config.merge:
        lora.merge(transformer, adapter.path, adapter.scale, adapters.read)
    return transformer


def save_merged(config: ModelConfig, adapter: Path, path: Path) -> None:
    """Write the diffusers folder `path`: the transformer with `adapter` merged, in the dtype of its base's files.

    Raises:
        UserError: as `bare` and `lora.load`, or the folder cannot be written.
    """
    parent, name = _source(config)
    dtype, probe = torch.float32, "blocks.0.attn1.to_q.weight"
    for file in sorted((parent / name).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if probe in tensors.keys():
                dtype = tensors.get_tensor(probe).dtype
    transformer = bare(config, dtype)
    lora.merge(transformer, adapter, read=adapters.read)
    with replacing(path) as temporary:
        transformer.save_pretrained(temporary)


def _scheduler(root: str, **options: Any) -> Any:
    """The scheduler of a folder, whose config names its class; it is tried, for a wrong value shows in use alone."""
    config = diffusers.UniPCMultistepScheduler.load_config(root, **options)
    kind = getattr(diffusers, config["_class_name"])
    kind.from_config(config).set_timesteps(2)
    return kind.from_config(config)


def _boundary(config: ModelConfig, root: Path) -> float:
    """The `boundary_ratio` of a model's two experts; 0: it has only one.

    Raises:
        UserError: damaged; required or conflict: `config` is not for a model with so many experts.
    """
    index = read_object(root / "model_index.json")
    second, boundary = index.get("transformer_2") or [None], index.get("boundary_ratio") or 0.0
    two = isinstance(second, list) and second[0] is not None
    if not isinstance(second, list) or not isinstance(boundary, float) or two != (0 < boundary < 1):
        raise UserError(
            f"{root / 'model_index.json'}: has only one of transformer_2 and boundary_ratio; get it again", "damaged"
        )
    if two and config.adapter is not None and config.expert is None:
        raise UserError(
            f"model.expert: is missing; {config.path} has two experts; set which one to train: high or low",
            "required",
            "model.expert",
        )
    if not two and (config.expert is not None or config.other_adapter is not None):
        field = "expert" if config.expert is not None else "other_adapter"
        raise UserError(
            f"model.{field}: is for models of two experts, and {config.path} has one; leave it out",
            "conflict",
            f"model.{field}",
        )
    return boundary


def load(config: ModelConfig, device: str | torch.device = "cpu") -> Wan:
    """Load the model that a recipe names, into main memory; only what will be trained has requires_grad.

    The transformer is read now, the other parts when they are used; that they fit together is checked now.

    Weights with `dtype: bf16` cannot be trained themselves (rounding would remove small updates), nor can a model with
    two experts if none is named; both can be sampled.

    Raises:
        UserError: no such model, or a part is missing, broken or does not fit the others.
    """
    root = diffusers_folder(config.path, config.revision)
    boundary = _boundary(config, root)
    two = 0 < boundary < 1
    if config.init == "random" and config.dtype != "fp32":
        raise UserError(
            "model.dtype: with init=random all weights are trained, so they are fp32; leave it out",
            "conflict",
            "model.dtype",
        )
    dtype = DTYPES[config.dtype]
    expert = config.expert or "high"
    name, other_name = (EXPERTS[key] for key in (expert, "low" if expert == "high" else "high"))

    vae_config = load_part(_vae_config, root, "vae")
    configs = {"text_encoder": load_part(UMT5Config, root, "text_encoder")}
    tokenizer = load_tokenizer(root, "tokenizer")
    scheduler = load_part(_scheduler, root, "scheduler")
    shape = load_part(WanTransformer3DModel.load_config, root, name)
    image_processor = None
    if shape.get("image_dim") is not None:
        configs["image_encoder"] = load_part(CLIPVisionConfig, root, "image_encoder")
        image_processor = load_part(AutoImageProcessor, root, "image_processor", trust_remote_code=False)
    for part in ("vae", *configs):
        check_files(root / part)
    _check_parts(root / name / "config.json", shape, vae_config, **configs)
    if two:
        other_shape = load_part(WanTransformer3DModel.load_config, root, other_name)
        check_files(root / other_name)
        _check_parts(root / other_name / "config.json", other_shape, vae_config, **configs)
        if other_shape.get("in_channels") != shape.get("in_channels"):
            raise UserError(
                f"{root / other_name / 'config.json'}: in_channels is not {name}'s; get the model again", "mismatch"
            )
        if config.other_adapter is not None and not (Path(config.other_adapter) / lora.FILE).is_file():
            raise UserError(
                f"model.other_adapter: {Path(config.other_adapter) / lora.FILE} does not exist",
                "missing",
                "model.other_adapter",
            )

    def read_other() -> WanTransformer3DModel:
        other = load_part(WanTransformer3DModel, root, other_name, torch_dtype=dtype)
        if config.other_adapter is not None:
            lora.load(other, config.other_adapter, adapters.read)
        fold_padding(other)
        keep_float32(other)
        return other.requires_grad_(False)

    folder = Path(root).absolute()  # later the working directory may be another

    def reader(kind: Any, part: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: load_part(kind, folder, part, **options).requires_grad_(False).eval()

    read: dict[str, Callable[[], nn.Module]] = {
        "vae": reader(AutoencoderKLWan, "vae", torch_dtype=torch.float32),
        "text_encoder": reader(UMT5EncoderModel, "text_encoder", dtype=dtype),
    }
    if "image_encoder" in configs:
        read["image_encoder"] = reader(CLIPVisionModel, "image_encoder", dtype=torch.float32)
    if two:
        read["other"] = read_other
    transformer = bare(config, dtype)
    transformer.requires_grad_(config.dtype == "fp32" and not (two and config.expert is None))
    if config.adapter is not None:
        adapter = config.adapter
        lora.attach(transformer, adapter.rank, adapter.alpha, adapter.targets or adapters.TARGETS, config.seed)
    if config.start and not Path(config.start).is_dir():
        if config.adapter is None:
            raise UserError(
                f"model.start: {config.start} is an adapter; set model.adapter, or name it in model.merge",
                "conflict",
                "model.start",
            )
        lora.proceed(transformer, config.start, adapters.read)
    fold_padding(transformer)
    keep_float32(transformer)
    return Wan(
        transformer,
        vae_config,
        read,
        tokenizer,
        scheduler,
        image_processor=image_processor,
        conditioning=config.conditioning,
        expert=expert,
        boundary=boundary,
        device=device,
    )


def _vae_config(root: str, **options: Any) -> Any:
    """The VAE's config including diffusers' defaults, without loading weights."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(root, **options)).config


def _check_parts(file: Path, shape: Mapping[str, Any], vae: Any, text_encoder: Any, image_encoder: Any = None) -> None:
    """Refuse a transformer that does not fit the other parts, or needs unsupported inputs; checks only the configs."""
    z, time = vae.z_dim, vae.scale_factor_temporal
    for field in ("latents_mean", "latents_std"):
        values = vae[field]
        if (
            not isinstance(values, list | tuple)
            or len(values) != z
            or not all(isinstance(v, int | float) for v in values)
        ):
            raise UserError(
                f"{file.parent.parent / 'vae' / file.name}: {field} is not a list of z_dim ({printable(z)}) numbers; "
                "get this part of the model again",
                "damaged",
            )
    fits = {
        "in_channels": ((z, 2 * z + time), f"the vae's z_dim is {z}, which asks for {z} or {2 * z + time}"),
        "out_channels": ((z,), f"the vae's z_dim is {z}"),
        "text_dim": ((text_encoder.d_model,), f"the text_encoder's d_model is {text_encoder.d_model}"),
        "pos_embed_seq_len": ((None,), "models of a first and a last picture cannot be trained here"),
    }
    if image_encoder is not None:
        width = image_encoder.hidden_size
        fits["image_dim"] = ((width,), f"the image_encoder's hidden_size is {width}")
    for field, (allowed, why) in fits.items():
        if shape.get(field) not in allowed:
            raise UserError(
                f"{file}: {field} is {shape.get(field)}, but {why}; use parts that belong together", "mismatch"
            )
