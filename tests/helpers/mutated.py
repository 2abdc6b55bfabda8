"""Attacks on all inputs, without whole runs: hypothesis changes values, and shrinks what fails to the smallest example.

    recipe      a recipe of a run or of clips is read; if a recipe of clips is accepted, its first scene is made
    clips       rows or bytes of metadata.jsonl are changed; then the clips are read
    scores      rows or bytes of scores.jsonl are changed; then groups are made
    model       a config, vocabulary or index of a model's folder is changed; then the model is loaded and encodes
    server      a judge's server answers anything, slowly, without end, or with a redirect

An attempt must be refused in one line (UserError), or end right: in time and without another error. A server's answer
must give a share in [0, 1].
"""

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import yaml
from helpers.falling import write_dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from posttrain.core import recipe
from posttrain.core.errors import UserError
from posttrain.pocket import folder

RECIPE: dict[str, Any] = {
    "run": "try",
    "model": {"path": "wan", "adapter": {"rank": 2, "alpha": 4}},
    "data": {
        "clips": "drops",
        "make": "film.yaml",
        "groups": {
            "losers": 2,
            "samples": ["made"],
            "samples_each": 2,
            "judge": "simulator",
            "sampler": {"steps": 2, "guidance": 1.0},
        },
    },
    "method": {"name": "gdpo", "mode": "pair", "beta_T": 15, "loser_weight": 0.1},
    "train": {"steps": 4, "batch": 2, "lr": 0.01, "ema": 0.9, "checkpoint_every": 1},
    "eval": {
        "clips": "drops",
        "splits": ["test_unseen"],
        "every": 2,
        "seeds": 1,
        "batch": 1,
        "sampler": {"steps": 2, "guidance": 1.0},
    },
    "export": ["diffusers", "comfyui", "merged"],
}
WORLD: dict[str, Any] = {
    "out": "drops",
    "splits": {"train": 2, "test_unseen": 2},
    "world": {
        "name": "drop",
        "width": 32,
        "height": 32,
        "frames": 5,
        "dropped": [1, 1],
        "pile": [0, 0],
        "drop": [0.5, 0.8],
        "size": [0.3, 0.4],
        "region": [0.7, 0.0],
        "camera_gap": 1.6,
        "target_pixels": [6, 24],
        "shapes": ["ball", "box", "cone"],
    },
    "renderer": {"name": "tiny"},
    "seed": 1,
}
ODD: list[Any] = [None, True, "", ".", "x" * 300, -1, 0, 1e308, 10**30, [], {}, "\x00", "a/b", "\ud800", "1e3", "null"]
KEY = "sk-a-key-that-nobody-may-see"
SECONDS = 60  # the most processor time of an attempt

ANYTHING = (
    st.sampled_from([*ODD, float("nan"), float("inf")])
    | st.text(st.characters(), max_size=9)
    | st.integers()
    | st.floats()
    | st.lists(st.integers() | st.none() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=3), max_size=2)
)


@st.composite
def changed(draw: Any, value: Any, most: int = 3) -> Any:
    """A copy in which up to `most` values are dropped, replaced, scaled, or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        holders = [value]
        for holder in holders:
            inner = holder.values() if isinstance(holder, dict) else holder
            holders += [part for part in inner if isinstance(part, dict | list) and part]
        holder = draw(st.sampled_from(holders)) if value else value
        if not holder:
            break
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        number = isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
        match draw(st.sampled_from(["drop", "rename", "scale", "exchange", "exchange"])):
            case "drop":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            case "scale" if number:
                holder[key] *= draw(st.sampled_from([-1, 0.5, 0.9, 1.1, 2, 2, 10, 1e9, 1e300]))
            case _:
                holder[key] = draw(ANYTHING)
    return value


@st.composite
def torn(draw: Any, content: bytes) -> bytes:
    """A copy in which up to three bytes are changed, and whose end may be cut off."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    return content[: draw(st.just(len(content)) | st.integers(0, len(content)))]


def make_home(home: Path) -> Path:
    """Write a model, a few clips, and samples of them with scores to `home`; returns `home`."""
    home.mkdir(parents=True)
    shutil.copytree(folder("wan"), home / "wan")
    write_dataset(home / "drops", ["train", "test_unseen"], clips=2, frames=5)
    (home / "made").mkdir()
    rows = []
    for clip in ("00000", "00001"):
        for seed in range(2):
            path = home / "made" / f"{clip}-s{seed}.mp4"
            shutil.copy(home / "drops" / "train" / f"{clip}.mp4", path)
            path.write_bytes(path.read_bytes() + bytes(seed + 1))  # because equal samples are refused
            rows.append({"file_name": path.name, "sa": 0.5, "pc": 0.2 + 0.1 * seed})
    (home / "made" / "scores.jsonl").write_text(_lines(rows))
    return home


def _lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Context that raises TimeoutError after `seconds` of this process's time, or ten times as many by the clock."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"hangs for {seconds} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def tried(what: str, attempt: Callable[[], Any]) -> str:
    """Call `attempt`; returns "refused", "right", or a line that says what is wrong."""
    said = io.StringIO()
    try:
        with within(SECONDS), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            attempt()
    except UserError as error:
        message = str(error)
        odd = "\n" in message or KEY in message or "\x1b" in message or "\x00" in message
        with contextlib.suppress(UnicodeEncodeError):
            message.encode()
            return f"{what}: message {message!r}" if odd else "refused"
        return f"{what}: message that cannot be printed {message!r}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {str(error)[:200]}"
    return f"{what}: tells the key" if KEY in said.getvalue() else "right"


def examples(strategy: st.SearchStrategy[Any], attempt: Callable[[Any], str], number: int, seed: int) -> Iterator[str]:
    """The verdicts of `attempt` on `number` examples. The first wrong one is shrunk, and ends the search."""
    found: list[str] = []
    wrong: list[str] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def one(value: Any) -> None:
        verdict = attempt(value)
        if verdict not in ("refused", "right"):
            wrong.append(verdict)
            raise AssertionError(verdict)
        if not wrong:
            found.append(verdict)

    hypothesis.configuration.set_hypothesis_home_dir(os.devnull + "-none")  # hypothesis must write no files
    with contextlib.suppress(Exception):
        one()
    yield from found
    yield from wrong[-1:]


def recipes(home: Path, seed: int, number: int = 20) -> Iterator[str]:
    import sim.cli
    from posttrain.commands.experiment import Recipe
    from sim.dataset import takes

    path = home / "odd.yaml"

    def read(text: bytes) -> str:
        path.write_bytes(text)
        return tried(f"recipe {text!r}", lambda: recipe.load(path, (), Recipe))

    def film(text: bytes) -> str:
        path.write_bytes(text)

        def attempt() -> None:
            plan = recipe.load(path, (), sim.cli.Recipe)
            world = plan.world.config
            if world.width * world.height * world.frames <= 10**5:  # larger clips may take long
                next(iter(takes(plan, "train", 0)))

        return tried(f"clips' recipe {text!r}", attempt)

    def written(value: Any) -> st.SearchStrategy[bytes]:
        """Recipes, most with one change (these are accepted more often), some with torn text."""
        one, more = (changed(value, most).map(lambda v: yaml.safe_dump(v).encode()) for most in (1, 3))
        return one | one | one | more | more.flatmap(torn)

    yield from examples(written(RECIPE), read, number, seed)
    yield from examples(written(WORLD), film, number, seed)


def clips(home: Path, seed: int, number: int = 30) -> Iterator[str]:
    from posttrain.data.config import DataConfig
    from posttrain.data.dataset import Clips

    path = home / "drops" / "train" / "metadata.jsonl"
    before = path.read_bytes()

    def read() -> None:
        clips = Clips(DataConfig(clips=str(home / "drops")), preload=False)
        clips.load(range(len(clips)))
        assert clips.key

    yield from _rows(path, before, read, number, seed)


def scores(home: Path, seed: int, number: int = 30) -> Iterator[str]:
    from posttrain.data.config import DataConfig
    from posttrain.data.dataset import Clips
    from posttrain.data.groups import gather

    path = home / "made" / "scores.jsonl"
    data = DataConfig(clips=str(home / "drops"), groups={"losers": 2, "samples": [str(home / "made")]})
    assert data.groups is not None
    true, groups = Clips(data, preload=False), data.groups
    yield from _rows(path, path.read_bytes(), lambda: gather(true, groups, scored=True), number, seed)


def _rows(path: Path, before: bytes, read: Callable[[], Any], number: int, seed: int) -> Iterator[str]:
    """The verdicts of `read` after the file's rows or bytes were changed; the file is restored at the end."""

    def attempt(content: bytes) -> str:
        path.write_bytes(content)
        return tried(f"{path.name} {content[:500]!r}", read)

    rows = [json.loads(line) for line in before.splitlines()]
    other = changed(rows).map(lambda rows: _lines(rows).encode())
    try:
        yield from examples(other | other.flatmap(torn) | torn(before), attempt, number, seed)
    finally:
        path.write_bytes(before)


def server(home: Path, seed: int, number: int = 8) -> Iterator[str]:
    from posttrain.judges.endpoint import connect

    top = [{"token": "yes", "logprob": -0.1}, {"token": "No", "logprob": -3.0}]
    good = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    bodies = changed(good, 1).map(lambda value: json.dumps(value).encode()) | st.just(json.dumps(good).encode())
    bodies |= st.sampled_from([b"\xff\xfe", b"null", b"[" * 10_000, b"x" * 2**21, b"", json.dumps(good).encode()])
    bodies |= st.just(json.dumps({"error": {"message": f"\x1b]0;own\x07 {KEY}\n\r"}}).encode()) | st.binary(max_size=50)
    headers = {"Retry-After": "999999999"}, {"Content-Encoding": "gzip"}, {"X-a": "b" * 10_000}
    extras = st.sampled_from([*[{}] * 6, *headers])
    ways = st.sampled_from([*["whole"] * 6, "slowly", "without end", "too short"])
    statuses = st.sampled_from([*[200] * 8, 301, 307, 401, 404, 429, 500, 599])
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    given_: dict[str, Any] = {}
    leaked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            leaked.append(str(self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body, extra, way = given_["what"]
            with contextlib.suppress(OSError):
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", given_["elsewhere"])
                promised = {"without end": 2**40, "too short": len(body) + 100}.get(way, len(body))
                for name, text in {**extra, "Content-Length": str(promised)}.items():
                    self.send_header(name, text)
                self.end_headers()
                if way == "slowly":
                    for at in range(len(body)):
                        self.wfile.write(body[at : at + 1])
                        time.sleep(0.1)
                while way == "without end":
                    self.wfile.write(b" " * 2**16)
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    def ask(what: tuple[int, bytes, dict[str, str], str]) -> str:
        given_["what"], kept = what, home / "answers"
        shutil.rmtree(kept, ignore_errors=True)
        url = f"http://127.0.0.1:{served.server_port}/v1"

        def attempt() -> None:
            answer = connect(url, "tiny", kept, tries=2, wait=0.01, timeout=3.0)(picture, "?")
            assert 0 <= answer.worth <= 1, answer
            assert 0 <= answer.mass <= 1.1, answer
            if json.loads(what[1]) == good and what[0] == 200:
                assert abs(answer.worth - np.exp(-0.1) / (np.exp(-0.1) + np.exp(-3))) < 1e-9, answer

        found = tried(f"server {what[0]} {what[1][:200]!r} {what[2]} {what[3]}", attempt)
        if leaked:
            return f"the key goes elsewhere: {leaked}"
        return f"the key is kept in {kept}" if any(KEY in p.read_text() for p in kept.glob("*.json")) else found

    before = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = KEY
    try:
        with (
            ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served,
            ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as other,
        ):
            served.daemon_threads = other.daemon_threads = True
            served.block_on_close = False
            given_["elsewhere"] = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
            for each in (served, other):
                threading.Thread(target=each.serve_forever, daemon=True).start()
            yield from examples(st.tuples(statuses, bodies, extras, ways), ask, number, seed)
            for each in (served, other):
                each.shutdown()
    finally:
        os.environ.pop("OPENAI_API_KEY")
        if before is not None:
            os.environ["OPENAI_API_KEY"] = before


def models(home: Path, seed: int, number: int = 6) -> Iterator[str]:
    import torch

    from posttrain.commands.loading import load_model
    from posttrain.models.base import AdapterConfig, ModelConfig

    paths = sorted((home / "wan").rglob("*.json"))
    contents = {path: path.read_bytes() for path in paths}

    def other(path: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        value = changed(json.loads(contents[path]), 1).map(lambda value: json.dumps(value).encode())
        return st.tuples(st.just(path), value | value | torn(contents[path]))

    def attempt(what: tuple[Path, bytes]) -> str:
        path, content = what

        def load() -> None:
            model = load_model(ModelConfig(path=str(home / "wan"), adapter=AdapterConfig(rank=2)))
            with torch.no_grad():
                model.encode_text(["a ball falls."])
                model.decode(model.encode(torch.zeros(1, 3, 5, 32, 32)))
            model.scheduler()

        path.write_bytes(content)
        found = tried(f"{path.relative_to(home)} {content[:600]!r}", load)
        path.write_bytes(contents[path])
        return found

    yield from examples(st.sampled_from(paths).flatmap(other), attempt, number, seed)


ATTACKS = {"recipe": recipes, "model": models, "clips": clips, "scores": scores, "server": server}
