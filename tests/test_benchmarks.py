"""What every benchmark keeps: metrics declared, measured and shown. And one that is added in a folder of its own."""

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.falling import SIZE, Oracle, RedTracker, film, rows_of, write_dataset
from rich.console import Console

from posttrain.core.errors import UserError
from posttrain.core.recipe import Plugin, PluginFrom, plugins, resolve
from posttrain.evaluation import benchmarks
from posttrain.evaluation.benchmarks.base import Benchmark, Metric, mean
from posttrain.evaluation.evaluate import EvalConfig, evaluate, validation
from posttrain.evaluation.records import Record, print_table, read_records
from posttrain.reporting.report import report
from posttrain.training.tripwires import goodness

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
FRAMES, CLIPS = 17, 4


def oracle(shift: int, value: float) -> Oracle:
    """A model whose squares fall `shift` frames late and in other colours than the truth's."""
    videos = {}
    for clip in range(CLIPS):
        start = 2 + 2 * clip
        tops = [start] * shift + list(rows_of(start, FRAMES - shift))
        videos[f"square 0{clip} falls."] = film(tops, 4 + 5 * clip, 200 + 10 * clip - 20 * shift)[0]
    model = Oracle(videos)
    torch.nn.init.constant_(model.transformer.weight, value)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falling")
    write_dataset(folder, ["test_unseen"], clips=CLIPS, frames=FRAMES)
    return folder


@pytest.fixture
def added(tmp_path: Path) -> Iterator[str]:
    """The benchmark of CONTRIBUTING.md, in a folder of its own that the resolver knows."""
    section = CONTRIBUTING.read_text().split("## A new benchmark")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "grey.py").write_text(code)
    benchmarks.__path__.append(str(tmp_path / "plugins"))
    yield "grey"
    benchmarks.__path__.remove(str(tmp_path / "plugins"))


def measured(run: Path, data: Path, name: str) -> tuple[Benchmark, EvalConfig, list[Record]]:
    config = EvalConfig(
        benchmark={"name": name}, clips=str(data), splits=("test_unseen",), seeds=2, every=1, sampler={"steps": 2}
    )
    models = {"base": lambda: nullcontext(oracle(9, 1.0)), "psft": lambda: nullcontext(oracle(2, 2.0))}
    evaluate(run, config, models, RedTracker())
    return config.benchmark.module.BENCHMARK, config, read_records(run)


def means(records: list[Record], metric: Metric) -> list[float | None]:
    return [mean([clip.numbers[metric.key] for clip in record.clips]) for record in records]


def keeps_the_protocol(run: Path, data: Path, name: str) -> list[Record]:
    """Declared, measured, the truth best, shown."""
    benchmark, config, records = measured(run, data, name)
    keys = [metric.key for metric in benchmark.metrics]
    assert keys
    assert len(set(keys)) == len(keys)
    assert [record.row for record in records] == [*(row.name for row in benchmark.rows), "psft"]
    assert {record.benchmark for record in records} == {name}
    for record in records:
        for clip in record.clips:
            assert list(clip.numbers) == keys
            assert set(clip.released) <= set(keys)
            assert set(clip.physics) <= {quantity.key for quantity in benchmark.scorecard}
            assert not [value for value in clip.numbers.values() if value is not None and math.isnan(value)]
    for metric in benchmark.metrics:
        assert metric.better != "truth", f"{metric.key}: is it better the less or the more?"
        truth, *others = (None if each is None else goodness(metric.better, each) for each in means(records, metric))
        assert truth is None or all(other is None or other <= truth for other in others), metric.key

    console = Console(width=80, file=io.StringIO())
    print_table(records, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(metric.title in printed for metric in benchmark.metrics)
    assert "…" not in printed
    as_json, as_html = report(run)
    rows = json.loads(as_json.read_text())["rows"]
    assert all(set(keys) <= row.keys() for row in rows)
    table = as_html.read_text().partition('<section id="table">')[2].partition("</section>")[0]
    # the share that was compared has a column only where videos are shorter than the true clips
    assert all(f">{metric.title}<small>" in table for metric in benchmark.metrics if metric.key != "span")
    assert all(f"</span>{record.row}</td>" in table for record in records)
    assert benchmark.heading in table
    logged, _ = validation(run, config, oracle(2, 2.0), RedTracker(), clips=2)(1)
    assert set(logged) <= {f"val_{metric.key}" for metric in benchmark.headlines}
    assert logged
    return records


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins("evaluation.benchmarks"))
def test_a_benchmark_keeps_the_protocol(tmp_path: Path, data: Path, name: str) -> None:
    keeps_the_protocol(tmp_path / "run", data, name)


@pytest.mark.slow
def test_the_benchmark_of_the_handbook_is_found_and_measured(tmp_path: Path, data: Path, added: str) -> None:
    """Against values by hand: a square of 6 x 6 of 32 x 32 pixels is 40 darker in a channel, but for frame 0."""
    assert added in plugins("evaluation.benchmarks")
    records = {record.row: record for record in keeps_the_protocol(tmp_path / "run", data, added)}
    assert records["truth"].clips[0].numbers["grey"] == pytest.approx(0, abs=1e-6)
    darker = 36 * 40 / SIZE**2 / 3 / 255 * (FRAMES - 1) / FRAMES
    assert records["psft"].clips[0].numbers["grey"] == pytest.approx(darker, rel=1e-3)
    assert records["psft"].clips[0].paths == []


@pytest.mark.parametrize("name", ["pisabench", "distribution", "gray"])
def test_helpers_are_no_benchmarks(name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve("evaluation.benchmarks", name)
    assert error.value.code == "unknown_name"


def test_a_recipe_chooses_the_benchmark() -> None:
    part: Plugin = PluginFrom("evaluation.benchmarks").parse({"name": "pisa", "falls": {"clips": "a", "seeds": 2}})
    config = EvalConfig(clips="drops", benchmark={"name": "pisa", "falls": {"clips": "a", "seeds": 2}})
    assert config.benchmark == part
    assert EvalConfig(**config.model_dump()) == config
    assert EvalConfig(clips="drops").benchmark.name == "pisa"
