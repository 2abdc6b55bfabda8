"""Compares the README's table and what `make psft`, `make oro` and `make gdpo` gave here with docs/results.md.

    python tests/release_check.py [RUNS]

Each number of the README's table must be that of docs/results.md for 100 new scenes. What was measured here
(RUNS/pocket-*/report.json, 30 unseen clips) must lie in the 95% intervals that docs/results.md gives for those clips.
Prints a table; exit code 1 if a number is off or a run is missing.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.core.errors import UserError
from posttrain.core.files import read_json

ROOT = Path(__file__).parents[1]
FRESH = "100 new scenes"  # the section of docs/results.md whose table the README shows
ROWS = {"psft": r"^PSFT$", "oro": r"\bORO\b", "gdpo": r"^PhyGDPO"}  # method -> its row in docs/results.md
COLUMNS = {"l2": r"^L2\b", "iou": r"^IoU\b", "g": r"\bg\b"}  # quantity -> what its heading says
CELL = re.compile(r"(-?[\d.]+)( \[(-?[\d.]+), (-?[\d.]+)\])?")


class Number(NamedTuple):
    """A value and its 95% interval as they are written, and the interval's ends."""

    text: str
    interval: str = ""
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """A number of docs/results.md beside the README's or the measured one; `wrong` is empty where they agree."""

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


def section(results: str, heading: str) -> list[list[str]]:
    """The first table of a section of docs/results.md."""
    return first_table(results.partition(f"## {heading}\n")[2].partition("\n## ")[0])


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
    """A line for each number of the README's table, and one for each number that the runs measured."""
    front, fresh = first_table(readme), section(results, FRESH)
    lines = []
    for method, begins in ROWS.items():
        shown, known = numbers(front, f"`make {method}`"), numbers(fresh, begins)
        for quantity in sorted(shown.keys() | {"l2", "iou"}):
            texts = [x.text + x.interval if x else "-" for x in (shown.get(quantity), known.get(quantity))]
            lines.append(Line(method, quantity, *texts, "", "" if texts[0] == texts[1] != "-" else "they differ"))
    for method, begins in ROWS.items():
        path = runs / f"pocket-{method}" / "report.json"
        here = measured(read_json(path), method) if path.is_file() else {}
        for quantity, known in numbers(section(results, f"`make {method}`"), begins).items():
            value, wrong = here.get(quantity), ""
            if value is None:
                wrong = "not measured" if path.is_file() else f"{path} is missing: `make {method}` first"
            elif known.low is None or known.high is None:
                wrong = "has no interval in docs/results.md"
            elif not known.low <= round(value[0], len(known.text.partition(".")[2])) <= known.high:
                wrong = "outside the interval of docs/results.md"
            shown = "{:.3f} [{:.3f}, {:.3f}]".format(*value) if value else "-"
            lines.append(Line(method, quantity, "", known.text + known.interval, shown, wrong))
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
        cells = f"{line.method:<5} {line.quantity:<3} {line.readme:<22} {line.results:<22} {line.measured:<22}"
        print(f"{cells} {line.wrong or ('' if line is heading else 'ok')}".rstrip())
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
