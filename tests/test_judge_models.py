"""Models as judges: a tiny LLaVA asked in this process and behind a server, and servers that misbehave."""

import base64
import contextlib
import gzip
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.falling import film
from helpers.llava import count, samples, url
from PIL import Image
from transformers import (
    InstructBlipVideoProcessor,
    InstructBlipVideoVideoProcessor,
    PreTrainedTokenizerFast,
)

from posttrain.core.errors import UserError
from posttrain.judges import endpoint, vlm
from posttrain.judges.questions import MASS, asking

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a model, here and behind a server


@pytest.mark.slow
def test_a_model_and_its_server_agree(llava: Path, port: int, tmp_path: Path) -> None:
    """A plain forward pass there, `generate` here; the likeliest 20 of 55 tokens there, all here."""
    here = asking(vlm.load(str(llava), CPU), frames=3)
    there = asking(endpoint.connect(url(port), "tiny", tmp_path / "cache"), frames=3)
    found = []
    for path in sorted(samples(tmp_path / "made").iterdir()):
        scores = here(path, "square 0 falls.")
        assert there(path, "square 0 falls.") == pytest.approx(scores, abs=1e-6)
        found.append(scores)
    assert all(0.001 < score < 0.999 for scores in found for score in scores[:2])
    assert len({round(score, 6) for scores in found for score in scores[:2]}) == 2 * len(found)
    assert all(scores.mass >= MASS for scores in found)
    assert here(path, "square 1 falls.").sa != scores.sa
    assert here(path, "square 1 falls.").pc == scores.pc


def test_likeliest_tokens_of_an_answer() -> None:
    """ln .5, ln .1 and ln .2: (.5 + .1) / (.5 + .1 + .2)."""
    top = [
        {"token": t, "logprob": math.log(p)} for t, p in ((" Yes", 0.5), ("No", 0.2), ("Yes", 0.1), ("Yesterday", 0.2))
    ]
    answer = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    assert endpoint.likeliest(answer, "") == [(t["token"].strip(), t["logprob"]) for t in top]
    broken: list[Any] = [{}, [], None, 3, {"choices": []}, {"choices": [{"logprobs": {"content": []}}]}]
    broken += [logprobs(("Yes", value)) for value in (math.nan, math.inf, 0.5, "x", None, [])]
    for answer in broken:
        with pytest.raises(UserError, match="me answers") as caught:
            endpoint.likeliest(answer, "me")
        assert (caught.value.code, caught.value.field) == ("answer", "--url")


def logprobs(*top: tuple[str, Any]) -> dict[str, Any]:
    """A server's answer with these likeliest first tokens."""
    tokens = [{"token": token, "logprob": logprob} for token, logprob in top]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}


@contextlib.contextmanager
def server(reply: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]) -> Iterator[str]:
    """The address of a server in this process, which answers each question so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with contextlib.suppress(OSError):  # who asks may have gone
                reply(self, asked)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def send(to: BaseHTTPRequestHandler, content: Any, status: int = 200, **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    to.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        to.send_header(name.replace("_", "-"), value)
    to.end_headers()
    to.wfile.write(body)


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ([("<think>", -0.001), ("Yes", -9), ("No", -9.2)], None),
        ([("\u0120Yes", -0.2), ("\u0120No", -1.8), ("Yes", -9)], 0.83),
        ([("No", -0.7), ("yes", -0.8), ("YES", -3)], 0.50),
        ([("Yes", -0.5), ("No", -1.0), ("The", -math.inf)], 0.62),
    ],
)
def test_a_token_that_says_neither_makes_no_score(
    tmp_path: Path, top: list[tuple[str, float]], expected: float | None
) -> None:
    """By hand, e.g. (e^-.2 + e^-9) / (e^-.2 + e^-9 + e^-1.8); what the server said is kept for the next time."""
    with server(lambda to, asked: send(to, logprobs(*top))) as address:
        ask = endpoint.connect(address, "m", tmp_path)
        for _ in range(2):
            if expected is None:
                with pytest.raises(UserError) as caught:
                    ask(PICTURES, "a?")
                assert caught.value.code == "answer"
            else:
                mass = sum(math.exp(logprob) for _, logprob in top)
                assert ask(PICTURES, "a?") == pytest.approx((expected, mass), abs=0.005)


def test_a_server_is_asked_as_it_wants_to_be(tmp_path: Path) -> None:
    """Five logprobs at most, `max_completion_tokens`, no temperature; and of the second question on at once."""
    times = []

    def reply(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        times.append(time.monotonic())
        for wrong, said in (
            ("max_tokens" in asked, "Unsupported parameter: use 'max_completion_tokens' instead."),
            (asked["top_logprobs"] > 5, "top_logprobs must be at most 5"),
            ("temperature" in asked, "temperature does not support 1 with this model"),
        ):
            if wrong:
                return send(to, {"error": {"message": said}}, 400)
        assert asked["max_completion_tokens"] == 1
        send(to, logprobs(("Yes", -0.1), ("No", -3)))

    with server(reply) as address:
        ask = endpoint.connect(address, "m", tmp_path, wait=60)
        ask(PICTURES, "a?")
        assert len(times) == 5
        ask(PICTURES, "b?")
        assert len(times) == 6


def test_pictures_are_made_smaller_where_asked(tmp_path: Path) -> None:
    sizes = []

    def reply(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        for part in asked["messages"][0]["content"][:-1]:
            content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            sizes.append(Image.open(io.BytesIO(content)).size)
        send(to, logprobs(("Yes", -0.1), ("No", -3)))

    wide = np.zeros((1, 40, 64, 3), np.uint8)
    with server(reply) as address:
        for side in (None, 32, 100, None):
            endpoint.connect(address, "m", tmp_path, side=side)(wide, "a?")
    assert sizes == [(64, 40), (32, 20), (64, 40)]


SECRET = "sk-0123456789"


def echo(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    send(to, {"error": f"\x1b[2J bad key {to.headers['Authorization']}\r\nfor all \u202e"}, 401)


def endless(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    to.send_response(200)
    to.end_headers()
    while True:
        to.wfile.write(b" " * 2**16)


def dripping(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 100:
        to.wfile.write(bytes([byte]))
        time.sleep(0.1)


BOMB = gzip.compress(bytes(10**8), 1)
HOSTILE: dict[str, tuple[Callable[[BaseHTTPRequestHandler, dict[str, Any]], None], str, str, int]] = {
    # what it does; code, field and how often it is asked
    "echo": (echo, "network", "OPENAI_API_KEY", 1),
    "endless": (endless, "network", "--url", 2),
    "dripping": (dripping, "network", "--url", 2),
    "gzip": (lambda to, asked: send(to, BOMB, Content_Encoding="gzip"), "network", "--url", 2),
    "latin": (lambda to, asked: send(to, b'{"a": "\xe4"}'), "network", "--url", 2),
    "deep": (lambda to, asked: send(to, b"[" * 10**5), "network", "--url", 2),
    "patience": (lambda to, asked: send(to, {}, 429, Retry_After="999999999"), "network", "--url", 1),
    "date": (lambda to, asked: send(to, {}, 503, Retry_After="Fri, 31 Dec 2199 23:59:59 GMT"), "network", "--url", 1),
    "large": (lambda to, asked: send(to, {}, 413), "network", "--side", 1),
    "nan": (lambda to, asked: send(to, logprobs(("Yes", math.nan))), "answer", "--url", 1),
    "overflow": (lambda to, asked: send(to, b'{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Yes",'
                 b' "logprob": 1e999}]}]}}]}'), "answer", "--url", 1),
    "never": (lambda to, asked: send(to, logprobs(("Yes", -math.inf))), "answer", "--model", 1),
    "list": (lambda to, asked: send(to, [1, 2]), "answer", "--url", 1),
    "null": (lambda to, asked: send(to, None), "answer", "--url", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_server_is_one_line_and_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reply, code, field, times = HOSTILE[name]
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\r\n")
    asked: list[str] = []

    def counted(to: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        asked.append(to.headers["Authorization"])
        reply(to, question)

    started = time.monotonic()
    with server(counted) as address:
        with pytest.raises(UserError) as caught:
            endpoint.connect(address, "m", tmp_path, tries=2, wait=0.01, timeout=1.0)(PICTURES, "a?")
        assert (caught.value.code, caught.value.field) == (code, field)
        assert asked == [f"Bearer {SECRET}"] * times
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 500
    assert SECRET not in said
    assert time.monotonic() - started < 5


def test_the_key_goes_to_one_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a redirect leads, nor into what is kept, nor is one sent that is none."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    reached = []

    def elsewhere(to: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        reached.append(to.headers["Authorization"])
        send(to, logprobs(("Yes", -0.1)))

    with server(elsewhere) as other, server(lambda to, asked: send(to, {}, 307, Location=f"{other}/x")) as address:
        with pytest.raises(UserError, match=other) as caught:
            endpoint.connect(address, "m", tmp_path)(PICTURES, "a?")
        assert (caught.value.code, caught.value.field) == ("network", "--url")
        assert not reached
        endpoint.connect(other, "m", tmp_path)(PICTURES, "a?")
        assert reached == [f"Bearer {SECRET}"]
    with server(lambda to, asked: send(to, logprobs(("Yes", -0.1), (SECRET, -3)))) as address:
        endpoint.connect(address, "m", tmp_path)(PICTURES, "b?")
    assert not [path for path in tmp_path.iterdir() if SECRET in path.read_text()]
    for key in ("sk-1\r\nX: y", "sk 1", "sk-\u00e4", "sk-\x001"):
        if "\0" not in key:
            monkeypatch.setenv("OPENAI_API_KEY", key)
            with pytest.raises(UserError) as caught:
                endpoint.connect("http://localhost:1/v1", "m", tmp_path)
            assert (caught.value.code, caught.value.field) == ("value", "OPENAI_API_KEY")
            assert key not in str(caught.value)


ADDRESSES = (
    "file:///etc",
    "localhost:80",
    "http://",
    "http://me:pw@h/v1",
    "http://h/v1?k=1",
    "http://h:99999",
    "",
)


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError) as caught:
        endpoint.connect(url, "m", tmp_path)
    assert (caught.value.code, caught.value.field) == ("value", "--url")


def test_a_damaged_kept_answer_is_asked_for_again(tmp_path: Path) -> None:
    with server(lambda to, asked: send(to, logprobs(("Yes", -0.5), ("No", -1.0)))) as address:
        ask = endpoint.connect(address, "m", tmp_path)
        first = ask(PICTURES, "a?")
        [path] = tmp_path.iterdir()
        for content in ("{", "[]", '{"top": [["Yes"]]}', '{"top": [["Yes", "x"]]}', ""):
            path.write_text(content)
            assert ask(PICTURES, "a?") == first


PICTURES = film([2, 20], 8, 200)[0]


def test_nothing_is_asked_twice(port: int, tmp_path: Path) -> None:
    """Other pictures, another question and another name of the model are asked for, the same is not."""
    ask, before = endpoint.connect(url(port), "tiny", tmp_path), count(port)
    first = ask(PICTURES, "a?")
    assert ask(PICTURES, "a?") == first
    assert endpoint.connect(url(port, "down"), "tiny", tmp_path)(PICTURES.copy(), "a?") == first
    assert count(port) == before + 1
    ask(PICTURES[::-1], "a?")
    ask(PICTURES, "b?")
    assert count(port) == before + 3
    with pytest.raises(UserError) as caught:
        endpoint.connect(url(port), "other", tmp_path)(PICTURES, "a?")
    assert (caught.value.code, caught.value.field) == ("network", "--model")


def test_what_may_pass_is_tried_again(port: int, tmp_path: Path) -> None:
    """429, 503 and an answer cut off are not the last word, and 503 for ever is one clear error."""
    expected = endpoint.connect(url(port), "tiny", tmp_path / "good")(PICTURES, "a?")
    started = time.monotonic()
    assert endpoint.connect(url(port, "busy"), "tiny", tmp_path / "busy", wait=0.01)(PICTURES, "a?") == expected
    assert time.monotonic() - started >= 1  # as the server asks
    before = count(port)
    with pytest.raises(UserError, match=r"3.*503.*overloaded"):
        endpoint.connect(url(port, "down"), "tiny", tmp_path, tries=3, wait=0.01)(PICTURES, "a?")
    assert count(port) == before + 3


def test_waits_grow(port: int, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="4"):
        endpoint.connect(url(port, "down"), "tiny", tmp_path, tries=4, wait=0.05)(PICTURES, "a?")
    assert time.monotonic() - started >= 0.05 * (1 + 2 + 4)


def test_the_rate_is_kept(port: int, tmp_path: Path) -> None:
    ask, started = endpoint.connect(url(port), "tiny", tmp_path, per_minute=300), time.monotonic()
    for question in ("1?", "2?", "3?"):
        ask(PICTURES, question)
    assert time.monotonic() - started >= 2 * 60 / 300


def test_a_server_that_cannot_serve_is_one_clear_error(port: int, tmp_path: Path) -> None:
    def code(address: str, model: str = "tiny") -> str:
        with pytest.raises(UserError) as caught:
            endpoint.connect(address, model, tmp_path, tries=2, wait=0.01)(PICTURES, "a?")
        assert "\n" not in str(caught.value)
        return caught.value.code

    before = count(port)
    assert code(url(port, "mute")) == "answer"
    assert count(port) == before + 1
    assert not list(tmp_path.iterdir())
    assert code(url(port), "other") == "network"
    assert code("http://127.0.0.1:1/v1") == "network"


def test_models_that_are_none_are_refused(llava: Path, tmp_path: Path) -> None:
    for name, gone in (("bare", "chat_template.jinja"), ("torn", "model.safetensors")):
        (tmp_path / name).mkdir()
        for path in llava.iterdir():
            if path.name != gone:
                os.link(path, tmp_path / name / path.name)
    for path, code in (("bare", "unsupported"), ("torn", "format"), ("missing", "missing")):
        with pytest.raises(UserError, match=path) as caught:
            vlm.load(str(tmp_path / path), CPU)
        assert "\n" not in str(caught.value)
        assert (caught.value.code, caught.value.field) == (code, "--model")


def test_a_model_that_takes_videos_alone_is_refused(llava: Path, tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast.from_pretrained(llava)
    sees = InstructBlipVideoVideoProcessor()
    InstructBlipVideoProcessor(sees, words, words, num_query_tokens=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="InstructBlipVideoProcessor") as caught:
        vlm.load(str(tmp_path), CPU)
    assert (caught.value.code, caught.value.field) == ("unsupported", "--model")
