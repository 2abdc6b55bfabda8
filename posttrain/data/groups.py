"""Groups for preference methods: a preferred clip (winner) and m rejected clips (losers) with the same first frame.

The winner is the true clip. Losers are clips of a dataset folder that break a law in the true clip's scene
(sim/worlds/counterfactual.py), samples of a model with several seeds, or both. Alternatively the best sample is the
winner and the other samples are the losers. Samples are files of any folder: <clip>-s<seed>.mp4 as a recipe's base
model makes them (losers.py), or <clip>-s<seed>-<model>.mp4 as `posttrain sample` makes them from <clip>.png. A judge's
scores are in scores.jsonl in the same folder, both from 0 to 1:

    {"file_name": "00012-s0.mp4", "sa": 0.9, "pc": 0.2}     semantic adherence, physical commonsense

A counterfactual has pc = 1 - severity and sa = 1, since its caption names what falls.
"""

import re
import sys
from collections.abc import Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from posttrain.core import codec, files
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError, printable
from posttrain.core.progress import track
from posttrain.data import listing, views
from posttrain.data.config import GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Latents
from posttrain.data.schema import ClipRow
from posttrain.models.base import VideoModel
from posttrain.types import Batch

SCORES = "scores.jsonl"
# How much two equal first frames may differ, of 255: in the mean colour of any of 8 x 8 fields, and of the object.
# The pocket's autoencoder and H.264 change fields by up to 19 (120 clips of three datasets, mean 9.5), the object by 7.
# The most similar of 30 scenes differ by 33 to 64, a clip that starts two frames late (of 16 per second) by 31 to 100.
# One frame late is 9 to 27, as much as the autoencoder.
SAME_PICTURE = 25.0


class Scores(NamedTuple):
    sa: float
    pc: float


class Group(NamedTuple):
    """Indices into `Members`."""

    winner: int
    losers: tuple[int, ...]
    true: int  # the clip whose first frame they continue; it is the winner unless samples win


def sample_of(stem: str, clips: Container[str]) -> tuple[str, int] | None:
    """(clip, seed) of a sample; None if the clip is not in `clips`.

    `stem` is the file's name without suffix. A clip's own name may also end in -s<number>: the longest match is used.
    """
    for seed in reversed([*re.finditer(r"-s(\d+)(?=-.|\Z)", stem)]):
        if stem[: seed.start()] in clips:
            return stem[: seed.start()], int(seed[1])
    return None


def names(clips: Clips) -> dict[str, int]:
    """The index of each true clip, by its file name without suffix; the names of its samples begin with it.

    Raises:
        UserError: two clips have the same name.
    """
    by_name: dict[str, int] = {}
    for index in range(len(clips)):
        if clips.row(index).violation:
            continue
        path = clips.video(index)
        if (other := by_name.setdefault(path.stem, index)) != index:
            raise UserError(
                f"{path}: has the same name as {clips.video(other)}, so a sample's clip would be ambiguous; rename one",
                "duplicate",
            )
    return by_name


class Members:
    """All clips of groups, in the form that `Latents` reads: those of `clips`, then the samples."""

    def __init__(self, clips: Clips, samples: Sequence[tuple[int, Path, Scores | None]]) -> None:
        self.clips, self.samples = clips, samples
        self.ids = [*clips.ids, *(str(path) for _, path, _ in samples)]

    def __len__(self) -> int:
        return len(self.ids)

    def _sample(self, index: int) -> tuple[int, Path, Scores | None] | None:
        """For a sample, the clip that it continues, its file and its scores; None for a clip of the dataset."""
        return self.samples[index - len(self.clips)] if index >= len(self.clips) else None

    def row(self, index: int) -> ClipRow:
        sample = self._sample(index)
        if sample is None:
            return self.clips.row(index)
        true = self.clips.row(sample[0])
        return ClipRow(sample[1].name, true.caption, true.fps, true.frames, true.size)

    def video(self, index: int) -> Path:
        sample = self._sample(index)
        return sample[1] if sample else self.clips.video(index)

    def seen(self, index: int) -> list[str]:
        return [] if self._sample(index) else self.clips.seen(index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        sample = self._sample(index)
        return (read_video(sample[1]), None) if sample else self.clips.read(index)

    def first(self, index: int) -> np.ndarray:
        """The first frame, uint8 (H, W, 3)."""
        sample = self._sample(index)
        if sample is None:
            return self.clips.first(index)
        size = self.clips.splits[0].size
        whole = views.View((0,), False, (0, 0, *size), size)
        return views.read(sample[1], whole)[0]

    def scores(self, index: int) -> Scores | None:
        sample = self._sample(index)
        if sample:
            return sample[2]
        violation = self.clips.row(index).violation
        assert violation is not None  # nobody asks for a true clip's scores
        return Scores(sa=1.0, pc=1.0 - violation.severity)


def gather(
    clips: Clips, config: GroupsConfig, pictured: bool = True, scored: bool = False
) -> tuple[Members, list[Group]]:
    """The groups of a dataset.

    Args:
        clips: true clips; with config.counterfactuals also clips that break a law (`violated`).
        pictured: whether the samples' model is conditioned on first frames; if not, first frames are not compared.
        scored: whether losers are weighted by their scores, so that every sample needs scores.

    Raises:
        UserError: no clip has enough losers; members of a group differ in their first frame, size, length or rate, or
            are the same file; two true clips have the same name and there are samples; a score is missing or out of
            range.
    """
    true = [index for index in range(len(clips)) if not clips.row(index).violation]
    by_name = names(clips) if config.samples else {}
    samples = [sample for folder in config.samples for sample in _samples(Path(folder), by_name, config, scored)]
    members = Members(clips, samples)
    losers: dict[int, list[int]] = {index: [] for index in true}
    winners = {clips.group(index): index for index in true if clips.group(index) is not None}
    for index in sorted(set(range(len(clips))) - set(true)):
        others = losers[winners[clips.group(index)]]
        # two tunnels with the same end give the same file
        if clips.row(index).sha256 not in [clips.row(other).sha256 for other in others]:
            others.append(index)
    for number, (winner, _, _) in enumerate(samples, len(clips)):
        losers[winner].append(number)
    groups, few = [], 0
    for number, true_one in enumerate(track(true, "looking at groups", len(true))):
        winner, candidates = true_one, sorted(losers[true_one])
        if len(candidates) >= config.losers:
            _check(members, Group(winner, tuple(candidates), true_one), pictured)
        if config.winner == "sample" and candidates:
            winner = max(candidates, key=partial(_merit, members))
            candidates = [index for index in candidates if _merit(members, index) < _merit(members, winner)]
        if len(candidates) < config.losers:
            few += 1
            continue
        order = np.random.default_rng([0, number]).permutation(candidates).tolist()  # a different order for each clip
        # the last group is filled up with the first losers, so all are used
        for first in range(0, len(candidates), config.losers):
            group_losers = tuple(order[(first + i) % len(candidates)] for i in range(config.losers))
            groups.append(Group(winner, group_losers, true_one))
    wanted = f"{config.losers} losers" + (" and a better one" if config.winner == "sample" else "")
    if not groups:
        raise UserError(
            f"data.groups: no clip has {wanted}; film or sample more, or lower data.groups.losers",
            "no_clips",
            "data.groups.losers",
        )
    if few:
        print(f"groups: {few} of {len(true)} clips are left out, with fewer than {wanted}", file=sys.stderr)
    return members, groups


def _merit(members: Members, index: int) -> float:
    """The score by which the preferred sample is chosen; the first one of equals."""
    scores = members.scores(index)
    assert scores is not None  # _samples checked it
    return scores.sa + scores.pc


def _samples(
    folder: Path, clip_of: dict[str, int], config: GroupsConfig, scored: bool
) -> list[tuple[int, Path, Scores | None]]:
    """The samples of the clips `clip_of` names in a folder, with seeds below config.samples_each (0: any seed)."""
    if not folder.is_dir():
        raise UserError(
            f"data.groups.samples: {folder} does not exist; set data.groups.samples_each to let the base model make it",
            "missing",
            "data.groups.samples",
        )
    path = folder / SCORES
    rows = score_rows(path) if path.exists() else None
    samples, others, over = list[tuple[int, Path, Scores | None]](), list[Path](), list[Path]()
    for video in listing.videos_in(folder):
        match sample_of(video.stem, clip_of):
            case clip, seed if not config.samples_each or seed < config.samples_each:
                if not files.intact(video):
                    raise UserError(f"{video}: is damaged (its content is not what was written); delete it", "damaged")
                samples.append((clip_of[clip], video, None if rows is None else _scores(path, video.name, rows)))
            case None:
                others.append(video)
            case _:
                over.append(video)
    if others:
        print(f"{folder}: {len(others)} videos continue no clip here, as {others[0].name}; left out", file=sys.stderr)
    if over:
        said = f"seeds from {config.samples_each} on (data.groups.samples_each), as {over[0].name}"
        print(f"{folder}: {len(over)} videos have {said}; left out", file=sys.stderr)
    if samples and rows is None and (scored or config.winner == "sample"):
        why, remedy = "losers are weighted by their scores", ", or set method.physics=null"
        if config.winner == "sample":
            why, remedy = "the best sample wins", ""
        raise UserError(
            f"{path}: does not exist, but {why}; run `posttrain score {folder} --clips DATASET --judge JUDGE`{remedy}",
            "missing",
        )
    return samples


def score_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of scores, by their videos' names.

    Raises:
        UserError: missing; format; value: a row names no video.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in files.read_jsonl(path):
        if not isinstance(name := row.get("file_name"), str):
            raise UserError(
                f"{path}: file_name is {printable(name)}, not a video's name; fix the row", "value", "file_name"
            )
        rows[name] = row
    return rows


def _scores(path: Path, name: str, rows: dict[str, dict[str, Any]]) -> Scores:
    if name not in rows:
        raise UserError(
            f"{path}: has no row for {name}; `posttrain score` adds it with the same judge, or remove that video",
            "unfinished",
        )
    if "sha256" in rows[name] and files.seal(rows[name]) != rows[name]:  # scores of other programs have no digest
        raise UserError(f"{path}: the row of {name} was changed after scoring; score it again", "damaged")
    for field in Scores._fields:
        value = rows[name].get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"{path}: {name}: {field} is {printable(value)}, not a number from 0 to 1; score it again",
                "value",
                field,
            )
    return Scores(*(float(rows[name][field]) for field in Scores._fields))


def _check(members: Members, group: Group, pictured: bool) -> None:
    """Refuse a group whose clips are not comparable."""
    clips, sums = members.clips, dict[str, int]()
    split, picture = clips.splits[0], members.first(group.winner)
    true = members.video(group.winner)
    for index in (group.winner, *group.losers):
        path, sampled = members.video(index), index >= len(clips)
        facts = codec.inspect(path)
        if sampled:
            rate = float(1 / np.diff(facts.times).mean())
            rate = split.fps if abs(rate / split.fps - 1) < 0.01 else rate
            expected = split.clip_format._asdict()
            own = {"frames": len(facts.times), "size": list(facts.size), "fps": rate}
            if differ := [key for key, value in own.items() if value != expected[key]]:
                key = differ[0]
                raise UserError(
                    f"{path}: {key} is {own[key]}, but {expected[key]} in {true}; sample it again with that {key}",
                    "mismatch",
                    key,
                )
            late = facts.times - np.arange(len(facts.times)) / split.fps
            worst = int(np.abs(late).argmax())
            if abs(late[worst]) > 0.5 / split.fps:
                raise UserError(
                    f"{path}: frame {worst} is shown at {facts.times[worst]:.3f} s, more than half a frame from "
                    f"{worst / split.fps:.3f} s as in {true}; write it at {split.fps:g} frames per second",
                    "mismatch",
                    "fps",
                )
        if facts.sha256 in sums:
            raise UserError(
                f"{path}: is the same file as {members.video(sums[facts.sha256])}; remove one of them", "duplicate"
            )
        sums[facts.sha256] = index
        if pictured or not sampled:
            check_first_picture(path, members.first(index), picture, str(true))


def check_first_picture(
    path: Path, picture_HWC: np.ndarray, true_HWC: np.ndarray, true: str, object_HW: np.ndarray | None = None
) -> None:
    """Refuse a video that does not begin with the first frame of its true clip.

    Args:
        path, true: names of the video and the true clip for the message.
        picture_HWC, true_HWC: their first frames, uint8, of one shape.
        object_HW: bool, the object that is followed, if known: it may be too small to change the mean of a field.

    Raises:
        UserError: mismatch: it continues another clip, or begins later.
    """
    apart = float((_fields(picture_HWC, object_HW) - _fields(true_HWC, object_HW)).abs().max())
    if apart > SAME_PICTURE:
        raise UserError(
            f"{path}: its first frame is not that of {true} (off by {apart:.0f} of 255): it continues another clip, "
            "or begins later",
            "mismatch",
        )


def _fields(picture_HWC: np.ndarray, object_HW: np.ndarray | None) -> torch.Tensor:
    """The mean colours of the picture's 8 x 8 fields and, if it is known, of the object: (fields, 3)."""
    picture = torch.tensor(picture_HWC).permute(2, 0, 1).float()
    fields = torch.nn.functional.adaptive_avg_pool2d(picture, 8).flatten(1).T
    if object_HW is None or not object_HW.any():
        return fields
    return torch.cat([fields, picture[:, torch.from_numpy(object_HW)].mean(1)[None]])


class Groups:
    """The latents of groups under `model`, cached in `folder`: a `Data` for runs (run.py).

    Raises:
        UserError: as `gather` and `Latents`.
    """

    def __init__(
        self,
        model: VideoModel,
        clips: Clips,
        config: GroupsConfig,
        folder: Path | str,
        pictured: bool = True,
        scored: bool = False,
    ) -> None:
        self.members, self.groups = gather(clips, config, pictured, scored)
        self._latents, self._clean = Latents(model, self.members, folder), model.n_cond_frames
        counts: dict[int, int] = {}
        self.ids = []
        for group in self.groups:
            counts[group.winner] = counts.get(group.winner, 0) + 1
            self.ids.append(f"{self.members.ids[group.winner]}/{counts[group.winner]}")
        scores = [[self.members.scores(index) for index in group.losers] for group in self.groups]
        self._scores = None if any(s is None for row in scores for s in row) else torch.tensor(scores)  # (groups, m, 2)

    @property
    def key(self) -> str:
        """A hash of everything that the batches depend on."""
        keys = [[self._latents.keys[index] for index in (g.true, g.winner, *g.losers)] for g in self.groups]
        return files.sha256_json([keys, None if self._scores is None else self._scores.tolist()])

    def __len__(self) -> int:
        return len(self.groups)

    def load(self, indices: Sequence[int]) -> Batch:
        """Winners with their text and condition, the losers' latents, and their scores if all losers have scores."""
        chosen = [self.groups[index] for index in indices]
        true = self._latents.load([group.true for group in chosen])
        losers = self._latents.load([index for group in chosen for index in group.losers]).z0_BCFHW
        assert true.z0_BCFHW is not None
        assert losers is not None
        winners = true.z0_BCFHW
        if any(group.winner != group.true for group in chosen):
            best = self._latents.load([group.winner for group in chosen]).z0_BCFHW
            assert best is not None
            # the first frame as it is given in training
            winners = torch.cat([winners[:, :, : self._clean], best[:, :, self._clean :]], dim=2)
        scores = None if self._scores is None else self._scores[list(indices)]
        return replace(
            true,
            z0_BCFHW=winners,
            ids=tuple(self.ids[index] for index in indices),
            losers_BMCFHW=losers.unflatten(0, (len(chosen), -1)),
            semantic_adherence_BM=None if scores is None else scores[..., 0],
            physical_commonsense_BM=None if scores is None else scores[..., 1],
        )
