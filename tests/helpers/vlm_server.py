"""An OpenAI-compatible server of a tiny model, for the tests of judges.

The server answers POST <kind>/v1/chat/completions: `good` at once; `slow` after a quarter of a second; `busy` with 429,
503 and a truncated answer before each good one; `down` always with 503; `mute` without logprobs. GET returns the number
of requests so far.
"""

import base64
import io
import json
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def complete(model: Any, processor: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request `asked`: one token, by a plain forward pass."""
    assert asked["max_tokens"] == 1
    images, chat = [], []
    for message in asked["messages"]:
        content = []
        for part in message["content"]:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                images.append(Image.open(io.BytesIO(base64.b64decode(data))))
                content.append({"type": "image"})
            else:
                content.append(part)
        chat.append({"role": message["role"], "content": content})
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    with torch.no_grad():
        logits_V = model(**processor(text=[text], images=images, return_tensors="pt")).logits[0, -1]
    values, tokens = (logits_V / asked["temperature"]).log_softmax(-1).topk(asked["top_logprobs"])
    top = [
        {"token": processor.tokenizer.decode([token]), "logprob": value}
        for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": top[0]["token"]}, "finish_reason": "length"}
    return {
        "object": "chat.completion",
        "choices": [choice | {"logprobs": {"content": [top[0] | {"top_logprobs": top}]}}],
    }


class Handler(BaseHTTPRequestHandler):
    requests = 0
    complete: Any  # set by `serve`

    def reply(self, status: int, value: Any, promised: int | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(promised or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply(200, Handler.requests)

    def do_POST(self) -> None:
        kind, _, rest = self.path[1:].partition("/")
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if rest != "v1/chat/completions" or asked["model"] != "tiny":
            return self.reply(404, {"error": {"message": f"no model {asked['model']}"}})
        Handler.requests += 1
        if kind == "down" or (kind == "busy" and Handler.requests % 4 == 2):
            return self.reply(503, {"error": {"message": "overloaded"}})
        if kind == "busy" and Handler.requests % 4 == 1:
            return self.reply(429, {"error": {"message": "too many requests"}})
        if kind == "busy" and Handler.requests % 4 == 3:
            return self.reply(200, "torn", promised=1000)
        if kind == "slow":
            time.sleep(0.25)
        answer = Handler.complete(asked)
        if kind == "mute":
            answer["choices"][0]["logprobs"] = None
        self.reply(200, answer)

    def log_message(self, *_: Any) -> None: ...


def serve(folder: Path, port: Connection) -> None:
    """Serve the model of `folder` until the process is killed; sends the port's number through `port`."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    Handler.complete = partial(complete, model, AutoProcessor.from_pretrained(folder))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        port.send(server.server_port)
        server.serve_forever()
