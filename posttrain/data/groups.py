"""Groups for methods of preference: a true clip, and m losers that continue the same first picture less truly.

Losers are clips of a dataset folder that break a law in the true clip's scene (sim/worlds/counterfactual.py), samples
that a model made under several seeds, or both; or the best of the samples wins against the others. Samples lie in any
folder, named <clip>-s<seed>.mp4 as a recipe's base makes them (losers.py), or <clip>-s<seed>-<model>.mp4 as `posttrain
sample` does of <clip>.png; and what a judge says of them lies beside them in scores.jsonl:

    {"file_name": "00012-s0.mp4", "sa": 0.9, "pc": 0.2}     both 0 to 1: follows its text, obeys physics

A counterfactual has pc = 1 - severity, and sa = 1: its caption names what falls, and that is there until it is not.
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
from posttrain.core.errors import UserError
from posttrain.core.progress import track
from posttrain.data import listing, views
from posttrain.data.config import GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.latents import Latents
from posttrain.data.schema import ClipRow
from posttrain.models.base import VideoModel
from posttrain.types import Batch

SCORES = "scores.jsonl"
# How much first pictures may differ: of 255, in the mean of any of 8 x 8 fields and colours. The pocket's autoencoder
# and H.264 change up to 19 (120 clips of three datasets, mean 9.5); the most alike of 30 scenes differ by 33 to 64.
SAME_PICTURE = 25.0


class Scores(NamedTuple):
    sa: float
    pc: float


class Group(NamedTuple):
    """Places in `Members`."""

    winner: int
    losers: tuple[int, ...]
    true: int  # the clip whose first picture they continue; the winner itself unless samples win


def sample_of(stem: str, clips: Container[str]) -> tuple[str, int] | None:
    """The clip that a sample continues, and its seed, by its file's name without suffix; None if it is none of `clips`.

    A clip's own name may end as a sample's does: of several that fit, the longest is meant.
    """
    for seed in reversed([*re.finditer(r"-s(\d+)(?=-.|\Z)", stem)]):
        if stem[: seed.start()] in clips:
            return stem[: seed.start()], int(seed[1])
    return None


def names(clips: Clips) -> dict[str, int]:
    """Where each true clip is, by its file's name without suffix, which its samples are called by.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, int] = {}
    for index in range(len(clips)):
        if clips.row(index).violation:
            continue
        path = clips.video(index)
        if (other := found.setdefault(path.stem, index)) != index:
            raise UserError(
                f"{path}: is called as {clips.video(other)} is, and samples go by these names; rename one of them",
                "duplicate",
            )
    return found


class Members:
    """The clips of groups, as `Latents` reads them: those of `clips`, and after them samples."""

    def __init__(self, clips: Clips, samples: Sequence[tuple[int, Path, Scores | None]]) -> None:
        self.clips, self.samples = clips, samples
        self.ids = [*clips.ids, *(str(path) for _, path, _ in samples)]

    def __len__(self) -> int:
        return len(self.ids)

    def _sample(self, index: int) -> tuple[int, Path, Scores | None] | None:
        """Of a sample the clip that it continues, its file and its scores; None for a clip of the dataset."""
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
        """The first picture, uint8 (H, W, 3)."""
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
        assert violation is not None  # of a true clip nobody asks
        return Scores(sa=1.0, pc=1.0 - violation.severity)


def gather(
    clips: Clips, config: GroupsConfig, pictured: bool = True, scored: bool = False
) -> tuple[Members, list[Group]]:
    """The groups of a dataset.

    Args:
        clips: the true ones, and with config.counterfactuals also those that are not (`violated`).
        pictured: whether the samples' model was given first pictures; if not, theirs need not be the true ones.
        scored: whether losers are weighed by their scores, so that samples need some.

    Raises:
        UserError: no clip has enough losers; members of a group differ in their first picture, size, length or rate, or
            are the same file; there are samples and two true clips have one name; or a score is missing or out of
            range.
    """
    true = [index for index in range(len(clips)) if not clips.row(index).violation]
    places = names(clips) if config.samples else {}
    samples = [sample for folder in config.samples for sample in _samples(Path(folder), places, config, scored)]
    members = Members(clips, samples)
    losers: dict[int, list[int]] = {index: [] for index in true}
    winners = {clips.group(index): index for index in true if clips.group(index) is not None}
    for index in sorted(set(range(len(clips))) - set(true)):
        others = losers[winners[clips.group(index)]]
        # two tunnels that end alike are one clip
        if clips.row(index).sha256 not in [clips.row(other).sha256 for other in others]:
            others.append(index)
    for number, (winner, _, _) in enumerate(samples, len(clips)):
        losers[winner].append(number)
    groups, few = [], 0
    for place, true_one in enumerate(track(true, "looking at groups", len(true))):
        winner, found = true_one, sorted(losers[true_one])
        if len(found) >= config.losers:
            _check(members, Group(winner, tuple(found), true_one), pictured)
        if config.winner == "sample" and found:
            winner = max(found, key=partial(_merit, members))
            found = [index for index in found if _merit(members, index) < _merit(members, winner)]
        if len(found) < config.losers:
            few += 1
            continue
        order = np.random.default_rng([0, place]).permutation(found).tolist()  # another for each clip
        # the last of several is filled up with the first ones, so that all are used
        for first in range(0, len(found), config.losers):
            some = tuple(order[(first + i) % len(found)] for i in range(config.losers))
            groups.append(Group(winner, some, true_one))
    which = f"{config.losers} losers" + (" and a better one" if config.winner == "sample" else "")
    if not groups:
        raise UserError(
            f"data.groups: no clip has {which}; film or sample more, or lower data.groups.losers",
            "no_clips",
            "data.groups.losers",
        )
    if few:
        print(f"groups: {few} of {len(true)} clips are left out, with fewer than {which}", file=sys.stderr)
    return members, groups


def _merit(members: Members, index: int) -> float:
    """By which the winner is chosen where samples win; of equal ones the first."""
    scores = members.scores(index)
    assert scores is not None  # _samples has looked
    return scores.sa + scores.pc


def _samples(
    folder: Path, places: dict[str, int], config: GroupsConfig, scored: bool
) -> list[tuple[int, Path, Scores | None]]:
    """The samples of clips of these names in a folder, of seeds below config.samples_each unless that is 0."""
    if not folder.is_dir():
        raise UserError(
            f"data.groups.samples: {folder} does not exist; let the base make it by data.groups.samples_each",
            "missing",
            "data.groups.samples",
        )
    path = folder / SCORES
    rows = {row.get("file_name"): row for row in files.read_jsonl(path)} if path.exists() else None
    found = []
    for video in listing.videos_in(folder):
        match sample_of(video.stem, places):
            case clip, seed if not config.samples_each or seed < config.samples_each:
                if not files.intact(video):
                    raise UserError(f"{video}: is damaged (its content is not what was written); delete it", "damaged")
                found.append((places[clip], video, None if rows is None else _scores(path, video.name, rows)))
    if found and rows is None and (scored or config.winner == "sample"):
        why, remedy = "losers are weighed by their scores", ", or set method.physics=null"
        if config.winner == "sample":
            why, remedy = "the best sample shall win", ""
        raise UserError(f"{path}: does not exist, and {why}; `posttrain score {folder}`{remedy}", "missing")
    return found


def _scores(path: Path, name: str, rows: dict[Any, dict[str, Any]]) -> Scores:
    if name not in rows:
        raise UserError(f"{path}: has no row for {name}; `posttrain score` it, or remove the file", "unfinished")
    if "sha256" in rows[name] and files.seal(rows[name]) != rows[name]:  # what others wrote has no digest
        raise UserError(f"{path}: the row of {name} is not what was written; score it again", "damaged")
    for field in Scores._fields:
        value = rows[name].get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"{path}: {name}: {field} is {value}, not a number from 0 to 1; score it again", "value", field
            )
    return Scores(*(float(rows[name][field]) for field in Scores._fields))


def _check(members: Members, group: Group, pictured: bool) -> None:
    """Refuse a group whose members are not comparable."""
    clips, sums = members.clips, dict[str, int]()
    split, picture = clips.splits[0], _fields(members.first(group.winner))
    true = members.video(group.winner)
    for index in (group.winner, *group.losers):
        path, sampled = members.video(index), index >= len(clips)
        facts = codec.inspect(path)
        if sampled:
            rate = float(1 / np.diff(facts.times).mean())
            rate = split.fps if abs(rate / split.fps - 1) < 0.01 else rate
            kind = {"frames": len(facts.times), "size": list(facts.size), "fps": rate}
            if other := [key for key, value in kind.items() if value != split.kind[key]]:
                found, wanted = kind[other[0]], split.kind[other[0]]
                raise UserError(
                    f"{path}: {other[0]} is {found}, but {wanted} in {true}; sample it as that is", "mismatch", other[0]
                )
        if facts.sha256 in sums:
            raise UserError(
                f"{path}: is the same file as {members.video(sums[facts.sha256])}; remove one of them", "duplicate"
            )
        sums[facts.sha256] = index
        if pictured or not sampled:
            apart = float((_fields(members.first(index)) - picture).abs().max())
            if apart > SAME_PICTURE:
                said = f"its first picture is not that of {true} (off by {apart:.0f} of 255); it continues another"
                raise UserError(f"{path}: {said}", "mismatch")


def _fields(picture_HWC: np.ndarray) -> torch.Tensor:
    """The mean colours of its 8 x 8 fields."""
    return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(picture_HWC).permute(2, 0, 1).float(), 8)


class Groups:
    """The latents of groups under `model`, cached in `folder`; a `Data` for runs (run.py).

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
        """One hash of everything that the batches depend on."""
        keys = [[self._latents.keys[index] for index in (g.true, g.winner, *g.losers)] for g in self.groups]
        return files.sha256_json([keys, None if self._scores is None else self._scores.tolist()])

    def __len__(self) -> int:
        return len(self.groups)

    def load(self, indices: Sequence[int]) -> Batch:
        """Winners with their text and condition, the losers' latents, and scores where all losers have some."""
        chosen = [self.groups[index] for index in indices]
        true = self._latents.load([group.true for group in chosen])
        losers = self._latents.load([index for group in chosen for index in group.losers]).z0_BCFHW
        assert true.z0_BCFHW is not None
        assert losers is not None
        winners = true.z0_BCFHW
        if any(group.winner != group.true for group in chosen):
            best = self._latents.load([group.winner for group in chosen]).z0_BCFHW
            assert best is not None
            # the first picture as it is given later
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
