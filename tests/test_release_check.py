"""`make release-check` on made-up reports: what agrees, what is off, and what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.project import ROOT
from release_check import COLUMNS, ROWS, compare, main, written

README = """
| unseen clips | L2 error | IoU | fitted g (truth 9.80 m/s²) |
|---|---|---|---|
| base model: objects hover | 0.293 | 0.082 | 0.03 |
| `make psft`: fine-tuning on true clips | 0.074 | 0.409 | 9.86 |
| then `make oro`: reward gradients | 0.058 | 0.480 | 10.7 |
| or `make gdpo`: preferences | 0.085 | 0.310 | 16.0 |
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

## `make oro`

| model | L2 | IoU | g, m/s² |
|---|---|---|---|
| PSFT | 0.079 [0.067, 0.092] | 0.388 | 9.84 |
| ORO, reward `object` | 0.058 [0.047, 0.069] | 0.480 | 10.7 [10.3, 11.5] |

## `make gdpo`

| model | L2 | IoU | g, m/s² |
|---|---|---|---|
| PhyGDPO | 0.085 [0.074, 0.098] | 0.310 | 16.0 [12.4, 18.2] |
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
    assert [(line.method, line.quantity) for line in lines] == [(m, q) for m in ROWS for q in COLUMNS]
    assert wrong(runs) == []


@pytest.mark.parametrize(
    ("method", "quantity", "values"),
    [
        ("psft", "l2", (0.0900, 0.44, 9.2)),
        ("psft", "g", (0.07, 0.44, 16.0)),
        ("oro", "iou", (0.06, 0.44, 10.5)),  # no interval in docs/results.md: by the measured one
        ("gdpo", "l2", (0.05, 0.32, 18.0)),
    ],
)
def test_what_lies_outside_is_told(runs: Path, method: str, quantity: str, values: tuple[float, float, float]) -> None:
    (runs / f"pocket-{method}" / "report.json").write_text(json.dumps(report(method, *values)))
    assert wrong(runs) == [(method, quantity)]


def test_the_pages_must_agree_with_each_other(runs: Path) -> None:
    assert wrong(runs, readme=README.replace("0.480", "0.490")) == [("oro", "iou")]
    assert wrong(runs, results=RESULTS.replace("| PhyGDPO |", "| other |")) == [("gdpo", q) for q in COLUMNS]


def test_a_run_that_is_missing_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "pocket-oro" / "report.json").unlink()
    assert wrong(runs) == [("oro", quantity) for quantity in COLUMNS]
    assert main([str(runs / "nowhere")]) == 1
    assert "make psft" in capsys.readouterr().out


def test_the_projects_own_pages_are_read() -> None:
    """Every number of the three rows is found in both, and is the same there."""
    pages = written((ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text())
    for method, (front, page) in pages.items():
        assert set(front) == set(page) == set(COLUMNS), method
        assert {q: n.text for q, n in front.items()} == {q: n.text for q, n in page.items()}, method
