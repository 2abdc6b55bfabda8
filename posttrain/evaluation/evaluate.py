"""Evaluation: rows (what made the video) x splits (which clips), none of them computed twice.

    truth      the true clip itself: what is left is the tracker's error
    truth_vae  the true clip through the model's autoencoder: the best its pictures allow
    frozen     the first picture, held
    base       the model that training started from, with what model.start and model.merge put into it
    others     the model after it, named by its method

Beside the splits there may be the grid, whose clips are told as two splits, `id` with depths and heights as in training
and `ood` with others, and the falls, which test p(t|y) and of the references need `truth` alone; see
evaluation/benchmarks/distribution.py.

A row is a file evaluation/<row>-<split>.json with a key, the hash of all that it depends on: weights, clips, tracker,
settings, the source of the metric. It is reused where the key is the same and made again where it is not. It grows by a
batch of clips at a time, so a killed evaluation continues. Rows that depend on no trained weights are kept by key in a
folder that runs share. What the rows say together: records.py.
"""

import hashlib
import inspect
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from posttrain import flow
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.progress import progress
from posttrain.core.recipe import Strict
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips
from posttrain.evaluation import sample
from posttrain.evaluation.benchmarks import distribution, pisa
from posttrain.evaluation.records import FALLS, FIXED, GRID, REFERENCES
from posttrain.flow import SamplerConfig
from posttrain.metrics import masks, physics
from posttrain.metrics import pisa as metric
from posttrain.models.base import VideoModel
from posttrain.types import Batch

TOLD = {GRID: ("id",), FALLS: ("group", "beta", "depths", "contact_time", "gravity", "camera", "fps")}  # of their rows
Look = Callable[[int, Clips, Sequence[np.ndarray], Sequence[dict[str, Any]]], dict[str, float]]
Models = Mapping[str, Callable[[], AbstractContextManager[VideoModel]]]


class FallsConfig(Strict):
    """The test of p(t|y): an ambiguous set (sim/ambiguous.py), and how many videos of each of its clips are made."""

    clips: str
    seeds: int = Field(6, ge=1)


class EvalConfig(Strict):
    """What `posttrain eval` measures, and how often training looks at a few clips of it (`every` steps; 0: never).

    `grid` is a folder that tells depths and heights which training had from others (sim/grid.py). Of it and of `falls`
    the split test_unseen is measured.
    """

    benchmark: Literal["pisa"] = "pisa"
    clips: str
    splits: tuple[str, ...] = Field(("test_seen", "test_unseen"), min_length=1)
    every: int = Field(0, ge=0)
    seeds: int = Field(3, ge=1)
    limit: int | None = Field(None, ge=1)  # the first clips of each split
    batch: int = Field(10, ge=1)  # clips sampled at once
    grid: str | None = None
    falls: FallsConfig | None = None
    sampler: SamplerConfig = SamplerConfig()
    tracker: str = "pocket"  # what follows the object: "pocket", or a SAM 2 in a folder or on the hub


class Tracker(Protocol):
    """Follows an object: (video_BCFHW in [-1, 1], mask0_BHW bool) -> logits_BFHW. `module` holds its weights."""

    module: nn.Module

    def __call__(self, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor: ...


class TestSet(NamedTuple):
    clips: Clips
    seeds: int  # videos of each
    references: tuple[str, ...] = REFERENCES


def tests(config: EvalConfig) -> dict[str, TestSet]:
    """What is measured, by the folder that it has below samples/.

    Raises:
        UserError: a folder or split is missing, or its rows do not tell what the test needs.
    """

    def some(clips: str, split: str) -> Clips:
        return Clips(DataConfig(clips=clips, split=split, limit=config.limit))

    found = {split: TestSet(some(config.clips, split), config.seeds) for split in config.splits}
    if config.grid:
        found[GRID] = TestSet(some(config.grid, "test_unseen"), config.seeds)
    if config.falls:
        found[FALLS] = TestSet(some(config.falls.clips, "test_unseen"), config.falls.seeds, ("truth",))
    for name, world in ((GRID, "grid"), (FALLS, "ambiguous")):
        if name in found and not found[name].clips.row(0).keys() >= set(TOLD[name]):
            folder, needed = found[name].clips.splits[0].folder, ", ".join(TOLD[name])
            raise UserError(f"{folder}: eval.{name} needs rows with {needed}; film them with world.name={world}")
    return found


def evaluate(
    run: Path | str, config: EvalConfig, models: Models, tracker: Tracker, cache: Path | str | None = None
) -> list[dict[str, Any]]:
    """Measure the references and `models` on every split; write evaluation/ and samples/ in the folder `run`.

    Args:
        models: row name -> a function that gives a context in which the row's model is ready, for instance "base" with
            the adapter switched off. The first one's autoencoder makes `truth_vae`.
        tracker: the segmenter that scores, on the models' device.
        cache: the folder in which runs share the rows of FIXED; None shares nothing.

    Returns:
        The records (also in the files), split by split, references first.

    Raises:
        UserError: a split is missing, a clip is torn, or the clips do not fit the model.
    """
    run = Path(run)
    splits = tests(config)
    asked = [(split, row) for split, each in splits.items() for row in (*each.references, *models)]
    names = {file_name(row, split) for split, row in asked}
    for path in (run / "evaluation").glob("*.json"):
        if path.name not in names:
            path.unlink()  # the table shows what this recipe asks for
    records, pending = {}, [*REFERENCES]
    for name, ready in models.items():
        with ready() as model:
            texts = read_captions(model, [each.clips for each in splits.values()], config.sampler)
            for row in (*pending, name):
                for split, (clips, seeds, _) in splits.items():
                    if (split, row) not in asked:
                        continue
                    record = blank(row, split, config, model, clips, tracker, seeds)
                    shared = None if cache is None or row not in FIXED else Path(cache) / record["key"][:16]
                    records[split, row] = complete(run, record, config, model, clips, tracker, texts, shared)
            pending = []
        del model  # before the next one is loaded
    return [records[each] for each in asked]


def blank(
    row: str, split: str, config: EvalConfig, model: VideoModel, clips: Clips, tracker: Tracker, seeds: int
) -> dict[str, Any]:
    """A record without numbers. Its key changes with everything that its numbers depend on."""
    truth = clips.row(0)
    facts: dict[str, Any] = {
        "row": row if row in REFERENCES else "sampled",
        "clips": [clips.row(i) for i in range(len(clips))],
        "tracker": weights_fingerprint(tracker.module),
        "source": [
            source(module)
            for module in (metric, physics, masks, pisa, distribution, sample, type(tracker), type(tracker.module))
        ],
    }
    if row not in ("truth", "frozen"):
        facts["model"] = [model.cache_key(), source(type(model))]
    if row not in REFERENCES:
        facts |= {
            "weights": [weights_fingerprint(module, base=row == "base") for module in model.weights()],
            "given": [model.n_cond_frames, model.boundary],
            "scheduler": [type(model.scheduler()).__name__, dict(model.scheduler().config)],
            "sampler": [config.sampler.model_dump(), seeds],
            "sampling": source(flow),
        }
    key = files.sha256_json(facts)
    settings = config.model_dump(mode="json", include={"clips", "limit", "seeds", "sampler", "tracker"})
    return {
        "model": row,
        "settings": settings,
        "split": split.removeprefix("test_"),
        "folder": split,
        "key": key,
        "fps": truth["fps"],
        "frames": truth["frames"],
        "size": truth["size"],
        "seeds": 1 if row in REFERENCES else seeds,
        "sampler": config.sampler.model_dump(),
        "total": len(clips),
        "seconds": 0.0,
        "clips": [],
    }


def complete(
    run: Path,
    record: dict[str, Any],
    config: EvalConfig,
    model: VideoModel,
    clips: Clips,
    tracker: Tracker,
    texts: Mapping[str, Tensor],
    shared: Path | None,
) -> dict[str, Any]:
    """The record with all its clips: what the run or the shared folder has, and the rest measured now."""
    path, settings = run / "evaluation" / file_name(record["model"], record["folder"]), record["settings"]
    samples = run / "samples" / record["model"] / record["folder"]
    found = files.read_json(path) if path.exists() else {}
    if found.get("key") == record["key"]:
        record = found | {"settings": settings}
        files.write_json(path, record)
    elif shared is not None and shared.exists():
        with files.replacing(samples) as temporary:
            shutil.copytree(shared / "samples", temporary)
        record = files.read_json(shared / "record.json") | {"settings": settings}
        files.write_json(path, record)
        tell(record, f"reused from {shared}")
        return record
    if len(record["clips"]) == record["total"]:
        tell(record, f"reused from {path}")
        return record

    title = f"{record['model']} on {record['split']} clips"
    with progress(title, record["total"] * record["seeds"], len(record["clips"]) * record["seeds"]) as advance:
        for first in range(len(record["clips"]), record["total"], config.batch):
            started = time.monotonic()
            indices = range(first, min(first + config.batch, record["total"]))
            batch, truths = clips.load(indices).to(model.device), [clips.row(i) for i in indices]
            scores = []
            for seed in range(record["seeds"]):
                videos = generate(record["model"], model, batch, truths, seed, config.sampler, texts)
                for name, video in zip(batch.ids, videos, strict=True):
                    sample.write_video(samples / f"{name}-s{seed}.mp4", video, record["fps"])
                scores.append(pisa.score_videos(videos, batch, truths, tracker, record["fps"]))
                for _ in indices:
                    advance("")
            for name, truth, *by_seed in zip(batch.ids, truths, *scores, strict=True):
                told = {key: truth[key] for key in TOLD.get(record["folder"], ())}
                clip = {"id": name, "caption": truth["caption"], "truth": told}
                record["clips"].append(clip | pisa.average(by_seed))
            record["seconds"] = round(record["seconds"] + time.monotonic() - started, 2)
            files.write_json(path, record)
    if shared is not None:
        with files.replacing(shared) as temporary:
            shutil.copytree(samples, temporary / "samples")
            files.write_json(temporary / "record.json", record)
    return record


def file_name(row: str, split: str) -> str:
    return f"{row}-{split}.json"


def source(of: Any) -> str:
    """Hash of the file in which a module or class is written."""
    return files.sha256(Path(str(inspect.getsourcefile(of))))


def read_captions(model: VideoModel, splits: Iterable[Clips], sampler: SamplerConfig) -> dict[str, Tensor]:
    """The texts of all clips, encoded, as `generate` wants them."""
    captions = [clips.row(i)["caption"] for clips in splits for i in range(len(clips))]
    return sample.encode_texts(model, [*captions, ""] if sampler.guided else captions)


def generate(
    row: str,
    model: VideoModel,
    batch: Batch,
    truths: Sequence[dict[str, Any]],
    seed: int,
    sampler: SamplerConfig,
    texts: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """The videos that a row shows for a batch of clips: uint8 (B, F, H, W, 3)."""
    true_BCFHW = batch.video_BCFHW
    assert true_BCFHW is not None
    with torch.no_grad():
        if row == "truth":
            return sample.to_uint8(true_BCFHW)
        if row == "frozen":
            return sample.to_uint8(true_BCFHW[:, :, :1].expand_as(true_BCFHW))
        if row == "truth_vae":
            return sample.to_uint8(model.decode(model.encode(true_BCFHW)))
    return sample.sample_clips(
        model,
        sample.to_uint8(true_BCFHW[:, :, :1])[:, 0],
        [truth["caption"] for truth in truths],
        [pisa.clip_seed(seed, name) for name in batch.ids],
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
    look: Look | None = None,
    truths: Sequence[str] = (),
) -> Callable[[int], tuple[dict[str, float], dict[str, Path]]]:
    """A function of the step for `Run(validate=...)` that gives val_l2, val_iou and val_vanished, and the videos.

    It samples the first clips of the split (None: the last) once and saves them under samples/validation/. Nothing is
    chosen by these numbers, so that the clips may be those of the test; `look` may measure more, of which
    the clips tell `truths` (tripwires.py).
    """
    some = Clips(DataConfig(clips=config.clips, split=split or config.splits[-1], limit=clips), truths=truths)
    folder, fps = Path(run) / "samples" / "validation", some.row(0)["fps"]
    texts = read_captions(model, [some], config.sampler) if config.every else {}  # while the transformer is not there

    def validate(step: int) -> tuple[dict[str, float], dict[str, Path]]:
        videos, scores = list[np.ndarray](), list[dict[str, Any]]()
        for first in range(0, len(some), config.batch):
            indices = range(first, min(first + config.batch, len(some)))
            batch, truths = some.load(indices).to(model.device), [some.row(i) for i in indices]
            made = generate("validation", model, batch, truths, 0, config.sampler, texts)
            scores += pisa.score_videos(made, batch, truths, tracker, fps)
            videos += [*made]
        paths = {f"validation/{name}": folder / f"step-{step:06d}" / f"{name}.mp4" for name in some.ids}
        for path, video in zip(paths.values(), videos, strict=True):
            sample.write_video(path, video, fps)
        means = {key: pisa.mean([score[key] for score in scores]) for key in ("l2", "iou", "vanished")}
        told = {f"val_{key}": value for key, value in means.items() if value is not None}
        return told | (look(step, some, videos, scores) if look else {}), paths

    return validate


def weights_fingerprint(module: nn.Module, base: bool = False) -> str:
    """Hash of a module's weights; with `base` an adapter on it does not count, as if it had never been attached."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        name = name.removeprefix("module.").replace(".base_layer", "")
        if base and ".lora_" in name:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if not base:
        adapters = getattr(getattr(module, "module", module), "peft_config", {})
        digest.update(repr([(name, c.r, c.lora_alpha) for name, c in adapters.items()]).encode())
    return digest.hexdigest()


def tell(record: dict[str, Any], what: str) -> None:
    print(f"{record['model']} on {record['split']} clips: {what}", file=sys.stderr)
