"""Attacks on tiny runs, for as many minutes as are given: python tests/chaos.py [MINUTES] [SEED], or `make chaos`.

    kills      SIGKILL and SIGTERM at random moments of every stage of a recipe, until a start ends by itself
    flips      a byte of a random file of a finished run is another, or the file is damaged or gone; then the run again
    recipes    values of recipes are exchanged, dropped, made huge or of another type
    manifests  likewise the rows of metadata.jsonl, and its bytes
    server     a judge's server answers anything

What comes of each is counted: refused (one line, exit code 1), right (done, and equal to what an undisturbed run
leaves, byte by byte), or wrong (a traceback, a hang, another result, a half-written remnant), which is told. Draws
depend on the seed alone, though not the moments at which a process is hit.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from helpers.falling import write_dataset
from helpers.forked import launch
from helpers.tiny import wan_folder

from posttrain.core import files, recipe
from posttrain.core.errors import UserError

RECIPE: dict[str, Any] = {
    "run": "try",
    "model": {"path": "wan", "conditioning": "text", "adapter": {"rank": 2, "alpha": 4}},
    "data": {
        "clips": "drops",
        "groups": {"losers": 2, "samples": ["made"], "samples_each": 2, "sampler": {"steps": 2, "guidance": 1.0}},
    },
    "method": {"name": "gdpo", "mode": "sum", "physics": None},
    "train": {"steps": 4, "batch": 2, "lr": 0.01, "ema": 0.9, "checkpoint_every": 1},
    "eval": {
        "clips": "drops",
        "splits": ["test_unseen"],
        "seeds": 1,
        "batch": 1,
        "sampler": {"steps": 2, "guidance": 1.0},
    },
    "export": ["diffusers", "comfyui", "merged"],
}
WORLD: dict[str, Any] = {"out": "x", "splits": {"train": 2}, "world": {"name": "drop", "frames": 9}, "seed": 1}
LIMIT = 300  # seconds, after which a command hangs
ODD: list[Any] = [
    None,
    True,
    "",
    ".",
    "x" * 300,
    -1,
    0,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    [],
    {},
    "\x00",
    "a/b",
]


def child(home: Path, output: Path, arguments: list[str]) -> None:
    """The command, as `python -m posttrain ARGUMENTS` runs it, with what it prints in a file."""
    os.chdir(home)
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["posttrain", *arguments]
    from posttrain.core.signals import launch as begin

    sys.exit(begin("posttrain.cli"))


def start(home: Path, *arguments: str) -> Any:
    return launch(child, home, home / "output", list(arguments))


def make_home(home: Path) -> Path:
    """A tiny model, a few clips and a recipe."""
    wan_folder(home / "wan")
    write_dataset(home / "drops", ["train", "test_unseen"], clips=2, frames=5)
    (home / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return home


def result(home: Path) -> dict[str, str]:
    """Digests of what a run and its losers leave, but for times, and for what is of use to nobody after it."""
    found = {}
    for folder in ("runs/try/adapter", "runs/try/merged", "runs/try/samples", "made"):
        found |= {f"{folder}/{name}": digest for name, digest in files.sums(home / folder).items()}
    for path in sorted((home / "runs" / "try" / "evaluation").glob("*.json")):
        found[path.name] = files.sha256_json(
            {k: v for k, v in files.read_json(path).items() if k not in ("seconds", "sha256")}
        )
    log = files.read_jsonl(home / "runs" / "try" / "log.jsonl")
    found["log"] = files.sha256_json([{k: v for k, v in row.items() if k != "seconds"} for row in log])
    return found


def verdict(home: Path, process: Any, expected: dict[str, str]) -> str:
    """What came of a command that was let run to its end: "refused", "right", or what is wrong."""
    process.join(LIMIT)
    said = (home / "output").read_text(errors="replace") if (home / "output").exists() else ""
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hangs"
    if "Traceback" in said:
        return "a traceback: " + said.strip().splitlines()[-1]
    lines = said.strip().splitlines() or [""]
    if process.exitcode == 1 and lines[-1].endswith("]"):
        return "refused"
    if process.exitcode:
        return f"exit code {process.exitcode}: {lines[-1]}"
    if remnants := sorted(home.rglob("*.part")):
        return f"a remnant: {remnants[0].relative_to(home)}"
    now = result(home)
    if now != expected:
        other = sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
        return f"another result: {', '.join(other[:3])}"
    return "right"


def kills(home: Path, expected: dict[str, str], seconds: float, draws: random.Random, most: int = 12) -> Iterator[str]:
    """One undisturbed end after up to `most` kills, from nothing."""
    shutil.rmtree(home / "runs")
    shutil.rmtree(home / "made")
    for number in range(most):
        process = start(home, "run", "recipe.yaml")
        # stages before the one that is reached are short, so moments are taken from what is left of the time
        process.join(draws.uniform(0, seconds * max(0.2, 1 - number / most)))
        if process.exitcode is not None:
            break
        number_sent = draws.choice((signal.SIGKILL, signal.SIGTERM))
        os.kill(process.pid, number_sent)
        process.join(LIMIT)
        said = (home / "output").read_text(errors="replace") if (home / "output").exists() else ""
        if process.exitcode is None:
            process.kill()
            yield f"hangs after {number_sent.name}"
        elif "Traceback" in said:
            yield f"a traceback after {number_sent.name}: {said.strip().splitlines()[-1]}"
        elif number_sent == signal.SIGTERM and process.exitcode not in (143, 0, -signal.SIGTERM):
            yield f"exit code {process.exitcode} after SIGTERM"
        else:
            yield "right"
    yield verdict(home, start(home, "run", "recipe.yaml"), expected)


def flips(home: Path, expected: dict[str, str], draws: random.Random) -> Iterator[str]:
    """One damage to a finished run, which is put back afterwards."""
    kept = home.parent / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(home, kept)
    if draws.random() < 0.5:  # so that checkpoints and latents are read back
        for name in ("adapter", "merged", "trained.json"):
            path = home / "runs" / "try" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folders = [home / "runs", home / "made"]
    paths = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = draws.choice([p for p in paths if p.suffix not in (".html", ".jpg", ".gif", ".png")])
    content = bytearray(path.read_bytes())
    how = draws.choice(("flipped", "flipped", "torn", "gone"))
    if how == "flipped":
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(content)
    elif how == "torn":
        path.write_bytes(content[: draws.randrange(len(content))])
    else:
        path.unlink()
    found = verdict(home, start(home, "run", "recipe.yaml"), expected)
    yield found if found in ("right", "refused") else f"{path.relative_to(home)} {how}: {found}"
    shutil.rmtree(home)
    kept.rename(home)


def mutated(value: Any, draws: random.Random) -> Any:
    """A deep copy with one of its values dropped, exchanged for another, or put under another name."""
    value = copy.deepcopy(value)
    holders = [value]
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        holders += [part for part in inner if isinstance(part, dict | list) and part]
    holder = draws.choice(holders)
    key = draws.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    match draws.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        case 2 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] *= draws.choice((-1, 0.5, 1e9, 1e300))
        case _:
            holder[key] = draws.choice(ODD)
    return value


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(what: str, attempt: Callable[[], Any]) -> str:
    """What came of a call in this process."""
    try:
        with within(60), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            attempt()
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"{what}: several lines: {error}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    return "right"


def recipes(home: Path, draws: random.Random) -> Iterator[str]:
    """One recipe of a run or of clips, changed up to three times."""
    import sim.cli
    from posttrain.commands.experiment import Recipe

    value, schema = draws.choice(((RECIPE, Recipe), (WORLD, sim.cli.Recipe)))
    for _ in range(draws.randint(1, 3)):
        value = mutated(value, draws) if value else value
    text = yaml.safe_dump(value)
    if draws.random() < 0.2:
        at = draws.randrange(len(text))
        text = text[:at] + draws.choice("{}[]:&*!\x00\t\"'-#\n") + text[at + 1 :]
    (home / "odd.yaml").write_text(text)
    with contextlib.chdir(home):
        yield tried(f"recipe {text!r}", lambda: recipe.load("odd.yaml", (), schema))


def manifests(home: Path, draws: random.Random) -> Iterator[str]:
    """A metadata.jsonl of which a row, or a byte, is another; then its clips are read."""
    from posttrain.data.config import DataConfig
    from posttrain.data.dataset import Clips

    path = home / "drops" / "train" / "metadata.jsonl"
    before = path.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[0] = mutated(rows[0], draws)
    content = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    if draws.random() < 0.3:
        content[draws.randrange(len(content))] = draws.randrange(256)

    def read() -> None:
        clips = Clips(DataConfig(clips="drops"), preload=False)
        clips.load([0, 1])
        assert clips.key

    path.write_bytes(content)
    try:
        with contextlib.chdir(home):
            yield tried(f"row {json.dumps(rows[0])}", read)
    finally:
        path.write_bytes(before)


def server(home: Path, draws: random.Random) -> Iterator[str]:
    """One question to a server that answers anything."""
    from posttrain.judges.endpoint import connect

    top = [{"token": draws.choice(("yes", "No", "\x1b[2J", "")), "logprob": draws.choice((-0.1, "x", None, 5, -1e999))}]
    good = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    bodies = [json.dumps(mutated(good, draws)).encode(), json.dumps(good).encode(), b"\xff\xfe", b"null", b"[" * 10_000]
    bodies += [b"x" * 2**21, b"", b'{"error": {"message": "\x1b]0;own\x07\\u001b[31m"}}']
    status, body = draws.choice((200, 200, 200, 302, 401, 404, 429, 500, 599)), draws.choice(bodies)
    extra = draws.choice(
        ({}, {"Retry-After": "999999999"}, {"Location": "http://127.0.0.1:1/"}, {"Content-Encoding": "gzip"})
    )
    promised = draws.choice((len(body), len(body), len(body) + 100))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, text in {**extra, "Content-Length": str(promised)}.items():
                self.send_header(name, text)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    picture = np.full((1, 16, 16, 3), draws.randrange(256), np.uint8)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{served.server_port}/v1"
        ask = connect(url, "tiny", home / "answers", tries=2, wait=0.01, timeout=3.0)
        yield tried(f"server {status} {body[:80]!r} {extra}", lambda: ask(picture, "?"))
        served.shutdown()
    shutil.rmtree(home / "answers", ignore_errors=True)


def attack(minutes: float, seed: int, runs: bool = True) -> dict[str, Counter[str]]:
    """Counts of refused, right and wrong by attack, of one round at least; what is wrong is printed.

    `runs`: also kills and flips.
    """
    draws, counts = random.Random(seed), dict[str, Counter[str]]()
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder) / "home")
        quick = {"recipes": recipes, "manifests": manifests, "server": server}
        attacks: dict[str, Callable[[], Iterator[str]]] = {
            name: (lambda each=each: each(home, draws)) for name, each in quick.items()
        }
        times = dict.fromkeys(quick, 10)
        if runs:
            began = time.monotonic()
            process = start(home, "run", "recipe.yaml")
            process.join(LIMIT)
            if process.exitcode:
                raise SystemExit(f"undisturbed: {(home / 'output').read_text()}")
            expected, seconds = result(home), time.monotonic() - began
            print(f"undisturbed: {seconds:.0f} s, {len(expected)} files")
            attacks["flips"] = lambda: flips(home, expected, draws)
            attacks["kills"] = lambda: kills(home, expected, seconds, draws)
            times |= {"flips": 3, "kills": 1}
        until, first = time.monotonic() + 60 * minutes, True
        while first or time.monotonic() < until:
            for name, each in attacks.items():
                for _ in range(times[name]):
                    if time.monotonic() >= until and not first:
                        break
                    for found in each():
                        good = found in ("refused", "right")
                        counts.setdefault(name, Counter())[found if good else "wrong"] += 1
                        if not good:
                            print(f"{name}: {found}", flush=True)
            first = False
    return counts


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    counts = attack(minutes, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{'':<10}  tried refused   right   wrong")
    for name, found in counts.items():
        cells = (sum(found.values()), found["refused"], found["right"], found["wrong"])
        print(f"{name:<10}" + "".join(f"{cell:>7} " for cell in cells))
    return int(any(found["wrong"] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
