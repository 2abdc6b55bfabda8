"""The judge behind an OpenAI-compatible server: POST <url>/chat/completions, pictures as data URLs, with logprobs.

A request asks for one answer token and its 20 most likely alternatives, or as many as the server returns; all others
count as probability 0. If a server requires `max_completion_tokens`, or its own `temperature`, the request is changed.
Not every server returns logprobs. Some must be configured for the number of pictures in a request (vLLM:
--limit-mm-per-prompt).

A server is not trusted: an answer must have at most LARGEST bytes, be uncompressed and arrive in time; redirects are
not followed; its text is shown on one short line, without control characters. Answers are cached by pictures, question
and model name, so no request is repeated. The key in the environment variable OPENAI_API_KEY, if any, is sent only to
the server's address, and neither printed nor stored.
"""

import asyncio
import base64
import io
import json
import math
import os
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from PIL import Image

from posttrain.core import files
from posttrain.core.errors import UserError, printable
from posttrain.judges.questions import Answer, Ask, weigh, word

KEY = "OPENAI_API_KEY"
TOPS = (20, 10, 5)  # top_logprobs: OpenAI and vLLM give 20, others fewer
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # what may be otherwise a little later
TIMEOUT = 300.0  # seconds for one answer, from the first byte sent to the last one read
LARGEST = 2**20  # bytes of one answer; 20 tokens take 2,000
LONGEST = 60.0  # seconds between two tries, unless the server asks for more
PATIENCE = 600.0  # seconds, the most that it may ask for


class Reply(NamedTuple):
    """A server's reply: its status, headers with lower-case names, and body."""

    status: int
    headers: httpx.Headers
    body: bytes


def connect(
    url: str,
    model: str,
    cache: Path,
    per_minute: float | None = None,
    side: int | None = None,
    tries: int = 6,
    wait: float = 1.0,
    timeout: float = TIMEOUT,
) -> Ask:
    """A judge's model that runs on a server.

    Args:
        url: the address including the version, such as http://localhost:8000/v1.
        cache: the folder for cached answers.
        per_minute: the largest number of requests per minute; None: no limit.
        side: the longer side of larger pictures after scaling down, pixels; None: no scaling.
        tries: number of tries of a request that fails for a temporary reason.
        wait: seconds after the first failure; each further wait is twice as long, or as long as the server asks.
        timeout: seconds for one answer.

    Raises:
        UserError: value: the address is invalid, or the key cannot be sent. When called: network: the server cannot be
            reached, refuses, redirects, or stays busy; answer: no usable logprobs, or neither yes nor no.
    """
    address, headers = _address(url), _headers()
    ways, pace = {"top": TOPS[0], "limit": "max_tokens", "temperature": 1}, _pace(per_minute)

    def ask(pictures_FHWC: np.ndarray, question: str) -> Answer:
        shown = [list(pictures_FHWC.shape), files.sha256_bytes(pictures_FHWC.tobytes()), *([side] if side else [])]
        path = cache / f"{files.sha256_json([model, question, shown])}.json"
        top = _kept(path)
        if top is None:
            content = _content(pictures_FHWC, question, side)
            answer = _ask(address, headers, ways, model, content, pace, tries, wait, timeout)
            top = likeliest(answer, f"{address}: {model}")
            files.write_sealed(path, {"model": model, "question": question, "top": top}, flush=False)
        yes, no = (sum(math.exp(logprob) for token, logprob in top if word(token) == w) for w in ("yes", "no"))
        return weigh(yes, no, model, question)

    return ask


def likeliest(answer: Any, who: str) -> list[tuple[str, float]]:
    """The most likely first tokens of an answer with their log probabilities, without those of probability 0.

    Raises:
        UserError: answer: there are no log probabilities, or invalid ones.
    """
    try:
        top = [
            (_clean(str(t["token"]), 100), float(t["logprob"]))
            for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][:100]
        ]
    except (LookupError, TypeError, ValueError) as error:
        remedy = "use a server that returns them, such as vLLM, or --judge vlm"
        reason = f"{who} answers without logprobs (top_logprobs), from which scores are computed; {remedy}"
        raise UserError(reason, "answer", "--url") from error
    if not all(logprob <= 0.01 for _, logprob in top):  # nan as well
        raise UserError(
            f"{who} answers with logprobs that are not valid ({printable(top)}); fix the server", "answer", "--url"
        )
    return [(token, logprob) for token, logprob in top if logprob > -math.inf]


def _kept(path: Path) -> list[tuple[str, float]] | None:
    """The tokens of a cached answer; None if there is none or it is damaged, so that the request is repeated."""
    try:
        return [(str(token), min(0.0, float(logprob))) for token, logprob in files.read_sealed(path)["top"]]
    except (UserError, LookupError, TypeError, ValueError):
        return None


def _address(url: str) -> str:
    try:
        parts = httpx.URL(url.strip())
        whole = parts.scheme in ("http", "https") and parts.host and 0 <= (parts.port or 0) < 2**16
        bare = not (parts.userinfo or parts.query or parts.fragment)
    except httpx.InvalidURL:
        whole = bare = False
    if not (whole and bare):
        remedy = f"give one such as http://localhost:8000/v1, and the key in {KEY}"
        raise UserError(f"--url: {_clean(url)} is not the address of a server; {remedy}", "value", "--url")
    return f"{url.strip().rstrip('/')}/chat/completions"


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _headers() -> dict[str, str]:
    key = _key()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"{KEY}: has a space or another character that is not allowed in a key; set it again", "value", KEY
        )
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {key}"} if key else {})


def _clean(text: str, most: int = 200) -> str:
    """A server's text, safe to print and store: on one line, without the key."""
    return printable(text.replace(_key(), "***") if _key() else text, most)


def _content(pictures_FHWC: np.ndarray, question: str, side: int | None) -> list[dict[str, Any]]:
    """The content of a chat message: the pictures, then the question."""
    seen = [{"type": "image_url", "image_url": {"url": _data_url(picture, side)}} for picture in pictures_FHWC]
    return [*seen, {"type": "text", "text": question}]


def _data_url(picture_HWC: np.ndarray, side: int | None) -> str:
    """A data URL of the picture as PNG, scaled down if its longer side is above `side`."""
    picture, content = Image.fromarray(picture_HWC), io.BytesIO()
    if side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _pace(per_minute: float | None) -> Iterator[None]:
    """Iterator that waits, so that it yields at most `per_minute` times a minute."""
    ready = -math.inf
    while True:
        time.sleep(max(0.0, ready - time.monotonic()))
        ready = time.monotonic() + (60 / per_minute if per_minute else 0)
        yield


def _ask(
    address: str,
    headers: dict[str, str],
    ways: dict[str, Any],
    model: str,
    content: list[dict[str, Any]],
    pace: Iterator[None],
    tries: int,
    wait: float,
    timeout: float,
) -> Any:
    """The answer's JSON. `ways` holds the request options; it is updated when the server refuses one of them."""
    attempt, reason = 0, ""
    while attempt < tries:
        next(pace)
        asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}]}
        asked |= {ways["limit"]: 1, "logprobs": True, "top_logprobs": ways["top"]}
        if ways["temperature"] is not None:  # some servers' logprobs are those after it
            asked |= {"temperature": ways["temperature"]}
        pause = min(wait * 2**attempt, LONGEST)
        try:
            reply = asyncio.run(_post(address, headers, json.dumps(asked).encode(), timeout))
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            reason = _clean(str(error)) or f"{type(error).__name__} after {timeout:g} s"
        else:
            said = _clean(reply.body[:2000].decode(errors="replace"))
            if reply.status == 200:
                try:
                    return json.loads(reply.body)
                except (ValueError, RecursionError):  # truncated, or not UTF-8
                    reason = f"its answer is not JSON: {said}"
            elif reply.status in (400, 422) and _learn(ways, said.lower()):
                continue
            elif reply.status not in BUSY:
                raise _refusal(address, reply, said)
            else:
                reason = f"{reply.status}: {said}"
                pause = max(pause, _asked(reply.headers.get("Retry-After", "")))
                if pause > PATIENCE:
                    message = f"{address}: is busy, and asks to try again in {pause / 3600:.1f} hours ({said})"
                    raise UserError(f"{message}; start again then; answers so far are kept", "network", "--url")
        attempt += 1
        if attempt < tries:
            time.sleep(pause)
    remedy = "check that the server runs and start again; answers so far are kept"
    raise UserError(f"{address}: no answer in {tries} tries ({reason}); {remedy}", "network", "--url")


async def _post(address: str, headers: dict[str, str], content: bytes, timeout: float) -> Reply:
    """One request; whatever the server does, it ends in time and takes LARGEST bytes at most."""
    async with asyncio.timeout(timeout), httpx.AsyncClient(timeout=timeout, follow_redirects=False) as client:
        async with client.stream("POST", address, headers=headers, content=content) as response:
            body = bytearray()
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise httpx.DecodingError("the answer is compressed, which was not requested")
            async for part in response.aiter_raw():
                body += part
                if len(body) > LARGEST:
                    raise httpx.DecodingError(f"the answer has more than {LARGEST} bytes")
            return Reply(response.status_code, response.headers, bytes(body))


def _learn(ways: dict[str, Any], said: str) -> bool:
    """Whether a refusal is about a request option that can be changed; if so, `ways` is changed."""
    if "max_completion_tokens" in said and ways["limit"] == "max_tokens":
        ways["limit"] = "max_completion_tokens"
    elif "logprobs" in said and ways["top"] > TOPS[-1]:
        ways["top"] = TOPS[TOPS.index(ways["top"]) + 1]
    elif "temperature" in said and ways["temperature"] is not None:
        ways["temperature"] = None
    else:
        return False
    return True


def _refusal(address: str, reply: Reply, said: str) -> UserError:
    """The error for a refusal that will not change if the request is repeated."""
    if 300 <= reply.status < 400:
        where = _clean(reply.headers.get("Location", "nowhere"))
        remedy = "the key is not sent there; if that is the right server, give its address as --url"
        return UserError(f"{address}: redirects to {where}; {remedy}", "network", "--url")
    fields = {401: KEY, 403: KEY, 404: "--model", 413: "--side"}
    remedies = {
        KEY: f"set {KEY} to a key that may use this model",
        "--model": "see that --url ends as in /v1, and that the server has this --model",
        "--side": "make the pictures smaller, as by --side 512, or show fewer, as by --frames 8",
    }
    field = fields.get(reply.status, "--url")
    remedy = remedies.get(field, "read its message; smaller or fewer pictures (--side, --frames) may help")
    return UserError(f"{address}: refuses ({reply.status}: {said}); {remedy}", "network", field)


def _asked(header: str) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; 0 if it is neither."""
    try:
        return float(header) if header.isdecimal() else parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
