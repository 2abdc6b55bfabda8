"""One training run: the order of the data, the optimiser's step, checkpoints, the log. It knows no method and no model.

    for batch in run.batches():
        loss, metrics = some_loss(run.module, batch, config, run.random)
        run.step(loss, **metrics)

A run that is killed at any moment and started again ends with the same weights, bit for bit, and the same log (but for
`seconds`): step s sees places s * batch ... (s + 1) * batch - 1 of an endless sequence of samples, in which every epoch
is a permutation from (seed, epoch); random numbers depend on (seed, step, place); the rest is in the checkpoint.
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.core import distributed, files
from posttrain.core.errors import UserError
from posttrain.core.progress import progress
from posttrain.core.recipe import Strict
from posttrain.core.trackers import TrackerName, check_trackers, log_videos, tracking
from posttrain.types import Batch, Random

KEPT = 2  # checkpoints


class TrainConfig(Strict):
    """How a run optimises. `batch` is global: over all ranks and micro-batches of one optimiser step."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    seed: int = Field(0, ge=0)
    accumulate: int = Field(1, ge=1)  # micro-batches per step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic; weights keep their own
    schedule: Literal["constant", "cosine"] = "constant"
    lr_end: float | None = Field(None, gt=0)  # where cosine ends; None: at 0
    warmup: int = Field(0, ge=0)  # steps from 0 to lr
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)  # the largest norm of the gradient
    ema: float = Field(0.0, ge=0, lt=1)  # decay of the weights' average, at step s at most (1 + s) / (10 + s); 0: none
    checkpoint_every: int = Field(100, ge=1)
    block_checkpointing: bool = False  # recompute each block in the backward pass, for memory
    trackers: tuple[TrackerName, ...] = ()  # what also shows the log and the validation videos

    @model_validator(mode="after")
    def _ends_below(self) -> "TrainConfig":
        if self.lr_end is not None and (self.schedule != "cosine" or self.lr_end > self.lr):
            raise PydanticCustomError(
                "part", "lr_end is where a cosine ends, at most at lr; mend both, or leave it out"
            )
        return self


class Data(Protocol):
    """What a run draws batches from."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def key(self) -> str:
        """Changes with the content."""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> Batch: ...


class Stopped(SystemExit):
    """The run was asked to stop, and its state is saved. The exit code is the shell's: 128 + signal."""


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def sample_order(seed: int, size: int, places: Sequence[int]) -> list[int]:
    """Dataset indices at these places of the endless sequence of samples."""
    return [int(_permutation(seed, place // size, size)[place % size]) for place in places]


class Run:
    """A training run in `folder` (log.jsonl, checkpoints/), which continues from its newest whole checkpoint.

    Args:
        module: what is trained; only parameters that require gradients are stepped, averaged and stored.
        data: anything with `ids`, `key`, `len` and `load(indices) -> Batch`.
        validate: called with the step number and averaged weights in place every `validate_every` steps; the numbers
            that it returns join that step's row of the log, and the video files, by name, go to the trackers.
        depends: what else the trained weights depend on, by name; values that JSON can hold.
        ends: asked with the step number after each validation, of which there is then one before the first step too,
            and on every process: whether training ends here.

    Attributes:
        module: the module to call in the loss; the caller puts it back where its model looks for it.
        random: random numbers for the batch at hand.
        steps: optimiser steps done.

    Raises:
        UserError: the folder cannot be written, belongs to another run, or the numbers do not fit each other.
    """

    def __init__(
        self,
        folder: Path | str,
        module: nn.Module,
        data: Data,
        train: TrainConfig,
        validate: Callable[[int], tuple[dict[str, float], Mapping[str, Path]]] | None = None,
        validate_every: int = 0,
        depends: dict[str, Any] | None = None,
        ends: Callable[[int], bool] | None = None,
    ) -> None:
        # these take seconds to import
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

        check_trackers(train.trackers)
        state = distributed.process()
        ranks, self._rank = state.num_processes, state.process_index
        if train.batch % (train.accumulate * ranks):
            raise UserError(f"train.batch: {train.batch} does not divide into {train.accumulate} x {ranks} parts")
        if not len(data):
            raise UserError("data: has no clips")
        self.folder, self.data, self.train = Path(folder), data, train
        self._validate, self._validate_every, self._depends = validate, validate_every, depends or {}
        self._ends = ends
        self._share = train.batch // (train.accumulate * ranks)

        AcceleratorState._reset_state()  # it would refuse another precision later in the same process
        bf16, zero = train.precision == "bf16", distributed.zero()
        self.accelerator = Accelerator(
            cpu=state.device.type == "cpu" and not zero,
            mixed_precision="bf16" if bf16 and not zero else "no",
            # as a number it would give way to the launcher's
            gradient_accumulation_plugin=GradientAccumulationPlugin(train.accumulate, sync_with_dataloader=False),
            deepspeed_plugin=distributed.zero_plugin(self._share, train.accumulate, train.clip, bf16) if zero else None,
            log_with=list(train.trackers) or None,
            project_dir=self.folder / "tensorboard",
        )

        if train.block_checkpointing:
            checkpointed: Any = module  # diffusers' name for it
            checkpointed.enable_gradient_checkpointing()
        self._start = start_fingerprint(module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(
                "model: nothing in it is trainable; give it an adapter, load it in fp32 to train all of it, and where "
                "there are two experts name model.expert"
            )
        optimizer = torch.optim.AdamW(
            parameters, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        # the scheduler stays unprepared: accelerate's would step once per rank
        schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        self._scheduler = (
            get_scheduler(schedule, optimizer, num_warmup_steps=train.warmup, num_training_steps=train.steps)
            if train.lr_end is None
            else get_cosine_with_min_lr_schedule_with_warmup(optimizer, train.warmup, train.steps, min_lr=train.lr_end)
        )
        self._plain = module  # as it is inside what `prepare` wraps around it
        self.module, self._optimizer = self.accelerator.prepare(module, optimizer)
        self._names = [name for name, p in self._plain.named_parameters() if p.requires_grad]
        self._ema = EMAModel(self._parameters, decay=train.ema) if train.ema else None

        # torch's flash attention for CPUs takes a pocket step from 0.40 to 0.59 s in bf16 (in fp32 both take 0.7 s)
        self._slow_attention = self.accelerator.device.type == "cpu" and train.precision == "bf16"
        self.random = Random(train.seed, 0, [])
        self.steps = 0
        self._stop: int | None = None
        self._context = ExitStack()  # of one micro-batch: precision, gradient synchronisation
        self._losses: list[dict[str, float]] = []  # of the micro-batches of this step
        self._started = time.monotonic()
        with files.explain(self.folder):
            self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._log_bytes = self._resume()
        self._ended = bool(ends and ends(self.steps))

    # ------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of the steps still to do; call `step` once for each."""
        self._cut_log()
        if self.done:
            return
        bar = progress("training", self.train.steps, self.steps)
        tracked = tracking(self.accelerator, self.folder, self.steps, self.meaning)
        shown = bar if self.accelerator.is_main_process else nullcontext(_silent)
        with self._signals(), tracked, shown as self._advance:
            if self._ends and not self.steps:
                self._log({"step": 0, **self._look()})
            while not self.done:
                self._started = time.monotonic()
                for part in range(self.train.accumulate):
                    ranks = self.accelerator.num_processes
                    first = self.steps * self.train.batch + (part * ranks + self._rank) * self._share
                    places = range(first, first + self._share)
                    self.random = Random(self.train.seed, self.steps, places)
                    # for layers that draw on their own, as dropout does
                    entropy = np.random.SeedSequence([self.train.seed, self.steps, part, self._rank])
                    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
                    batch = self.data.load(sample_order(self.train.seed, len(self.data), places))
                    self._context.enter_context(self.accelerator.accumulate(self.module))
                    self._context.enter_context(self.accelerator.autocast())
                    if self._slow_attention:
                        self._context.enter_context(sdpa_kernel(SDPBackend.MATH))
                    yield batch.to(self.accelerator.device)

    def add(self, part: Callable[[], Tensor]) -> None:
        """Take the gradient of a part of a micro-batch's loss, and free what it needed; `step` takes the last part's.

        `part` makes it, so that its forward pass too knows that processes need not meet for it.
        """
        synchronises = self.accelerator.sync_gradients
        with self.accelerator.no_sync(self.module):
            loss = part()
            self.accelerator.sync_gradients = False  # or DeepSpeed would step
            with torch.autocast(self.accelerator.device.type, enabled=False):
                self.accelerator.backward(loss)
        self.accelerator.sync_gradients = synchronises

    def step(self, loss: Tensor, **metrics: float | Tensor) -> None:
        """Take the gradient of a micro-batch's loss; after the last one of a step, update, log and save.

        Raises:
            UserError: the loss or the gradient is not finite.
            Stopped: SIGTERM or SIGINT came meanwhile; everything is saved.
        """
        with torch.autocast(self.accelerator.device.type, enabled=False):
            self.accelerator.backward(loss)
        self._context.close()
        self._losses.append({name: float(torch.as_tensor(v).detach()) for name, v in {"loss": loss, **metrics}.items()})
        if not self.accelerator.sync_gradients:
            return
        rows, self._losses = self._losses, []
        row = {name: self._mean([r[name] for r in rows]) for name in rows[0]}
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.train.clip)
        assert norm is not None
        if not math.isfinite(row["loss"]) or not math.isfinite(norm):
            raise self._not_finite(row["loss"], float(norm))
        row |= {"lr": self._scheduler.get_last_lr()[0], "grad_norm": float(norm)}
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        if self._ema:
            self._ema.step(self._parameters)
        self.steps += 1
        row["seconds"] = time.monotonic() - self._started
        last = self.steps == self.train.steps
        if self._validate and self._validate_every and (last or self.steps % self._validate_every == 0):
            row |= self._look()
        self._log({"step": self.steps, **row})
        self._advance(f"loss {row['loss']:.4g}")
        stop = self._asked_to_stop()
        if self.done or stop or self.steps % self.train.checkpoint_every == 0:
            self._save()
        if stop and not self.done:
            name = signal.Signals(stop).name
            print(f"{name}: saved step {self.steps} of {self.train.steps}; start again to continue", file=sys.stderr)
            raise Stopped(128 + stop)

    @property
    def done(self) -> bool:
        return self._ended or self.steps == self.train.steps

    def finish(self) -> nn.Module:
        """Put the averaged weights into the module for good, take off what accelerate wrapped around it, return it."""
        if self._ema:
            self._ema.copy_to(self._parameters)
        self.module = self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        return self.module

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The averaged weights are in the module inside this context (its own where there is no average)."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self._ema.restore(self._parameters)

    # ------------------------------------------------------------------ what a step needs

    def _look(self) -> dict[str, float]:
        """Validate: the numbers, while the videos go to the trackers; and whether training ends here."""
        assert self._validate is not None
        with self.weights():
            scores, videos = self._validate(self.steps)
        log_videos(self.accelerator, videos, self.steps)
        if self._ends:
            self.accelerator.wait_for_everyone()  # what it reads, one process has written
            self._ended = self._ends(self.steps)
        return scores

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._plain.parameters() if p.requires_grad]

    def _mean(self, values: Sequence[float]) -> float:
        """Over micro-batches and ranks."""
        mean = torch.tensor(sum(values) / len(values), dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean.to(self.accelerator.device), "mean")
        return float(mean)

    def _not_finite(self, loss: float, norm: float) -> UserError:
        first = self.steps * self.train.batch
        order = sample_order(self.train.seed, len(self.data), range(first, first + self.train.batch))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        kept = self._kept()
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        clips = ", ".join(self.data.ids[index] for index in order)
        return UserError(
            f"{self.folder}: {what} at step {self.steps + 1}, clips {clips}; {last}; lower train.lr or mend these clips"
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT wait for the end of the step; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self) -> int:
        """The signal that came, 0 for none; every rank answers the same."""
        stop = self._stop or 0
        if self.accelerator.num_processes > 1:
            stops = self.accelerator.gather(torch.tensor([stop], device=self.accelerator.device))
            stop = int(stops.max())
        return stop

    # ------------------------------------------------------------------ files

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _kept(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step-*"))

    def _log(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        path = self.folder / "log.jsonl"
        with files.explain(path), open(path, "a") as stream:
            stream.write(json.dumps(row) + "\n")
            self.accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    @property
    def meaning(self) -> dict[str, Any]:
        """What the trained weights depend on here; a checkpoint is continued only if it is the same."""
        train = self.train.model_dump(mode="json", exclude={"checkpoint_every", "trackers"})
        settings = {f"train.{name}": value for name, value in train.items()}
        return {**settings, "data": self.data.key, "model": self._start, **self._depends}

    def _save(self) -> None:
        optimizer = distributed.optimizer_state(self._optimizer, self._parameters)
        if self.accelerator.is_main_process:
            log = self.folder / "log.jsonl"
            with files.explain(log), open(log, "rb+") as stream:
                os.fsync(stream.fileno())
            state = io.BytesIO()  # written by Python, whose errors say what the disk said
            torch.save(
                {
                    "optimizer": optimizer,
                    "scheduler": self._scheduler.state_dict(),
                    "ema": self._ema.state_dict() if self._ema else None,
                },
                state,
            )
            weights = {n: p.detach().contiguous() for n, p in zip(self._names, self._parameters, strict=True)}
            contents = {"weights.safetensors": save_tensors(weights), "state.pt": state.getvalue()}
            sums = {name: files.sha256_bytes(content) for name, content in contents.items()}
            meta = {"step": self.steps, "log_bytes": log.stat().st_size, "sha256": sums, **self.meaning}
            contents["meta.json"] = json.dumps(meta, indent=1).encode()
            with files.replacing(self._checkpoints / f"step-{self.steps:06d}") as temporary:
                temporary.mkdir()
                for name, content in contents.items():
                    (temporary / name).write_bytes(content)
            self._drop_old()
        self.accelerator.wait_for_everyone()

    def _drop_old(self) -> None:
        for old in self._kept()[:-KEPT]:
            shutil.rmtree(old)

    def _resume(self) -> int:
        """Continue from the newest whole checkpoint; the length of its log."""
        if self.accelerator.is_main_process:
            files.sweep(self._checkpoints)
            self._drop_old()  # who was killed after writing the newest had not come to it
        log_bytes = 0
        for path in reversed(self._kept()):
            try:
                meta, weights, state = _read_checkpoint(path)
            except Damaged as error:
                aside = path.with_name(f"damaged-{path.name}")
                print(f"{path}: is damaged ({error}); the one before it is used, it becomes {aside}", file=sys.stderr)
                self.accelerator.wait_for_everyone()  # all have looked
                if self.accelerator.is_main_process:
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                continue
            if other := [key for key, value in self.meaning.items() if meta.get(key) != value]:
                raise UserError(
                    f"{path}: was made with another {', '.join(other)}; choose another run name or delete the folder"
                )
            for name, parameter in zip(self._names, self._parameters, strict=True):
                parameter.data.copy_(weights[name])
            distributed.load_optimizer_state(self._optimizer, self._parameters, state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            if self._ema:
                self._ema.load_state_dict(state["ema"])
                self._ema.to(self.accelerator.device)
            self.steps, log_bytes = meta["step"], meta["log_bytes"]
            if self.accelerator.is_main_process:
                print(f"{self.folder}: continues from step {self.steps} of {self.train.steps}", file=sys.stderr)
            break
        return log_bytes

    def _cut_log(self) -> None:
        """Take the steps off the log that will be done again."""
        if self.accelerator.is_main_process:
            log = self.folder / "log.jsonl"
            with files.explain(log), open(log, "ab") as stream:
                stream.truncate(min(self._log_bytes, stream.tell()))
        self.accelerator.wait_for_everyone()


class Damaged(Exception):
    """A checkpoint is not what was written; the message says which part."""


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Meta, weights and state.

    Raises:
        Damaged: something in it is absent or changed. A disk that does not answer is no damage, and raises OSError.
    """
    try:
        meta = files.read_json(path / "meta.json")
        contents = {name: (path / name).read_bytes() for name in meta["sha256"]}
    except (UserError, FileNotFoundError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise Damaged(str(error)) from error
    for name, content in contents.items():
        if files.sha256_bytes(content) != meta["sha256"][name]:
            raise Damaged(f"{name} is not what was written")
    state = torch.load(io.BytesIO(contents["state.pt"]), map_location="cpu", weights_only=True)
    return meta, load_tensors(contents["weights.safetensors"]), state


def start_fingerprint(module: nn.Module) -> str:
    """Hash of the weights, and of which are trained: what a run starts from."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _silent(note: str) -> None: ...
