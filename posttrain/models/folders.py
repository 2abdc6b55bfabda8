"""Diffusers and transformers folders: find what `model.path` names, and load its parts or a network, with errors of one
line."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from posttrain.core.errors import UserError, printable
from posttrain.core.files import read_object
from posttrain.models.base import ModelConfig
from posttrain.pocket import whole

if TYPE_CHECKING:  # a recipe is read without transformers, which takes seconds to import
    from transformers import PreTrainedModel

# What is fetched of a hub repository: the parts a folder may have, and in them configs, vocabularies and safe weights.
PARTS = ["transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"]
PARTS += ["image_encoder", "image_processor"]
WANTED = ["model_index.json", *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "safetensors", "model"))]


def find(path: str, revision: str | None = None, embedded: str | None = None) -> Path:
    """The diffusers folder that `path` names: "pocket", a folder, or a hub id, which is downloaded if necessary.

    Args:
        embedded: the folder in posttrain/pocket for "pocket"; None: this family has no embedded model.

    Raises:
        UserError: there is none.
    """
    pocket = path == "pocket" and embedded is not None
    if pocket or Path(path).is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision: {revision} is for hub ids, and {path} is a folder; leave it out",
                "conflict",
                "model.revision",
            )
        return whole(str(embedded)) if pocket else Path(path)
    if Path(path).is_file():
        raise UserError(
            f"model.path: {path} is a file; name the diffusers folder of the whole model or its hub id, and an adapter "
            "in model.start or model.merge",
            "format",
            "model.path",
        )
    if len(Path(path).parts) != 2 or path.startswith((".", "/", "~")):
        offered = "'pocket', a" if embedded else "a"
        raise UserError(
            f"model.path: {path} does not exist; give {offered} diffusers folder or a hub id", "missing", "model.path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # the hub, the network and the disk each raise their own kinds
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.path: {path}{at} is no folder and cannot be downloaded from the hub ({_reason(error)}); check its "
            "name, model.revision, the network and the login (hf auth login), or give a folder",
            "network",
            "model.path",
        ) from error


def network(kind: "type[PreTrainedModel]", config: ModelConfig, part: str) -> Any:
    """A network of `kind` with the weights that `config.path` names, float32; `init: random` uses only its config.

    The path is a transformers folder, a hub id, or "pocket": the embedded folder `part`.

    Raises:
        UserError: it is not such a network, or incomplete.
    """
    local = Path(config.path).exists() or config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    path, name = str(whole(part)) if config.path == "pocket" else config.path, kind.__name__
    if local and not (Path(path) / "config.json").exists():
        raise UserError(
            f"{Path(path) / 'config.json'}: does not exist; name the folder of a {name} or a hub id",
            "missing",
            "model.path",
        )
    try:
        if config.init == "random":
            return kind.config_class.from_pretrained(path)
        net, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own kinds
        raise UserError(f"{path}: cannot be loaded as a {name} ({_reason(error)})", "format", "model.path") from error
    if info["missing_keys"]:  # transformers would leave these random and only warn
        raise UserError(f"{path}: lacks {sorted(info['missing_keys'])[0]}; it is no whole {name}", "damaged")
    return net


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_files(part: Path) -> None:
    """Refuse a part whose weights are missing, damaged, quantised, or lack a shard; reads only their headers."""
    config = read_object(part / "config.json") if (part / "config.json").is_file() else {}
    if "quantization_config" in config:
        quantised = config["quantization_config"]
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise _quantised(part, printable(method or "see its config.json"))
    shards: set[str] = set()
    for index in part.glob("*.safetensors.index.json"):
        if not isinstance(names_of := read_object(index).get("weight_map"), dict):
            raise UserError(f"{index}: has no weight_map; get this part of the model again", "damaged")
        shards |= {str(name) for name in names_of.values()}
    names = sorted(shards or {path.name for path in part.glob("*.safetensors")})
    if not names:
        raise UserError(f"{part}: has no .safetensors file; get this part of the model in that format", "missing")
    for name in names:
        if Path(name).name != name:
            raise UserError(
                f"{part}: its index lists {name!r}, which is not a file of this folder; get the model again", "outside"
            )
        try:
            with safe_open(part / name, framework="pt") as tensors:
                dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
        except FileNotFoundError as error:
            raise UserError(f"{part / name}: does not exist; get this file of the model again", "missing") from error
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{part / name}: is damaged ({_reason(error)}); get this file of the model again", "damaged"
            ) from error
        if small := sorted(dtype for dtype in dtypes if dtype.startswith(("F8", "F4", "I8", "U8"))):
            raise _quantised(part, small[0])


def _quantised(part: Path, what: str) -> UserError:
    return UserError(
        f"{part}: is quantised ({what}), which is not supported; use the model with weights of 16 or 32 bits "
        "(model.dtype=bf16 holds them in half the memory)",
        "unsupported",
        "model.path",
    )


def load_part(kind: Any, root: Path, name: str, **options: Any) -> Any:
    """Load one component of the folder `root`; any error becomes a UserError that names it.

    `kind` is the class whose `from_pretrained` reads it, or a function that does.
    """
    part = root / name
    if not part.is_dir():
        raise UserError(
            f"{part}: does not exist; model.path must name a whole diffusers folder", "missing", "model.path"
        )
    weighty = isinstance(kind, type) and issubclass(kind, nn.Module)
    if weighty:
        check_files(part)
        options |= {"use_safetensors": True, "output_loading_info": True}
    read = kind.from_pretrained if hasattr(kind, "from_pretrained") else kind
    try:
        loaded = read(str(root), subfolder=name, local_files_only=True, **options)
    except Exception as error:  # diffusers, transformers and safetensors each raise their own kinds
        raise UserError(
            f"{part}: cannot be loaded ({_reason(error)}); get this part of the model again", "damaged"
        ) from error
    if weighty:
        loaded, info = loaded
        if info["missing_keys"]:  # diffusers would leave these random and only warn
            lacking = sorted(info["missing_keys"])[0]
            raise UserError(f"{part}: lacks {lacking}; get this part of the model again", "damaged")
    return loaded


def load_tokenizer(root: Path, name: str) -> Any:
    """The tokenizer in the folder `name` of `root`; code in the folder is never run.

    Raises:
        UserError: its vocabulary is missing (transformers would silently make another); or as `load_part`.
    """
    if (root / name).is_dir() and not any((root / name / file).is_file() for file in VOCABULARIES):
        raise UserError(
            f"{root / name}: has none of {', '.join(VOCABULARIES)}; get this part of the model again", "missing"
        )
    from transformers import AutoTokenizer

    return load_part(AutoTokenizer, root, name, trust_remote_code=False)


VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model")  # one of these a tokenizer is read from
