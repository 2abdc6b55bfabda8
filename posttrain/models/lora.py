"""Low-rank adapters: attach to a transformer, switch off (the reference model), save and load.

W' = W + (alpha / rank) B A with B = 0 at the start (Hu et al. 2021). The saved file is diffusers' own, with the
adapter's metadata in its header, so that a stock pipeline's `load_lora_weights` also gets alpha != rank right.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import nn

from posttrain.files import UserError, write_bytes

FILE = "pytorch_lora_weights.safetensors"
NAME = "default"
# Every linear map of a Wan block: attn1 is self-attention, attn2 attends to the text.
TARGETS = (
    *(f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
)


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
    from peft import LoraConfig  # peft takes seconds to import, and recipes need TARGETS alone
    from peft.functional import cast_adapter_dtype

    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name.endswith(f".{target}") or name == target for name in names):
            raise UserError(f"model.adapter.targets: no linear layer ends in {target!r}; a Wan block has {TARGETS}")
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


def load(transformer: nn.Module, folder: Path | str) -> None:
    """Put the adapter saved in `folder` onto `transformer`, in place of any that is there.

    Raises:
        UserError: the file is absent or does not fit this transformer.
    """
    from peft.functional import cast_adapter_dtype

    inner, path = unwrap(transformer), Path(folder) / FILE
    if not path.is_file():
        raise UserError(f"{path}: does not exist; train the run first or name its adapter folder")
    if attached(inner):
        inner.delete_adapters(NAME)
    try:
        inner.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer", adapter_name=NAME)
    except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: does not fit the model ({reason}); use the base that it was trained on") from error
    cast_adapter_dtype(inner, NAME)
