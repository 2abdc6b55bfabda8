"""Run a command in a process of its own, and note when it writes files, or send it a signal at one of its writes.

Python calls an audit hook before every file that is opened for writing, every rename, removal, new folder and process.
These moments are assigned to stages by the names of their files, so a signal can be sent in every stage, however short:
just before the stage's n-th moment, or some time after it.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from helpers.forked import launch

# Stages in the order in which they run. Patterns match the final name of a file and its temporary name.
STAGES = {
    "filming": r"sim make ",
    "sampling losers": r"made/(?!.*scores)",
    "scoring losers": r"made/.*scores",
    "latents": r"runs/cache/latents/",
    "training": r"runs/try/(\.?trained|log|checkpoints|samples/validation|\.?adapter(?!.*(comfyui|README)))",
    "evaluation": r"runs/(cache/evaluation|try/(evaluation|samples))",
    "report": r"runs/try/\.?report",
    "export": r"runs/try/adapter/.*(comfyui|README)",
    "merging": r"runs/try/merged",
}


class Hit(NamedTuple):
    """A signal that is sent `seconds` after the moment `number` (from 0) of a stage."""

    stage: str
    number: int
    seconds: float
    signal: int


class Moments:
    """An audit hook that notes the moments of each stage in `told`, and sends the signal at the moment of `hit`."""

    def __init__(self, home: Path, hit: Hit | None) -> None:
        self.home, self.hit, self.told = f"{home}/", hit, list[tuple[str, float]]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        name = _written(event, arguments)
        if name is None:
            return
        name = name.removeprefix(self.home)
        stage = next((stage for stage, pattern in STAGES.items() if re.match(pattern, name)), None)
        if stage is None:
            return
        self.told.append((stage, time.monotonic()))
        if self.hit and self.hit.stage == stage:
            if [one for one, _ in self.told].count(stage) == self.hit.number + 1:
                if self.hit.seconds:
                    aim = threading.Timer(self.hit.seconds, os.kill, (os.getpid(), self.hit.signal))
                    aim.daemon = True
                    aim.start()
                else:
                    os.kill(os.getpid(), self.hit.signal)


def _written(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change, or the command that it starts; None for other events."""
    if event == "subprocess.Popen":
        words = [str(word) for word in arguments[1]]
        return " ".join(words[words.index("-m") + 1 :]) if "-m" in words else None
    if event == "open":
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        return arguments[0] if writes and isinstance(arguments[0], str) else None
    if event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "shutil.copytree"):
        return str(arguments[event in ("os.rename", "shutil.copytree")])
    return None


def child(home: Path, words: list[str], hit: Hit | None, told: Path | None) -> None:
    """Run `posttrain WORDS` in `home` and exit with its code; what it prints is in the file `output` beside `home`.

    If `told` is given, the moments and their times are written to it as JSON.
    """
    os.setsid()  # so that Ctrl-C in a terminal does not reach this process
    os.chdir(home)
    opened = os.open(home.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["posttrain", *words]
    moments = Moments(home, hit)
    if hit or told:
        sys.addaudithook(moments)
    from posttrain.core.signals import launch as begin

    code = begin("posttrain.cli")
    if told:
        told.write_text(json.dumps([*moments.told, ("end", time.monotonic())]))
    sys.stdout.flush()
    sys.exit(code)


def start(home: Path, *words: str, hit: Hit | None = None, told: Path | None = None) -> Any:
    """Start `child` in a process, and return the process."""
    (home.parent / "output").unlink(missing_ok=True)
    return launch(child, home, list(words), hit, told)


def gaps(told: Path) -> dict[str, list[float]]:
    """By stage, the seconds from each moment to the next moment of any stage."""
    moments = json.loads(told.read_text())
    found: dict[str, list[float]] = {}
    for (stage, time_), (_, next_) in pairwise(moments):
        found.setdefault(stage, []).append(next_ - time_)
    return found


def left_behind(home: Path) -> list[str]:
    """The command lines of other processes whose working folder is `home`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") == str(home) and folder.name != str(os.getpid()):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100])
        except OSError:
            continue
    return found
