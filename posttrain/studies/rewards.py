"""Which rewards recognise which violations: rewards of clips that break one law by a known amount, as Markdown.

    python -m posttrain.studies.rewards data/pocket-violations --groups 4 --sum segmentation=1,trajectory=2

For each reward (a file of posttrain/rewards) and each kind of violation

    rho      Spearman's rho of reward and severity, over the true clip of a group (severity 0) and its clips of that
             kind; the median over groups. -1 means that a worse clip always has a lower reward.
    towards  share of clips x at which the gradient points to the true clip x*: the reward's derivative along x* - x is
             positive.
    nearer   share of clips at which the gradient moves the object to its true position: the derivative is positive
             along the change of pixels that moves the visible object by one pixel towards its true position.
    step     share of clips at which a step along the gradient helps: all pixels after the first frame change by
             `STEP` (root mean square), and then the object is nearer to its true masks (Chamfer distance,
             posttrain/metrics/pisa.py), as measured by the embedded tracker, which no reward uses.

`towards` and `nearer` hold for small steps in pixels only. The three shares are over the least and the most severe clip
of the kind in each group. A kind that a reward declares in its RANKS should have rho <= -0.9 and is printed in bold. A
second table has the mean rewards of clips that no reward may prefer: the static video, and the first frame followed by
black, a flat colour or noise.

Shape letters: B batch, C channels, F frames, H W pixels.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from posttrain.core.codec import read_video
from posttrain.core.errors import UserError
from posttrain.core.progress import markdown, track
from posttrain.core.recipe import plugins, resolve
from posttrain.data.dataset import Split, open_split, read_annotations, targets, to_float
from posttrain.metrics import pisa
from posttrain.metrics.masks import Track, segment
from posttrain.models.base import ModelConfig
from posttrain.nets import tracker
from posttrain.rewards.base import Reward, true_masks
from posttrain.types import Batch

ASKED = 0.9  # target: |rho| of the kinds that a reward declares
TRUE = ""  # stands for the kind of the true clip
STEP = 0.05  # of pixels in [-1, 1]


class Judged(NamedTuple):
    """A clip's reward, its derivatives towards and nearer, and the gain of a step; None: not computed."""

    group: int
    kind: str
    severity: float
    reward: float
    towards: float | None = None
    nearer: float | None = None
    step: float | None = None


class Violated(NamedTuple):
    """A clip that breaks a law: violation, pixels in [-1, 1], and masks of the scored object; B is 1."""

    kind: str
    severity: float
    video_BCFHW: Tensor
    mask_BFHW: Tensor


def group_numbers(split: Split, count: int | None = None) -> list[int]:
    """The numbers of the first `count` groups of a split, or of all.

    Raises:
        UserError: the split has no groups.
    """
    numbers = list(dict.fromkeys(row.group for row in split.rows if row.group is not None))
    if not numbers:
        raise UserError(
            f"{split.folder}: has no groups; film recipes/pocket/violations.yaml and name its folder", "no_clips"
        )
    return numbers[:count]


def truth(split: Split, group: int) -> Batch:
    """The true clip of a group with its masks, flow and depth, as a batch of one."""
    index = next(i for i, row in enumerate(split.rows) if row.group == group and row.violation is None)
    arrays = read_annotations(split.annotations(index), ["instances", "flow", "depth"])
    tensors = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    return Batch(
        ids=(split.rows[index].file_name,),
        video_BCFHW=to_float(read_video(split.video(index)))[None],
        instances_BFHW=tensors["instances"],
        target_B=targets([split.rows[index]]),
        flow_BFCHW=tensors["flow"].float().movedim(-1, 2),
        depth_BFHW=tensors["depth"].float(),
    )


def violated(split: Split, group: int, kinds: Sequence[str] | None = None) -> Iterator[Violated]:
    """The group's clips that break a law, of the given kinds or of all kinds."""
    for index, row in enumerate(split.rows):
        violation = row.violation
        if row.group == group and violation and (kinds is None or violation.kind in kinds):
            assert row.target is not None
            mask = read_annotations(split.annotations(index), ["instances"])["instances"] == row.target + 1
            video = to_float(read_video(split.video(index)))
            yield Violated(violation.kind, violation.severity, video[None], torch.from_numpy(mask)[None])


def judge(
    split: Split,
    rewards: Mapping[str, Reward],
    groups: Sequence[int],
    follow: Track,
    kinds: Sequence[str] | None = None,
) -> dict[str, list[Judged]]:
    """By name of the reward: all clips of these groups, the true one of each group first.

    Args:
        follow: the tracker that measures whether a step helps.
    """
    judged: dict[str, list[Judged]] = {name: [] for name in rewards}
    for group in groups:
        batch = truth(split, group)
        assert batch.video_BCFHW is not None
        clips = list(violated(split, group, kinds))
        for name, reward in rewards.items():
            with torch.no_grad():
                judged[name].append(Judged(group, TRUE, 0.0, reward(batch.video_BCFHW, batch).item()))
        for clip in track(clips, f"group {group}", len(clips)):
            severities = [other.severity for other in clips if other.kind == clip.kind]
            directions = {}
            if clip.severity in (min(severities), max(severities)):
                directions = {"towards": batch.video_BCFHW - clip.video_BCFHW, "nearer": nearer(clip, batch)}
            for name, reward in rewards.items():
                value, slopes = derivatives(reward, clip.video_BCFHW, batch, directions, follow)
                judged[name].append(Judged(group, clip.kind, clip.severity, value, **slopes))
    return judged


def derivatives(
    reward: Reward, video_BCFHW: Tensor, batch: Batch, directions: Mapping[str, Tensor], follow: Track
) -> tuple[float, dict[str, float | None]]:
    """The reward of a clip; if there are directions, also its derivative along each (None: the direction is zero) and
    the gain of a step. Frame 0 is given, so its gradient is set to 0."""
    if not directions:
        with torch.no_grad():
            return reward(video_BCFHW, batch).item(), {}
    value, gradient = with_gradient(reward, video_BCFHW, batch)
    gradient[:, :, 0] = 0
    slopes = {
        name: (gradient * direction).sum().item() if direction.any() else None for name, direction in directions.items()
    }
    return value, slopes | {"step": gain(video_BCFHW, gradient, batch, follow)}


def gain(video_BCFHW: Tensor, gradient_BCFHW: Tensor, batch: Batch, follow: Track) -> float:
    """How much a step of size STEP lowers the Chamfer distance of the object to its true masks."""
    size = gradient_BCFHW[:, :, 1:].double().square().mean().sqrt().clamp_min(1e-30).to(gradient_BCFHW.dtype)
    moved_BCFHW = (video_BCFHW + STEP / size * gradient_BCFHW).clamp(-1, 1)
    true_BFHW = true_masks(batch)
    times_F = pisa.even_times(true_BFHW.shape[1], 1)
    before, after = (
        pisa.score(segment(follow, shown, true_BFHW[:, 0])[0].numpy(), true_BFHW[0].numpy(), times_F, 1)["chamfer"]
        for shown in (video_BCFHW, moved_BCFHW)
    )
    return before - after


def nearer(clip: Violated, batch: Batch) -> Tensor:
    """The change of pixels (B, C, F, H, W) that moves the object by up to a pixel per axis towards its true position.

    0 in frames in which the object is not visible, or is less than a pixel from its true position. Uncovered pixels get
    the true clip's background, the mean over the frames that show it. The object's shadow does not move.
    """
    assert batch.video_BCFHW is not None
    assert batch.instances_BFHW is not None
    bare = (batch.instances_BFHW == 0)[:, None].to(clip.video_BCFHW.dtype)
    background_BCHW = (batch.video_BCFHW * bare).sum(2) / bare.sum(2).clamp_min(1)
    change = torch.zeros_like(clip.video_BCFHW)
    for t in range(1, clip.video_BCFHW.shape[2]):
        here, there = clip.mask_BFHW[0, t], true_masks(batch)[0, t]
        if not here.any() or not there.any():
            continue
        direction = there.nonzero().double().mean(0) - here.nonzero().double().mean(0)
        step = tuple((direction / direction.norm().clamp_min(1e-6) * (direction.norm() >= 1)).round().int().tolist())
        if step == (0, 0):
            continue
        seen, moved = clip.video_BCFHW[0, :, t], here.roll(step, (0, 1))
        without = torch.where(here, background_BCHW[0], seen)
        change[0, :, t] = torch.where(moved, seen.roll(step, (1, 2)), without) - seen
    return change


def with_gradient(reward: Reward, video_BCFHW: Tensor, batch: Batch) -> tuple[float, Tensor]:
    """The reward of one clip, and its gradient in the clip's pixels."""
    video_BCFHW = video_BCFHW.detach().requires_grad_()
    value = reward(video_BCFHW, batch).sum()
    (gradient,) = torch.autograd.grad(value, video_BCFHW)
    return value.item(), gradient


def total(judged: Mapping[str, list[Judged]], weights: Mapping[str, float]) -> list[Judged]:
    """The weighted sum of rewards for each clip: rewards and derivatives are summed, the gain of a step is None."""
    rows = []
    for clips in zip(*(judged[name] for name in weights), strict=True):
        weighted = list(zip(weights.values(), clips, strict=True))
        sums: dict[str, Any] = {"reward": sum(w * clip.reward for w, clip in weighted)}
        for quantity in ("towards", "nearer"):
            if getattr(clips[0], quantity) is not None:
                sums[quantity] = sum(w * getattr(clip, quantity) for w, clip in weighted)
        rows.append(clips[0]._replace(**sums, step=None))
    return rows


def rho(clips: Sequence[Judged], kind: str) -> float:
    """Spearman's rho of reward and severity, the median over groups; NaN if no group has several severities."""
    rhos = []
    for group in dict.fromkeys(clip.group for clip in clips):
        chosen = [clip for clip in clips if clip.group == group and clip.kind in (TRUE, kind)]
        rewards, severities = [clip.reward for clip in chosen], [clip.severity for clip in chosen]
        if len(set(severities)) > 2:
            # rho is not defined if all rewards are equal
            rhos.append(float(spearmanr(rewards, severities).statistic) if len(set(rewards)) > 1 else 0.0)
    return float(np.median(rhos)) if rhos else float("nan")


def right(clips: Sequence[Judged], kind: str, quantity: str) -> str:
    """The share of the kind's clips whose `quantity` (towards, nearer or step) is positive; a dash without clips."""
    slopes = [slope for clip in clips if clip.kind == kind and (slope := getattr(clip, quantity)) is not None]
    return f"{np.mean([slope > 0 for slope in slopes]):.0%}" if slopes else "–"


def impostors(batch: Batch) -> dict[str, Tensor]:
    """Clips that no reward may prefer to the true one; all begin with the true first frame."""
    assert batch.video_BCFHW is not None
    first, rest = batch.video_BCFHW[:, :, :1], torch.ones_like(batch.video_BCFHW[:, :, 1:])
    noise = torch.rand(rest.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    after = {
        "frozen": first * rest,
        "blank": -rest,
        "flat": first.mean((3, 4), keepdim=True) * rest,
        "noise": noise,
    }
    return {name: torch.cat([first, pictures], 2) for name, pictures in after.items()}


def table(judged: Mapping[str, list[Judged]], declared: Mapping[str, Sequence[str]]) -> str:
    """Markdown: a line per kind, a column per reward with rho and the shares towards, nearer and step."""
    kinds = dict.fromkeys(clip.kind for clips in judged.values() for clip in clips if clip.kind != TRUE)

    def cell(name: str, kind: str) -> str:
        clips = judged[name]
        order = rho(clips, kind)
        text = "–" if math.isnan(order) else f"{order:+.2f}"
        shares = " ".join(right(clips, kind, quantity) for quantity in ("towards", "nearer", "step"))
        return (f"**{text}**" if kind in declared.get(name, ()) else text) + f" {shares}"

    lines = [[kind, *(cell(name, kind) for name in judged)] for kind in kinds]
    return markdown(["violation", *judged], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="which rewards recognise which violations")
    parser.add_argument("clips", help="a dataset folder of groups")
    parser.add_argument("--split", default="test_unseen")
    parser.add_argument("--groups", type=int, default=1, help="number of groups")
    parser.add_argument("--rewards", nargs="+", default=plugins("rewards"))
    parser.add_argument("--sum", nargs="*", default=[], help="weighted sums of rewards, as segmentation=1,trajectory=2")
    options = parser.parse_args(arguments)
    try:
        split = open_split(options.clips, options.split)
        groups = group_numbers(split, options.groups)
        modules = {name: resolve("rewards", name) for name in options.rewards}
        sums = {text: weights(text, options.rewards) for text in options.sum}
        rewards: dict[str, Reward] = {name: module.load(module.Config()) for name, module in modules.items()}
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    judged = judge(split, rewards, groups, tracker.load(ModelConfig(family="tracker", path="pocket")))
    declared = {name: module.RANKS for name, module in modules.items()}
    columns = judged | {text: total(judged, chosen) for text, chosen in sums.items()}
    print(f"{len(groups)} groups, {len(columns[options.rewards[0]])} clips\n\n{table(columns, declared)}\n")
    lines: dict[str, list[list[float]]] = {}
    for group in groups:
        batch = truth(split, group)
        assert batch.video_BCFHW is not None
        for kind, video in ({"true": batch.video_BCFHW} | impostors(batch)).items():
            with torch.no_grad():
                values = {name: reward(video, batch).item() for name, reward in rewards.items()}
            more = [sum(weight * values[name] for name, weight in chosen.items()) for chosen in sums.values()]
            lines.setdefault(kind, []).append([*values.values(), *more])
    means = ([kind, *(f"{value:.4f}" for value in np.mean(rows, 0))] for kind, rows in lines.items())
    print(markdown(["clip", *columns], means))
    return 0


def weights(text: str, known: Sequence[str]) -> dict[str, float]:
    """The mapping of a text such as "a=1,b=2".

    Raises:
        UserError: the text has another form, or names a reward that is not in `known`.
    """
    parsed = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            parsed[name] = float(weight)
        except ValueError:
            raise UserError(f"--sum {text}: should be name=weight,name=weight", "format", "--sum") from None
        if name not in known:
            raise UserError(f"--sum {text}: {name} is not among {', '.join(known)}", "unknown_name", "--sum")
    return parsed


if __name__ == "__main__":
    raise SystemExit(main())
