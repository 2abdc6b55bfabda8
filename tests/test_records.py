"""Means, intervals and differences of records, against values worked out otherwise."""

import math
from dataclasses import replace

import numpy as np
import pytest

from posttrain.evaluation.benchmarks import pisa
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.records import Record, difference, interval


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
