"""Attacks on tiny runs, for as many minutes as are given: python tests/chaos.py [MINUTES] [SEED], or `make chaos`.

    kill STAGE    SIGKILL, SIGTERM or Ctrl-C at a moment of a stage of `posttrain run`; started again, the run ends
    damage FILE   a byte of a file of a run, of its clips or its model is another, or the file is cut off or gone; then
                  the run is started again, with all there, or with its last stages still to do
    run           one value of the recipe is exchanged; taken, it is run to its end
    recipe, clips, scores, server    see mutated.py

What comes of each is counted: refused (one line, exit code 1), right (done, with all that an undisturbed run leaves,
byte by byte: clips, samples, scores, latents, checkpoints, weights, videos, records, table, exports), or wrong (a
traceback, a hang, a process or half-written file left behind, another result, or a refusal where the run can go on by
itself), which is printed. Draws depend on the seed alone, though not what the machine does meanwhile.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helpers import forked, mutated
from helpers.killed import STAGES, Hit, gaps, left_behind, start
from helpers.mutated import RECIPE, WORLD

from posttrain.commands.experiment import Recipe
from posttrain.core import files, recipe
from posttrain.core.errors import UserError
from posttrain.pocket import folder

os.environ["HF_HUB_OFFLINE"] = "1"  # a changed name shall not be asked for
LIMIT = 600  # seconds, after which a command hangs
ROWS = ("truth", "truth_vae", "frozen", "base", "gdpo")
# What each stage leaves; before a hit, all is removed that the stage and those after it leave.
LEFT = {
    "filming": ["drops"],
    "sampling losers": ["made"],
    "scoring losers": ["made/scores.jsonl"],
    "latents": ["runs/cache/latents"],
    "training": ["runs/try/adapter", "runs/try/trained.json", "runs/try/checkpoints", "runs/try/log.jsonl"],
    "evaluation": ["runs/try/evaluation", *(f"runs/try/samples/{row}" for row in ROWS), "runs/cache/evaluation"],
    "report": ["runs/try/report.json", "runs/try/report.html", "runs/try/report.gif"],
    "export": ["runs/try/adapter/README.md", "runs/try/adapter/try_comfyui.safetensors"],
    "merging": ["runs/try/merged"],
}
# What may be missing when a file is damaged, so that others are read back.
UNDONE = {
    "nothing": [],
    "weights": ["runs/try/adapter", "runs/try/trained.json"],
    "training": LEFT["training"],
    "measurement": LEFT["evaluation"][:-1],  # what runs share stays
}
# What no run can make again: damage to it is refused.
GIVEN = r"wan/|(recipe|film)\.yaml|drops/recipe|made/(samples|scores)\.|runs/try/(adapter/pytorch|trained|recipe|log)"
UNREAD = r"runs/(cache|try/checkpoints|try/samples/validation)/|.*/\.sha256/|made/sampler\."  # may stay damaged
MISSED = "missed"  # a hit that came after the end
LONG = ("steps", "batch", "seeds", "samples_each", "losers", "accumulate", "rank")  # numbers that ask for time
OFTEN = {signal.SIGKILL: 4, signal.SIGTERM: 1, signal.SIGINT: 1}


def make_home(home: Path) -> Path:
    """A copy of the embedded model, a recipe of a run, and one of its clips, which are not filmed yet."""
    shutil.copytree(folder("wan"), home / "wan")
    (home / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (home / "film.yaml").write_text(yaml.safe_dump(WORLD))
    return home


def result(home: Path) -> dict[str, str]:
    """Digests of what a run, its clips and losers leave, but for times."""
    found = {}
    for part in ("drops", "made", "runs"):
        found |= {f"{part}/{name}": digest for name, digest in files.sums(home / part).items()}
    for name in list(found):
        path = home / name
        try:
            if re.fullmatch(r"runs/(try/evaluation/.*|cache/evaluation/.*/record|try/report)\.json", name):
                found[name] = files.sha256_json(_timeless(files.read_json(path)))
            elif name.endswith("log.jsonl"):
                found[name] = files.sha256_json(_timeless(files.read_jsonl(path)))
            elif name.endswith("meta.json") or name.endswith("report.html"):  # of digests and times
                found[name] = "there"
        except UserError as error:
            found[name] = str(error)
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key not in ("seconds", "sha256", "times")}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def remove(home: Path, names: list[str]) -> None:
    for name in names:
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def ended(home: Path, process: Any) -> str:
    """What a command that was let run to its end, or was hit, has done wrong; "" if nothing."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "hangs"
    until = time.monotonic() + 60
    while (others := left_behind(home)) and time.monotonic() < until:
        time.sleep(0.05)
    if others:
        return f"leaves processes behind: {others[0]}"
    said = output(home)
    return f"a traceback: {said.splitlines()[-1]}" if "Traceback" in said else ""


def output(home: Path) -> str:
    path = home.parent / "output"
    return path.read_text(errors="replace").strip() if path.exists() else ""


def verdict(home: Path, expected: dict[str, str], given: bool = False, damage: bool = False) -> str:
    """What comes of the run in `home`, started until its end: "refused", "right", or what is wrong.

    `given`: it may be refused. `damage`: a damaged checkpoint, put aside, and what nobody reads may stay.
    """
    process = start(home, "run", "recipe.yaml")
    if wrong := ended(home, process):
        return wrong
    last = (output(home).splitlines() or [""])[-1]
    if remnants := sorted(home.rglob("*.part")):
        return f"a remnant: {remnants[0].relative_to(home)}"
    if process.exitcode == 1 and last.endswith("]"):
        return "refused" if given else f"refused: {last}"
    if process.exitcode:
        return f"exit code {process.exitcode}: {last}"
    now, allowed = result(home), re.compile(UNREAD if damage else r"\Z.")
    other = [name for name in sorted(now.keys() | expected.keys()) if now.get(name) != expected.get(name)]
    other = [name for name in other if not allowed.match(name)]
    return f"another result: {', '.join(other[:3])}" if other else "right"


class Attacks:
    """An undisturbed run in a folder, and attacks on copies of it."""

    def __init__(self, folder: Path) -> None:
        self.whole, self.copy, told = make_home(folder / "whole" / "home"), folder / "copy" / "home", folder / "told"
        process = start(self.whole, "run", "recipe.yaml", told=told)
        if wrong := ended(self.whole, process):
            raise SystemExit(f"undisturbed: {wrong}\n{output(self.whole)}")
        if process.exitcode:
            raise SystemExit(f"undisturbed: {output(self.whole)}")
        self.expected, self.gaps = result(self.whole), gaps(told)
        assert self.gaps.keys() == STAGES.keys() == LEFT.keys(), self.gaps.keys()

    def home(self, undone: list[str]) -> Path:
        """A copy of the run without some of its files."""
        shutil.rmtree(self.copy.parent, ignore_errors=True)
        shutil.copytree(self.whole, self.copy)
        remove(self.copy, undone)
        return self.copy

    def aim(self, stage: str, draws: random.Random) -> Hit:
        """A hit of a stage: half of them just before one of its moments, the others in the time after it."""
        number = draws.randrange(len(self.gaps[stage]))
        seconds = draws.choice((0.0, draws.uniform(0, self.gaps[stage][number])))
        sent = draws.choices(list(OFTEN), list(OFTEN.values()))[0]
        return Hit(stage, number, seconds, sent)

    def kill(self, stage: str, draws: random.Random) -> str:
        """A hit of the stage in a run that has all before it; then the run to its end."""
        stages = list(LEFT)
        home = self.home([name for later in stages[stages.index(stage) :] for name in LEFT[later]])
        hit = self.aim(stage, draws)
        if wrong := struck(home, hit):
            return wrong if wrong == MISSED else f"{wrong}, by {hit}"
        found = verdict(home, self.expected)
        return found if found == "right" else f"{found}, after {hit}"

    def damage(self, what: str, draws: random.Random) -> str:
        """A file of a kind, see `kinds`, is damaged; then the run is started again."""
        undone = draws.choice(list(UNDONE))
        home = self.home(UNDONE[undone])
        paths = kinds(home).get(what) or kinds(self.home([]))[what]
        path = draws.choice(paths)
        content = bytearray(path.read_bytes())
        how = draws.choice(("flipped", "flipped", "damaged", "gone"))
        if how == "flipped":
            content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
            path.write_bytes(content)
        elif how == "damaged":
            path.write_bytes(content[: draws.randrange(len(content))])
        else:
            path.unlink()
        name = path.relative_to(home).as_posix()
        found = verdict(home, self.expected, bool(re.match(GIVEN, name)), damage=True)
        if found == "refused" and "start again" in output(home):
            found = verdict(home, self.expected, damage=True)
        if name.endswith("log.jsonl") and "not what was written" in output(home):
            found = found.replace("another result: runs/try/log.jsonl", "right")
        if re.match("recipe|film|wan", name):  # a changed recipe or model is another one, and this is not put back
            found = found.partition(":")[0].replace("another result", "right")
        return found if found in ("right", "refused") else f"{name} {how}, {undone} undone: {found}"

    def run(self, draws: random.Random) -> Iterator[str]:
        """A run of a recipe with another value, where it is taken and asks for little."""

        def do(value: Any) -> str:
            home = self.home(["runs/try"])
            (home / "odd.yaml").write_text(yaml.safe_dump(value))
            try:
                with contextlib.chdir(home):
                    asked = recipe.flat(recipe.load("odd.yaml", (), Recipe).model_dump(mode="json"))
            except UserError:
                return "refused"
            if any((asked.get(key) or 0) > 50 for key in asked if key.rpartition(".")[2] in LONG):
                return "right"  # it may take its time
            process = start(home, "run", "odd.yaml")
            wrong, last = ended(home, process), (output(home).splitlines() or [""])[-1]
            if not wrong and process.exitcode == 1 and last.endswith("]"):
                return "refused"
            if not wrong and process.exitcode:
                wrong = f"exit code {process.exitcode}: {last}"
            return f"{value}: {wrong}" if wrong else "right"

        yield from mutated.examples(mutated.changed(RECIPE, 1), do, 2, draws.getrandbits(32))


def struck(home: Path, hit: Hit) -> str:
    """What a run that is hit does wrong; "" if it ends by the signal, MISSED if before it."""
    process = start(home, "run", "recipe.yaml", hit=hit)
    if wrong := ended(home, process):
        return wrong
    by = {-hit.signal, 128 + hit.signal} if hit.signal != signal.SIGKILL else {-signal.SIGKILL}
    if process.exitcode in by:
        said = output(home).splitlines()
        if hit.signal != signal.SIGKILL and not (said and ("continue" in said[-1])):
            return "ends without a line"
        return ""
    late = hit.seconds and not process.exitcode
    return MISSED if late else f"exit code {process.exitcode}: {(output(home).splitlines() or [''])[-1]}"


def kinds(home: Path) -> dict[str, list[Path]]:
    """The files of a run, its clips and model by kind, which is the path without numbers and digests."""
    found: dict[str, list[Path]] = {}
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home).as_posix()
        if path.is_file() and path.stat().st_size and not name.endswith((".html", ".jpg", ".gif", ".png", ".lock")):
            name = re.sub(rf"({'|'.join(ROWS)})(?=[-/])", "*", name)
            name = re.sub(r"(train|test_unseen)|(?<=/)[0-9a-f]{2}(?=/)|[0-9a-f]{16,}", "*", name)
            name = re.sub(r"(?<![a-z0-9])[0-9]+|(?<=-s)[0-9]+", "*", name)
            found.setdefault(name, []).append(path)
    return found


def attack(minutes: float, seed: int, runs: bool = True) -> dict[str, Counter[str]]:
    """Counts of tried, refused, right and wrong by attack; what is wrong is printed. Each of `mutated` once at least.

    `runs`: also kills and damage, for which whole runs are started.
    """
    draws, counts = random.Random(seed), dict[str, Counter[str]]()
    until = time.monotonic() + 60 * minutes

    def count(name: str, found: str) -> None:
        if found == MISSED:
            return
        good = found in ("refused", "right")
        counts.setdefault(name, Counter())[found if good else "wrong"] += 1
        if not good:
            print(f"{name}: {found}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        home = mutated.make_home(Path(folder) / "mutated")
        attacks = Attacks(Path(folder)) if runs else None
        stages, files_ = _endless(list(STAGES), draws), _endless(list(kinds(attacks.whole)) if attacks else [""], draws)
        first = True
        while first or time.monotonic() < until:
            first = False
            for name, attempt in mutated.ATTACKS.items():
                for found in attempt(home, draws.getrandbits(32)):
                    count(name, found)
            for _ in range(4 if attacks else 0):
                assert attacks is not None
                if time.monotonic() < until:
                    count(f"kill {(stage := next(stages))}", attacks.kill(stage, draws))
                    for found in attacks.run(draws):
                        count("run", found)
                    count(f"damage {(what := next(files_))}", attacks.damage(what, draws))
    return counts


def _endless(things: list[str], draws: random.Random) -> Iterator[str]:
    """All of them in turn, in another order each time."""
    while True:
        yield from draws.sample(things, len(things))


def main() -> int:
    forked.start_server()
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    counts = attack(minutes, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(table(counts))
    return int(any(found["wrong"] for found in counts.values()))


def table(counts: dict[str, Counter[str]]) -> str:
    """Markdown; the last line has the sums."""
    sums = {name: [found.total(), found["refused"], found["right"], found["wrong"]] for name, found in counts.items()}
    sums = dict(sorted(sums.items())) | {"all": [sum(column) for column in zip(*sums.values(), strict=True)]}
    lines = [f"| {name} | {' | '.join(map(str, cells))} |" for name, cells in sums.items()]
    return "\n".join(["| attack | tried | refused | right | wrong |", "|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    sys.exit(main())
