"""What a benchmark is, and what it measures on one clip.

    eval: {benchmark: {name: pisa}, ...}

A benchmark is a module of this folder with a `Config` (its keys in the recipe) and `BENCHMARK`, which declares the
metrics of its table and how they are measured. Records, printed tables, reports, charts and tripwires use this
declaration; none of them names a metric. A module without these two names is a helper.

Shape letters: B batch, C channels, F frames, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from posttrain.data.schema import ClipRow
from posttrain.models.base import VideoModel
from posttrain.types import Batch

PROTOCOL = ("Config", "BENCHMARK")
Trace = list[list[float] | None]  # a centre [x, y] in pixels for each frame, None where it is lost
Pair = list[float]  # [value, sigma]


@dataclass(frozen=True)
class Metric:
    """A metric: a number that is measured on each clip.

    Attributes:
        key: its name in files.
        title: its name in tables.
        unit: "s", "m/s²", ...; "" for a pure number.
        better: less; more; zero: the nearer to 0, of a signed number; one: the nearer to 1, of a ratio to the truth;
            truth: the nearer to the truth's own value.
        decimals: how many are shown.
        hint: text below the title in a table; "": the unit or which direction is better.
        headline: text for the head of a report; "": not shown there.
        share: whether it is a share of 1, which a headline shows in percent.
        wire: whether tripwires watch it.
    """

    key: str
    title: str
    unit: str = ""
    better: Literal["less", "more", "zero", "one", "truth"] = "less"
    decimals: int = 3
    hint: str = ""
    headline: str = ""
    share: bool = False
    wire: bool = True


@dataclass(frozen=True)
class Row:
    """A row of the table that is not a trained model.

    Attributes:
        note: its description in the table.
        video: (true_BCFHW in [-1, 1], model) -> the row's video; None: the model samples.
        uses_model: whether `video` uses the model.
        shown: whether the report's players show it.
    """

    name: str
    note: str
    video: Callable[[Tensor, VideoModel], Tensor] | None = None
    uses_model: bool = False
    shown: bool = True


TRUTH = Row("truth", "the tracker's own error", lambda true_BCFHW, model: true_BCFHW)
TRUTH_VAE = Row(
    "truth_vae",
    "the true clip through the model's autoencoder",
    lambda true_BCFHW, model: model.decode(model.encode(true_BCFHW)),
    uses_model=True,
    shown=False,
)
FROZEN = Row(
    "frozen",
    "the first frame repeated",
    lambda true_BCFHW, model: true_BCFHW[:, :, :1].expand_as(true_BCFHW),
    shown=False,
)
BASE = Row("base", "the model that training started from")
ROWS = (TRUTH, TRUTH_VAE, FROZEN, BASE)


@dataclass(frozen=True)
class ClipScore:
    """The measurements of one clip. For several samples: means over those that have a number, and lists of the rest.

    Attributes:
        numbers: the benchmark's metrics by key; None if a metric has no value.
        id, caption: of the clip; `score` does not set them.
        truth: the fields of the clip's row that a test needs, see `TestSet.facts`.
        released: the metrics that the authors' released code computes in another way, computed in that way.
        physics: the scorecard, by quantity.
        true_path: the object's centre in the true clip; `paths`: in each sample.
        impact_frames: of each sample, None if nothing lands.
        lifted: of each sample, see distribution.lifted; None if it was not computed.
        notes: on samples that are not measured completely, or not at the times of their frames; None: no notes.
    """

    numbers: Mapping[str, float | None]
    id: str = ""
    caption: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)
    released: Mapping[str, float | None] = field(default_factory=dict)
    physics: Mapping[str, Pair | None] = field(default_factory=dict)
    true_path: Trace = field(default_factory=list)
    paths: list[Trace] = field(default_factory=list)
    impact_frames: list[int | None] = field(default_factory=list)
    lifted: list[dict[str, Any] | None] | None = None
    notes: list[str] | None = None


class Tracker(Protocol):
    """Follows an object: (video_BCFHW in [-1, 1], mask0_BHW bool) -> logits_BFHW. `module` holds its weights."""

    module: nn.Module

    def __call__(self, video_BCFHW: Tensor, mask0_BHW: Tensor) -> Tensor: ...


class Score(Protocol):
    """Scores one video for each clip of a batch.

    Args:
        videos_BFHWC: uint8; the first frame is the clip's.
        batch: the true clips, in pixels, with instances and target if they are known.
        rows: the rows of the true clips.
        times_F: seconds at which the videos' frames are shown, ascending from 0; the rate need not be constant.
        tracker: follows an object, on the batch's device.
    """

    def __call__(
        self, videos_BFHWC: np.ndarray, batch: Batch, rows: Sequence[ClipRow], times_F: np.ndarray, tracker: Tracker
    ) -> list[ClipScore]: ...


class TestSet(NamedTuple):
    """Clips that are measured: a split of a dataset folder.

    Attributes:
        seeds: samples of each clip.
        rows: the reference rows (no model samples them) that are measured on it; None: all.
        facts: fields of the clips' rows that records keep, in `ClipScore.truth`.
        needed: fields that the clips' rows must have; `world` is the world that writes them.
    """

    folder: str
    split: str
    seeds: int
    rows: tuple[Row, ...] | None = None
    facts: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    world: str = ""


@dataclass(frozen=True)
class Benchmark:
    """The interface of a benchmark.

    Attributes:
        metrics: the table's columns. The first one is drawn and has intervals everywhere.
        score: measures videos.
        heading, note: text above its table in a report.
        scorecard: quantities of `ClipScore.physics`, which a report shows by their medians.
        rows: rows of the table that are not trained models; the first one is the truth.
        sources: other modules that the numbers depend on; if their source changes, records are measured again.
        tests: (config, seeds) -> further test sets besides the recipe's splits, by their name in files.
        split: (split, clip) -> the split under which the table shows a clip; None: it is not shown.
    """

    metrics: tuple[Metric, ...]
    score: Score
    heading: str = "How far from the truth?"
    note: str = ""
    scorecard: tuple[Metric, ...] = ()
    rows: tuple[Row, ...] = ROWS
    sources: tuple[ModuleType, ...] = ()
    tests: Callable[[Any, int], dict[str, TestSet]] = lambda config, seeds: {}
    split: Callable[[str, ClipScore], str | None] = lambda split, clip: split

    @property
    def references(self) -> tuple[Row, ...]:
        """The reference rows, which no model samples. Nothing in them is random, so one seed is enough."""
        return tuple(row for row in self.rows if row.video is not None)

    @property
    def headlines(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in self.metrics if metric.headline)


def merge(scores: Sequence[ClipScore]) -> ClipScore:
    """The scores of several samples of one clip, merged."""
    first = scores[0]
    return replace(
        first,
        numbers={key: mean([score.numbers[key] for score in scores]) for key in first.numbers},
        released={key: mean([score.released[key] for score in scores]) for key in first.released},
        physics={name: pooled([score.physics[name] for score in scores]) for name in first.physics},
        paths=[path for score in scores for path in score.paths],
        impact_frames=[frame for score in scores for frame in score.impact_frames],
        lifted=None if first.lifted is None else [lift for score in scores for lift in score.lifted or ()],
        notes=[note for score in scores for note in score.notes or ()] or None,
    )


def pooled(measures: Sequence[Pair | None]) -> Pair | None:
    """[value, sigma] of the mean of the measures that are not None."""
    present = np.array([measure for measure in measures if measure is not None])
    if not len(present):
        return None
    return [float(present[:, 0].mean()), float(np.sqrt((present[:, 1] ** 2).sum()) / len(present))]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
