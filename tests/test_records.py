"""Means, intervals and differences of records, against values worked out otherwise."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from posttrain.core.errors import UserError
from posttrain.evaluation.benchmarks import pisa
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import (
    Record,
    comparable,
    difference,
    interval,
    print_table,
    summary,
    unequal,
)


def test_interval_is_the_95_percent_interval_of_the_mean() -> None:
    random = np.random.default_rng(0)
    values = random.normal(3, 2, 400)
    found = interval([*values, None])
    assert found["n"] == 400
    assert found["mean"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(400)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval([*values, None]) == found
    assert interval([1.5]) == {"mean": 1.5, "low": 1.5, "high": 1.5, "n": 1}
    assert interval([None]) == {"mean": None, "low": None, "high": None, "n": 0}


def scored(row: str, count: int = 30, landing: int = 6, span: float = 1.0, split: str = "unseen") -> Record:
    """A row of `count` clips, of which `landing` land."""
    numbers: dict[str, float | None] = {"l2": 0.316, "chamfer": 0.9, "iou": 0.083, "vanished": 0.01, "span": span}
    clips = [
        ClipScore(
            numbers
            | {"time_error": 1.195, "time_offset": -16.4, "no_contact": 0.0}
            | ({} if i < landing else {"time_error": None, "time_offset": None, "no_contact": 1.0}),
            str(i),
            released={"l2": 0.2, "span": span},
        )
        for i in range(count)
    ]
    return Record(row, row, split, f"test_{split}", "", [8, 8], 1, count, clips=tuple(clips))


def printed(records: list[Record], width: int = 80, released: bool = False) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    print_table(records, console, released)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_printed_table_fits_and_leaves_nothing_out(width: int) -> None:
    """Also with long names: every metric, the whole interval, of how many clips, the share that never lands."""
    long = "stepfun-video-t2v-30b-with-a-very-long-suffix-for-the-settings"
    lines = printed([scored("base"), scored(long), scored("[b]x[/b]", split="seen")], width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for metric in pisa.METRICS:
        assert metric.title in text, metric.title
    assert text.count("0.316 [0.316, 0.316]") == 3
    assert text.count("1.195 s (of 6)") == 3
    assert text.count("-16 ms (of 6)") == 3
    assert text.count(" 0.80") == 3  # 24 of 30 never land
    assert "[b]x[/b]" in text
    assert long in "".join(line.split("  ")[0].rstrip() for line in lines)


def test_rows_of_other_spans_or_clips_are_not_compared_in_silence() -> None:
    assert not [line for line in printed([scored("a"), scored("b")], 200) if ":" in line]
    lines = printed([scored("a", span=0.15), scored("b", count=20)], 200)
    assert [line for line in lines if ":" in line] == unequal([scored("a", span=0.15), scored("b", count=20)])
    shown, counted = unequal([scored("a", span=0.15), scored("b", count=20)])
    assert "a 0.15, b 1.00" in shown
    assert "a 30, b 20" in counted
    assert unequal([scored("a", span=0.5), scored("b", span=0.5)])  # the same, and short
    origins = [replace(scored("psft", span=span), origin=name) for name, span in (("a", 1.0), ("b", 0.5))]
    assert comparable([origins[0], replace(origins[0], origin="b")], ["a", "b"])
    with pytest.raises(UserError) as error:
        comparable(origins, ["a", "b"])
    assert error.value.code == "mismatch"


def test_an_older_record_without_a_metric_is_shown() -> None:
    old = scored("old")
    old = replace(old, clips=tuple(replace(clip, numbers={"l2": 0.5}) for clip in old.clips))
    assert summary(old)["span"]["mean"] is None
    assert any("old" in line and "0.500" in line for line in printed([old]))
    assert difference(scored("new"), old)["span"]["n"] == 0


def test_difference_is_paired() -> None:
    """Clips differ far more than the models do: only pairs show that one is better by 0.1 everywhere."""

    def record(name: str, offset: float, ids: range) -> Record:
        clips = [ClipScore({metric.key: i + offset for metric in pisa.METRICS}, str(i)) for i in ids]
        clips[0] = replace(clips[0], numbers={**clips[0].numbers, "time_error": None})
        return Record(name, name, "unseen", "test_unseen", "", [8, 8], 1, len(clips), clips=tuple(clips))

    found = difference(record("psft", -0.1, range(1, 20)), record("base", 0.0, range(0, 18)))
    assert (found["model"], found["against"], found["split"]) == ("psft", "base", "unseen")
    assert found["l2"]["n"] == 17
    assert found["time_error"]["n"] == 16
    assert [found["l2"][key] for key in ("mean", "low", "high")] == pytest.approx([-0.1] * 3)
