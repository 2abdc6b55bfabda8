"""From a folder, a training checkpoint or a hub id to an `OpenSora`, and back to files in the published names.

`model.path` is one of
- "pocket", the embedded one,
- a folder with transformer/, vae/, text_encoder/ and tokenizer/; model_index.json may say {"fps": ...}, and scheduler/
  how times are transformed,
- a folder with the transformer itself, as hpcai-tech/OpenSora-STDiT-v3 has it, or that hub id,
- the folder of a training checkpoint of Open-Sora or PISA (see weights.py), of which model/ is read, else ema.pt.
Parts that the folder lacks are the published ones, from the hub. `model.start` may be a single file of weights, such as
ema.pt; then `model.path` names its model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from posttrain.core.errors import UserError
from posttrain.core.files import read_object
from posttrain.models import lora
from posttrain.models.base import ModelConfig
from posttrain.models.folders import check_files, load_part, load_tokenizer
from posttrain.models.opensora import weights
from posttrain.models.opensora.model import FPS, OpenSora
from posttrain.models.opensora.stdit import NULL, TARGETS, STDiT3, initialise
from posttrain.models.opensora.vae import OpenSoraVAE
from posttrain.models.opensora.weights import files_of
from posttrain.pocket import whole

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = "hpcai-tech/OpenSora-STDiT-v3"
VAE = "hpcai-tech/OpenSora-VAE-v1.2"
TEXT = (
    "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"  # T5 v1.1-XXL in safetensors, below text_encoder/ and tokenizer/
)
EMBEDDED = "opensora"  # in posttrain/pocket
KINDS = ("json", "safetensors", "model")


class Parts(NamedTuple):
    """Folders of a model's parts."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    fps: float
    scheduler: dict[str, Any]  # what differs from the published one


def locate(path: str, revision: str | None = None) -> Parts:
    """The folders of the parts of the model that `path` names; missing parts are downloaded.

    Raises:
        UserError: `path` is not a folder and cannot be downloaded from the hub.
    """
    root = folder_of(path, revision)
    text = None
    if not ((root / "text_encoder").is_dir() and (root / "tokenizer").is_dir()):
        text = _fetch(TEXT, None, "text_encoder/*", "tokenizer/*")
    index, times = root / "model_index.json", root / "scheduler" / "scheduler_config.json"
    return Parts(
        root / "transformer" if (root / "transformer").is_dir() else root,
        root / "vae" if (root / "vae").is_dir() else _fetch(VAE, None, "*"),
        (text or root) / "text_encoder",
        (text or root) / "tokenizer",
        float(read_object(index).get("fps", FPS)) if index.exists() else FPS,
        {name: value for name, value in read_object(times).items() if name[0] != "_"} if times.exists() else {},
    )


def folder_of(path: str, revision: str | None = None) -> Path:
    """The absolute folder that `path` names, since the working directory may change later. Errors as `locate`."""
    if path == "pocket" or Path(path).is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision: {revision} is for hub ids, and {path} is a folder; leave it out",
                "conflict",
                "model.revision",
            )
        return whole(EMBEDDED) if path == "pocket" else Path(path).absolute()
    if Path(path).is_file():
        raise UserError(
            f"model.path: {path} is a file; set it to the model's folder or hub id, and model.start to the file",
            "format",
            "model.path",
        )
    if len(Path(path).parts) != 2 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path: {path} does not exist; give a folder or a hub id", "missing", "model.path")
    return _fetch(path, revision, "*", "transformer/*", "vae/*", "text_encoder/*", "tokenizer/*")


def read_configs(path: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of transformer and VAE; {} means the defaults of our classes, which are those of the published model.

    Raises:
        UserError: as `locate`. The published model is known without the hub.
    """
    if path == MODEL and not Path(path).is_dir():
        return {}, {}
    root = folder_of(path, revision)
    transformer, vae = (root / name if (root / name).is_dir() else None for name in ("transformer", "vae"))
    return STDiT3.read_config(transformer or root), OpenSoraVAE.read_config(vae) if vae else {}


def _fetch(name: str, revision: str | None, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"{pattern}.{kind}" for pattern in patterns for kind in KINDS]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"model.path: {name} cannot be downloaded from the hub ({reason}); check the network and the login "
            "(hf auth login), or name a folder that has transformer/, vae/, text_encoder/ and tokenizer/",
            "network",
            "model.path",
        ) from error


def bare(config: ModelConfig, dtype: torch.dtype | None = None) -> STDiT3:
    """The transformer from which training starts, without a new adapter; dtype None: `config.dtype`.

    Raises:
        UserError: it cannot be loaded, or `start` or `merge` do not fit it.
    """
    return _transformer(config, _transformer_folder(config), dtype or DTYPES[config.dtype])


def _transformer_folder(config: ModelConfig) -> Path:
    root = folder_of(config.path, config.revision)
    return root / "transformer" if (root / "transformer").is_dir() else root


def _transformer(config: ModelConfig, folder: Path, dtype: torch.dtype | None) -> STDiT3:
    """The transformer; dtype None: that of the files."""
    shape = STDiT3.read_config(folder)
    if config.init == "random":
        return initialise(shape, config.seed)
    source = folder
    if config.start and not _is_adapter(config.start):
        source = Path(config.start)
        own = STDiT3.read_config(source) if source.is_dir() else {}
        if any(own[name] != shape[name] for name in own.keys() & shape.keys()):
            raise UserError(
                f"model.start: {config.start} was trained from another model; name that one in model.path",
                "mismatch",
                "model.start",
            )
    tensors = weights.read(source)
    if source is not folder and NULL not in tensors:
        tensors |= {name: tensor for name, tensor in weights.read(folder).items() if name == NULL}
    transformer = STDiT3.build(shape, tensors, source, dtype)
    for adapter in config.merge:
        lora.merge(transformer, adapter.path, adapter.scale)
    return transformer


def freeze(transformer: STDiT3, trained: bool) -> None:
    """Without an adapter, train all weights except the text projection and the rotary frequencies along time."""
    transformer.requires_grad_(trained)
    for frozen in (transformer.rope, transformer.y_embedder):
        frozen.requires_grad_(False)


def _is_adapter(start: str) -> bool:
    """Whether `model.start` is a file of low-rank matrices; other files are weights, as folders are."""
    return Path(start).is_file() and Path(start).suffix == ".safetensors"


def save_merged(config: ModelConfig, adapter: Path, path: Path) -> None:
    """Write the folder `path` in the published layout: the transformer with `adapter` merged, in its files' dtype.

    Raises:
        UserError: as `bare` and `lora.load`, or the folder cannot be written.
    """
    transformer = _transformer(config, _transformer_folder(config), None)
    lora.merge(transformer, adapter)
    transformer.save_published(path)


def load(config: ModelConfig, device: str | torch.device = "cpu") -> OpenSora:
    """Load the model that a recipe names, into main memory; only the weights to train have requires_grad.

    Without an adapter, all weights are trained except the text projection and the frequencies along time, as published.
    Weights with `dtype: bf16` cannot be trained themselves. The transformer is read now, other parts when first used.

    Raises:
        UserError: no such model, or a part is missing, broken or does not fit the others.
    """
    if config.expert is not None or config.other_adapter is not None:
        field = "expert" if config.expert is not None else "other_adapter"
        raise UserError(
            f"model.{field}: is for models of two experts, and Open-Sora has one; leave it out",
            "conflict",
            f"model.{field}",
        )
    if config.init == "random" and config.dtype != "fp32":
        raise UserError(
            "model.dtype: with init=random all weights are trained, so they are fp32; leave it out",
            "conflict",
            "model.dtype",
        )
    parts, dtype = locate(config.path, config.revision), DTYPES[config.dtype]
    files_of(parts.vae)
    check_files(parts.text_encoder)
    with torch.device("meta"):
        vae = OpenSoraVAE(**OpenSoraVAE.read_config(parts.vae))
    text_config = load_part(T5Config, parts.text_encoder.parent, parts.text_encoder.name)
    tokenizer = load_tokenizer(parts.tokenizer.parent, parts.tokenizer.name)

    transformer = _transformer(config, parts.transformer, dtype)
    fits = {
        "in_channels": (vae.channels, "the VAE's latents have"),
        "caption_channels": (text_config.d_model, "the text encoder's d_model is"),
    }
    for field, (wanted, why) in fits.items():
        if transformer.config[field] != wanted:
            raise UserError(
                f"{parts.transformer}: {field} is {transformer.config[field]}, but {why} {wanted}; "
                "use parts that belong together",
                "mismatch",
                "model.path",
            )
    freeze(transformer, config.dtype == "fp32")
    if config.adapter is not None:
        adapter = config.adapter
        lora.attach(transformer, adapter.rank, adapter.alpha, adapter.targets or TARGETS, config.seed)
    if config.start and _is_adapter(config.start):
        if config.adapter is None:
            raise UserError(
                f"model.start: {config.start} is an adapter; set model.adapter, or name it in model.merge",
                "conflict",
                "model.start",
            )
        lora.proceed(transformer, config.start)

    def read_vae() -> nn.Module:
        return OpenSoraVAE.from_pretrained(parts.vae, torch_dtype=torch.float32).requires_grad_(False)

    def read_text() -> nn.Module:
        folder = parts.text_encoder
        return load_part(T5EncoderModel, folder.parent, folder.name, dtype=dtype).requires_grad_(False).eval()

    read: dict[str, Callable[[], nn.Module]] = {"vae": read_vae, "text_encoder": read_text}
    return OpenSora(
        transformer,
        vae,
        read,
        tokenizer,
        conditioning=config.conditioning,
        scheduler=parts.scheduler,
        fps=parts.fps,
        device=device,
    )
