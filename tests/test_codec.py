"""Video files: all are opened in one place, and what is written is what is read."""

import ast
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.project import MODULES

from posttrain.core.codec import gif, lossless, playable, read_video, write_near_lossless


def ramp(size: int = 64, frames: int = 5) -> np.ndarray:
    """A smooth colour picture that gets brighter, uint8 (F, H, W, 3)."""
    y, x = np.mgrid[:size, :size] * 200 // size
    return np.stack([np.stack([x, y, (x + y) // 2], -1) + 8 * k for k in range(frames)]).astype(np.uint8)


@pytest.mark.slow
def test_video_files_are_opened_in_one_module() -> None:
    """Whoever else needs PyAV has a new kind of reading, which belongs there."""
    users = [
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "av.open"
    ]
    assert set(users) == {"posttrain.core.codec"}


def test_lossless_is_lossless_and_the_others_are_near(tmp_path) -> None:
    video = ramp()
    (tmp_path / "a.mp4").write_bytes(lossless(video, 16))
    assert np.array_equal(read_video(tmp_path / "a.mp4"), video)
    assert lossless(video, 16) == (tmp_path / "a.mp4").read_bytes()
    write_near_lossless(tmp_path / "b.mp4", video, 12.5)
    assert np.abs(read_video(tmp_path / "b.mp4").astype(int) - video).mean() < 2
    odd = video[:, :63, :61]
    (tmp_path / "c.mp4").write_bytes(playable(odd, 16, 10))
    shown = read_video(tmp_path / "c.mp4")
    assert shown.shape == (5, 62, 60, 3)
    assert np.abs(shown.astype(int) - odd[:, :62, :60]).mean() < 3
    content, size = gif(tmp_path / "b.mp4")
    assert (content[:6], size) == (b"GIF89a", (64, 64))


WRITE = """
import hashlib, pathlib, sys
import numpy as np
from posttrain.core import codec
for size in (48, 64, 130):
    noise = np.random.default_rng(0).random((9, size, size, 3)) * 60
    video = (noise + np.linspace(0, 190, size)[:, None, None]).astype(np.uint8)
    codec.write_near_lossless(pathlib.Path(sys.argv[1]), video, 16)
    for content in (pathlib.Path(sys.argv[1]).read_bytes(), codec.lossless(video, 16), codec.playable(video, 16, 20)):
        print(hashlib.sha256(content).hexdigest())
"""


@pytest.mark.slow
def test_what_lies_in_memory_does_not_change_a_byte(tmp_path) -> None:
    """x264's macroblock tree reads what nobody wrote: with it these three sizes gave up to five files each."""
    said = [
        subprocess.run(
            [sys.executable, "-c", WRITE, str(tmp_path / f"{value}.mp4")],
            env={**os.environ, "MALLOC_PERTURB_": str(value)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for value in (0, 1, 85, 255)
    ]
    assert len(set(said[0])) == 9
    assert said[1:] == said[:1] * 3
