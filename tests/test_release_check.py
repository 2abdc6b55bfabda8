"""`make release-check` on made-up reports: what agrees, what is off, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.project import ROOT
from release_check import COLUMNS, FRESH, ROWS, compare, first_table, main, numbers, section

README = """
| 100 new scenes | L2 error [95%] | IoU |
|---|---|---|
| base model: objects hover | 0.291 [0.281, 0.301] | 0.083 |
| `make psft`: fine-tuning on true clips | 0.083 [0.071, 0.097] | 0.374 |
| then `make oro`: reward gradients | 0.063 [0.057, 0.070] | 0.429 |
| or `make gdpo`: preferences | 0.089 [0.078, 0.102] | 0.307 |
"""
RESULTS = """
## `make psft`

| model | L2 | Chamfer | IoU | g, m/s² |
|---|---|---|---|---|
| base | 0.293 [0.281, 0.305] | 0.442 | 0.082 [0.079, 0.084] | 0.03 [0.01, 0.06] |
| PSFT | 0.074 [0.061, 0.089] | 0.067 | 0.409 [0.369, 0.450] | 9.86 [9.17, 10.21] |

| model | L2 | IoU |
|---|---|---|
| PSFT | 0.5 [0.4, 0.6] | 0.1 |

## 100 new scenes

| model | L2 | Chamfer | IoU |
|---|---|---|---|
| PSFT | 0.083 [0.071, 0.097] | 0.083 | 0.374 |
| PSFT, then ORO | 0.063 [0.057, 0.070] | 0.045 | 0.429 |
| PhyGDPO | 0.089 [0.078, 0.102] | 0.089 | 0.307 |

## `make oro`

| model | L2 | IoU | g, m/s² |
|---|---|---|---|
| PSFT | 0.079 [0.067, 0.092] | 0.388 | 9.84 |
| ORO, reward `object` | 0.058 [0.047, 0.069] | 0.480 [0.430, 0.530] | 10.7 [10.3, 11.5] |

## `make gdpo`

| model | L2 | IoU | g, m/s² |
|---|---|---|---|
| PhyGDPO | 0.085 [0.074, 0.098] | 0.310 [0.270, 0.350] | 16.0 [12.4, 18.2] |
"""
MEASURED = {"psft": (0.0612, 0.44, 9.2), "oro": (0.0694, 0.47, 10.3), "gdpo": (0.08, 0.32, 18.0)}


def report(method: str, l2: float, iou: float, g: float) -> dict[str, Any]:
    spread = {"low": -0.02, "high": 0.02}
    rows = [
        {
            "model": model,
            "split": split,
            "l2": {"mean": l2 + off, "low": l2 + off - 0.01, "high": l2 + off + 0.01},
            "iou": {"mean": iou, **{end: iou + by for end, by in spread.items()}},
            "physics": {"g": {"median": g, "low": g - 1, "high": g + 1}},
        }
        for model, split, off in (("base", "unseen", 0.2), (method, "seen", 0.3), (method, "unseen", 0.0))
    ]
    return {"rows": rows}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method, values in MEASURED.items():
        (tmp_path / f"pocket-{method}").mkdir()
        (tmp_path / f"pocket-{method}" / "report.json").write_text(json.dumps(report(method, *values)))
    return tmp_path


def wrong(runs: Path, readme: str = README, results: str = RESULTS) -> list[tuple[str, str]]:
    return [(line.method, line.quantity) for line in compare(readme, results, runs) if line.wrong]


def test_what_lies_within_the_intervals_agrees(runs: Path) -> None:
    """Also at an interval's end, as it is rounded there."""
    lines = compare(README, RESULTS, runs)
    shown = [(method, quantity) for method in ROWS for quantity in ("iou", "l2")]
    assert [(line.method, line.quantity) for line in lines] == shown + [(m, q) for m in ROWS for q in COLUMNS]
    assert wrong(runs) == []


@pytest.mark.parametrize(
    ("method", "quantity", "values"),
    [
        ("psft", "l2", (0.0900, 0.44, 9.2)),
        ("psft", "g", (0.07, 0.44, 16.0)),
        ("oro", "iou", (0.06, 0.42, 10.5)),
        ("gdpo", "l2", (0.05, 0.32, 18.0)),
    ],
)
def test_what_lies_outside_is_told(runs: Path, method: str, quantity: str, values: tuple[float, float, float]) -> None:
    (runs / f"pocket-{method}" / "report.json").write_text(json.dumps(report(method, *values)))
    assert wrong(runs) == [(method, quantity)]


def test_the_pages_must_agree_with_each_other(runs: Path) -> None:
    assert wrong(runs, readme=README.replace("0.429", "0.430")) == [("oro", "iou")]
    assert wrong(runs, readme=README.replace("0.063 [0.057", "0.063 [0.056")) == [("oro", "l2")]
    assert wrong(runs, results=RESULTS.replace("| PhyGDPO | 0.089", "| other | 0.089")) == [
        ("gdpo", "iou"),
        ("gdpo", "l2"),
    ]
    assert wrong(runs, results=RESULTS.replace(" [0.430, 0.530]", "")) == [("oro", "iou")]


def test_a_run_that_is_missing_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "pocket-oro" / "report.json").unlink()
    assert wrong(runs) == [("oro", quantity) for quantity in COLUMNS]
    assert main([str(runs / "nowhere")]) == 1
    assert "make psft" in capsys.readouterr().out


def test_the_projects_own_pages_are_read() -> None:
    """The README shows the table of new scenes; each method's own table has an interval for every number."""
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
    for method, begins in ROWS.items():
        front, fresh = numbers(first_table(readme), f"`make {method}`"), numbers(section(results, FRESH), begins)
        assert set(front) == {"l2", "iou"}, method
        assert front == {name: fresh[name] for name in front}, method
        known = numbers(section(results, f"`make {method}`"), begins)
        assert set(known) == set(COLUMNS), method
        assert all(number.interval for number in known.values()), method
