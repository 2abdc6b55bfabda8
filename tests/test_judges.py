"""Judges: what a score is worth by hand, a tiny LLaVA asked in this process and behind a server, and whole folders."""

import base64
import contextlib
import gzip
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from helpers import vlm_server
from helpers.falling import FPS, SIZE, RedTracker, film, rows_of, write_clip, write_dataset, write_groups
from helpers.forked import launch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipVideoProcessor,
    InstructBlipVideoVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from posttrain import cli
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import Scores, gather
from posttrain.evaluation.sample import write_video
from posttrain.judges import endpoint, simulator, vlm
from posttrain.judges.folder import find
from posttrain.judges.questions import MASS, asking, pictures, questions, spread, weigh, word

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for message in messages %}user: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} assistant:"
)


def llava_folder(out: Path) -> Path:
    """A LLaVA of random weights that likes to begin its answers with Yes or No."""
    text = " ".join(questions("square 0 1 falls.")) + " user : assistant"
    words = [*dict.fromkeys(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text))]
    vocabulary = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "Yes", " Yes", "No", *words, *map(str, range(2, 30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=["<image>"])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    sees = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, fast, **sees, chat_template=TEMPLATE).save_pretrained(out)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=8, initializer_range=0.3)
    language = LlamaConfig(
        **size, vocab_size=len(vocabulary), initializer_range=0.3, bos_token_id=2, eos_token_id=3, pad_token_id=1
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=language,
                image_token_index=vocabulary.index("<image>"),
                vision_feature_layer=-1,
            )
        )
        last_D = model.get_input_embeddings().weight[vocabulary.index(":")]  # the prompt's last token
        last_D *= 8 / last_D.norm()  # so that it tells in the end
        model.lm_head.weight[5:8] += last_D / 4
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("judges") / "llava")


@pytest.fixture(scope="module")
def port(llava: Path) -> Iterator[int]:
    """Of a server in a process of its own."""
    here, there = multiprocessing.Pipe()
    server = launch(vlm_server.serve, llava, there)
    there.close()
    yield here.recv()
    server.kill()
    server.join()


def count(port: int) -> int:
    """How many requests the server had."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/count")
    return int(connection.getresponse().read())


def url(port: int, kind: str = "good") -> str:
    return f"http://127.0.0.1:{port}/{kind}/v1"


def samples(out: Path, seeds: int = 2) -> Path:
    """What a model made of the first frames of `write_groups`."""
    for group, seed in itertools.product(range(2), range(seeds)):
        video, _ = film(rows_of(2, 5), 4 + 12 * group, 120 + 40 * seed)
        video[0] = film([2], 4 + 12 * group, 200)[0][0]
        write_video(out / f"{group:05d}-0-s{seed}.mp4", video, FPS)
    return out


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """With drops, a dataset folder of groups, and made, a folder of samples."""
    write_groups(tmp_path / "drops")
    samples(tmp_path / "made")
    with contextlib.chdir(tmp_path):
        yield tmp_path


# ---------------------------------------------------------------- questions


def test_the_questions_are_those_of_videocon_physics() -> None:
    assert questions("a cup falls.") == (
        'Does this video entail the description: "a cup falls."?',
        "Does this video follow the physical laws?",
    )


def test_an_answer_by_hand() -> None:
    assert weigh(0.3, 0.1, "", "") == pytest.approx((0.75, 0.4))
    assert weigh(0.0, 0.1, "", "") == (0, 0.1)
    for yes, no in ((1e-30, 3e-30), (0.0, 0.0), (MASS / 2.1, MASS / 2.1), (math.nan, 0.5)):
        with pytest.raises(UserError, match="me: ") as caught:
            weigh(yes, no, "me", "a?")
        assert caught.value.code == "answer"


def test_spellings_of_yes_and_no() -> None:
    for token in (
        "Yes",
        " yes",
        "YES",
        "\u0120Yes",
        "\u2581yes",
        "Yes,",
        "**Yes",
        '"Yes"',
        "\u010aYes",
        "Yes.\n",
        "\u201cyes\u201d",
    ):
        assert word(token) == "yes", token
    for token in ("No", "\u0120no", "\u2581No", "NO!", " No."):
        assert word(token) == "no", token
    for token in ("Yesterday", "not", "Now", "None", "<think>", "Ye", "", "\u0120", "N", "yes no", "\u0120\u0120noyes"):
        assert word(token) == "", token


def test_pictures_are_evenly_spread(tmp_path: Path) -> None:
    assert spread(np.arange(33) / 16, 5).tolist() == [0, 8, 16, 24, 32]
    assert spread(np.arange(10) / 16, 4).tolist() == [0, 3, 6, 9]
    assert spread(np.arange(3) / 16, 16).tolist() == [0, 1, 2]
    assert spread(np.arange(9) / 16, 1).tolist() == [0]
    assert spread(np.array([0, 0.1, 0.2, 0.3, 1.0, 2.0]), 3).tolist() == [0, 4, 5]  # by time, not by number
    video, instances = film(rows_of(2, 9), 8, 200)
    write_clip(tmp_path / "a.mp4", video, instances)
    assert (pictures(tmp_path / "a.mp4", 3) == video[[0, 4, 8]]).all()


# ---------------------------------------------------------------- the simulator


def test_severity_and_metrics_by_hand() -> None:
    assert simulator.of_severity(0.25) == (1.0, 0.75)
    assert simulator.of_metrics(l2=0.02, l2_frozen=0.08, vanished=0.1) == pytest.approx((0.9, 0.75))
    assert simulator.of_metrics(l2=0.0, l2_frozen=0.3, vanished=0.0) == (1.0, 1.0)
    assert simulator.of_metrics(l2=0.3, l2_frozen=0.3, vanished=0.0) == (1.0, 0.0)
    assert simulator.of_metrics(l2=0.0, l2_frozen=0.0, vanished=0.0) == (1.0, 1.0)  # nothing moves, in neither
    assert simulator.of_metrics(l2=0.01, l2_frozen=0.0, vanished=0.0) == (1.0, 0.0)


def test_laws_of_the_mapping() -> None:
    """Scores are in [0, 1], and no better for what is worse."""
    random = np.random.default_rng(0)
    for l2, more, frozen, vanished in random.random((200, 4)):
        some, worse = (simulator.of_metrics(value, frozen, vanished) for value in (l2, l2 + more))
        assert all(0 <= score <= 1 for score in (*some, *worse))
        assert worse.pc <= some.pc
    severities = np.linspace(0, 1, 11)
    found = [simulator.of_severity(severity).pc for severity in severities]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1.0, 0.0)


def test_samples_against_their_truth(tmp_path: Path) -> None:
    """The truth itself; two rows too low; frozen; gone in the last quarter; twice as large and at half the rate."""
    write_dataset(tmp_path / "drops", ["train"], clips=1, frames=16)
    (tmp_path / "made").mkdir()
    true = rows_of(2, 16)
    low = np.minimum(true + 2, SIZE - 6)
    low[0] = 2
    shown = {"s0": film(true, 4, 200), "s1": film(low, 4, 200), "s2": film([2] * 16, 4, 200), "s3": film(true, 4, 200)}
    shown["s3"][0][12:] = 90
    for name, (video, instances) in shown.items():
        write_clip(tmp_path / "made" / f"00000-{name}.mp4", video, instances)
    large = film(true, 4, 200)[0][::2].repeat(2, 1).repeat(2, 2)
    write_video(tmp_path / "made" / "00000-s4.mp4", large, FPS / 2)

    clips = Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False)
    judge = simulator.samples(clips, RedTracker(), CPU)
    found = [judge(tmp_path / "made" / f"00000-s{seed}.mp4", "") for seed in range(5)]
    assert found[0] == (1.0, 1.0)
    assert found[1] == pytest.approx((1.0, 1 - (low - true).mean() / (true - 2).mean()))
    assert found[2] == (1.0, 0.0)
    frozen = (true - 2).mean() / (math.sqrt(2) * SIZE)
    assert found[3] == pytest.approx((0.75, max(0.0, 1 - 0.25 / frozen)))  # where it vanished, L2 is 1
    assert found[4].sa == 1
    assert found[4].pc > 0.95  # compressed with loss


def test_short_varying_and_other_samples_are_judged_by_their_frames_own_times(tmp_path: Path) -> None:
    """Missing frames are charged; half of the frames at their own times are the truth; other clips are refused."""
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=17)
    made, true = tmp_path / "made", rows_of(2, 17)
    made.mkdir()
    write_clip(made / "00000-s0.mp4", *film(true[:9], 4, 200))
    some = np.array([0, 1, 2, 4, 5, 8, 9, 10, 11, 13, 14, 16])
    with av.open(str(made / "00000-s1.mkv"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=1000, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "rgb24"
        for k, picture in zip(some, film(true[some], 4, 200)[0], strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * k / FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_clip(made / "00000-s2.mp4", *film(rows_of(4, 17), 9, 210))
    write_clip(made / "00000-s3.mp4", *film(true[4:], 4, 200))
    judge = simulator.samples(Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False), RedTracker(), CPU)
    short, frozen = judge(made / "00000-s0.mp4", ""), (true - 2).mean() / (math.sqrt(2) * SIZE)
    assert short == pytest.approx((1 - 8 / 17, max(0.0, 1 - 8 / 17 / frozen)))
    assert judge(made / "00000-s1.mkv", "") == (1.0, 1.0)
    for name in ("00000-s2.mp4", "00000-s3.mp4"):
        with pytest.raises(UserError, match=name) as error:
            judge(made / name, "")
        assert error.value.code == "mismatch"


def test_samples_are_judged_by_the_clip_that_is_meant(tmp_path: Path) -> None:
    """Of clips called scene and scene-s2 each shall have the other's seed 2."""
    write_dataset(tmp_path / "drops", ["train"], clips=2, frames=9)
    place = tmp_path / "drops" / "train"
    rows = read_jsonl(place / "metadata.jsonl")
    for row, name in zip(rows, ("scene", "scene-s2"), strict=True):
        (place / row["file_name"]).rename(place / f"{name}.mp4")
        row |= {"file_name": f"{name}.mp4"}
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "made").mkdir()
    write_clip(tmp_path / "made" / "scene-s2.mp4", *film(rows_of(2, 9), 4, 200))
    write_clip(tmp_path / "made" / "scene-s2-s0.mp4", *film(rows_of(4, 9), 9, 210))
    found, _ = find(tmp_path / "made", tmp_path / "drops", "train")
    assert [(v.name, v.caption) for v in found] == [
        ("scene-s2-s0.mp4", "square 01 falls."),
        ("scene-s2.mp4", "square 00 falls."),
    ]
    judge = simulator.samples(Clips(DataConfig(clips=str(tmp_path / "drops")), preload=False), RedTracker(), CPU)
    assert [judge(video.path, video.caption) for video in found] == [(1.0, 1.0)] * 2
    with pytest.raises(UserError, match=r"other-s0\.mp4") as caught:
        judge(tmp_path / "made" / "other-s0.mp4", "")
    assert caught.value.code == "mismatch"


# ---------------------------------------------------------------- a model, here and behind a server


@pytest.mark.slow
def test_a_model_and_its_server_agree(llava: Path, port: int, home: Path) -> None:
    """A plain forward pass there, `generate` here; the likeliest 20 of 55 tokens there, all here."""
    here = asking(vlm.load(str(llava), CPU), frames=3)
    there = asking(endpoint.connect(url(port), "tiny", home / "cache"), frames=3)
    found = []
    for path in sorted((home / "made").iterdir()):
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


# ---------------------------------------------------------------- whole folders


def test_a_folder_of_groups_by_severity(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "drops", "--judge", "simulator"]) == 0
    rows = read_jsonl(home / "drops" / "train" / "scores.jsonl")
    assert [row["file_name"] for row in rows] == [f"0000{g}-{i}.mp4" for g in (0, 1) for i in range(4)]
    assert [(row["sa"], row["pc"]) for row in rows] == [(1.0, 1.0), (1.0, 0.75), (1.0, 0.5), (1.0, 0.25)] * 2
    assert "scores: 8 videos, on average sa 1.000, pc 0.625" in capsys.readouterr().out
    clips = Clips(DataConfig(clips="drops"), preload=False, violated=True)
    members, _ = gather(clips, GroupsConfig(counterfactuals=True))
    for row, index in zip(rows, range(8), strict=True):
        if clips.row(index).violation:
            assert members.scores(index) == (row["sa"], row["pc"])  # what groups take it for


@pytest.mark.slow
def test_samples_are_scored_where_groups_look(home: Path, llava: Path, port: int) -> None:
    """By a model and by its server, with the same result; what is no sample of a true clip is left alone."""
    write_video(home / "made" / "other-s0.mp4", film(rows_of(2, 5), 8, 200)[0], FPS)
    common = ["score", "made", "--clips", "drops", "--frames", "2"]
    assert cli.main([*common, "--judge", "vlm", "--model", str(llava)]) == 0
    config = GroupsConfig(losers=2, samples=("made",))
    members, groups = gather(Clips(DataConfig(clips="drops"), preload=False), config)
    found = [members.scores(index) for group in groups for index in sorted(group.losers)]
    assert len(set(found)) == 4
    rows = read_jsonl(home / "made" / "scores.jsonl")
    assert [Scores(row["sa"], row["pc"]) for row in rows] == found
    assert {row["judge"] for row in rows} == {f"vlm {llava}, 2 frames"}
    assert all(MASS <= row["mass"] <= 1.001 for row in rows)
    (home / "made" / "scores.jsonl").unlink()
    before = count(port)
    assert cli.main([*common, "--judge", "endpoint", "--model", "tiny", "--url", url(port)]) == 0
    assert count(port) == before + 8
    again = read_jsonl(home / "made" / "scores.jsonl")
    assert [row["file_name"] for row in again] == [row["file_name"] for row in rows]
    for old, new in zip(rows, again, strict=True):
        assert (new["sa"], new["pc"]) == pytest.approx((old["sa"], old["pc"]), abs=1e-6)


def test_samples_by_the_embedded_tracker(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores that another version of the judge gave, or an unknown one, are given again, which a line says."""
    command = ["score", "made", "--clips", "drops", "--judge", "simulator"]
    assert cli.main(command) == 0
    path = home / "made" / "scores.jsonl"
    rows = read_jsonl(path)
    assert len(rows) == 4
    assert all(0 <= row[key] <= 1 for row in rows for key in ("sa", "pc"))
    assert "another version" not in capsys.readouterr().err
    judge, older = rows[0]["judge"], [{**row, "sa": 0.123, "key": "other", "version": "other"} for row in rows[:2]]
    del older[0]["version"]
    files.write_jsonl(path, [*map(files.seal, older), *rows[2:]])
    assert cli.main(command) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "another version" in line]
    assert said == [f"made/scores.jsonl: 2 scores are of another version of {judge}; scored again"]
    assert read_jsonl(path) == rows
    damaged = [rows[0], {**rows[1], "file_name": "00009-s0.mp4"}, {**rows[2], "judge": "who"}, {**rows[3], "sa": 0.5}]
    (home / "made" / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damaged))
    assert cli.main(["score", "made", "--clips", "drops", "--judge", "simulator"]) == 0
    assert read_jsonl(home / "made" / "scores.jsonl") == rows


@pytest.mark.slow
def test_what_changed_is_scored_again_and_judges_are_not_mixed(
    home: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["score", "made", "--clips", "drops", "--frames", "2"]
    command = [*common, "--judge", "endpoint", "--model", "tiny", "--url", url(port)]
    assert cli.main(command) == 0
    rows, before = read_jsonl(home / "made" / "scores.jsonl"), count(port)
    assert cli.main(command) == 0
    assert count(port) == before
    write_video(home / "made" / "00001-0-s0.mp4", film([2, 2, 3, 4, 9], 16, 250)[0], FPS)
    assert cli.main(command) == 0
    assert count(port) == before + 2
    again = read_jsonl(home / "made" / "scores.jsonl")
    assert [row["file_name"] for row in again] == [row["file_name"] for row in rows]
    assert [old == new for old, new in zip(rows, again, strict=True)] == [True, True, False, True]
    capsys.readouterr()
    assert cli.main([*command, "--frames", "3"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("made/scores.jsonl: ")
    assert said.endswith("[other_run]")
    assert read_jsonl(home / "made" / "scores.jsonl") == again


def scored(home: Path, command: list[str]) -> None:
    os.chdir(home)
    raise SystemExit(cli.main(command))


@pytest.mark.slow
def test_a_killed_scoring_continues(home: Path, port: int) -> None:
    """SIGKILL after the second row of eight; then only what is missing is asked, at most one clip's answers twice."""
    command = ["score", "drops", "--judge", "endpoint", "--model", "tiny", "--url", url(port, "slow"), "--frames", "2"]
    path, before = home / "drops" / "train" / "scores.jsonl", count(port)
    process = launch(scored, home, command)
    while not path.exists() or len(read_jsonl(path)) < 2:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = read_jsonl(path)
    assert 2 <= len(kept) < 8
    command[7] = url(port)
    assert cli.main(command) == 0
    rows = read_jsonl(path)
    assert rows[: len(kept)] == kept
    assert len(rows) == 8
    assert 16 <= count(port) - before <= 17


@pytest.mark.parametrize(
    ("command", "begins", "code"),
    [
        (["made", "--judge", "vlm", "--clips", "drops"], "--model: ", "required"),
        (["made", "--judge", "endpoint", "--model", "m"], "--url: ", "required"),
        (["drops", "--judge", "simulator", "--model", "m"], "--model: ", "conflict"),
        (["made", "--judge", "vlm", "--model", "m", "--rate", "3"], "--rate: ", "conflict"),
        (["made", "--judge", "vlm", "--model", "m", "--side", "64"], "--side: ", "conflict"),
        (["drops", "--judge", "simulator", "--clips", "drops"], "drops: ", "no_clips"),
        (["made", "--judge", "simulator"], "made/00000-0-s0.mp4: ", "required"),
        (["missing", "--judge", "simulator"], "missing: ", "no_clips"),
    ],
)
def test_what_does_not_go_together_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], command: list[str], begins: str, code: str
) -> None:
    assert cli.main(["score", *command]) == 1
    line = capsys.readouterr().err
    assert line.startswith(begins)
    assert line.endswith(f" [{code}]\n")
    assert line.count("\n") == 1
