"""Low-rank adapters: attach to a transformer, switch off (the reference model), save, load, merge into the weights.

W' = W + (alpha / rank) B A with B = 0 at the start (Hu et al. 2021). The saved file has diffusers' format. Its B
is already multiplied by alpha / rank, so that every loader gives the same adapter; older files, with alpha in the
header, are read too. A transformer here is any ModelMixin of diffusers that is a PeftAdapterMixin; differences between
families are arguments.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import nn

from posttrain.core.errors import UserError
from posttrain.core.files import write_bytes

FILE = "pytorch_lora_weights.safetensors"
NAME = "default"
OTHER = "other"  # one that is read beside it for a moment
SURVIVES = 0.98  # the share of an adapter that has to be left when it is merged into coarse weights

# What an adapter's header may say beside what changes nothing: see `_check_plain`.
READ = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"}
PASSING = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
PASSING |= {"inference_mode", "lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules"}
# Of files that other programs wrote: part of a name in them, what they are, and what to do.
FOREIGN = (
    (".lokr_", "a LoKr (Kronecker factors)", "merge it into the base with the program that made it"),
    (".hada_", "a LoHa (Hadamard factors)", "merge it into the base with the program that made it"),
    (".oft_", "an OFT (rotations)", "merge it into the base with the program that made it"),
    ("dora_scale", "a DoRA", "merge it into the base with the program that made it"),
    ("lora_magnitude_vector", "a DoRA", "merge it into the base with the program that made it"),
    (
        "base_model.model.",
        "peft's own file",
        "write it anew with `transformer.` in place of `base_model.model.` in its names, "
        "and its lora_B times lora_alpha / r of adapter_config.json",
    ),
    (
        ".lora_A.default.",
        "DiffSynth-Studio's file",
        "write it anew in ComfyUI's names, with `diffusion_model.` before each name and without `.default`",
    ),
)
PREFIXES = ("transformer.", "diffusion_model.", "lora_unet_")  # of the names in diffusers', ComfyUI's, musubi's files
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of what a matrix may hold


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
    """Context in which the adapter is off: the transformer equals the base model bit for bit (the DPO reference)."""
    inner = unwrap(transformer)
    inner.disable_adapters()
    try:
        yield
    finally:
        inner.enable_adapters()


@torch.no_grad()
def share(transformer: nn.Module, other: nn.Module) -> float:
    """The share of the adapter on `transformer` that is in the weights of `other`: 1: all of it, 0: nothing.

    It is <D, D'> / <D, D> over all adapted layers. D is the change of a layer's weight by the adapter. D' is the change
    by an adapter on `other` or, if that has none, the difference of its weight from the base of `transformer`.
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
    """The change of a layer's weight by its adapter, float32."""
    (name,) = layer.active_adapters
    added: torch.Tensor = layer.get_delta_weight(name)
    return added.float()


def save(transformer: nn.Module, folder: Path | str) -> Path:
    """Write the adapter to `folder`/pytorch_lora_weights.safetensors (atomic, the same bytes for the same weights).

    Its B is multiplied by each layer's scale, and the header says alpha = rank.
    """
    inner = unwrap(transformer)
    config, weights = inner.peft_config[NAME], _weights(inner, NAME)
    for name, tensor in weights.items():
        layer, matrix = name.rsplit(".lora_", 1)  # "A.weight", "B.weight" or "B.bias"
        if matrix.startswith("B"):
            weights[name] = tensor * inner.get_submodule(layer).scaling[NAME]
    metadata: dict[str, Any] = {
        "transformer.r": config.r,
        "transformer.lora_alpha": config.r,
        "transformer.target_modules": sorted(config.target_modules),
    }
    if config.rank_pattern:
        metadata |= {f"transformer.{name}": config.rank_pattern for name in ("rank_pattern", "alpha_pattern")}
    if config.lora_bias:
        metadata["transformer.lora_bias"] = True
    content = save_tensors(
        {f"transformer.{name}": tensor.contiguous().cpu() for name, tensor in weights.items()},
        # one entry alone: safetensors writes several in a random order
        {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)},
    )
    path = Path(folder) / FILE
    write_bytes(path, content)
    return path


def save_comfyui(file: Path | str, path: Path | str, original_name: Callable[[str], str | None]) -> None:
    """Write the adapter that `save` put into `file` as ComfyUI reads it: in the original names, with alpha in B.

    Args:
        original_name: maps a layer to its name there; None if it has none.

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
    """The weights that `save` wrote into `file`."""
    with safe_open(file, "pt") as tensors:
        metadata = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
        return {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}, metadata


def load(transformer: nn.Module, path: Path | str, read: Callable[[Path], Weights] = read) -> None:
    """Put the adapter at `path` (a file, or the folder that `save` wrote into) onto `transformer`.

    It replaces an adapter that is already attached.

    Args:
        read: function that reads the file; a family may support more layouts than that of `save`.

    Raises:
        UserError: the file is absent, it and this transformer do not have the same layers, or it is more than a
            low-rank adapter.
    """
    inner = unwrap(transformer)
    path = _file(path)
    if attached(inner):
        inner.delete_adapters(NAME)
    _add(inner, path, read, NAME)


def _file(path: Path | str) -> Path:
    path = Path(path)
    path = path / FILE if path.suffix != ".safetensors" else path
    if not path.is_file():
        raise UserError(f"{path}: does not exist; train the run first or name its adapter folder", "missing")
    return path


def _add(inner: Any, path: Path, read: Callable[[Path], Weights], name: str) -> None:
    """Attach the adapter in the file `path` in addition to existing ones. Raises UserError: see `load`."""
    from diffusers.utils import logging
    from peft.functional import cast_adapter_dtype

    _check_foreign(path)
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would only warn of is refused below
    try:
        weights, metadata = read(path)
        _check_plain(path, metadata)
        with warnings.catch_warnings(action="ignore"):  # peft's, of the same
            inner.load_lora_adapter(weights, prefix="transformer", adapter_name=name, metadata=metadata or None)
    except UserError:
        raise
    except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
        if isinstance(error, json.JSONDecodeError | KeyError):
            raise UserError(
                f"{path}: its header lora_adapter_metadata cannot be read ({error}); write it as diffusers does, each "
                "key with `transformer.` before it, or leave it out",
                "format",
            ) from error
        if "should be empty" in str(error):
            left = str(error).partition("dict_keys(")[2].rstrip(").") or str(error)
            raise UserError(
                f"{path}: has parts that are not read here ({left[:300]}); take them out, or merge the file into the "
                "base with the program that made it",
                "unsupported",
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line only says that there are more
        raise UserError(
            f"{path}: does not fit the model ({reason}); use the base that it was trained on", "mismatch"
        ) from error
    finally:
        logging.set_verbosity(level)
    given = {key.removeprefix("transformer.") for key in weights}
    there = name in getattr(inner, "peft_config", {})
    taken = set(_weights(inner, name)) if there else set()
    targets = metadata.get("transformer.target_modules", [])  # peft makes layers for what the file has, no more
    adapted = {key.split(".lora_")[0] for key in given}
    lacking = set(_linear(inner, targets if isinstance(targets, list) else [])) - adapted
    unsaid = {key for key in taken - given if not key.endswith(".bias")}  # peft gives all layers one, of zeros
    if wrong := sorted(given - taken) or sorted(unsaid) or sorted(lacking):
        where = "model" if wrong[0] in given else "file"
        raise UserError(
            f"{path}: does not fit the model (the {where} has no {wrong[0]}); use the base that it was trained on",
            "mismatch",
        )
    cast_adapter_dtype(inner, name)
    for key, tensor in weights.items():  # again, because peft has rounded it to the dtype of the base
        layer, matrix, part = key.removeprefix("transformer.").rsplit(".", 2)
        inner.get_parameter(f"{layer}.{matrix}.{name}.{part}").data.copy_(tensor)
    inner.train(inner.training)  # peft's new layers are in training mode, where a dropout of the file would act


def _weights(inner: Any, name: str) -> dict[str, torch.Tensor]:
    """The matrices and biases of an adapter, by layer."""
    from peft.utils import get_peft_model_state_dict

    with warnings.catch_warnings():  # peft takes a bias, which has one axis, for a damaged matrix
        warnings.filterwarnings("ignore", r"Adapter '.*': \d+ LoRA tensor")
        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(inner, adapter_name=name)
    return weights


def _check_foreign(path: Path) -> None:
    """Refuse a file that does not have low-rank matrices in supported names, and say what it is."""
    try:
        with safe_open(path, "pt") as tensors:
            names = sorted(tensors.keys())
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
            endless = [name for name in names if not tensors.get_tensor(name).float().isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({error}); get it again", "damaged") from error
    for part, what, remedy in FOREIGN:
        if wrong := [name for name in names if part in name]:
            raise UserError(f"{path}: is {what} ({wrong[0]}), which is not supported; {remedy}", "unsupported")
    if not any("lora" in name or ".diff" in name for name in names):
        what = "a model's own weights" if any(name.endswith(".weight") for name in names) else "no adapter"
        raise UserError(
            f"{path}: is {what} ({names[:1]}); name a file with low-rank matrices (lora_A, lora_B)", "format"
        )
    if endless:
        raise UserError(f"{path}: {endless[0]} has values that are not finite; get it again", "damaged")
    if small := [name for name in names if dtypes[name] not in DTYPES]:
        raise UserError(
            f"{path}: is quantised ({small[0]} is {dtypes[small[0]]}), which is not read here; write it in 16 or 32 "
            "bits",
            "unsupported",
        )
    if strange := [name for name in names if not name.startswith(PREFIXES)]:
        raise UserError(
            f"{path}: has {strange[0]} and {len(strange) - 1} more names that do not begin with "
            f"{', '.join(PREFIXES)}; rename them (in diffusers `transformer.<layer>.lora_A.weight`) or take them out",
            "unsupported",
        )
    ours = [name for name in names if name.startswith("transformer.")]
    if wrong := [name for name in ours if not name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_B.bias"))]:
        raise UserError(
            f"{path}: has {wrong[0]}, which diffusers' files do not have; call matrices lora_A.weight and "
            "lora_B.weight, multiply lora_B by alpha / rank, and take alpha out",
            "unsupported",
        )
    kohya = {name.partition(".lora_")[0] for name in names if name.startswith("lora_unet_") and ".lora_" in name}
    there = set(names)
    for layer in sorted(kohya):
        for part in (".lora_down.weight", ".lora_up.weight", ".alpha"):
            if layer + part not in there:
                raise UserError(
                    f"{path}: lacks {layer}{part}, which each layer has in files of kohya and musubi; get it again, "
                    "or give an alpha that is the rank",
                    "format",
                )


def _check_plain(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse a header with options beyond W + scale B A, or with an initialisation that changes the base."""
    from dataclasses import asdict

    from peft import LoraConfig

    usual = asdict(LoraConfig())
    for key, value in metadata.items():
        field = key.removeprefix("transformer.")
        if not key.startswith("transformer.") or field in READ | PASSING or not value or value == usual.get(field):
            continue
        if field == "init_lora_weights" and value in ("gaussian", "orthogonal"):
            continue
        if field == "bias" and value == "none":
            continue
        raise UserError(
            f"{path}: its header says {field}: {value!r}, which is not supported; "
            "merge it into the base with the program that made it",
            "unsupported",
        )


def _linear(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the linear layers that end in one of `targets`, whether an adapter is on them or not."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def proceed(transformer: nn.Module, path: Path | str, read: Callable[[Path], Weights] = read) -> None:
    """Copy the weights at `path`, read as in `load`, into the attached adapter, so that training continues from them.

    The attached adapter keeps its own alpha: B is rescaled so that the change of W is that of the file.

    Raises:
        UserError: as `load`, or it has another rank or other targets than the one attached, or biases.
    """
    inner, path = unwrap(transformer), _file(path)
    _add(inner, path, read, OTHER)
    wanted, given = _shapes(inner, NAME), _shapes(inner, OTHER)
    if biases := [name for name in given if name.endswith(".bias")]:
        raise UserError(
            f"{path}: has {biases[0]}, but model.adapter has no biases; merge it with model.merge",
            "mismatch",
            "model.adapter",
        )
    ranks = sorted({min(shape[:2]) for name, shape in given.items()})
    if len(ranks) > 1:
        several = ", ".join(map(str, ranks))
        raise UserError(
            f"{path}: has layers of different ranks ({several}), but model.adapter has one rank for all; "
            "merge it with model.merge",
            "mismatch",
            "model.adapter.rank",
        )
    for name in sorted(wanted.keys() & given.keys()):
        rank, found = (min(shapes[name][:2]) for shapes in (wanted, given))
        if rank != found:
            raise UserError(
                f"{path}: has rank {found}, but model.adapter has {rank}; set model.adapter.rank to that of the file, "
                "or merge it with model.merge",
                "mismatch",
                "model.adapter.rank",
            )
    if differing := sorted(wanted.keys() ^ given.keys()):
        what = "adapts" if differing[0] in given else "does not adapt"
        layer = differing[0].split(".lora_")[0]
        raise UserError(
            f"{path}: {what} {layer}, unlike model.adapter; set model.adapter.targets to those of the file",
            "mismatch",
            "model.adapter.targets",
        )
    with torch.no_grad():
        for layer in adapted_layers(inner):
            layer.lora_A[NAME].weight.copy_(layer.lora_A[OTHER].weight)
            layer.lora_B[NAME].weight.copy_(layer.lora_B[OTHER].weight * (layer.scaling[OTHER] / layer.scaling[NAME]))
    inner.set_adapter(NAME)
    inner.delete_adapters(OTHER)


def adapted_layers(transformer: nn.Module) -> list[Any]:
    """Its layers with an adapter."""
    return [layer for layer in unwrap(transformer).modules() if hasattr(layer, "lora_A")]


def _shapes(transformer: nn.Module, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's matrices and biases, by name without the adapter's name."""
    named = transformer.named_parameters()
    return {key.replace(f".{name}.", "."): tuple(p.shape) for key, p in named if ".lora_" in key and f".{name}." in key}


def merge(transformer: nn.Module, path: Path | str, scale: float = 1.0, read: Callable[[Path], Weights] = read) -> None:
    """Merge the adapter at `path`, times `scale`, into a transformer that has none: W + scale alpha / rank B A.

    Raises:
        UserError: as `load`, or rounding to the precision of the weights removes it.
    """
    load(transformer, path, read)
    if not any(layer.lora_B[NAME].weight.any() for layer in adapted_layers(transformer)):
        print(f"{path}: changes nothing, because all its lora_B are 0", file=sys.stderr)
    survives, dtype = fuse(transformer, scale), unwrap(transformer).dtype
    if dtype != torch.float32 and abs(survives - 1) > 1 - SURVIVES:
        raise UserError(
            f"{path}: times {scale:g}, merged into {str(dtype).removeprefix('torch.')} weights, {survives:.1%} of it "
            "is left; set model.dtype=fp32, or keep the adapter separate from the weights (model.start; "
            "distribute the adapter file)",
            "mismatch",
            "model.merge",
        )
    unwrap(transformer).requires_grad_(True)  # peft had frozen it


@torch.no_grad()
def fuse(transformer: nn.Module, scale: float = 1.0) -> float:
    """Merge the attached adapter, times `scale`, into the weights, and remove it.

    Returns:
        The share of it that is in the weights after rounding: <D, D'> / <D, D> over all adapted layers, with D the
        exact change of a weight and D' the actual change.
    """
    inner = unwrap(transformer)
    both = own = 0.0
    for layer in adapted_layers(inner):
        layer.scale_layer(scale)
        added, before = _added(layer), layer.base_layer.weight.to(torch.float32, copy=True)
        layer.merge()
        both += float((added * (layer.base_layer.weight.float() - before)).sum())
        own += float(added.square().sum())
    inner.unload_lora()
    return both / own if own else 1.0


def rescale(transformer: nn.Module, scale: float) -> None:
    """Set the adapter's strength to `scale` times that of training; 0 gives the base."""
    for layer in adapted_layers(transformer):
        layer.set_scale(NAME, scale)
