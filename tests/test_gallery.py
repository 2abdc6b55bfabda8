"""`posttrain sample`: a picture and a prompt in; clips, a contact sheet and a GIF out."""

import contextlib
import io
import itertools
import shutil
import struct
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from helpers.falling import RedTracker, write_dataset
from helpers.tiny import wan_folder
from PIL import Image

from posttrain import cli
from posttrain.commands import sampling
from posttrain.commands.experiment import open_run
from posttrain.core import files
from posttrain.core.codec import inspect, read_video
from posttrain.core.errors import UserError
from posttrain.evaluation.benchmarks.pisabench import open_benchmark
from posttrain.evaluation.evaluate import EvalConfig, evaluate, validation
from posttrain.evaluation.sample import write_video
from posttrain.evaluation.score import sample_missing
from posttrain.models.base import AdapterConfig, Defaults, ModelConfig, sampler
from posttrain.models.wan.loading import load
from posttrain.models.wan.published import defaults
from posttrain.reporting.gallery import (
    LINE,
    Wish,
    animation,
    contact_sheet,
    fit,
    natural_size,
    open_picture,
    sample_side_by_side,
)
from posttrain.training.checkpoints import start_fingerprint


def test_the_middle_of_a_picture_is_kept(tmp_path: Path) -> None:
    stripes = np.repeat(np.arange(12, dtype=np.uint8)[None, :, None] * 20, 4, axis=0).repeat(3, axis=2)  # 12 x 4
    pixels, done = fit(Image.fromarray(stripes), (4, 4))
    assert np.array_equal(pixels, stripes[:, 4:8])
    assert done == "12 x 4, its middle 4 x 4 kept"
    pixels, done = fit(Image.fromarray(stripes), (8, 16))
    assert pixels.shape == (8, 16, 3)
    assert done == "12 x 4, its middle 8 x 4 kept, resized to 16 x 8"
    assert np.abs(pixels[0, [0, -1], 0].astype(int) - [40, 180]).max() <= 5  # stripes 2 and 9
    assert fit(Image.fromarray(stripes), (4, 12))[1] == "12 x 4"

    lying = Image.fromarray(stripes)
    exif = lying.getexif()
    exif[0x0112] = 6  # a camera held upright
    lying.save(tmp_path / "upright.png", exif=exif)
    assert open_picture(tmp_path / "upright.png").size == (4, 12)


@pytest.mark.parametrize(("size", "expected"), [((1920, 1080), (448, 832)), ((100, 50), (32, 96)), ((9, 9), (32, 32))])
def test_the_size_that_a_picture_asks_for(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert natural_size(Image.new("RGB", size), (480, 832), 32) == expected


def test_a_video_gives_its_first_picture_upright(tmp_path: Path) -> None:
    clip = np.repeat(np.arange(3, dtype=np.uint8)[:, None, None, None] * 60 + 40, 32, 1).repeat(48, 2).repeat(3, 3)
    clip[:, :16] += 60
    write_video(tmp_path / "a.mp4", clip, 8)
    picture = np.asarray(open_picture(tmp_path / "a.mp4")).astype(int)
    assert np.abs(picture - clip[0]).max() < 8
    content = (tmp_path / "a.mp4").read_bytes()
    at = content.index(b"tkhd") + 44
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # by 90 degrees, clockwise
    (tmp_path / "turned.mp4").write_bytes(content[:at] + turned + content[at + 36 :])
    assert np.array_equal(np.asarray(open_picture(tmp_path / "turned.mp4")), np.rot90(picture, -1))
    (tmp_path / "damaged.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"damaged\.mp4: ") as error:
        open_picture(tmp_path / "damaged.mp4")
    assert error.value.code == "damaged"


def test_sheet_and_gif_show_the_frames(tmp_path: Path) -> None:
    ramp = np.linspace(0, 250, 16).astype(np.uint8)[:, None, None, None] * np.ones((1, 64, 32, 3), np.uint8)
    contact_sheet(tmp_path / "sheet.png", {"one": ramp, "two": ramp[::-1]})
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (128 + 14), 8 * 64, 3)
    chosen = ramp[[0, 2, 4, 6, 9, 11, 13, 15], 0, 0, 0]
    assert sheet[64, 32::64, 0].tolist() == chosen.tolist()
    assert sheet[128 + 14 + 64, 32::64, 0].tolist() == chosen[::-1].tolist()

    animation(tmp_path / "clips.gif", [[ramp, ramp[::-1]]], 16, ["one", "two"])
    gif = Image.open(tmp_path / "clips.gif")
    assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (16, (128, 142), 60, 0)
    for number in (0, 7, 15):
        gif.seek(number)
        pixels = np.asarray(gif.convert("RGB")).astype(int)
        assert abs(pixels[78, 32, 0] - int(ramp[number, 0, 0, 0])) <= 8
        assert abs(pixels[78, 96, 0] - int(ramp[15 - number, 0, 0, 0])) <= 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a finished run of it and a picture."""
    path = tmp_path_factory.mktemp("home")
    wan_folder(path / "wan")
    wan = load(ModelConfig(path=str(path / "wan"), adapter=AdapterConfig(rank=2, alpha=4)))
    start = start_fingerprint(wan.module)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in wan.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    run = path / "runs" / "try"
    wan.save(run / "adapter")
    recipe = {
        "run": "try",
        "model": {"path": "wan", "adapter": {"rank": 2, "alpha": 4}},
        "data": {"clips": "drops"},
        "method": {"name": "psft"},
        "train": {"steps": 1, "batch": 1, "lr": 0.01},
        "eval": {"clips": "drops", "sampler": {"steps": 2, "guidance": 1.0}},
    }
    files.write_text(run / "recipe.yaml", yaml.safe_dump(recipe))
    files.write_json(run / "trained.json", {"model": start, "sha256": files.sums(run / "adapter")})
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "first.png")
    return path


def sampled(home: Path, target: str, *more: str, image: str | None = "first.png") -> tuple[int, str, str]:
    """Exit code, output and errors of `posttrain sample TARGET --image IMAGE --prompt ... MORE`."""
    arguments = ["sample", target, *(["--image", image] if image else []), "--prompt", "a duck falls.", *more]
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def test_what_is_left_out_is_as_the_models_authors_have_it() -> None:
    assert defaults("pocket") == Defaults(frames=33, size=(64, 64), fps=16, steps=12, guidance=1.0, guidance_low=None)
    for path in ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "/models/Wan2.2-TI2V-5B-Diffusers"):
        assert defaults(path)[:4] == (121, (704, 1280), 24, 50)
    assert defaults("mine") == defaults("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    two = defaults("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    assert sampler(two) == {"steps": 40, "guidance": 4.0, "guidance_low": 3.0}
    assert sampler(two, {"steps": 9}) == {"steps": 9, "guidance": 4.0, "guidance_low": 3.0}
    assert sampler(two, {"guidance": 6.0}) == {"steps": 40, "guidance": 6.0, "guidance_low": None}
    low = {"steps": 9, "guidance": 5.0, "guidance_low": 2.0, "size": (1, 1)}
    assert sampler(defaults("mine"), low) == {"steps": 9, "guidance": 5.0, "guidance_low": 2.0}
    assert sampler(defaults("mine"), low, {"guidance": 1.0})["guidance_low"] is None


@pytest.mark.parametrize("fps", [16, 12.5, 24000 / 1001])
def test_a_video_plays_as_fast_as_it_should(tmp_path: Path, fps: float) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", clip, fps)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate or 0) == pytest.approx(fps, rel=1e-6)
    assert float(1 / np.median(np.diff(inspect(tmp_path / "clip.mp4").times))) == pytest.approx(fps, rel=1e-4)


@pytest.mark.slow
def test_the_second_expert_has_its_own_guidance(tmp_path: Path) -> None:
    wan_folder(tmp_path / "two", "wan2.2-t2v-a14b")
    Image.new("RGB", (32, 32), (90, 120, 30)).save(tmp_path / "first.png")
    shown = []
    for low in ("9", "1"):
        arguments = ("--steps", "6", "--guidance", "9", "--guidance-low", low, "--output", low)
        code, _, said = sampled(tmp_path, "two", *SMALL, *arguments)
        assert code == 0, said
        shown.append(frames(tmp_path / low / "first-s0-two.mp4"))
    assert np.abs(shown[0] - shown[1]).mean() > 0.1  # it answers at the end alone


def test_a_run_is_sampled_as_it_was_measured(home: Path) -> None:
    plan, _ = open_run(str(home / "runs" / "try"))
    measured = plan.model_copy(update={"eval": EvalConfig(clips="x", sampler={"steps": 3, "guidance_low": 2.0})})
    assert sampling.as_evaluated(measured) == {"steps": 3, "guidance": 1.0, "guidance_low": 2.0}


@pytest.mark.parametrize(("path", "device", "dtype"), [("wan", "cpu", "fp32"), ("wan", "cuda", "bf16"),
                                                       ("pocket", "cuda", "fp32")])  # fmt: skip
def test_a_model_alone_is_bf16_on_a_gpu(path: str, device: str, dtype: str) -> None:
    for pictured, conditioning in ((True, "image"), (False, "text")):
        config = sampling.alone(path, pictured, torch.device(device))
        assert (config.path, config.dtype, config.conditioning) == (path, dtype, conditioning)


def test_videos_are_made_without_what_the_caller_does_not_want(home: Path, tmp_path: Path) -> None:
    """Where there is guidance; and no benchmark's words are said beside it."""
    write_dataset(tmp_path / "drops", ["test_seen"], clips=1, frames=5)
    model, said = load(ModelConfig(path=str(home / "wan"))), list[list[int]]()
    model.text_encoder.register_forward_hook(lambda part, given, out: said.extend(given[0].tolist()))
    kind, benchmark = {"frames": 5, "fps": 16, "size": [32, 32]}, open_benchmark(tmp_path / "drops")
    for guidance, told in ((2.0, ["square 00 falls.", "a duck that melts"]), (1.0, ["square 00 falls."])):
        ready = partial(contextlib.nullcontext, model)
        sample_missing(
            ready, benchmark, tmp_path / str(guidance), kind, 1, 1, 1, guidance, negative="a duck that melts"
        )
        assert said == model.tokenizer(told, padding="max_length", max_length=512).input_ids
        said.clear()


@pytest.mark.slow
def test_all_texts_are_encoded_before_anything_is_sampled(home: Path, tmp_path: Path) -> None:
    """So that the text encoder and the transformer are not on the device together."""
    write_dataset(tmp_path / "drops", ["test_seen", "test_unseen"], clips=3, frames=5)
    calls: list[str] = []

    @contextlib.contextmanager
    def ready() -> Iterator[Any]:
        model = load(ModelConfig(path=str(home / "wan")))
        assert model.text_encoder is not None
        model.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
        model.transformer.register_forward_hook(lambda *_: calls.append("velocity"))
        yield model

    def order() -> list[str]:
        found = [name for name, _ in itertools.groupby(calls)]
        calls.clear()
        return found

    wish = Wish("a duck falls.", (32, 32), 5, 16, 2, 2.0, seeds=(0, 1))
    sample_side_by_side({"a": ready}, np.zeros((32, 32, 3), np.uint8), wish, tmp_path / "clip")
    assert order() == ["text", "velocity"]
    kind = {"frames": 5, "fps": 16, "size": [32, 32]}
    sample_missing(ready, open_benchmark(tmp_path / "drops"), tmp_path / "out", kind, 2, 2, 2, 2.0)
    assert order() == ["text", "velocity"]
    sample_missing(ready, open_benchmark(tmp_path / "drops"), tmp_path / "few", kind, 1, 2, 2, 2.0, texts_kept=4)
    assert order() == ["text", "velocity"] * 2  # but of six captions four are kept, so that any number has room
    for path in (tmp_path / "few").rglob("*.mp4"):
        same = read_video(tmp_path / "out" / path.relative_to(tmp_path / "few"))
        assert np.array_equal(read_video(path), same)
    config = EvalConfig(clips=str(tmp_path / "drops"), seeds=2, batch=2, every=1, sampler={"steps": 2, "guidance": 2})
    evaluate(tmp_path / "run", config, {"base": ready}, RedTracker())
    assert order() == ["text", "velocity"]
    with ready() as model:
        validate = validation(tmp_path / "run", config, model, RedTracker())
        assert order() == ["text"]
        validate(1)
        assert order() == ["velocity"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_a_model_is_gone_before_the_next_is_loaded(home: Path, tmp_path: Path, adapter: AdapterConfig | None) -> None:
    """Two of them may be more than the device holds."""
    loaded: list[weakref.ref[Any]] = []

    @contextlib.contextmanager
    def ready() -> Iterator[Any]:
        assert all(part() is None for part in loaded)
        model = load(ModelConfig(path=str(home / "wan"), adapter=adapter))
        loaded.extend(weakref.ref(part) for part in (model, model.transformer, model.vae, model.text_encoder))
        yield model

    wish = Wish("a duck falls.", (32, 32), 5, 16, 1, 1.0)
    sample_side_by_side({name: ready for name in "abc"}, np.zeros((32, 32, 3), np.uint8), wish, tmp_path / "clip")
    assert len(loaded) == 12


SMALL = ("--height", "32", "--width", "32", "--frames", "5")


@pytest.mark.slow
def test_base_and_tuned_stand_side_by_side(home: Path) -> None:
    code, out, said = sampled(home, "try", *SMALL, "--seed", "3", "4", "--fps", "7.5", "--scale", "0.5")
    assert code == 0, said
    assert "first.png: 60 x 40, its middle 40 x 40 kept, resized to 32 x 32; 5 frames, 2 steps, guidance 1\n" in out
    folder = home / "runs" / "try" / "samples" / "asked"
    clips = [f"first-s{seed}-{label}.mp4" for seed in (3, 4) for label in ("base", "psft-x0.5")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([".lock", *clips, "first.gif", "first.png"])
    with av.open(str(folder / clips[0])) as container:
        assert container.streams.video[0].average_rate == 7.5
    assert Image.open(folder / "first.gif").size == (2 * 128, 2 * 128 + 14)
    assert Image.open(folder / "first.png").size == (5 * 128, 4 * (128 + 14))
    shown = {name: frames(folder / name) for name in clips}
    first, *others = shown.values()
    assert all(np.abs(first[0] - other[0]).mean() < 4 for other in others)  # the picture
    assert all(np.abs(first - other).mean() > 1 for other in others)  # another seed, another model


@pytest.mark.slow
def test_a_model_alone_is_the_base_of_its_run_and_scale_0_too(home: Path) -> None:
    """By the contact sheets, which lose nothing; how a video is coded turns on a rounded grey level."""
    for target, more in (("try", ("--scale", "0")), ("wan", ("--steps", "2", "--guidance", "1"))):
        code, _, said = sampled(home, target, *SMALL, *more, "--output", target + "-compared")
        assert code == 0, said
    both, one = (
        np.asarray(Image.open(home / f"{target}-compared" / "first.png")).astype(int) for target in ("try", "wan")
    )
    base, none = (row[:-LINE] for row in np.split(both, 2))
    for same in (none, one[:-LINE]):
        assert np.abs(base - same).max() <= 1


@pytest.mark.slow
def test_what_is_conditioned_on_text_takes_no_picture(home: Path) -> None:
    """Neither a run that was trained so nor its base, which then stands for itself too."""
    shutil.copytree(home / "runs" / "try", home / "runs" / "words")
    path = home / "runs" / "words" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(recipe | {"run": "words", "model": recipe["model"] | {"conditioning": "text"}}))
    code, out, said = sampled(home, "words", *SMALL, "--output", "told", image=None)
    assert code == 0, said
    assert out.startswith("text: 32 x 32; 5 frames, 2 steps, guidance 1\n")
    code, _, said = sampled(home, "wan", *SMALL, "--steps", "2", "--guidance", "1", "--output", "told", image=None)
    assert code == 0, said
    base, tuned, alone = (frames(home / "told" / f"a-duck-falls-s0-{name}.mp4") for name in ("base", "psft", "wan"))
    assert np.abs(base - alone).mean() < 0.5
    assert np.abs(base - tuned).mean() > 1
    code, _, said = sampled(home, "words", *SMALL)
    assert code == 1
    assert said.startswith("--image: words was trained without first frames")


@pytest.mark.parametrize("target", ["try", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"])
def test_what_continues_a_picture_needs_one(home: Path, target: str) -> None:
    code, _, said = sampled(home, target, *SMALL, image=None)
    assert code == 1
    assert said.startswith(f"--image: is missing; {target} ")
    assert " a first frame; name one" in said
    assert said.count("\n") == 1


def test_what_cannot_be_sampled_is_one_line(home: Path) -> None:
    (home / "words.png").write_text("no picture")
    for target, more, expected in (
        ("try", ("--image", "nothing.png"), "nothing.png: does not exist; name a picture"),
        ("try", ("--image", "words.png"), "words.png: cannot be read as a picture; give a PNG, JPEG or WebP file"),
        ("try", ("--height", "32"), "--height, --width: give both or neither"),
        ("wan", ("--scale", "2"), "--scale: wan is not a run and has no adapter; leave it out or name a run"),
        ("nowhere", SMALL, "model.path: nowhere does not exist; give 'pocket', a diffusers folder or a hub id"),
        (
            "try",
            ("--height", "32", "--width", "32", "--frames", "6"),
            "--frames, --height, --width: 6 frames of 32 x 32 do not fit the model; "
            "make clips of 4k + 1 frames with sides in multiples of 16 x 16",
        ),
    ):
        code, _, said = sampled(home, target, *more)
        assert code == 1
        assert said.splitlines()[-1].startswith(expected)


def test_a_run_of_whole_weights_has_no_scale(home: Path) -> None:
    run = home / "runs" / "whole"
    wan = load(ModelConfig(path=str(home / "wan")))
    wan.save(run / "adapter")
    text = (home / "runs" / "try" / "recipe.yaml").read_text()
    files.write_text(
        run / "recipe.yaml", yaml.safe_dump(yaml.safe_load(text) | {"run": "whole", "model": {"path": "wan"}})
    )
    digests = files.sums(run / "adapter")
    files.write_json(run / "trained.json", {"model": start_fingerprint(wan.module), "sha256": digests})
    code, _, said = sampled(home, "whole", *SMALL, "--scale", "0.5")
    assert code == 1
    assert "whole has no adapter, because all weights were trained; leave it out" in said.splitlines()[-1]
    with pytest.raises(UserError, match="does not exist"):
        open_picture(home / "nothing.png")
