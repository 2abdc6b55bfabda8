"""Score videos that any model made: `posttrain eval BENCHMARK --clips FOLDER ...`, a row of the table per folder.

`--run RUN` first samples such folders with a run's base and its tuned model. Both get the paper's prompts: for real
clips a sentence that the video conforms to the laws of physics, and the negative prompts.

A folder contains a video for each clip to be scored: <clip>.mp4, or <clip>-s<seed>.mp4 for several samples. If the
benchmark has several splits, there is a subfolder for each (seen/00.mp4, unseen/00-s1.mp4).

Videos may have any size, rate and length; the time of each frame comes from the file's time stamps. If a video is
shorter than the true clip, the object counts as vanished in the missing part. Its first frame must be the benchmark's.
Models that cannot make the benchmark's shape get its first frame padded with black. So only the largest centred box of
the benchmark's shape is scored, scaled to the truth's own size, at most 256 pixels on the shorter side (as PisaBench's
authors do). metrics/pisa.py chooses the frames that are compared.

Departure from the published evaluation: in generated videos the object is followed from its true mask in frame 0, while
the authors click again. Files are as in evaluate.py: evaluation/, samples/, resumable, reused by key.
"""

import math
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain import flow
from posttrain.core import codec, files
from posttrain.core.errors import UserError
from posttrain.core.parallel import in_order
from posttrain.core.progress import progress
from posttrain.data import groups, listing, schema, views
from posttrain.evaluation import records, sample
from posttrain.evaluation.benchmarks import base, pisa
from posttrain.evaluation.benchmarks.base import ClipScore, Tracker, merge
from posttrain.evaluation.benchmarks.pisabench import Truth
from posttrain.evaluation.evaluate import file_name, say, source, version_of, weights_fingerprint
from posttrain.evaluation.records import Record, read_records
from posttrain.metrics import pisa as metric
from posttrain.metrics import retimed
from posttrain.models.base import VideoModel
from posttrain.types import Batch

VERSION = "sampler.json"  # beside videos that are made here: the version of the code that made them
LARGEST = 256  # pixels on the shorter side
FINE = 3  # times a video's rate: what has so many frames per second can be brought to it by dropping some


def score(
    out: Path | str,
    benchmark: Mapping[str, Sequence[Truth]],
    folders: Mapping[str, Path],
    tracker: Tracker,
    fps: float | None = None,
    device: torch.device | str = "cpu",
    made: Collection[str] = (),
) -> list[Record]:
    """Score the videos of each folder on every split; returns the records (also in `out`/evaluation).

    Args:
        folders: row name -> folder.
        tracker: the segmenter that follows the object in the videos, on `device`.
        fps: the videos' frames per second, where their files say it wrongly; None is what they say.
        made: rows whose videos `sample_missing` made. The first frames of other videos are checked.

    Raises:
        UserError: a folder has no video of any clip, a video is damaged or does not begin with its clip's first frame,
            or `out` has scores with other settings.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise UserError(f"--fps: {fps:g} is not a frame rate; give frames per second", "value", "--fps")
    out = Path(out)
    protocol = {"tracker": weights_fingerprint(tracker.module), "splits": sorted(benchmark)}
    _claim(out, protocol)
    for row, folder in folders.items():
        empty, scored = [], False
        for split, truths in benchmark.items():
            found = samples_of(folder, split, [truth.id for truth in truths], several=len(benchmark) > 1)
            chosen = [truth for truth in truths if truth.id in found]
            if not chosen:
                empty.append(split)
                continue
            record = _blank(row, split, folder, chosen, found, protocol, fps, tracker)
            if len(chosen) < len(truths):
                lacking = next(truth.id for truth in truths if truth.id not in found)
                say(record, f"{len(chosen)} of {len(truths)} have a video in {folder} ({lacking} has none)")
            _complete(out, record, chosen, found, tracker, device, row not in made)
            scored = True
        for split in empty if scored else ():
            print(
                f"{row} on {split.removeprefix('test_')} clips: left out, {folder} has no video of them",
                file=sys.stderr,
            )
        if not scored:
            split, truths = next(iter(benchmark.items()))
            example = f"{split}/{truths[0].id}" if len(benchmark) > 1 else truths[0].id
            raise UserError(
                f"{folder}: has no video of any clip; name them by the clips, as in {example}.mp4", "no_clips"
            )
    return read_records(out)


def samples_of(folder: Path, split: str, ids: Sequence[str], several: bool) -> dict[str, list[Path]]:
    """The videos of each clip, in the order of their seeds; clips without videos are left out."""
    place = folder / split
    if not place.is_dir():
        if several:
            return {}
        place = folder
    known = set(ids)
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        parts = re.fullmatch(r"(.+?)(?:-s(\d+))?", path.stem)
        if parts and path.suffix.lower() in listing.SUFFIXES and parts[1] in known:
            found.setdefault(parts[1], []).append((int(parts[2] or 0), path))
    return {name: [path for _, path in sorted(some)] for name, some in found.items()}


class Start(Protocol):
    """The first frame and caption that a model continues; see `Truth`."""

    @property
    def id(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def context(self) -> str: ...
    @property
    def picture(self) -> Callable[[], np.ndarray]: ...


def sample_missing(
    model: Callable[[], AbstractContextManager[VideoModel]],
    benchmark: Mapping[str, Sequence[Start]],
    folder: Path,
    kind: Mapping[str, Any],
    seeds: int,
    batch: int,
    steps: int,
    guidance: float,
    guidance_low: float | None = None,
    negative: str = "",
    texts_kept: int = 256,
) -> int:
    """Sample the videos that `folder` lacks, from the first frame of each clip; returns how many were sampled.

    Args:
        model: returns a context manager with the model; called only if there is something to do.
        kind: frames, fps and size (height, width) of its videos; a picture of another shape is padded with black.
        negative: the negative prompt, used with guidance.
        texts_kept: number of encoded captions in memory at once; each of Wan's takes 8.4 MB.
    """
    frames, fps, size = int(kind["frames"]), float(kind["fps"]), (int(kind["size"][0]), int(kind["size"][1]))
    wanted = [
        (truth, seed, path)
        for split, truths in benchmark.items()
        for seed in range(seeds)
        for truth in truths
        if not _is_there(path := folder / split / f"{truth.id}-s{seed}.mp4")
    ]
    version, note = version_of(sample, flow), folder / VERSION
    if note.exists():
        try:
            same = files.read_json(note) == version
        except UserError:  # damaged: nobody knows
            same = False
        if not same:
            print(
                f"{folder}: has videos by another version of the sampler; delete them to make them anew",
                file=sys.stderr,
            )
    elif not listing.videos_in(folder):
        files.write_json(note, version)
    if not wanted:
        return 0
    unwanted = [negative] if max(guidance, guidance_low or 1) > 1 else []
    texts: dict[str, torch.Tensor] = {}
    with model() as ready, progress(f"videos for {folder.name}", len(wanted)) as advance:

        def make(part: Sequence[tuple[Start, int, Path]]) -> None:
            pictures = np.stack([padded(truth.picture(), size) for truth, _, _ in part])
            noise = [sample.clip_seed(seed, truth.id) for truth, seed, _ in part]
            captions = [truth.caption + truth.context for truth, _, _ in part]
            made = sample.sample_clips(
                ready, pictures, captions, noise, frames, steps, guidance, negative, guidance_low, texts
            )
            for (_, _, path), video in zip(part, made, strict=True):
                sample.write_video(path, video, fps, noted=True)

        together = max(texts_kept // batch, 1) * batch
        for first in range(0, len(wanted), together):
            some = wanted[first : first + together]
            needed = dict.fromkeys([*(truth.caption + truth.context for truth, _, _ in some), *unwanted])
            texts = {caption: texts[caption] for caption in needed if caption in texts}
            texts |= sample.encode_texts(ready, [caption for caption in needed if caption not in texts])
            batches = [some[i : i + batch] for i in range(0, len(some), batch)]
            for part, _ in zip(batches, in_order(make, batches, ready.device), strict=True):
                for _ in part:
                    advance("")
    return len(wanted)


def _is_there(path: Path) -> bool:
    """Whether a sample exists and is intact; if it is damaged, a message says that it is sampled again."""
    if path.exists() and not files.intact(path):
        print(f"{path}: is damaged; made again", file=sys.stderr)
        return False
    return path.exists()


def padded(picture_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (uint8) scaled to fit into `size` (height, width), centred on black."""
    height, width = picture_HWC.shape[:2]
    top, left, tall, wide = views.centred(size, (height, width))
    out = np.zeros((*size, 3), np.uint8)
    view = views.View((), False, (0, 0, height, width), (tall, wide))
    out[top : top + tall, left : left + wide] = views.scale(picture_HWC, view)
    return out


def _claim(out: Path, protocol: dict[str, Any]) -> None:
    """Refuse a folder whose scores were made with other settings."""
    path = out / "protocol.json"
    kept = files.read_object(path) if path.exists() else protocol
    if other := [name for name in protocol if kept.get(name) != protocol[name]]:
        raise UserError(
            f"{path}: its scores were made with another {', '.join(other)}; choose another --out or delete {out}",
            "other_run",
            "--out",
        )
    files.write_json(path, protocol)


def _blank(
    row: str,
    split: str,
    folder: Path,
    truths: Sequence[Truth],
    found: Mapping[str, Sequence[Path]],
    protocol: dict[str, Any],
    fps: float | None,
    tracker: Tracker,
) -> Record:
    """A record without numbers. Its key is a hash of everything that its numbers depend on."""
    measures = (pisa, *pisa.BENCHMARK.sources, base, codec, views, groups, type(tracker.module))
    facts = {
        "clips": [
            [truth.id, truth.key, schema.to_json(truth.row), [files.sha256(p) for p in found[truth.id]]]
            for truth in truths
        ],
        "sources": [*map(source, measures), files.sha256(Path(__file__))],
        "protocol": protocol,
        "fps": fps,
    }
    name = split.replace("/", "-")
    return Record(
        model=row,
        row=row,
        split=name.removeprefix("test_"),
        folder=name,
        key=files.sha256_json(facts),
        size=list(scored_size(truths[0].row.size)),
        seeds=max(len(found[truth.id]) for truth in truths),
        total=len(truths),
        videos=str(folder),
        given_fps=fps,
    )


def _complete(
    out: Path,
    record: Record,
    truths: Sequence[Truth],
    found: Mapping[str, Sequence[Path]],
    tracker: Tracker,
    device: torch.device | str,
    checked: bool,
) -> None:
    """Score the clips that the record's file does not have yet, one by one."""
    path = out / "evaluation" / file_name(record.model, record.folder)
    samples = out / "samples" / record.model / record.folder
    kept = records.read_whole(path)
    if kept is not None and kept.key == record.key:
        record = kept
    done = len(record.clips)
    if done == record.total:
        say(record, f"reused from {path}")
        return
    with progress(f"{record.model} on {record.split} clips", record.total, done) as advance:
        for truth in truths[done:]:
            started = time.monotonic()
            scores = []
            for seed, video in enumerate(found[truth.id]):
                pictures, times_F = load(video, scored_size(truth.row.size))
                if record.given_fps:
                    times_F = metric.even_times(len(pictures), record.given_fps)
                scored = score_video(pictures, times_F, truth, tracker, device, video if checked else None)
                places, rate = steady(times_F)
                scores.append(in_places(scored, places))
                sample.write_video(samples / f"{truth.id}-s{seed}.mp4", pictures[places], rate)
            if not record.clips:
                record = replace(record, fps=rate, frames=len(pictures))
            clip = replace(merge(scores), id=truth.id, caption=truth.caption)
            seconds = round(record.seconds + time.monotonic() - started, 2)
            record = replace(record, clips=(*record.clips, clip), seconds=seconds)
            records.write(path, record)
            advance("")


def scored_size(size: tuple[int, int]) -> tuple[int, int]:
    """The height and width at which a true clip of `size` is scored: its own, or smaller multiples of 8."""
    shrink = LARGEST / min(size)
    return size if shrink >= 1 else (round(size[0] * shrink / 8) * 8, round(size[1] * shrink / 8) * 8)


def load(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A video's pictures, uint8 (F, H, W, 3), and the seconds at which they are shown, (F,), from 0.

    They are its largest centred box of the shape of `size`, scaled to it.
    """
    facts = codec.inspect(path)
    if len(facts.times) < 2:
        raise UserError(f"{path}: is a single picture; give videos", "format")
    frames = facts.marks or tuple(range(len(facts.times)))
    view = views.View(frames, facts.marks is not None, views.centred(facts.size, size), size)
    return views.read(path, view), facts.times


def score_video(
    pictures_FHWC: np.ndarray,
    times_F: np.ndarray,
    truth: Truth,
    tracker: Tracker,
    device: torch.device | str = "cpu",
    path: Path | None = None,
) -> ClipScore:
    """Score one video against its true clip with pisa.score; `true_path` has one point per frame of the video.

    Raises:
        UserError: mismatch: the video does not begin with the true clip's first frame (checked if `path` is given).
    """
    height, width = pictures_FHWC.shape[1:3]
    view = views.View((), False, views.centred(truth.row.size, (height, width)), (height, width))
    # all of them, also for a short video: what it lacks is charged where there is an object
    true_FHW = np.stack([views.scale_ids(mask, view) for mask in truth.masks(truth.row.frames)])
    if path is not None:
        first = views.scale(truth.picture(), view)
        groups.check_first_picture(path, pictures_FHWC[0], first, f"clip {truth.id}", true_FHW[0])
    batch = Batch(
        ids=(truth.id,),
        instances_BFHW=torch.from_numpy(true_FHW[None].astype(np.uint8)).to(device),
        target_B=torch.ones(1, dtype=torch.int64, device=device),
    )
    pictures = retimed.pictures(pictures_FHWC, times_F) if path is not None else None  # our own are as they were made
    found = pisa.score(pictures_FHWC[None], batch, [truth.row], times_F, tracker, pictures)[0]
    if path is not None and pictures is not None:
        notes = [*timing_notes(times_F, pictures, truth.row.fps), *codec.inspect(path).notes]
        found = replace(found, notes=notes or None)
    seen = metric.true_frames(times_F, len(true_FHW), truth.row.fps)
    return replace(found, true_path=pisa.path(true_FHW[seen]))


def timing_notes(times_F: np.ndarray, pictures: retimed.Pictures, fps_true: float) -> list[str]:
    """Warnings about the frame rate of a video, which affects all numbers in seconds."""
    fps = 1 / metric.frame_step(times_F)
    if pictures.times is None:
        return ["frames are repeated irregularly, so g, landing and the like are not measured"]
    if pictures.rate:
        return [f"{pictures.rate:g} fps shown as {fps:.3g}: g, landing and the like are measured at {pictures.rate:g}"]
    ratio = fps_true / fps
    if 1.03 < ratio < FINE and abs(ratio - round(ratio)) > 0.03:
        return [
            f"{fps:.3g} fps, of true clips {fps_true:g}: g, landing and the like are right for videos made at this "
            "rate, but wrong if frames were dropped to reach it"
        ]
    return []


def steady(times_F: np.ndarray) -> tuple[np.ndarray, float]:
    """To show a video at a constant rate (its average): the frame to show at each step (F,), and the rate."""
    step = metric.frame_step(times_F)
    return views.nearest(times_F, metric.even_times(len(times_F), 1 / step)), 1 / step


def in_places(score: ClipScore, places_F: np.ndarray) -> ClipScore:
    """The score with its paths for the video as it is shown, see `steady`."""
    paths = [[path[place] for place in places_F] for path in score.paths]
    true_path = [score.true_path[place] for place in places_F if place < len(score.true_path)]
    return replace(score, paths=paths, true_path=true_path)
