"""One training run: the loop, the order of the data, the log. It does not depend on the method or the model.

    for batch in run.batches():
        loss, metrics = some_loss(run.module, batch, config, run.random)
        run.step(loss, **metrics)

A method that learns from the model's own samples can take several optimiser steps on each of these rollouts:

    for samples in run.rollouts(make_samples, updates=4):
        loss, metrics = some_loss(run.module, samples, config, run.random)
        run.step(loss, **metrics)

A run that is killed at any moment and started again ends with the same weights, bit for bit, and the same log (except
`seconds`). Step s uses positions s * batch ... (s + 1) * batch - 1 of an endless sequence of samples, in which each
epoch is a permutation from (seed, epoch). Random numbers depend on (seed, step, position). All other state is in the
checkpoint.

With several updates, the order of the samples uses s // updates instead of s, and checkpoints are written only after a
rollout's last update. So no rollout is stored: a continued run computes it again, with the same weights and random
numbers. A run that is asked to stop ends after the last update.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posttrain.core import distributed, files
from posttrain.core.errors import UserError
from posttrain.core.progress import progress
from posttrain.core.signals import Interrupted
from posttrain.core.trackers import check_trackers, log_videos, tracking
from posttrain.training import checkpoints
from posttrain.training.optim import Optimizer, TrainConfig
from posttrain.types import LAYERS, Batch, Random

Rollout = TypeVar("Rollout")
Metric = float | Tensor | tuple[Tensor, Tensor]  # a pair stands for the first over the second


class Data(Protocol):
    """The data from which a run draws batches."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def key(self) -> str:
        """A hash of the content."""

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> Batch: ...


class Stopped(SystemExit):
    """The run was asked to stop, and its state is saved. The exit code is the shell's: 128 + signal."""


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def sample_order(seed: int, size: int, positions: Sequence[int]) -> list[int]:
    """Dataset indices at these positions of the endless sequence of samples."""
    return [int(_permutation(seed, position // size, size)[position % size]) for position in positions]


def share(train: TrainConfig, processes: int) -> int:
    """Number of clips per process in a micro-batch. Raises UserError if the batch cannot be divided."""
    parts = train.accumulate * processes
    if train.batch % parts:
        raise UserError(
            f"train.batch: is {train.batch}, and must be a multiple of train.accumulate ({train.accumulate}) x "
            f"processes ({processes}) = {parts}; change one of the three",
            "mismatch",
            "train.batch",
        )
    return train.batch // parts


class Run:
    """A training run in `folder` (log.jsonl, checkpoints/), which continues from its newest intact checkpoint.

    Args:
        module: the module to train; only parameters that require gradients are updated, averaged and stored.
        data: anything with `ids`, `key`, `len` and `load(indices) -> Batch`.
        validate: called with the step number and averaged weights in place every `validate_every` steps; the numbers
            that it returns join that step's row of the log, and the video files, by name, go to the trackers.
        depends: further settings that the trained weights depend on, by name; JSON values.
        ends: function of the step that returns whether training ends here. Every process calls it after each
            validation; if it is given, there is a validation before the first step too.

    Attributes:
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
        check_trackers(train.trackers)
        state = distributed.process()
        self._rank, self._share = state.process_index, share(train, state.num_processes)
        if not len(data):
            raise UserError("data: has no clips", "no_clips", "data")
        self.folder, self.data, self.train = Path(folder), data, train
        self._validate, self._validate_every, self._depends = validate, validate_every, depends or {}
        self._ends = ends
        self.accelerator = self._accelerator()

        if train.block_checkpointing:
            checkpointed: Any = module  # diffusers' name for it
            checkpointed.enable_gradient_checkpointing()
        self._start = checkpoints.start_fingerprint(module)
        self._optimizer = Optimizer(module, train, self.accelerator)

        # torch's flash attention for CPUs takes a pocket step from 0.40 to 0.59 s in bf16 (in fp32 both take 0.7 s)
        self._slow_attention = self.accelerator.device.type == "cpu" and train.precision == "bf16"
        self.random = Random(train.seed, 0, [])
        self.steps = 0
        self._updates = 1  # optimiser steps on each batch
        self._stop: int | None = None
        self._losses: list[dict[str, tuple[float, ...]]] = []  # of the micro-batches of this step
        self._started = time.monotonic()
        with files.explain(self.folder):
            self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._log_bytes = self._resume()
        self._ended = bool(ends and ends(self.steps))

    @property
    def module(self) -> nn.Module:
        """The (wrapped) module to call in the loss; the caller must put it into its model."""
        return self._optimizer.module

    # ------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of the steps still to do; call `step` once for each.

        Raises:
            UserError: a loss or a gradient is not finite.
            Stopped: SIGTERM or SIGINT came meanwhile; everything is saved.
        """
        return self.rollouts(lambda batch: batch, updates=1)

    def rollouts(self, make: Callable[[Batch], Rollout], updates: int) -> Iterator[Rollout]:
        """Yield `make(micro-batch)`, reused for `updates` optimiser steps; call `step` once for each.

        `make` runs in the first of these steps; the loss draws its random numbers after those of `make`. If the rollout
        needs no gradient, `make` must use torch.no_grad() itself. Raises as `batches` does.
        """
        self._updates, made = updates, dict[int, Rollout]()
        with self._surroundings():
            while not self.done:
                self._started = time.monotonic()
                for part in range(self.train.accumulate):
                    with self._micro_batch(part):
                        if self.steps % updates == 0:
                            made[part] = make(self._load(part))
                        last = (self.steps + 1) % updates == 0
                        yield made.pop(part) if last else made[part]
                self._update()

    def step(self, loss: Tensor, **metrics: Metric) -> None:
        """Compute the gradient of a micro-batch's loss. The weights are updated when the loop requests the next batch.

        The log has each metric's mean over micro-batches and processes; for a pair, the ratio of the two means.
        """
        with torch.autocast(self.accelerator.device.type, enabled=False):
            self.accelerator.backward(loss)
        self._losses.append({name: _numbers(value) for name, value in {"loss": loss, **metrics}.items()})

    def add(self, part: Callable[[], Tensor]) -> None:
        """Add the gradient of a part of a micro-batch's loss and free its graph; `step` handles the last part.

        `part` computes the loss, so that the forward pass also runs inside `no_sync`.
        """
        synchronises = self.accelerator.sync_gradients
        with self.accelerator.no_sync(self.module):
            loss = part()
            self.accelerator.sync_gradients = False  # or DeepSpeed would step
            with torch.autocast(self.accelerator.device.type, enabled=False):
                self.accelerator.backward(loss)
        self.accelerator.sync_gradients = synchronises

    def _update(self) -> None:
        """An optimiser step with the gradients of its micro-batches: move the weights, validate, log, save, stop."""
        rows, self._losses = self._losses, []
        if len(rows) != self.train.accumulate:
            raise RuntimeError(f"run.step was called {len(rows)} times in {self.train.accumulate} micro-batches")
        row = {name: self._ratio([r[name] for r in rows]) for name in rows[0]}
        norm = self._optimizer.clip()
        if not math.isfinite(row["loss"]) or not math.isfinite(norm):
            raise self._not_finite(row["loss"], norm)
        row |= {"lr": self._optimizer.lr, "grad_norm": norm}
        self._optimizer.step()
        self.steps += 1
        row["seconds"] = time.monotonic() - self._started
        last = self.steps >= self.train.steps
        if self._validate and self._validate_every and (last or self.steps % self._validate_every == 0):
            row |= self._look()
        self._log({"step": self.steps, **row})
        self._advance(f"loss {row['loss']:.4g}")
        stop, between = self._asked_to_stop(), self.steps % self._updates == 0
        every, before = self.train.checkpoint_every, self.steps - self._updates
        if self.done or (between and (stop or self.steps // every > before // every)):
            self._save()
        if stop and between:
            name = signal.Signals(stop).name
            print(f"{name}: saved step {self.steps} of {self.train.steps}; start again to continue", file=sys.stderr)
            raise Stopped(128 + stop)

    @property
    def done(self) -> bool:
        return self._ended or self.steps >= self.train.steps

    def finish(self) -> nn.Module:
        """Put the averaged weights into the module permanently and return it without accelerate's wrapper."""
        return self._optimizer.finish()

    # ------------------------------------------------------------------ what a step needs

    def _accelerator(self) -> Any:
        from accelerate import Accelerator  # it takes seconds to import
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin

        AcceleratorState._reset_state()  # it would refuse another precision later in the same process
        train, state = self.train, distributed.process()
        bf16, zero = train.precision == "bf16", distributed.zero()
        return Accelerator(
            cpu=state.device.type == "cpu" and not zero,
            mixed_precision="bf16" if bf16 and not zero else "no",
            # as a number it would give way to the launcher's
            gradient_accumulation_plugin=GradientAccumulationPlugin(train.accumulate, sync_with_dataloader=False),
            deepspeed_plugin=distributed.zero_plugin(self._share, train.accumulate, train.clip, bf16) if zero else None,
            log_with=list(train.trackers) or None,
            project_dir=self.folder / "tensorboard",
        )

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Context of all steps: cuts the log to the steps done, defers signals, opens trackers and progress bar."""
        self._cut_log()
        if self.done:
            yield
            return
        bar = progress("training", self.train.steps, self.steps)
        tracked = tracking(self.accelerator, self.folder, self.steps, self.meaning)
        shown = bar if self.accelerator.is_main_process else nullcontext(_silent)
        with self._signals(), tracked, shown as self._advance:
            if self._ends and not self.steps:
                self._log({"step": 0, **self._look()})
            yield

    @contextmanager
    def _micro_batch(self, part: int) -> Iterator[None]:
        """Context around one micro-batch: sets random numbers, precision, and whether processes exchange gradients."""
        self.random = Random(self.train.seed, self.steps, self._positions(part))
        # for layers that draw on their own, as dropout does
        entropy = np.random.SeedSequence([self.train.seed, self.steps, part, self._rank], spawn_key=(LAYERS,))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        attention = sdpa_kernel(SDPBackend.MATH) if self._slow_attention else nullcontext()
        with self.accelerator.accumulate(self.module), self.accelerator.autocast(), attention:
            yield

    def _positions(self, part: int) -> range:
        """Positions of this process's share of a micro-batch in the sequence of samples."""
        first = self._first() + (part * self.accelerator.num_processes + self._rank) * self._share
        return range(first, first + self._share)

    def _first(self) -> int:
        """The position of the step's first sample."""
        return self.steps // self._updates * self.train.batch

    def _load(self, part: int) -> Batch:
        batch = self.data.load(sample_order(self.train.seed, len(self.data), self._positions(part)))
        return batch.to(self.accelerator.device)

    def _look(self) -> dict[str, float]:
        """Validate: send videos to the trackers; returns the numbers and whether training ends here."""
        assert self._validate is not None
        with self._optimizer.averaged():
            scores, videos = self._validate(self.steps)
        log_videos(self.accelerator, videos, self.steps)
        if self._ends:
            self.accelerator.wait_for_everyone()  # what it reads, one process has written
            self._ended = self._ends(self.steps)
        return scores

    def _mean(self, values: Sequence[float]) -> float:
        """The mean over micro-batches and ranks."""
        mean = torch.tensor(sum(values) / len(values), dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean.to(self.accelerator.device), "mean")
        return float(mean)

    def _ratio(self, values: Sequence[tuple[float, ...]]) -> float:
        """The mean over micro-batches and ranks, or for pairs the ratio of the two means."""
        above, *below = (self._mean(each) for each in zip(*values, strict=True))
        return above if not below else above / below[0] if below[0] else math.nan

    def _not_finite(self, loss: float, norm: float) -> UserError:
        first = self._first()
        order = sample_order(self.train.seed, len(self.data), range(first, first + self.train.batch))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        kept = checkpoints.kept(self._checkpoints)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        clips = ", ".join(self.data.ids[index] for index in order)
        broken = [self.data.ids[index] for index in order if not _finite(self.data.load([index]))]
        if broken:
            remedy = f"the data of clip {broken[0]} are not finite: delete runs/cache, or leave the clip out"
        else:
            remedy = "the data of these clips are finite, so they are not the cause: lower train.lr"
        return UserError(
            f"{self.folder}: {what} at step {self.steps + 1}, clips {clips}; {last}; {remedy}",
            "not_finite",
            "" if broken else "train.lr",
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Context that defers SIGTERM and SIGINT to the end of the step or rollout; a second one acts at once."""
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
        if self._stop:  # since the last step asked
            raise Interrupted(self._stop)

    def _asked_to_stop(self) -> int:
        """The signal received, 0 for none; equal on every rank."""
        stop = self._stop or 0
        if self.accelerator.num_processes > 1:
            stops = self.accelerator.gather(torch.tensor([stop], device=self.accelerator.device))
            stop = int(stops.max())
        return stop

    # ------------------------------------------------------------------ files

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def meaning(self) -> dict[str, Any]:
        """Everything that the trained weights depend on; a checkpoint is continued only if it is equal."""
        train = self.train.model_dump(mode="json", exclude={"checkpoint_every", "trackers"})
        settings = {f"train.{name}": value for name, value in train.items()}
        return {**settings, "data": self.data.key, "model": self._start, **self._depends}

    def _save(self) -> None:
        state = self._optimizer.state()
        if self.accelerator.is_main_process:
            log = self.folder / "log.jsonl"
            with files.explain(log), open(log, "rb+") as stream:
                os.fsync(stream.fileno())
                content = stream.read()
            noted = {"log_bytes": len(content), "log_sha256": files.sha256_bytes(content)}
            meta = {"step": self.steps, **noted, **self.meaning}
            checkpoints.save(self._checkpoints, meta, self._optimizer.weights(), state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Restore the newest intact checkpoint; returns the length of its log in bytes, 0 without a checkpoint."""
        checkpoint = checkpoints.newest(self._checkpoints, self.meaning)
        if checkpoint is None:
            return 0
        self._optimizer.restore(checkpoint.weights, checkpoint.state)
        self.steps = int(checkpoint.meta["step"])
        if self.accelerator.is_main_process:
            print(f"{self.folder}: continues from step {self.steps} of {self.train.steps}", file=sys.stderr)
            log, noted = self.folder / "log.jsonl", checkpoint.meta.get("log_sha256")
            content = log.read_bytes()[: checkpoint.meta["log_bytes"]] if log.is_file() else b""
            if noted and files.sha256_bytes(content) != noted:  # the weights do not depend on it
                print(f"{log}: is missing or not what was written; do not trust the report's curves", file=sys.stderr)
        return int(checkpoint.meta["log_bytes"])

    def _log(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        path = self.folder / "log.jsonl"
        with files.explain(path), open(path, "r+b") as stream:  # not "a": where the folder is removed, training ends
            stream.seek(0, os.SEEK_END)
            stream.write(json.dumps(row).encode() + b"\n")
            self.accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def _cut_log(self) -> None:
        """Remove from the log the steps that will be done again."""
        if self.accelerator.is_main_process:
            log = self.folder / "log.jsonl"
            with files.explain(log), open(log, "ab") as stream:
                stream.truncate(min(self._log_bytes, stream.tell()))
        self.accelerator.wait_for_everyone()


def _numbers(metric: Metric) -> tuple[float, ...]:
    return tuple(float(torch.as_tensor(v).detach()) for v in (metric if isinstance(metric, tuple) else (metric,)))


def _finite(batch: Batch) -> bool:
    """Whether all numbers are finite."""
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor) and value.is_floating_point()]
    return all(bool(value.isfinite().all()) for value in tensors)


def _silent(note: str) -> None: ...
