"""What a run has done so far and how long its training still takes, read from its folder: `posttrain status RUN`."""

import fcntl
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from posttrain.commands.experiment import TRAINED, load_recipe, run_folder
from posttrain.core import files
from posttrain.evaluation import records
from posttrain.training.tripwires import LOOKS, read_looks

RECENT = 20  # steps whose median time is the time of a step


@dataclass(frozen=True)
class Status:
    """The state of one run.

    Attributes:
        stage: "not started", "training", "trained" (nothing is measured yet), "measuring" or "measured".
        step, steps: training steps done, and those of the recipe.
        left: seconds that the other steps take at the speed of the last ones; None if no step is known or left.
        pid: the process that works in the folder; 0 if it cannot be known which; None if there is none.
        memory: its peak main memory in bytes; None if it is not known.
        values: the last logged loss and the last measured values of validation and tripwires, by name.
        tripped: the wires that the last look tripped.
        measured: a line for each row that is measured, with the number of its clips.
    """

    folder: Path
    stage: str
    step: int
    steps: int
    left: float | None
    pid: int | None
    memory: int | None
    values: dict[str, float]
    tripped: list[str]
    measured: list[str]


def runs(target: Path | str) -> Iterator[Path]:
    """The folder of a run, named as for `load_recipe`; of a sweep or table, the folders of its runs.

    Raises:
        UserError: the run does not exist.
    """
    folder = run_folder(target)
    if not load_recipe(folder).divided:
        yield folder
        return
    for path in sorted({*folder.glob("*/recipe.yaml"), *folder.glob("*/*/recipe.yaml")}):
        yield path.parent


def status(folder: Path) -> Status:
    """The state of the run in `folder`; writes nothing.

    Raises:
        UserError: a file of the run is damaged.
    """
    plan, log = load_recipe(folder), folder / "log.jsonl"
    rows = files.read_log(log) if log.exists() else []
    trained, steps = (folder / TRAINED).exists(), plan.train.steps
    step = steps if trained else max((row["step"] for row in rows), default=0)
    times = [row["seconds"] for row in rows[-RECENT:] if row.get("seconds")]
    left = statistics.median(times) * (steps - step) if times and step < steps else None
    found = [records.read(path) for path in sorted((folder / "evaluation").glob("*.json"))]
    parts = [record for record in found if record]
    whole = bool(parts) and all(len(record.clips) == record.total for record in parts)
    stage = "training" if rows else "not started"
    if trained:
        stage = "measured" if whole else "measuring" if parts else "trained"
    looks = read_looks(folder) if (folder / LOOKS).exists() else []
    values = {name: value for row in rows for name, value in row.items() if _shown(name) and value is not None}
    pid = worker(folder)
    return Status(
        *(folder, stage, step, steps, left, pid, peak_memory(pid) if pid else None, values),
        tripped=looks[-1].tripped if looks else [],
        measured=[f"{part.row} on {part.split} clips, {len(part.clips)} of {part.total}" for part in parts],
    )


def _shown(name: str) -> bool:
    return name == "loss" or (name.startswith("val_") and name != "val_tripped")


def worker(folder: Path) -> int | None:
    """The process that holds the folder's lock (core/files.alone); 0 if it is not known which; None if it is free."""
    lock = folder / ".lock"
    if not lock.exists():
        return None
    with open(lock) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            inode = os.fstat(stream.fileno()).st_ino
    try:
        text = Path("/proc/locks").read_text()
    except OSError:
        return 0
    holders = re.findall(rf"FLOCK +\w+ +WRITE +(\d+) +\w+:\w+:{inode} ", text)
    return int(holders[0]) if holders else 0


def peak_memory(pid: int) -> int | None:
    """The largest main memory that a process has held, in bytes; None if Linux does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(peak[1]) * 1024 if peak else None


def line(now: Status) -> str:
    """The state in a few lines of text."""
    parts = [f"{now.folder}: {now.stage}"]
    if now.stage == "training":
        parts.append(f"step {now.step} of {now.steps}")
        if now.left is not None:
            parts.append(f"left {timedelta(seconds=round(now.left))}")
    if now.pid is not None:
        size = f" with {now.memory / 2**30:.1f} GiB at most" if now.memory else ""
        parts.append(f"process {now.pid or '(unknown)'} works on it{size}")
    elif now.stage != "measured":
        parts.append("no process works on it; `posttrain run` continues")
    lines = [", ".join(parts)]
    if now.values:
        lines.append(
            "  last values: "
            + ", ".join(f"{name.removeprefix('val_')} {value:.4g}" for name, value in now.values.items())
        )
    if now.tripped:
        lines.append(f"  tripped: {', '.join(now.tripped)}")
    return "\n".join(lines + [f"  {measured}" for measured in now.measured])
