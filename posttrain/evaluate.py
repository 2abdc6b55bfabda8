"""Evaluation: rows (what made the video) x splits (which clips), none of them computed twice.

    truth      the true clip itself: what is left is the tracker's error
    truth_vae  the true clip through the model's autoencoder: the best its pictures allow
    frozen     the first picture, held
    base       the model that training started from, with what model.start and model.merge put into it
    others     the model after it, named by its method

Beside the splits there may be the grid, whose clips are told as two splits, `id` with depths and heights as in training
and `ood` with others, and the falls, which test p(t|y) and of the references need `truth` alone; see
benchmarks/distribution.py.

A row is a file evaluation/<row>-<split>.json with a key, the hash of all that it depends on: weights, clips, tracker,
settings, the source of the metric. It is reused where the key is the same and made again where it is not. It grows by a
batch of clips at a time, so a killed evaluation continues. Rows that depend on no trained weights are kept by key in a
folder that runs share.
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
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from torch import Tensor, nn

from posttrain import files, flow, sample
from posttrain.benchmarks import distribution, pisa
from posttrain.data.clips import Clips, DataConfig
from posttrain.files import UserError
from posttrain.flow import SamplerConfig
from posttrain.metrics import masks, physics
from posttrain.metrics import pisa as metric
from posttrain.models.base import VideoModel
from posttrain.progress import progress
from posttrain.types import Batch, Strict

REFERENCES = ("truth", "truth_vae", "frozen")  # nothing random in them, so one seed
FIXED = (*REFERENCES, "base")  # the same for all runs of one base
GRID, FALLS = "grid", "falls"  # beside the splits
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
            "given": [model.clean, model.boundary],
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


# ---------------------------------------------------------------- statistics


def read_records(run: Path | str) -> list[dict[str, Any]]:
    """The finished records of a run, split by split, references and base first; that of the grid as `id` and `ood`.

    Raises:
        UserError: there is none, or they are not of one evaluation.
    """
    records = [part for record in _finished(Path(run)) if record["split"] != FALLS for part in parts(record)]
    return sorted(records, key=position)


def read_falls(run: Path | str) -> list[dict[str, Any]]:
    """The finished records of the test of p(t|y), which may be none."""
    return sorted((record for record in _finished(Path(run)) if record["split"] == FALLS), key=position)


def _finished(run: Path) -> list[dict[str, Any]]:
    folder = run / "evaluation"
    records = [files.read_json(path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in records if len(record["clips"]) == record["total"]]
    if not records:
        raise UserError(f"{folder}: has no finished evaluation; run `posttrain eval` first")
    if any(record.get("settings") != records[0].get("settings") for record in records):
        raise UserError(f"{folder}: an evaluation with other settings was cut off; run `posttrain eval` to its end")
    return records


def parts(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of a grid as one of the clips within the distribution of the training clips and one of the others."""
    if record["split"] != GRID:
        return [record]
    clips = {
        name: [clip for clip in record["clips"] if clip["truth"]["id"] == (name == "id")] for name in ("id", "ood")
    }
    return [record | {"split": name, "clips": some} for name, some in clips.items() if some]


def position(record: dict[str, Any]) -> tuple[bool, str, int]:
    """Where a record stands among others: by split, unseen first, references and base before the rest."""
    row = record["model"]
    return record["split"] != "unseen", record["split"], FIXED.index(row) if row in FIXED else len(FIXED)


def interval(
    values: Sequence[float | None], statistic: Literal["mean", "median"] = "mean", level: float = 0.95
) -> dict[str, Any]:
    """Mean of the values that exist, its percentile bootstrap interval (10,000 resamples, seeded), their number.

    Or their median, and its interval. `level` is the interval's.
    """
    present = np.array([value for value in values if value is not None], dtype=float)
    if not len(present):
        return {statistic: None, "low": None, "high": None, "n": 0}
    low = high = middle = float(getattr(np, statistic)(present))
    if len(present) > 1:
        resampled = bootstrap(
            (present,),
            getattr(np, statistic),
            n_resamples=10_000,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=1000,
        )
        low, high = resampled.confidence_interval
    return {statistic: middle, "low": float(low), "high": float(high), "n": len(present)}


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """One row of report.json: each metric's interval over clips; "released" holds those of the other convention.

    "physics" is the scorecard, with medians, as a fit fails now and then.
    """
    clips = record["clips"]
    released = {key: interval([clip["released"][key] for clip in clips]) for key in clips[0]["released"]}
    means = {key: interval([clip[key] for clip in clips]) for key in pisa.METRICS}
    cards = [clip.get("physics", {}) for clip in clips]  # older runs have none
    card = {name: interval([found[name] and found[name][0] for found in cards], "median") for name in cards[0]}
    return {"model": record["model"], "split": record["split"]} | means | {"released": released, "physics": card}


def difference(record: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Each metric of `record` minus that of `against`, clip by clip; paired intervals over the clips in both."""
    others = {clip["id"]: clip for clip in against["clips"]}
    pairs = [(clip, others[clip["id"]]) for clip in record["clips"] if clip["id"] in others]

    def gap(key: str) -> list[float | None]:
        return [None if a[key] is None or b[key] is None else a[key] - b[key] for a, b in pairs]

    names = {"model": record["model"], "against": against["model"], "split": record["split"]}
    return names | {key: interval(gap(key)) for key in pisa.METRICS}


def print_table(records: Sequence[dict[str, Any]], console: Console | None = None, released: bool = False) -> None:
    """The records' means, L2 first with its interval; `released`: in the other convention. Fits 80 columns."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = {
        "l2": "L2 [95%]",
        "chamfer": "Chamfer",
        "iou": "IoU",
        "vanished": "Vanished",
        "time_error": "Time error",
    }
    if released:
        del headings["time_error"]
    for heading in ("Model", "Clips", *headings.values()):
        table.add_column(heading, justify="left" if heading in ("Model", "Clips") else "right", no_wrap=True)
    for previous, record in zip([records[0], *records], records, strict=False):
        if previous["split"] != record["split"]:
            table.add_row()
        row = summary(record)["released"] if released else summary(record)
        cells = {key: "-" if row[key]["mean"] is None else f"{row[key]['mean']:.3f}" for key in headings}
        if row["l2"]["mean"] is not None:
            cells["l2"] += f" [{row['l2']['low']:.3f}, {row['l2']['high']:.3f}]"
        if not released and row["time_error"]["mean"] is not None:
            cells["time_error"] += " s"
        style = "dim" if record["model"] in REFERENCES else None
        table.add_row(record["model"], record["split"], *cells.values(), style=style)
    (console or Console()).print(table)


def print_differences(splits: Sequence[Sequence[dict[str, Any]]], console: Console | None = None) -> None:
    """What records of each split differ by from its first one: paired means over clips with 95% intervals."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"Minus {splits[0][0]['model']}", no_wrap=True)
    table.add_column("Clips", no_wrap=True)
    for heading in ("L2 [95%]", "IoU [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    for first, *others in splits:
        for record in others:
            gap = difference(record, first)
            cells = [f"{gap[k]['mean']:+.3f} [{gap[k]['low']:+.3f}, {gap[k]['high']:+.3f}]" for k in ("l2", "iou")]
            table.add_row(record["model"], record["split"], *cells)
    (console or Console()).print(table)
