"""posttrain/metrics/retimed.py: true clips of a simulated drop, brought to other rates as converters do, in real files.

What is measured in seconds is that of the clips before, or it is said that it cannot be measured.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from posttrain.core.codec import read_video
from posttrain.data.dataset import to_float
from posttrain.evaluation import score
from posttrain.evaluation.benchmarks.base import ClipScore
from posttrain.evaluation.benchmarks.pisabench import Truth, open_benchmark
from posttrain.evaluation.records import Record, unequal
from posttrain.metrics import retimed
from sim.cli import make

CLIPS, FPS = 6, 16
WORLD = """
out: {out}
world: {{name: drop, width: 64, height: 64, frames: {frames}, fps: {fps}, dropped: [1, 1], pile: [0, 0],
  drop: [0.5, 0.8], size: [0.3, 0.4], region: [0.7, 0.0], camera_gap: 1.6, camera_height: [0.5, 0.5],
  camera_step: [0.0, 0.0], target_pixels: [12, 24], texture: 0.0, studio: true, restitution: [0.1, 0.3]}}
renderer: {{name: gl, supersample: 2}}
splits: {{test_unseen: {clips}}}
seed: 5
"""
ENCODERS = {
    ".mp4": ("libx264", "yuv420p", {"crf": "18"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "20", "b:v": "0", "cpu-used": "6"}),
    ".gif": ("gif", "rgb8", {}),
}


def drops(folder: Path, fps: float = FPS, frames: int = 33, clips: int = CLIPS) -> Sequence[Truth]:
    recipe = folder / "drop.yaml"
    recipe.write_text(WORLD.format(out=folder / "drops", fps=fps, frames=frames, clips=clips))
    make(recipe, workers=1)
    truths = open_benchmark(str(folder / "drops"), None, "", folder / "cache")["test_unseen"]
    at = folder / "drops" / "test_unseen"
    return [replace(truth, row=replace(truth.row, file_name=str(at / truth.row.file_name))) for truth in truths]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Truth]:
    return drops(tmp_path_factory.mktemp("truth"))


def true_pictures(truth: Truth) -> np.ndarray:
    return read_video(truth.row.file_name)


def by_filter(pictures_FHWC: np.ndarray, fps: float, rounding: str) -> np.ndarray:
    """FFmpeg's own filter."""
    graph = av.filter.Graph()
    height, width = pictures_FHWC.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, FPS))
    middle, sink = graph.add("fps", f"fps={fps}:round={rounding}"), graph.add("buffersink")
    source.link_to(middle)
    middle.link_to(sink)
    graph.configure()
    made = []
    for pts, picture in enumerate([*pictures_FHWC, None]):
        frame = None if picture is None else av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        if frame is not None:
            frame.pts, frame.time_base = pts, Fraction(1, FPS)
        source.push(frame)
        try:
            while True:
                made.append(graph.pull().to_ndarray(format="rgb24"))
        except (av.BlockingIOError, av.EOFError):
            pass
    return np.stack(made)


def convert(pictures_FHWC: np.ndarray, fps: float, rule: str) -> np.ndarray:
    """`latest`, `nearest`: which picture is shown at a time; others are roundings of FFmpeg's filter."""
    if rule not in ("latest", "nearest"):
        return by_filter(pictures_FHWC, fps, rule)
    at = np.arange(math.floor((len(pictures_FHWC) - 1) * fps / FPS) + 1) * FPS / fps
    return pictures_FHWC[np.floor(at + (rule == "nearest") / 2 + 1e-9).astype(int)]


def write(path: Path, pictures_FHWC: np.ndarray, fps: float) -> Path:
    encoder, pixels, options = ENCODERS[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    gif = path.suffix == ".gif"  # counts time in hundredths of a second
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=100 if gif else Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures_FHWC.shape[1:3], pixels
        for number, picture in enumerate(pictures_FHWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pixels)
            frame.pts = round(number * 100 / fps) if gif else number
            frame.time_base = Fraction(1, 100) if gif else 1 / Fraction(fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Knows:
    """Follows the object by the true picture that is most like the one that is seen."""

    module = torch.nn.Identity()

    def __init__(self, truth: Truth) -> None:
        self.pictures = to_float(true_pictures(truth)).transpose(0, 1)
        self.masks = torch.from_numpy(np.stack(list(truth.masks(truth.row.frames))))

    def __call__(self, video_BCFHW: torch.Tensor, mask0_BHW: torch.Tensor) -> torch.Tensor:
        seen = video_BCFHW[0].transpose(0, 1)
        nearest = torch.cdist(seen.flatten(1), self.pictures.flatten(1)).argmin(1)
        return (self.masks[nearest].float() * 2 - 1)[None]


def measure(path: Path, truth: Truth) -> ClipScore:
    pictures, times_F = score.load(path, (64, 64))
    return score.score_video(pictures, times_F, truth, Knows(truth), path=path)


def median(scores: Sequence[ClipScore], name: str) -> float:
    found = [pair[0] for each in scores if (pair := each.physics[name]) is not None]
    assert len(found) == len(scores)
    return float(np.median(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "fps", "rule"),
    [
        (".webm", 24, "near"),
        (".mp4", 24, "nearest"),
        (".mp4", 24, "down"),
        (".mp4", 25, "near"),
        (".gif", 30, "near"),
        (".mp4", 30, "nearest"),
        (".mp4", 50, "near"),
        (".mp4", 60, "latest"),
    ],
)
def test_a_film_brought_to_a_higher_rate_has_the_same_scorecard(
    truths: Sequence[Truth], tmp_path: Path, suffix: str, fps: float, rule: str
) -> None:
    scores = []
    for truth in truths:
        path = write(tmp_path / f"{truth.id}{suffix}", convert(true_pictures(truth), fps, rule), fps)
        pictures, times_F = score.load(path, (64, 64))
        seen = retimed.pictures(pictures, times_F)
        assert seen.rate == FPS
        assert seen.times is not None
        true = np.arange(33, dtype=np.uint8).repeat(16 * 16 * 3).reshape(33, 16, 16, 3)
        numbers = convert(true, fps, rule)[:, 0, 0, 0]  # of the source's frame that each frame shows
        assert (seen.times * FPS).round(6).tolist() == numbers[seen.frames].tolist()
        scores.append(measure(path, truth))
    assert median(scores, "g") == pytest.approx(9.81, rel=0.05)
    landed = np.median([truth.row.contact_time for truth in truths])
    assert median(scores, "contact") == pytest.approx(landed, abs=0.01)
    assert abs(np.mean([each.numbers["time_offset"] for each in scores])) < 15
    assert abs(median(scores, "energy_fall")) < 0.3
    assert abs(median(scores, "penetration")) < 0.05
    assert median(scores, "drift") < 0.1
    assert [note[:15] for each in scores for note in each.notes or ()] == ["16 fps shown as"] * CLIPS


@pytest.mark.parametrize("fps", [12, 10])
def test_a_film_brought_to_a_lower_rate_is_named(truths: Sequence[Truth], tmp_path: Path, fps: float) -> None:
    """Nothing in it tells whether pictures were dropped."""
    pictures = true_pictures(truths[0])
    clip = measure(write(tmp_path / "a.mp4", convert(pictures, fps, "near"), fps), truths[0])
    record = Record("kling", "kling", "unseen", "", "", [64, 64], 1, 1, clips=(clip,))
    (line,) = unequal([record])
    assert line.startswith(f"unseen: kling: 1 of 1 videos: {fps} fps, of true clips 16: g, landing")
    assert measure(write(tmp_path / "b.mp4", pictures, FPS), truths[0]).notes is None
    assert measure(write(tmp_path / "c.mp4", pictures[::2], FPS / 2), truths[0]).notes is None


def test_pictures_that_are_shown_again_at_no_steady_rate(truths: Sequence[Truth], tmp_path: Path) -> None:
    """L2 and IoU are measured, g and the landing are not."""
    again = np.random.default_rng(0).permutation([1, 2] * 16)
    pictures = true_pictures(truths[0])[:32].repeat(again, 0)
    clip = measure(write(tmp_path / "a.mp4", pictures, 24), truths[0])
    assert clip.numbers["l2"] is not None
    assert [clip.numbers[name] for name in ("time_error", "time_offset", "no_contact")] == [None] * 3
    assert [name for name, pair in clip.physics.items() if pair] == ["permanence"]
    assert clip.notes == ["frames are repeated irregularly, so g, landing and the like are not measured"]


@pytest.mark.slow
@pytest.mark.parametrize("fps", [24, 60])
def test_what_was_filmed_at_its_rate_is_not_taken_for_another(tmp_path: Path, fps: int) -> None:
    """Among it are bodies that hang for a moment, and that lie still at the end."""
    for truth in drops(tmp_path, fps, 2 * fps + 1, clips=3):
        path = write(tmp_path / f"{truth.id}.mp4", true_pictures(truth), fps)
        pictures, times_F = score.load(path, (64, 64))
        seen = retimed.pictures(pictures, times_F)
        assert seen.rate is None
        assert seen.times is times_F
        assert len(seen.frames) == len(times_F)
        assert retimed.pictures(pictures[:1].repeat(33, 0), times_F[:33]).rate is None  # nothing moves
