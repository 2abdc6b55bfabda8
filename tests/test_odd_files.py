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
from posttrain.data.listing import choose, entries
from posttrain.data.views import see
from posttrain.reporting.gallery import open_picture

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
        assert [note.split(":")[0] for note in facts.notes] == ["HDR"]
        assert name in facts.notes[0]


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


# ---------------------------------------------------------------- lists


def chosen(folder: Path, **texts: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(file, caption) of each clip of a folder with a.mp4, sub/b.mp4 and these texts, and all notes.

    A "0" in the name of a text is a dot, and a "1" a slash.
    """
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    film(folder / "a.mp4", plain(), "libx264", "yuv420p")
    film(folder / "sub" / "b.mp4", plain(), "libx264", "yuv420p")
    for name, text in texts.items():
        (folder / name.replace("0", ".").replace("1", "/")).write_text(text)
    rows, _, video_notes = choose(entries(folder, "train"), Wanted(5, 8, (32, 32)), "leave_out")
    return [(row.file_name, row.caption) for row in rows], [note for video in video_notes for note in video.notes]


def test_each_row_has_the_caption_of_the_first_column_that_is_filled(tmp_path: Path) -> None:
    table = "video,caption,prompt,text\na.mp4,,nan,left\nsub/b.mp4,None,right,wrong\n"
    assert chosen(tmp_path, metadata0csv=table)[0] == [("a.mp4", "left"), ("sub/b.mp4", "right")]


def test_a_quote_after_a_comma_and_a_space_opens_a_cell(tmp_path: Path) -> None:
    assert chosen(tmp_path, metadata0csv='video, caption\na.mp4, "one, two"\n')[0] == [("a.mp4", "one, two")]


def test_videos_above_and_below_go_together(tmp_path: Path) -> None:
    clips, notes = chosen(tmp_path, a0txt="top", sub1b0txt="deep", c0txt="lost", c0divx="", README0md="")
    assert clips == [("a.mp4", "top"), ("sub/b.mp4", "deep")]
    assert [note.split(":")[0] for note in notes] == ["no video"]


def test_a_part_in_columns_of_other_names_is_noted(tmp_path: Path) -> None:
    _, notes = chosen(tmp_path, metadata0csv="video,caption,start_frame,Start,fps\na.mp4,one,3,0,8\n")
    assert [note for note in notes if "not read" in note] == [
        "start_frame is not read: only start and end, in seconds, are"
    ]


def test_of_two_lists_the_one_that_is_not_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, _ = chosen(tmp_path, metadata0csv="video,caption\na.mp4,one\n", videos0txt="a.mp4\n", prompts0txt="two\n")
    assert clips == [("a.mp4", "one")]
    assert "metadata.csv is read; videos.txt is not" in capsys.readouterr().err


def test_a_first_frame_from_an_odd_video_has_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_picture(film(tmp_path / "combs.mp4", plain(), "libx264", "yuv420p", flags="+ildct+ilme"))
    assert "combs.mp4: interlaced: " in capsys.readouterr().err


def test_the_last_captions_of_a_list_may_be_empty(tmp_path: Path) -> None:
    clips, notes = chosen(tmp_path, videos0txt="a.mp4\nsub/b.mp4\n", prompts0txt="one\n\n")
    assert clips == [("a.mp4", "one")]
    assert notes == ["no caption"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata0csv", "video,caption,Caption\na.mp4,one,two\n", "two columns"),
        ("metadata0csv", "video|caption\na.mp4|one, two\n", r"file names, but video\|caption"),
        ("metadata0csv", "video,description\na.mp4,one\n", "metadata.csv has none called caption"),
        ("captions0CSV", "video,caption\na.mp4,one\n", "data.clips=.*captions.CSV"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(tmp_path, **{name: text})
    if name == "captions0CSV":  # as the message says
        listed = entries(tmp_path / "captions.CSV", "train")
        assert [(entry.name, entry.caption) for entry in listed] == [("a.mp4", "one")]
