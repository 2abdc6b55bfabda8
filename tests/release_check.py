"""Compares what `make psft`, `make oro` and `make gdpo` gave here with the README's table: `make release-check`.

    python tests/release_check.py [RUNS]

Each number of the README must be that of docs/results.md, and what was measured (RUNS/pocket-*/report.json, unseen
clips) must lie in the 95% interval that docs/results.md gives. Where it gives none, the README's number must lie in the
interval that was measured. Prints a table; exit code 1 if a number is off or a run is missing.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.core.errors import UserError
from posttrain.core.files import read_json

ROOT = Path(__file__).parents[1]
ROWS = {"psft": "PSFT", "oro": "ORO", "gdpo": "PhyGDPO"}  # method -> how its row begins in docs/results.md
COLUMNS = {"l2": r"^L2\b", "iou": r"^IoU\b", "g": r"\bg\b"}  # quantity -> what its heading says
CELL = re.compile(r"(-?[\d.]+)( \[(-?[\d.]+), (-?[\d.]+)\])?")


class Number(NamedTuple):
    """A value and its 95% interval as they are written, and the interval's ends."""

    text: str
    interval: str = ""
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """A number of the README beside what was measured; `wrong` says why they do not agree, or is empty."""

    method: str
    quantity: str
    readme: str
    results: str
    measured: str
    wrong: str


def first_table(text: str) -> list[list[str]]:
    """The cells of the first Markdown table that has a column for L2; its first row is the heading."""
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = next((table.splitlines() for table in tables if "L2" in table.splitlines()[0]), [])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not set(row) <= set("|- :")]


def numbers(table: Sequence[Sequence[str]], begins: str) -> dict[str, Number]:
    """By quantity, the numbers of the row in whose first cell `begins` is found."""
    heading, *rows = table or [[]]
    row = next((row for row in rows if re.search(begins, row[0])), [])
    found = {}
    for quantity, pattern in COLUMNS.items():
        for name, cell in list(zip(heading, row, strict=False))[1:]:
            if re.search(pattern, name) and (match := CELL.match(cell.replace("−", "-"))):
                text, interval, low, high = match.groups()
                found[quantity] = Number(text, interval, float(low), float(high)) if interval else Number(text)
    return found


def written(readme: str, results: str) -> dict[str, tuple[dict[str, Number], dict[str, Number]]]:
    """By method, the numbers of the README and of docs/results.md."""
    both = {}
    for method, begins in ROWS.items():
        section = results.partition(f"## `make {method}`\n")[2].partition("\n## ")[0]
        both[method] = (
            numbers(first_table(readme), f"`make {method}`"),
            numbers(first_table(section), f"^{begins}\\b"),
        )
    return both


def measured(report: dict[str, Any], method: str) -> dict[str, tuple[float, float, float]]:
    """By quantity, the value and its interval in the run's row of unseen clips."""
    row = next((row for row in report["rows"] if (row["model"], row["split"]) == (method, "unseen")), None)
    if row is None:
        return {}
    parts = {"l2": row["l2"], "iou": row["iou"], "g": row.get("physics", {}).get("g", {})}
    ends = ("low", "high")
    triples = {name: (x.get("mean", x.get("median")), *map(x.get, ends)) for name, x in parts.items()}
    return {name: triple for name, triple in triples.items() if None not in triple}


def compare(readme: str, results: str, runs: Path) -> list[Line]:
    """A line for each number of the README's rows."""
    lines = []
    for method, (front, page) in written(readme, results).items():
        path = runs / f"pocket-{method}" / "report.json"
        here = measured(read_json(path), method) if path.is_file() else {}
        for quantity in COLUMNS:
            shown, known, value = front.get(quantity), page.get(quantity), here.get(quantity)
            wrong = ""
            if shown is None or known is None:
                wrong = f"is not in {'the README' if shown is None else 'docs/results.md'}"
            elif shown.text != known.text:
                wrong = "README and docs/results.md differ"
            elif value is None:
                wrong = "not measured" if path.is_file() else f"{path} is missing: `make {method}` first"
            elif known.low is not None and known.high is not None:
                digits = len(known.text.partition(".")[2])
                if not known.low <= round(value[0], digits) <= known.high:
                    wrong = "outside the interval of docs/results.md"
            elif not value[1] <= float(shown.text) <= value[2]:
                wrong = "the README's is outside the measured interval"
            lines.append(
                Line(
                    method, quantity, shown.text if shown else "-", known.text + known.interval if known else "-",
                    "{:.3f} [{:.3f}, {:.3f}]".format(*value) if value else "-", wrong,
                )
            )  # fmt: skip
    return lines


def main(arguments: Sequence[str]) -> int:
    runs = Path(arguments[0]) if arguments else ROOT / "runs"
    try:
        lines = compare((ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text(), runs)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    heading = Line("", "", "README", "docs/results.md", "measured", "")
    for line in (heading, *lines):
        cells = f"{line.method:<5} {line.quantity:<3} {line.readme:>7}  {line.results:<22} {line.measured:<22}"
        print(f"{cells} {line.wrong or ('' if line is heading else 'ok')}".rstrip())
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
