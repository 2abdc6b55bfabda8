"""Evaluation: measure every row (a model or a reference) on every test set, each once.

The rows are those that the benchmark declares (benchmarks/base.py) and the model after training, named by its method.
The row `base` is the model that training started from, including model.start and model.merge. The test sets are the
recipe's splits and further sets of the benchmark.

A row on a test set is a record, a file evaluation/<row>-<set>.json. Its key is a hash of all that it depends on:
weights, clips, tracker, settings, the source of the metrics. A record with the same key is reused; otherwise it is
measured again. It is written after each batch of clips, so a killed evaluation continues. Rows that depend on no
trained weights are stored by key in a folder that runs share. records.py makes tables from the records.
"""

import hashlib
import inspect
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from posttrain import flow
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.parallel import in_order
from posttrain.core.progress import progress
from posttrain.core.recipe import Plugin, PluginFrom, Strict
from posttrain.data import schema
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.data.schema import ClipRow
from posttrain.evaluation import records, sample
from posttrain.evaluation.benchmarks import base, pisa
from posttrain.evaluation.benchmarks.base import Benchmark, ClipScore, Row, TestSet, Tracker, mean, merge
from posttrain.evaluation.records import Record
from posttrain.flow import SamplerConfig
from posttrain.metrics.pisa import even_times
from posttrain.models.base import VideoModel
from posttrain.types import Batch

# (step, clips, videos uint8 (F, H, W, 3), their scores) -> more numbers for the log
Watch = Callable[[int, Clips, Sequence[np.ndarray], Sequence[ClipScore]], dict[str, float]]
Models = Mapping[str, Callable[[], AbstractContextManager[VideoModel]]]

VALIDATION = "validation"  # the split that training looks at, of objects neither trained nor tested on


class EvalConfig(Strict):
    """What `posttrain eval` measures, and how often training samples a few of its clips (`every` steps; 0: never)."""

    benchmark: Annotated[Plugin, PluginFrom("evaluation.benchmarks")] = Field(
        default_factory=lambda: Plugin("pisa", pisa, pisa.Config())
    )
    clips: str
    splits: tuple[str, ...] = Field(("test_seen", "test_unseen"), min_length=1)
    every: int = Field(0, ge=0)
    seeds: int = Field(3, ge=1)
    limit: int | None = Field(None, ge=1)  # the first clips of each split
    batch: int = Field(8, ge=1)  # clips sampled at once
    sampler: SamplerConfig = SamplerConfig()
    tracker: str = "pocket"  # what follows the object: "pocket", or a SAM 2 in a folder or on the hub


def test_sets(config: EvalConfig) -> dict[str, TestSet]:
    """The test sets, by the name of their folder below samples/."""
    benchmark: Benchmark = config.benchmark.module.BENCHMARK
    splits = {split: TestSet(config.clips, split, config.seeds) for split in config.splits}
    return splits | benchmark.tests(config.benchmark.config, config.seeds)


def watched_split(config: EvalConfig) -> str:
    """The split for validation during training: `validation` if the clips have it, else the last of `splits`."""
    has_one = (Path(config.clips) / VALIDATION / "metadata.jsonl").exists()
    return VALIDATION if has_one else config.splits[-1]


def open_clips(name: str, test: TestSet, limit: int | None) -> Clips:
    """The clips of a test set.

    Raises:
        UserError: the folder or split is missing, or its rows lack fields that the test needs.
    """
    clips = Clips(DataConfig(clips=test.folder, split=test.split, limit=limit))
    if any(getattr(clips.row(0), field) is None for field in test.needed):
        key, needed = f"eval.benchmark.{name}", ", ".join(test.needed)
        folder = clips.splits[0].folder
        raise UserError(
            f"{folder}: {key} needs rows with {needed}; film clips with world.name={test.world}", "mismatch", key
        )
    return clips


def evaluate(
    run: Path | str, config: EvalConfig, models: Models, tracker: Tracker, cache: Path | str | None = None
) -> list[Record]:
    """Measure the references and `models` on every test set; write evaluation/ and samples/ in the folder `run`.

    Args:
        models: row name -> function that returns a context manager with the row's model, for example "base" with the
            adapter switched off. The first model's autoencoder makes `truth_vae`.
        tracker: the segmenter that measures, on the models' device.
        cache: the folder in which runs share the rows that depend on no trained weights; None: no sharing.

    Returns:
        The records (also in the files), test set by test set, references first.

    Raises:
        UserError: a split is missing, a clip is damaged, or the clips do not fit the model.
    """
    run = Path(run)
    benchmark: Benchmark = config.benchmark.module.BENCHMARK
    tests = test_sets(config)
    clips = {name: open_clips(name, test, config.limit) for name, test in tests.items()}
    references = {row.name: row for row in benchmark.references}
    asked = [
        (name, row)
        for name, test in tests.items()
        for row in (*(row.name for row in (benchmark.references if test.rows is None else test.rows)), *models)
    ]
    names = {file_name(row, name) for name, row in asked}
    for path in (run / "evaluation").glob("*.json"):
        if path.name not in names:
            path.unlink()  # the table shows what this recipe asks for
    shared_rows = [row.name for row in benchmark.rows]
    found, pending = dict[tuple[str, str], Record](), [*references]
    for model_name, ready in models.items():
        with ready() as model:
            texts = read_captions(model, clips.values(), config.sampler)
            for row in (*pending, model_name):
                for name, test in tests.items():
                    if (name, row) not in asked:
                        continue
                    record = blank(row, name, config, model, clips[name], test, tracker)
                    shared = None if cache is None or row not in shared_rows else Path(cache) / record.key[:16]
                    found[name, row] = complete(
                        run, record, config, model, clips[name], test.facts, tracker, texts, shared
                    )
            pending = []
        del model  # before the next one is loaded
    return [found[each] for each in asked]


def reference(benchmark: Benchmark, name: str) -> Row | None:
    """The reference row of this name; None for a row that a model samples."""
    return next((row for row in benchmark.references if row.name == name), None)


def blank(
    row: str, name: str, config: EvalConfig, model: VideoModel, clips: Clips, test: TestSet, tracker: Tracker
) -> Record:
    """A record without numbers, for a row on the test set of this name.

    Its key is a hash of everything that its numbers depend on.
    """
    benchmark: Benchmark = config.benchmark.module.BENCHMARK
    shown = reference(benchmark, row)
    own = (config.benchmark.module, *benchmark.sources)
    facts: dict[str, Any] = {
        "row": shown.name if shown else "sampled",
        "clips": [schema.to_json(clips.row(i)) for i in range(len(clips))],
        "tracker": weights_fingerprint(tracker.module),
        "source": [source(each) for each in (*own, base, sample, type(tracker), type(tracker.module))],
    }
    if shown is None or shown.uses_model:
        facts["model"] = [model.cache_key(), source(type(model))]
    if shown is None:
        facts |= {
            "weights": [weights_fingerprint(module, base=row == base.BASE.name) for module in model.weights()],
            "given": [model.n_cond_frames, model.boundary],
            "scheduler": [type(model.scheduler()).__name__, dict(model.scheduler().config)],
            "sampler": [config.sampler.model_dump(), test.seeds],
            "sampling": source(flow),
        }
    first = clips.row(0)
    return Record(
        model=row,
        row=row,
        split=name.removeprefix("test_"),
        folder=name,
        key=files.sha256_json(facts),
        size=list(first.size),
        seeds=1 if shown else test.seeds,
        total=len(clips),
        benchmark=config.benchmark.name,
        fps=first.fps,
        frames=first.frames,
        settings=config.model_dump(mode="json", include={"clips", "limit", "seeds", "sampler", "tracker"}),
        sampler=config.sampler.model_dump(),
    )


def complete(
    run: Path,
    record: Record,
    config: EvalConfig,
    model: VideoModel,
    clips: Clips,
    kept_facts: tuple[str, ...],
    tracker: Tracker,
    texts: Mapping[str, Tensor],
    shared: Path | None,
) -> Record:
    """The complete record: clips from the run or the shared folder are reused, the rest is measured now."""
    path, settings = run / "evaluation" / file_name(record.model, record.folder), record.settings
    samples = run / "samples" / record.model / record.folder
    kept = records.read_whole(path)
    if kept is not None and kept.key == record.key and whole(samples, kept):
        record = replace(kept, settings=settings)
        records.write(path, record)
    elif (
        shared is not None
        and (kept := records.read_whole(shared / "record.json")) is not None
        and kept.key == record.key
        and whole(shared / "samples", kept)
    ):
        with files.replacing(samples) as temporary:
            shutil.copytree(shared / "samples", temporary)
        record = replace(kept, settings=settings)
        records.write(path, record)
        say(record, f"reused from {shared}")
        return record
    if len(record.clips) == record.total:
        say(record, f"reused from {path}")
        if shared is not None and not (shared / "record.json").is_file():  # it was killed before it came to that
            share(shared, record, samples)
        return record

    benchmark: Benchmark = config.benchmark.module.BENCHMARK
    shown, fps = reference(benchmark, record.model), clips.row(0).fps
    title = f"{record.model} on {record.split} clips"
    starts = range(len(record.clips), record.total, config.batch)
    batches = [range(first, min(first + config.batch, record.total)) for first in starts]

    def measure(work: tuple[range, int]) -> list[ClipScore]:
        indices, seed = work
        batch, rows = clips.load(indices).to(model.device), [clips.row(i) for i in indices]
        videos = sample_row(shown, model, batch, rows, seed, config.sampler, texts)
        for name, video in zip(batch.ids, videos, strict=True):
            sample.write_video(samples / f"{name}-s{seed}.mp4", video, fps, noted=True)
        return benchmark.score(videos, batch, rows, even_times(videos.shape[1], fps), tracker)

    with progress(title, record.total * record.seeds, len(record.clips) * record.seeds) as advance:
        measured = in_order(measure, product(batches, range(record.seeds)), model.device)
        started = time.monotonic()
        for indices in batches:
            by_seed = []
            for _ in range(record.seeds):
                by_seed.append(next(measured))
                for _ in indices:
                    advance("")
            added = []
            for index, *of_clip in zip(indices, *by_seed, strict=True):
                row = clips.row(index)
                truth = schema.facts(row, kept_facts)
                added.append(replace(merge(of_clip), id=clips.ids[index], caption=row.caption, truth=truth))
            now = time.monotonic()
            seconds, started = round(record.seconds + now - started, 2), now
            record = replace(record, clips=(*record.clips, *added), seconds=seconds)
            records.write(path, record)
    if shared is not None:
        share(shared, record, samples)
    return record


def share(folder: Path, record: Record, samples: Path) -> None:
    """Copy a record and its samples to a folder from which other runs can use them."""
    with files.replacing(folder) as temporary:
        shutil.copytree(samples, temporary / "samples")
        records.write(temporary / "record.json", record)


def whole(samples: Path, record: Record) -> bool:
    """Whether a record's samples exist and match their digests; if not, a message says that they are sampled again."""
    paths = [samples / f"{clip.id}-s{seed}.mp4" for clip in record.clips for seed in range(record.seeds)]
    damaged = [path for path in paths if not (path.is_file() and files.intact(path))]
    if damaged:
        print(f"{damaged[0]}: is missing or damaged; measured again", file=sys.stderr)
    return not damaged


def file_name(row: str, split: str) -> str:
    return f"{row}-{split}.json"


def source(of: Any) -> str:
    """Hash of the source file of a module or class."""
    return files.sha256(Path(str(inspect.getsourcefile(of))))


def version_of(*of: Any) -> str:
    """Eight letters of a hash of the source files of modules or classes."""
    return files.sha256_json([source(each) for each in of])[:8]


def read_captions(model: VideoModel, splits: Iterable[Clips], sampler: SamplerConfig) -> dict[str, Tensor]:
    """The encoded texts of all clips, as `sample_row` takes them."""
    captions = [clips.row(i).caption for clips in splits for i in range(len(clips))]
    return sample.encode_texts(model, [*captions, ""] if sampler.guided else captions)


def sample_row(
    shown: Row | None,
    model: VideoModel,
    batch: Batch,
    rows: Sequence[ClipRow],
    seed: int,
    sampler: SamplerConfig,
    texts: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """The videos of a row of the table for a batch of clips: uint8 (B, F, H, W, 3).

    Args:
        shown: a reference row; None: the model samples.
        rows: the rows of the clips.
    """
    true_BCFHW = batch.video_BCFHW
    assert true_BCFHW is not None
    if shown is not None and shown.video is not None:
        with torch.no_grad():
            return sample.to_uint8(shown.video(true_BCFHW, model))
    return sample.sample_clips(
        model,
        sample.to_uint8(true_BCFHW[:, :, :1])[:, 0],
        [row.caption for row in rows],
        [sample.clip_seed(seed, name) for name in batch.ids],
        true_BCFHW.shape[2],
        sampler.steps,
        sampler.guidance,
        guidance_low=sampler.guidance_low,
        texts=texts,
    )


def validation(
    run: Path | str,
    config: EvalConfig,
    model: VideoModel,
    tracker: Tracker,
    clips: int = 8,
    split: str | None = None,
    look: Watch | None = None,
    truths: Sequence[str] = (),
) -> Callable[[int], tuple[dict[str, float], dict[str, Path]]]:
    """A function of the step for `Run(validate=...)`: returns the benchmark's headline metrics, as val_l2, and videos.

    It samples the first clips of the split (None: `watched_split`) once and saves them in samples/validation/. `look`
    may measure more (tripwires.py) and needs the annotations `truths`.
    """
    benchmark: Benchmark = config.benchmark.module.BENCHMARK
    chosen = Clips(DataConfig(clips=config.clips, split=split or watched_split(config), limit=clips), truths=truths)
    folder, fps = Path(run) / "samples" / "validation", chosen.row(0).fps
    texts = read_captions(model, [chosen], config.sampler) if config.every else {}  # while the transformer is not there

    def validate(step: int) -> tuple[dict[str, float], dict[str, Path]]:
        videos, scores = list[np.ndarray](), list[ClipScore]()
        with progress(f"validation at step {step}", len(chosen)) as advance:
            for first in range(0, len(chosen), config.batch):
                indices = range(first, min(first + config.batch, len(chosen)))
                batch, rows = chosen.load(indices).to(model.device), [chosen.row(i) for i in indices]
                made = sample_row(None, model, batch, rows, 0, config.sampler, texts)
                scores += benchmark.score(made, batch, rows, even_times(made.shape[1], fps), tracker)
                videos += [*made]
                for _ in indices:
                    advance("")
        paths = {f"validation/{name}": folder / f"step-{step:06d}" / f"{name}.mp4" for name in chosen.ids}
        for path, video in zip(paths.values(), videos, strict=True):
            sample.write_video(path, video, fps)
        means = {metric.key: mean([score.numbers[metric.key] for score in scores]) for metric in benchmark.headlines}
        numbers = {f"val_{key}": value for key, value in means.items() if value is not None}
        return numbers | (look(step, chosen, videos, scores) if look else {}), paths

    return validate


def weights_fingerprint(module: nn.Module, base: bool = False) -> str:
    """Hash of a module's weights; with `base`, an adapter that adds nothing is ignored."""
    digest, weights = hashlib.sha256(), module.state_dict()
    base = base and not any(tensor.any() for name, tensor in weights.items() if ".lora_B." in name)
    for name, tensor in weights.items():
        name = name.removeprefix("module.").replace(".base_layer", "")
        if base and ".lora_" in name:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if not base:
        adapters = getattr(getattr(module, "module", module), "peft_config", {})
        digest.update(repr([(name, c.r, c.lora_alpha) for name, c in adapters.items()]).encode())
    return digest.hexdigest()


def say(record: Record, what: str) -> None:
    print(f"{record.model} on {record.split} clips: {what}", file=sys.stderr)
