"""Asks a model behind an OpenAI-compatible server: POST <url>/chat/completions, pictures as data URLs, with logprobs.

Of the answer one token is wanted and the TOP likeliest in its place; "Yes" and "No" are all of them that say so, with
or without a space around them, and what is not among them counts nothing. Not every server gives logprobs, and one that
does may have to be told how many pictures a question may have (vLLM: --limit-mm-per-prompt).

Answers are kept by the pictures, the question and the model's name, so that nothing is asked twice. The key in the
environment's OPENAI_API_KEY, if there is one, is sent to the server and kept nowhere.
"""

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.judges.questions import ANSWERS, Ask, no_answer, ratio

TOP = 20  # the most that OpenAI and vLLM give
BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # what may be otherwise a little later
TIMEOUT = 300.0  # seconds for one answer
LONGEST = 60.0  # seconds between two tries, unless the server asks for more


def connect(
    url: str, model: str, cache: Path, per_minute: float | None = None, tries: int = 6, wait: float = 1.0
) -> Ask:
    """A model of a server.

    Args:
        url: up to and with its version, as http://localhost:8000/v1.
        cache: the folder where answers are kept.
        per_minute: how many requests at most; None: as many as the server answers.
        tries: of a request that fails for a reason that may pass.
        wait: seconds after the first failure; each further wait is twice as long, or as long as the server asks.

    Raises:
        UserError: the address is none. When asked: the server refuses, is not there, or gives no logprobs; or the
            answer begins with neither word.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url: {url} is no address of a server; give one as http://localhost:8000/v1")
    address, pace = f"{url.rstrip('/')}/chat/completions", _pace(per_minute)

    def ask(pictures_FHWC: np.ndarray, question: str) -> float:
        shown = [list(pictures_FHWC.shape), files.sha256_bytes(pictures_FHWC.tobytes())]
        path = cache / f"{files.sha256_json([model, question, shown])}.json"
        if not path.exists():
            answer = _post(address, _request(model, pictures_FHWC, question), pace, tries, wait)
            kept = {"model": model, "question": question, "top": likeliest(answer, f"{url}: {model}")}
            files.write_json(path, kept, flush=False)
        top = files.read_json(path)["top"]
        yes, no = (sum(math.exp(logprob) for token, logprob in top if token.strip() == word) for word in ANSWERS)
        if yes + no == 0:
            raise no_answer(model, question)
        return ratio(yes, no)

    return ask


def likeliest(answer: Any, who: str) -> list[tuple[str, float]]:
    """The likeliest first tokens of an answer with their log probabilities.

    Raises:
        UserError: there are none.
    """
    try:
        return [
            (str(t["token"]), float(t["logprob"]))
            for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        ]
    except (LookupError, TypeError, ValueError) as error:
        remedy = "use a server that does, as vLLM, or --judge vlm"
        raise UserError(f"{who} answers without logprobs (top_logprobs), which scores come from; {remedy}") from error


def _request(model: str, pictures_FHWC: np.ndarray, question: str) -> dict[str, Any]:
    seen = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures_FHWC]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}],
        "max_tokens": 1,
        "temperature": 1,  # some servers' logprobs are those after it
        "logprobs": True,
        "top_logprobs": TOP,
    }


def _data_url(picture_HWC: np.ndarray) -> str:
    """A picture without loss."""
    content = io.BytesIO()
    Image.fromarray(picture_HWC).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _pace(per_minute: float | None) -> Iterator[None]:
    """Yields not more often than so."""
    ready = -math.inf
    while True:
        time.sleep(max(0.0, ready - time.monotonic()))
        ready = time.monotonic() + (60 / per_minute if per_minute else 0)
        yield


def _post(address: str, asked: dict[str, Any], pace: Iterator[None], tries: int, wait: float) -> Any:
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    for attempt in range(tries):
        next(pace)
        request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
        pause = min(wait * 2**attempt, LONGEST)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
            reason = f"{error.code} {error.reason}: {said}"
            if error.code not in BUSY:
                raise UserError(f"{address}: refuses ({reason}); mend --url, --model or OPENAI_API_KEY") from error
            asks = error.headers.get("Retry-After", "")
            pause = max(pause, float(asks) if asks.isdecimal() else 0.0)
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            reason = str(error) or type(error).__name__
        if attempt < tries - 1:
            time.sleep(pause)
    remedy = "see that the server runs and start again, what was answered is kept"
    raise UserError(f"{address}: no answer in {tries} tries ({reason}); {remedy}")
