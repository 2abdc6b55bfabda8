"""Progress of a long job, as a live bar in a terminal or as lines elsewhere; and Markdown tables."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
EVERY = 15.0  # seconds between lines


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with a note after each piece of work; `done` of the `total` pieces are done already."""
    if sys.stderr.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        # redrawn only by `advance`: a drawing thread would slow the training down
        with Progress(TextColumn(title), *columns, TextColumn("{task.fields[note]}"), auto_refresh=False) as live:
            task = live.add_task(title, total=total, completed=done, note="")

            def redraw(note: str = "") -> None:
                live.update(task, advance=1, note=note, refresh=True)

            yield redraw
        return
    start = printed = time.monotonic()
    first = done

    def advance(note: str = "") -> None:
        nonlocal done, printed
        done += 1
        now = time.monotonic()
        if now - printed >= EVERY or done == total:
            printed = now
            left = timedelta(seconds=round((now - start) / (done - first) * (total - done)))
            print(f"{title} {done}/{total}, left {left} {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The items one by one, with progress."""
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance("")


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: a heading line of `columns`, then `lines` of cells."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *lines))
