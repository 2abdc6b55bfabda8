"""Tripwires: quantities that must not get worse while a reward is trained, measured on held-out clips.

A model can raise a reward while the clips get worse in ways that the reward does not measure. So before the first step
and every `eval.every` steps the same held-out clips are sampled from the same noise (a look). Measured on each clip:

    reward          1      the trained reward, a weighted sum
    reward_*        1      its summands if there are several, and the rewards of `watch`
    l2, iou, ...           the benchmark's metrics with `wire` set, from the evaluation's tracker
    g_error         m/s^2  |g - G| from the scorecard (metrics/physics.py), if the clips' rows have the distance
    drift, jump, growth    magnitudes from the scorecard: sideways (m/s, m) and of the size (1/s); 0 in truth
    motion          ratio  mean |x_(f+1) - x_f| of the pictures
    sharpness       ratio  variance of the pictures' Laplacian
    size            ratio  area of the object's mask, geometric mean over the frames in which both have one
    colour          0..1   root mean square distance of the object's mean colour from the true one, over those frames

where a ratio is relative to the true clip. For all clips together: distance = |theta - theta_0| / |theta_0| of the
trained weights.

With q turned so that more is better (-l2; -|log q| for a ratio) and d the change of a clip since the first look, the
wire of q is tripped where, over the clips,

    mean d(reward) > 0,  p <= CHANCE,  and  mean d(q) < 0,  p <= CHANCE / (looks x wires),

and q changes by more than `tolerance`, because a significant change may still be too small to matter. p is that of the
one-sided sign-flip test: the share of all choices of signs of the d whose mean is as large. If two sets of samples come
from the same model, each sign is equally likely, so the test is exact for any distribution and any dependence of the
quantities. `looks` is the number of looks of the whole run after the first (Bonferroni): if nothing but the reward
changes, chance trips some wire in at most CHANCE of the runs. With n clips p is at least 2^-n, so too few clips for
many looks are refused, and a wire with values for fewer than LEAST clips is not tested. The best look is the one with
the highest reward among those without a tripped wire; its weights are in runs/<run>/best, which `model.start` accepts.

All results are in runs/<run>/tripwires.jsonl, a row for each look. A look reads the rows of earlier steps and writes
them again with its own, so a killed run continues correctly.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.ndimage import laplace
from torch import Tensor, nn

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, PluginFrom, Strict
from posttrain.data.dataset import Clips, to_float
from posttrain.data.schema import ClipRow
from posttrain.evaluation.benchmarks.base import ClipScore, Metric, Pair, Tracker, mean
from posttrain.evaluation.evaluate import EvalConfig, Watch, watched_split
from posttrain.metrics.masks import segment
from posttrain.models.base import VideoModel
from posttrain.rewards.base import Reward

LOOKS, BEST = "tripwires.jsonl", "best"  # in the run's folder
QUANTITIES = (  # beside the benchmark's metrics; a reward has the title of its name
    Metric("reward", "reward", better="more"),
    Metric("g_error", "error of g", "m/s²"),
    Metric("drift", "drift", "m/s"),
    Metric("jump", "jump", "m"),
    Metric("growth", "growth", "1/s"),
    Metric("motion", "motion, of the truth's", better="one"),
    Metric("sharpness", "sharpness, of the truth's", better="one"),
    Metric("size", "size, of the truth's", better="one"),
    Metric("colour", "error of colour"),
)
LEAST = 12  # clips; fewer pairs say nothing
CHANCE = 0.05  # of runs in which nothing but the reward changes, a wire is tripped in so many
EXACT = 16  # clips up to which all choices of signs are tried; of more as many are drawn
Values = dict[str, list[float | None]]  # by quantity, clip by clip


@dataclass(frozen=True)
class Look:
    """The measurements at one step: the wires tripped so far, all values, and the digests of the files in best/.

    `version`: that of the measuring code.
    """

    step: int
    tripped: list[str]
    values: Values
    best: dict[str, str]  # their digests, see files.sums
    version: str = ""


class TripwiresConfig(Strict):
    """`tripwires:` in a recipe, beside `eval` with its `every`."""

    watch: tuple[Annotated[Plugin, PluginFrom("rewards")], ...] = ()  # rewards that are not trained
    split: str | None = None  # of eval.clips; None: `validation` where it has one, else the last of eval.splits
    clips: int = Field(16, ge=LEAST)  # the first so many
    tolerance: float = Field(0.05, ge=0)  # share of the first look's mean; of a ratio, its logarithm
    # roll_back: training ends where a wire is tripped, and the best look's weights are what it leaves
    on_trip: Literal["warn", "roll_back"] = "warn"


def chooses_by_the_test(wires: TripwiresConfig, measured: EvalConfig) -> bool:
    """Whether the clips that choose the weights are also clips of the evaluation."""
    return wires.on_trip == "roll_back" and (wires.split or watched_split(measured)) in measured.splits


def watching(
    run: Path,
    config: TripwiresConfig,
    trained: Mapping[str, tuple[float, Reward]],
    model: VideoModel,
    tracker: Tracker,
    metrics: Sequence[Metric],
    looks: int,
    version: str = "",
) -> Watch:
    """A function for `evaluate.validation(look=...)` that returns the means for the log; one process calls it.

    Create it before training: the model's present weights are the start for `distance`; they are kept in main memory.

    Args:
        trained: weight and function of each reward that is trained.
        metrics: of the benchmark that scores.
        looks: number of looks of the whole run after the first.
        version: of the measuring code. Earlier looks of another version are kept, but not compared with.

    Raises:
        UserError: a reward of `watch` is trained, or does not exist. When called: there are too few clips.
    """
    if both := [part.name for part in config.watch if part.name in trained]:
        raise UserError(
            f"tripwires.watch: {both[0]} is trained, so it is measured anyway; leave it out",
            "conflict",
            "tripwires.watch",
        )
    watched = {part.name: part.module.load(part.config, model.device) for part in config.watch}
    summands = {name: reward for name, (_, reward) in trained.items()}
    weights = {name: weight for name, (weight, _) in trained.items()}
    start = [p.detach().to("cpu", copy=True) for p in trainable(model)]

    known = {metric.key: metric for metric in (*metrics, *QUANTITIES)}

    def measure(clips: Clips, index: int, video_FHWC: np.ndarray, score: ClipScore) -> dict[str, float | None]:
        batch, video_BCFHW = clips.load([index]).to(model.device), to_float(video_FHWC)[None].to(model.device)
        with torch.no_grad():
            found = {name: float(reward(video_BCFHW, batch)) for name, reward in (summands | watched).items()}
        reward = sum(weights[name] * found[name] for name in weights)
        shown = found if len(trained) > 1 else {name: found[name] for name in watched}
        assert batch.instances_BFHW is not None
        assert batch.target_B is not None
        true_BFHW = batch.instances_BFHW == batch.target_B.view(-1, 1, 1, 1)
        masks_BFHW = segment(tracker, video_BCFHW, true_BFHW[:, 0])
        looks = appearance(video_FHWC, masks_BFHW[0].cpu().numpy(), clips.read(index)[0], true_BFHW[0].cpu().numpy())
        named = {f"reward_{name}": value for name, value in shown.items()}
        scored = {metric.key: score.numbers[metric.key] for metric in metrics if metric.wire}
        numbers = {"reward": reward, **named, **scored, **card(score.physics, clips.row(index)), **looks}
        return {name: None if value is None or math.isnan(value) else value for name, value in numbers.items()}

    def look(
        step: int, clips: Clips, videos_BFHWC: Sequence[np.ndarray], scores: Sequence[ClipScore]
    ) -> dict[str, float]:
        each = [measure(clips, *one) for one in zip(range(len(clips)), videos_BFHWC, scores, strict=True)]
        values: Values = {name: [numbers[name] for numbers in each] for name in each[0]}
        kept = [look for look in read_looks(run) if look.step < step]
        earlier = [look for look in kept if look.version == version]
        if len(earlier) < len(kept) and not earlier:
            said = f"{len(kept)} looks were measured by another version of the code"
            print(f"{run}: tripwires: {said}; this one, of step {step}, is the first to compare with", file=sys.stderr)
        enough(len(clips), looks, len(values) - 1)
        said = f"chance trips one in at most {CHANCE:.0%} of runs like this ({looks} looks at {len(values) - 1} wires)"
        if not earlier:
            print(f"{run}: tripwires over {len(clips)} clips: {said}", file=sys.stderr)
        first = earlier[0].values if earlier else values
        wires = tripped(first, values, config.tolerance, known, looks)
        best = best_look([*earlier, Look(step, wires, values, {}, version)])
        if best.step == step:
            model.save(run / BEST)
        now = Look(step, wires, values, files.sums(run / BEST), version)
        files.write_jsonl(run / LOOKS, [files.seal(asdict(look)) for look in (*kept, now)])
        if wires:
            changes = (change(name, first, values) for name in wires)
            print(
                f"{run}: step {step}: a wire is tripped: {change('reward', first, values)}, but {', '.join(changes)} "
                f"since step {earlier[0].step}; {said}; the weights of step {best.step} are in {run / BEST}",
                file=sys.stderr,
            )
        means = {name: mean(numbers) for name, numbers in values.items()}
        logged = {f"val_{name}": value for name, value in means.items() if value is not None}
        return logged | {"val_distance": distance(start, trainable(model)), "val_tripped": float(len(wires))}

    return look


def read_looks(run: Path) -> list[Look]:
    """Every look of a run.

    Raises:
        UserError: a line of the file is not a look (format), or does not match its digest (damaged).
    """
    path, looks = run / LOOKS, []
    for number, line in enumerate(files.read_jsonl(path) if path.exists() else (), 1):
        if not isinstance(line.get("step"), int) or not line.keys() >= {field.name for field in fields(Look)}:
            raise UserError(
                f"{path}:{number}: is not a look; remove {run} (keep a copy of its adapter/), train again", "format"
            )
        if files.seal(line) != line:
            raise UserError(
                f"{path}:{number}: was changed; remove {run} (keep a copy of its adapter/), train again",
                "damaged",
            )
        looks.append(Look(**{field.name: line[field.name] for field in fields(Look)}))
    return looks


def best(run: Path) -> tuple[int, Path]:
    """The step of a run's best look, and the folder with its weights.

    Raises:
        UserError: as `read_looks`; damaged: the weights do not match their digests.
    """
    looks = read_looks(run)
    if wrong := files.changed(run / BEST, looks[-1].best):
        message = f"{run / BEST / wrong[0]}: is missing or not what was written; delete {run} and train again"
        raise UserError(message, "damaged")
    return best_look(looks).step, run / BEST


def ended(run: Path, config: TripwiresConfig, step: int) -> bool:
    """Whether training ends at `step`: a wire was tripped by then, and the recipe says to roll back."""
    return config.on_trip == "roll_back" and any(look.tripped for look in read_looks(run) if look.step <= step)


def best_look(looks: Sequence[Look]) -> Look:
    """The look with the highest mean reward among those without a tripped wire; the first one of equals.

    Only looks with the code version of the last one are considered.
    """
    alike = [look for look in looks if look.version == looks[-1].version]
    return max((look for look in alike if not look.tripped), key=lambda look: mean(look.values["reward"]) or -math.inf)


def enough(clips: int, looks: int, wires: int) -> None:
    """Refuse a number of clips with which no wire could trip.

    Raises:
        UserError: mismatch.
    """
    needed = max(LEAST, math.ceil(math.log2(looks * wires / CHANCE)))
    if clips < needed <= EXACT:
        raise UserError(
            f"tripwires.clips: {looks} looks at {wires} wires need {needed} clips, and there are {clips}; film more, "
            "raise tripwires.clips, or look less often (eval.every)",
            "mismatch",
            "tripwires.clips",
        )
    if needed > EXACT:
        raise UserError(
            f"eval.every: {looks} looks at {wires} wires are too many to tell changes from chance; raise eval.every",
            "mismatch",
            "eval.every",
        )


def chance(gains: Sequence[float]) -> float:
    """p of the one-sided sign-flip test: the share of choices of signs with which the mean is as large as theirs."""
    signs, gain = _signs(len(gains)), np.array(gains, dtype=float)
    least = gain.sum() - 1e-9 * np.abs(gain).sum()  # sums in another order are rounded otherwise
    return float((signs @ gain >= least).mean())


@cache
def _signs(count: int) -> np.ndarray:
    """Choices of `count` signs, one a row, the first one all +1: every one of them, or 2^EXACT."""
    if count <= EXACT:
        return 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    drawn = np.random.default_rng(0).integers(0, 2, (2**EXACT, count))
    drawn[0] = 0
    return 1.0 - 2 * drawn


def tripped(first: Values, now: Values, tolerance: float, known: Mapping[str, Metric], looks: int) -> list[str]:
    """The tripped wires (see the module's docstring). For quantities not in `known` (rewards), more is better."""
    wires = [name for name in now if name != "reward"]

    def moved(name: str, sign: int, least: float, level: float) -> bool:
        pairs = [(a, b) for a, b in zip(first[name], now[name], strict=True) if a is not None and b is not None]
        if len(pairs) < LEAST:
            return False
        better = known[name].better if name in known else "more"
        scale = 1.0 if better == "one" else abs(float(np.mean([a for a, _ in pairs])))
        gains = [sign * (goodness(better, b) - goodness(better, a)) for a, b in pairs]
        return float(np.mean(gains)) > least * scale and chance(gains) <= level

    if not moved("reward", 1, 0.0, CHANCE):
        return []
    return [name for name in wires if moved(name, -1, tolerance, CHANCE / (looks * len(wires)))]


def goodness(better: str, value: float) -> float:
    """The quantity transformed so that more is better; see `Metric.better`."""
    if better == "one":
        return -abs(math.log(max(value, 1e-3)))
    if better == "zero":
        return -abs(value)
    return -value if better == "less" else value


def change(name: str, first: Values, now: Values) -> str:
    """The means of two looks as text, such as "iou 0.412 -> 0.301"."""
    return f"{name} {mean(first[name]):.3g} -> {mean(now[name]):.3g}"


def card(physics: Mapping[str, Pair | None], row: ClipRow) -> dict[str, float | None]:
    """g_error, drift, jump and growth of a clip (see the module's docstring); None if the scorecard lacks it."""
    g, gravity = physics.get("g"), row.gravity
    found = {"g_error": abs(g[0] - math.hypot(*gravity)) if g and gravity else None}
    for name, quantity in (("drift", "drift"), ("jump", "jump"), ("growth", "size")):
        measure = physics.get(quantity)
        found[name] = abs(measure[0]) if measure else None
    return found


def appearance(
    video_FHWC: np.ndarray, masks_FHW: np.ndarray, true_FHWC: np.ndarray, true_masks_FHW: np.ndarray
) -> dict[str, float | None]:
    """motion, sharpness, size and colour of one clip (see the module's docstring); None if undefined for the true clip.

    Args:
        video_FHWC, true_FHWC: uint8.
        masks_FHW, true_masks_FHW: bool, of the object.
    """
    shown, true = (video.astype(np.float64) / 255 for video in (video_FHWC, true_FHWC))

    def moved(x_FHWC: np.ndarray) -> float:
        return float(np.abs(np.diff(x_FHWC, axis=0)).mean())

    def edges(x_FHWC: np.ndarray) -> float:
        return float(laplace(x_FHWC[1:].mean(3), axes=(1, 2)).var((1, 2)).mean())

    def ratio(measured: Callable[[np.ndarray], float]) -> float | None:
        return measured(shown) / measured(true) if measured(true) > 0 else None

    found: dict[str, float | None] = {"motion": ratio(moved), "sharpness": ratio(edges), "size": None, "colour": None}
    areas = masks_FHW.sum((1, 2)), true_masks_FHW.sum((1, 2))
    both = (areas[0] > 0) & (areas[1] > 0) & (np.arange(len(shown)) > 0)  # frame 0 is given
    if both.any():
        colour, true_colour = (
            np.einsum("fhwc,fhw->fc", x[both], masks[both]) / area[both, None]
            for x, masks, area in zip((shown, true), (masks_FHW, true_masks_FHW), areas, strict=True)
        )
        found["size"] = float(np.exp(np.log(areas[0][both] / areas[1][both]).mean()))
        found["colour"] = float(np.sqrt(((colour - true_colour) ** 2).mean()))
    return found


def trainable(model: VideoModel) -> list[nn.Parameter]:
    return [p for p in model.transformer.parameters() if p.requires_grad]


def distance(start: Sequence[Tensor], now: Sequence[Tensor]) -> float:
    """|theta - theta_0| / |theta_0|."""
    moved = sum(float((p.detach().cpu().double() - q.double()).square().sum()) for p, q in zip(now, start, strict=True))
    return math.sqrt(moved / sum(float(q.double().square().sum()) for q in start))
