"""Files that a player would show otherwise: what is used of them is said, or they are refused."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from posttrain.core.codec import inspect, picture
from posttrain.core.errors import UserError
from posttrain.data.config import Wanted
from posttrain.data.views import see

HIDDEN = np.full((32, 32, 4), (200, 30, 30, 255), np.uint8)
HIDDEN[:, :16, 3] = 0


def film(path: Path, frame: av.VideoFrame, codec: str, pixels: str, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, pixels
        stream.color_trc = frame.color_trc
        for k in range(6):
            frame.pts, frame.time_base = k, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def notes_of(path: Path) -> list[str]:
    view, notes = see(inspect(path), Wanted(5, 8, (32, 32)))
    assert view is not None
    return [note.split(":")[0] for note in notes]


def plain() -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")


def test_what_of_a_video_is_not_shown_as_a_player_would_is_noted(tmp_path: Path) -> None:
    """Notes are for the file that needs one alone."""
    hidden = av.VideoFrame.from_ndarray(HIDDEN, format="rgba")
    assert notes_of(film(tmp_path / "plain.mp4", plain(), "libx264", "yuv420p")) == []
    assert notes_of(film(tmp_path / "combs.mp4", plain(), "libx264", "yuv420p", flags="+ildct+ilme")) == ["interlaced"]
    assert notes_of(film(tmp_path / "hidden.mov", hidden, "qtrle", "argb")) == ["transparent"]
    assert inspect(film(tmp_path / "opaque.gif", plain(), "gif", "rgb8")).notes == ()
    eyes = film(tmp_path / "eyes.mkv", plain(), "libx264", "yuv420p", **{"x264-params": "frame-packing=3"})
    assert notes_of(eyes) == ["stereo"]
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        frame = plain()
        frame.color_trc = transfer
        facts = inspect(film(tmp_path / f"{name}.mp4", frame, "libx264", "yuv420p"))
        assert [note.split(":")[0] for note in facts.notes] == ["HDR"] and name in facts.notes[0]


def test_of_several_streams_the_one_that_is_used_is_named(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(6):
            for stream in streams:
                container.mux(stream.encode(plain()))
        for stream in streams:
            container.mux(stream.encode())
    assert notes_of(tmp_path / "two.mkv") == ["several streams"]


def test_a_picture_of_16_bits_keeps_its_greys(tmp_path: Path) -> None:
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(picture(tmp_path / "deep.png"))[..., 0], grey // 257)


def test_a_picture_that_hides_a_part_is_refused(tmp_path: Path) -> None:
    Image.fromarray(HIDDEN, "RGBA").save(tmp_path / "hidden.png")
    Image.fromarray((HIDDEN | [0, 0, 0, 255]).astype(np.uint8), "RGBA").save(tmp_path / "opaque.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    assert np.asarray(picture(tmp_path / "opaque.png"))[0, 0].tolist() == [200, 30, 30]
    for name in ("hidden.png", "float.tiff"):
        with pytest.raises(UserError, match=name) as error:
            picture(tmp_path / name)
        assert error.value.code == "format"
