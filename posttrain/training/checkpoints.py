"""Checkpoints of a run: folders step-000100/ with weights.safetensors, state.pt and meta.json.

meta.json has the digests of the other files and its own.

A checkpoint is complete or absent. A damaged one is renamed, and the previous one is used.
"""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from posttrain.core import distributed, files
from posttrain.core.errors import UserError

KEPT = 2  # checkpoints


class Checkpoint(NamedTuple):
    meta: dict[str, Any]  # step, what the weights depend on, digests of the files
    weights: dict[str, Tensor]
    state: dict[str, Any]


class Damaged(Exception):
    """A checkpoint is incomplete or does not match its digests; the message says which part."""


def kept(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def save(folder: Path, meta: Mapping[str, Any], weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint of step meta["step"], and delete the oldest ones."""
    stored = io.BytesIO()  # written by Python, whose errors say what the disk said
    torch.save(dict(state), stored)
    contents = {"weights.safetensors": save_tensors(dict(weights)), "state.pt": stored.getvalue()}
    sums = {name: files.sha256_bytes(content) for name, content in contents.items()}
    contents["meta.json"] = json.dumps(files.seal({**meta, "files": sums}), indent=1).encode()
    with files.replacing(folder / f"step-{meta['step']:06d}") as temporary:
        temporary.mkdir()
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
    drop_old(folder)


def drop_old(folder: Path) -> None:
    for old in kept(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, meaning: Mapping[str, Any]) -> Checkpoint | None:
    """The newest intact checkpoint, None if there is none. Every process must call this.

    Args:
        meaning: everything that the weights depend on now.

    Raises:
        UserError: the checkpoint was made with other settings.
    """
    process = distributed.process()
    if process.is_main_process:
        files.sweep(folder)
        drop_old(folder)  # who was killed after writing the newest had not come to it
    for path in reversed(kept(folder)):
        try:
            checkpoint = read(path)
        except Damaged as error:
            aside = path.with_name(f"damaged-{path.name}")
            print(
                f"{path}: is damaged ({error}); the previous one is used; this one is renamed to {aside}",
                file=sys.stderr,
            )
            process.wait_for_everyone()  # all have looked
            if process.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            continue
        if other := [key for key, value in meaning.items() if checkpoint.meta.get(key) != value]:
            raise UserError(
                f"{path}: was made with another {', '.join(other)}; set it back, "
                f"choose another run=..., or delete {folder.parent}",
                "other_run",
                other[0],
            )
        return checkpoint
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`.

    Raises:
        Damaged: a file is missing or changed. Errors of the disk itself are raised as OSError.
    """
    try:
        meta = files.read_sealed(path / "meta.json")
        contents = {name: (path / name).read_bytes() for name in meta["files"]}
    except (UserError, FileNotFoundError, KeyError) as error:
        if isinstance(silent := error.__cause__, OSError) and not isinstance(silent, FileNotFoundError):
            raise silent from None
        raise Damaged(str(error).partition(";")[0]) from error  # without a remedy: the caller has one
    for name, content in contents.items():
        if files.sha256_bytes(content) != meta["files"][name]:
            raise Damaged(f"{name} does not match its digest")
    state = torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)
    return Checkpoint(meta, load_tensors(contents["weights.safetensors"]), state)


def start_fingerprint(module: nn.Module) -> str:
    """Hash of the weights a run starts from, and of which of them are trained."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
