"""Encode clips and captions once. A cache entry is a file whose name is the hash of all it depends on.

So an entry of another VAE, text encoder, clip or caption is never used by mistake, runs share entries, and interrupted
encoding continues. An entry's header has a digest of its name and content. An entry that is damaged or was renamed is
encoded again, or refused if training is already reading it.
"""

import hashlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.parallel import in_order
from posttrain.core.progress import progress
from posttrain.data.dataset import Clips, targets, to_float
from posttrain.data.schema import ClipRow
from posttrain.models.base import VideoModel
from posttrain.types import Batch

VERSION = "1"  # of what this code makes of a clip; with another one, entries are made again
CONDITION = "condition."  # what names in an entry begin with that are of Batch.condition


class Readable(Protocol):
    """The part of the interface of `Clips` that encoding needs. Of a row only caption and target are used."""

    @property
    def ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def row(self, index: int) -> ClipRow: ...
    def video(self, index: int) -> Path: ...
    def seen(self, index: int) -> list[str]: ...
    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]: ...


class Latents:
    """The latents, text embeddings and conditions of `clips` under `model`, cached in `folder`.

    Raises:
        UserError: a clip is damaged or changed, or the cache cannot be written.
    """

    def __init__(self, model: VideoModel, clips: Readable, folder: Path | str) -> None:
        from accelerate import PartialState

        self.ids = clips.ids
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(lambda i: files.sha256(clips.video(i)), range(len(clips))))
        rows = [clips.row(index) for index in range(len(clips))]
        base = model.cache_key()
        self.keys = [files.sha256_json([base, sums[i], row.caption, *clips.seen(i)]) for i, row in enumerate(rows)]
        self._rows = rows
        self._files = [Path(folder) / key[:2] / f"{key}.safetensors" for key in self.keys]
        state = PartialState()
        if state.is_main_process:
            print(f"latents: {sum(file.exists() for file in self._files)} of {len(self)} are in {folder}")
        # each process its own share of all, for others may already be at work
        share = range(state.process_index, len(self), state.num_processes)
        for parent in {self._files[index].parent for index in share}:
            files.sweep(parent)
        with ThreadPoolExecutor() as pool:
            mine = [index for index, whole in zip(share, pool.map(self._whole, share), strict=True) if not whole]
        if damaged := [self._files[index] for index in mine if self._files[index].exists()]:
            said = f"{len(damaged)} are damaged or of another version, and made again ({damaged[0]})"
            print(f"latents: {said}", file=sys.stderr)
        texts, encoding_text = dict[str, Tensor](), Lock()

        def encode(index: int) -> None:
            video, _ = clips.read(index)
            caption = rows[index].caption
            with torch.no_grad():
                pixels = to_float(video)[None].to(model.device)
                z0_CFHW = model.encode(pixels)[0]
                condition = model.condition(pixels[:, :, :1], pixels.shape[2])
                with encoding_text:
                    if caption not in texts:
                        texts[caption] = _trim(model.encode_text([caption])[0])
            entry = {"z0": z0_CFHW.float(), "text": texts[caption].float()}
            entry |= {f"{CONDITION}{name}": value[0] for name, value in condition.items()}
            entry = {k: v.contiguous().cpu() for k, v in entry.items()}
            # one field alone: safetensors writes several in an order that changes from process to process
            content = save(entry, {"sha256": _digest(self.keys[index], entry)})
            files.write_bytes(self._files[index], content, flush=False)

        if mine:
            with progress("encoding clips", len(mine)) as advance:
                for _ in in_order(encode, mine, model.device):
                    advance("")
        model.unload()  # UMT5 alone is 11 GiB, and training needs it not
        state.wait_for_everyone()
        self._length = model.text_tokens
        entries = zip(self.ids, self._files, strict=True) if state.is_main_process else ()
        if full := [name for name, file in entries if _tokens(file) == self._length]:
            names = ", ".join(full[:3]) + (", ..." if len(full) > 3 else "")
            said = f"{len(full)} of {len(self)} fill the {self._length} tokens that the model reads"
            print(f"captions: {said}; what is beyond is cut ({names})", file=sys.stderr)

    @property
    def key(self) -> str:
        """A hash of everything that the latents depend on."""
        return files.sha256_json(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, indices: Sequence[int]) -> Batch:
        """Latents and text embeddings of the clips at `indices`."""
        entries = [self._entry(index) for index in indices]
        text_BLD = torch.stack(
            [torch.nn.functional.pad(e["text"], (0, 0, 0, self._length - len(e["text"]))) for e in entries]
        )
        return Batch(
            ids=tuple(self.ids[index] for index in indices),
            z0_BCFHW=torch.stack([entry["z0"] for entry in entries]),
            text_BLD=text_BLD,
            target_B=targets([self._rows[index] for index in indices]),
            condition={
                name.removeprefix(CONDITION): torch.stack([entry[name] for entry in entries])
                for name in entries[0]
                if name.startswith(CONDITION)
            },
        )

    def _entry(self, index: int) -> dict[str, Tensor]:
        """The cache entry of a clip. Raises UserError if it is missing, damaged or renamed."""
        path = self._files[index]
        try:
            with safe_open(path, "pt") as stored:
                entry, noted = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: is damaged; start again: it is then encoded again", "damaged") from error
        if noted.get("sha256") != _digest(self.keys[index], entry):
            said = (
                "does not match its digest, or is of another version of the code; start again: it is then encoded again"
            )
            raise UserError(f"{path}: {said}", "damaged")
        return entry

    def _whole(self, index: int) -> bool:
        try:
            self._entry(index)
        except UserError:
            return False
        return True


def _digest(key: str, entry: dict[str, Tensor]) -> str:
    """The digest of the code's version, an entry's name and its tensors."""
    digest = hashlib.sha256(f"{VERSION} {key}".encode())
    for name, tensor in sorted(entry.items()):
        digest.update(f" {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Annotated:
    """Latents together with the pixels and annotations of the same clips."""

    def __init__(self, latents: Latents, clips: Clips) -> None:
        assert latents.ids == clips.ids
        self.ids, self._latents, self._clips = clips.ids, latents, clips

    @property
    def key(self) -> str:
        return files.sha256_json([self._latents.key, self._clips.key])

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, indices: Sequence[int]) -> Batch:
        """One batch with the latents, pixels and annotations of the clips at `indices`."""
        latents, truth = self._latents.load(indices), self._clips.load(indices)
        return replace(truth, z0_BCFHW=latents.z0_BCFHW, text_BLD=latents.text_BLD, condition=latents.condition)


def _tokens(file: Path) -> int:
    """The number of tokens of an entry's caption; 0 if the entry is damaged (reading it raises the error)."""
    try:
        with safe_open(file, "pt") as entry:
            return int(entry.get_slice("text").get_shape()[0])
    except (SafetensorError, OSError):
        return 0


def _trim(text_LD: Tensor) -> Tensor:
    """A text embedding without its zero padding."""
    used = text_LD.abs().amax(dim=-1).nonzero()
    return text_LD[: int(used.max()) + 1 if len(used) else 0]
