"""Low-rank adapters: attach to a transformer, switch off (the reference model), save, load, fold into the weights.

W' = W + (alpha / rank) B A with B = 0 at the start (Hu et al. 2021). The saved file is diffusers' own, with the
adapter's metadata in its header, so that a stock pipeline's `load_lora_weights` also gets alpha != rank right. A
transformer here is any ModelMixin of diffusers that is a PeftAdapterMixin; what a family has of its own is an argument.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import nn

from posttrain.core.errors import UserError
from posttrain.core.files import write_bytes

FILE = "pytorch_lora_weights.safetensors"
NAME = "default"


def unwrap(transformer: nn.Module) -> Any:
    """The bare transformer inside a distributed wrapper, or itself."""
    inner = getattr(transformer, "module", transformer)
    return inner if isinstance(inner, nn.Module) else transformer


def attached(transformer: nn.Module) -> bool:
    return bool(getattr(unwrap(transformer), "peft_config", {}))


def attach(transformer: nn.Module, rank: int, alpha: int | None, targets: Sequence[str], seed: int) -> None:
    """Freeze `transformer` and add a trainable adapter in place. The same seed gives the same adapter.

    Args:
        alpha: the adapter is scaled by alpha / rank; None means alpha = rank.
        targets: name endings of the linear layers to adapt.

    Raises:
        UserError: a target names no layer.
    """
    from peft import LoraConfig  # peft takes seconds to import
    from peft.functional import cast_adapter_dtype

    for target in targets:
        if not _linear(transformer, [target]):
            names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
            near = get_close_matches(target, names, n=1, cutoff=0)[0]
            raise UserError(
                f"model.adapter.targets: no linear layer ends in {target!r}; the name of one is {near!r}",
                "unknown_name",
                "model.adapter.targets",
            )
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unwrap(transformer).add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets)), adapter_name=NAME
        )
    cast_adapter_dtype(unwrap(transformer), NAME)  # float32 whatever the base is


@contextmanager
def disabled(transformer: nn.Module) -> Iterator[None]:
    """Inside, the transformer is the base model again, bit for bit: the reference of preference losses."""
    inner = unwrap(transformer)
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()


@torch.no_grad()
def share(transformer: nn.Module, other: nn.Module) -> float:
    """How much of the adapter on `transformer` is in the weights of `other`: 1 all of it, 0 nothing.

    It is <D, D'> / <D, D> over all adapted layers, with D what the adapter adds to a layer's weight, and D' what an
    adapter on `other` adds, or where there is none, what its weight has more than the base of `transformer`.
    """
    both = own = 0.0
    layers = {name: layer for name, layer in unwrap(transformer).named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        theirs: Any = other.get_submodule(name)
        device = theirs.weight.device
        added = _added(layer).to(device)
        if hasattr(theirs, "lora_A"):
            found = _added(theirs)
        else:
            found = theirs.weight.float() - layer.base_layer.weight.to(device).float()
        both += float((added * found).sum())
        own += float(added.square().sum())
    return both / own if own else 1.0


def _added(layer: Any) -> torch.Tensor:
    """What the adapter on a layer adds to its weight, float32."""
    (name,) = layer.active_adapters
    added: torch.Tensor = layer.get_delta_weight(name)
    return added.float()


def save(transformer: nn.Module, folder: Path | str) -> Path:
    """Write the adapter to `folder`/pytorch_lora_weights.safetensors (atomic, the same bytes for the same weights)."""
    from peft.utils import get_peft_model_state_dict

    inner = unwrap(transformer)
    config = inner.peft_config[NAME]
    weights = get_peft_model_state_dict(inner, adapter_name=NAME)
    metadata = {
        "transformer.r": config.r,
        "transformer.lora_alpha": config.lora_alpha,
        "transformer.target_modules": sorted(config.target_modules),
    }
    content = save_tensors(
        {f"transformer.{name}": tensor.contiguous().cpu() for name, tensor in weights.items()},
        # one entry alone: safetensors writes several in a random order
        {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)},
    )
    path = Path(folder) / FILE
    write_bytes(path, content)
    return path


def save_comfyui(file: Path | str, path: Path | str, original_name: Callable[[str], str | None]) -> None:
    """Write the adapter that `save` put into `file` as ComfyUI reads it: in the original names, alpha folded into B.

    Args:
        original_name: the name of a layer there, None where it has none.

    Raises:
        UserError: it adapts a layer for which there is no original name.
    """
    weights, metadata = read(Path(file))
    scale = metadata["transformer.lora_alpha"] / metadata["transformer.r"]
    renamed = {}
    for name, tensor in weights.items():
        layer, matrix = name.removeprefix("transformer.").rsplit(".lora_", 1)  # "A.weight" or "B.weight"
        original = original_name(layer)
        if original is None:
            raise UserError(
                f"{file}: ComfyUI has no name for {layer}; leave `comfyui` out of export:", "unsupported", "export"
            )
        scaled = tensor * scale if matrix.startswith("B") else tensor
        renamed[f"diffusion_model.{original}.lora_{matrix}"] = scaled.contiguous()
    write_bytes(path, save_tensors(renamed, {"format": "pt"}))


Weights = tuple[dict[str, torch.Tensor], dict[str, Any]]  # of an adapter by name, and its metadata


def read(file: Path) -> Weights:
    """What `save` put into `file`."""
    with safe_open(file, "pt") as tensors:
        metadata = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
        return {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}, metadata


def load(transformer: nn.Module, path: Path | str, read: Callable[[Path], Weights] = read) -> None:
    """Put the adapter at `path` (a file, or the folder that `save` wrote into) onto `transformer`.

    It takes the place of one that is there.

    Args:
        read: how the file is read; a family may know more layouts than that of `save`.

    Raises:
        UserError: the file is absent, or it and this transformer do not have the same layers.
    """
    from diffusers.utils import logging
    from peft.functional import cast_adapter_dtype
    from peft.utils import get_peft_model_state_dict

    inner, path = unwrap(transformer), Path(path)
    path = path / FILE if path.suffix != ".safetensors" else path
    if not path.is_file():
        raise UserError(f"{path}: does not exist; train the run first or name its adapter folder", "missing")
    if attached(inner):
        inner.delete_adapters(NAME)
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would only warn of is refused below
    try:
        weights, metadata = read(path)
        with warnings.catch_warnings(action="ignore"):  # peft's, of the same
            inner.load_lora_adapter(weights, prefix="transformer", adapter_name=NAME, metadata=metadata or None)
    except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line only says that there are more
        raise UserError(
            f"{path}: does not fit the model ({reason}); use the base that it was trained on", "mismatch"
        ) from error
    finally:
        logging.set_verbosity(level)
    given = {key.removeprefix("transformer.") for key in weights}
    taken = set(get_peft_model_state_dict(inner, adapter_name=NAME)) if attached(inner) else set()
    targets = metadata.get("transformer.target_modules", [])  # peft makes layers for what the file has, no more
    adapted = {key.split(".lora_")[0] for key in given}
    lacking = set(_linear(inner, targets if isinstance(targets, list) else [])) - adapted
    if wrong := sorted(given - taken) or sorted(taken - given) or sorted(lacking):
        where = "model" if wrong[0] in given else "file"
        raise UserError(
            f"{path}: does not fit the model (the {where} has no {wrong[0]}); use the base that it was trained on",
            "mismatch",
        )
    cast_adapter_dtype(inner, NAME)


def _linear(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers that end in one of `targets`, whether an adapter is on them or not."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def proceed(transformer: nn.Module, path: Path | str, read: Callable[[Path], Weights] = read) -> None:
    """Give the adapter that is attached the weights at `path`, read as in `load`, so that training goes on from there.

    Raises:
        UserError: as `load`, or it has another rank, alpha or other targets than the one attached.
    """
    inner = unwrap(transformer)
    before, wanted = inner.peft_config[NAME], _shapes(inner)
    load(inner, path, read)
    after, found = inner.peft_config[NAME], _shapes(inner)
    if (before.r, before.lora_alpha) != (after.r, after.lora_alpha):
        raise UserError(
            f"{path}: has rank {after.r} and alpha {after.lora_alpha}, but model.adapter has {before.r} and "
            f"{before.lora_alpha}; set model.adapter to those of the file, or fold it in with model.merge",
            "mismatch",
            "model.adapter",
        )
    if differing := sorted(set(wanted.items()) ^ set(found.items())):
        what = "adapts" if differing[0] in found.items() else "does not adapt"
        layer = differing[0][0].split(".lora_")[0]
        raise UserError(
            f"{path}: {what} {layer}, unlike model.adapter; set model.adapter.targets to those of the file",
            "mismatch",
            "model.adapter.targets",
        )


def _shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the matrices of its adapters."""
    return {name: tuple(p.shape) for name, p in transformer.named_parameters() if ".lora_" in name}


def merge(transformer: nn.Module, path: Path | str, scale: float = 1.0, read: Callable[[Path], Weights] = read) -> None:
    """Fold the adapter at `path`, times `scale`, into a transformer that has none: W + scale alpha / rank B A.

    Raises:
        UserError: as `load`.
    """
    load(transformer, path, read)
    fuse(transformer, scale)
    unwrap(transformer).requires_grad_(True)  # peft had frozen it


def fuse(transformer: nn.Module, scale: float = 1.0) -> None:
    """Fold the adapter that is attached, times `scale`, into the weights, and take it off."""
    inner = unwrap(transformer)
    inner.fuse_lora(scale)
    inner.unload_lora()


def rescale(transformer: nn.Module, scale: float) -> None:
    """Let the adapter count `scale` times as much as it was trained to; 0 is the base."""
    for layer in unwrap(transformer).modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale(NAME, scale)
