"""Videos of any kind: which frames are seen and when, which part of the picture, and what is refused as damaged."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.videos import LEVEL, WANTED, shown, steady, write

from posttrain.core.codec import check, complaints, inspect
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig, Wanted
from posttrain.data.dataset import Clips
from posttrain.data.listing import choose, entries
from posttrain.data.views import centred, moved, nearest, plan, read, see


def clip_of(path: Path, wanted: Wanted) -> np.ndarray:
    view, notes = see(inspect(path), wanted)
    assert view is not None, notes
    return read(path, view)


# ---------------------------------------------------------------- time


def test_the_nearest_frame_is_seen_and_of_two_the_earlier() -> None:
    times = np.array([0.0, 1.0, 2.0, 4.0])
    assert nearest(times, np.array([0.0, 0.4, 0.5, 0.6, 1.5, 2.9, 3.0, 3.1, 9.0])).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    random = np.random.default_rng(0)
    times, at = np.cumsum(random.uniform(0.01, 0.1, 50)), random.uniform(0, 3, 200)
    assert nearest(times, at).tolist() == np.abs(times[:, None] - at).argmin(0).tolist()


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4]),
        (30, [0, 4, 7, 11, 15]),  # 3.75 per frame: 3.75, 7.5 (the earlier), 11.25, 15
        (24, [0, 3, 6, 9, 12]),
        (120, [0, 15, 30, 45, 60]),
        (6, [0, 1, 1, 2, 3]),  # 0.75 per frame: 0.75, 1.5 (the earlier), 2.25, 3
    ],
)
def test_a_file_is_retimed_by_its_own_clock(tmp_path, fps, expected) -> None:
    path = write(tmp_path / "a.mp4", steady(expected[-1] + 1, fps))
    assert shown(clip_of(path, Wanted(5, 8.0, (32, 32)))) == expected


def test_a_varying_rate_is_followed(tmp_path) -> None:
    times = [0, 0.01, 0.02, 0.13, 0.2, 0.24, 0.26, 0.3, 0.37, 0.45, 0.52]
    path = write(tmp_path / "a.mp4", times)
    assert shown(clip_of(path, Wanted(5, 8.0, (32, 32)))) == [0, 3, 5, 8, 10]
    assert see(inspect(path), Wanted(5, 8.0, (32, 32)))[1] == ["retimed: a varying rate to 8 fps"]


@pytest.mark.parametrize(
    ("count", "fps", "long_enough"),
    [(5, 8, True), (4, 8, True), (3, 8, False), (15, 30, True), (14, 30, False), (60, 120, True), (59, 120, False)],
)
def test_a_clip_that_ends_too_early_is_left_out(count, fps, long_enough) -> None:
    places, _, notes = plan(np.array(steady(count, fps)), (32, 32), Wanted(5, 8.0, (32, 32)))
    assert (places is not None) == long_enough
    if not long_enough:
        lasts, short = count / fps, 0.5 - count / fps
        said = f"too short: it lasts {lasts:.2f} s, 5 frames at 8 fps reach 0.50 s: {short:.2f} s are missing"
        assert notes == [said]


@pytest.mark.parametrize("fps", [8, 12, 15, 16, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120, 240])
@pytest.mark.parametrize(("frames", "rate"), [(81, 16.0), (121, 24.0)])
def test_five_seconds_of_any_rate_are_enough_for_the_lengths_of_wan(fps, frames, rate) -> None:
    count = round(5 * fps)
    times = np.arange(count) * 5 / count  # the last picture is shown until 5 s
    places, _, notes = plan(times, (32, 32), Wanted(frames, rate, (32, 32)))
    assert places is not None, notes
    assert (places[0], places[-1]) == (0, count - 1)
    places, _, notes = plan(times[: round(4.6 * fps)], (32, 32), Wanted(frames, rate, (32, 32)))
    assert places is None
    fits = int(notes[0].partition("data.frames=")[2].partition(" ")[0])
    assert fits % 4 == 1
    assert (fits - 1) / rate <= round(4.6 * fps) * 5 / count < (fits + 3) / rate


def test_what_is_done_is_said() -> None:
    def notes(count: int, fps: float, size: tuple[int, int], wanted: tuple[int, int] = (16, 16)) -> list[str]:
        return plan(np.array(steady(count, fps)), size, Wanted(5, 8.0, wanted))[2]

    assert notes(5, 8, (16, 16)) == []
    assert notes(5, 8, (32, 32)) == ["scaled: 32 x 32 to 16 x 16 pixels"]
    assert notes(5, 8, (8, 8)) == ["enlarged: 8 x 8 to 16 x 16 pixels"]
    assert notes(16, 30, (16, 16)) == ["retimed: 30 fps to 8 fps"]
    assert notes(4, 6, (16, 16)) == ["retimed: 6 fps to 8 fps, 1 pictures are held"]
    assert notes(25, 8, (16, 16)) == ["cut: the first 0.50 of 3.00 s"]
    assert notes(5, 8, (16, 32)) == ["cropped: 16 x 32 to 16 x 16 pixels (height x width)"]
    assert notes(5, 8, (101, 33)) == [
        "cropped: 101 x 33 to 33 x 33 pixels (height x width)",
        "scaled: 33 x 33 to 16 x 16 pixels",
    ]


def test_frames_of_a_container_without_their_times_are_in_order(tmp_path) -> None:
    """AVI numbers packets, and H.264 lays them in another order than they are shown in: 0 2 3 6 5 11 10."""
    for name in ("b.avi", "b.mkv", "b.ts", "b.mp4", "b.mov", "b.flv"):
        path = write(tmp_path / name, steady(30, 30), base=90000 if name == "b.ts" else 30, swapped=True)
        assert (inspect(path).marks is None) == (name == "b.avi")
        assert see(inspect(path), Wanted(30, 30.0, (32, 32)))[1] == []
        assert shown(clip_of(path, Wanted(30, 30.0, (32, 32)))) == list(range(30)), name


def test_of_two_frames_at_one_time_the_first_is_seen(tmp_path) -> None:
    """Matroska counts milliseconds: of 1,500 frames per second every third shares its time with another."""
    path = write(tmp_path / "a.mkv", steady(50, 1500), codec="ffv1", base=1500)
    facts = inspect(path)
    assert facts.times.tolist() == pytest.approx([k / 1000 for k in range(34)])
    pictures = shown(clip_of(path, Wanted(5, 125.0, (32, 32))))
    assert pictures == pytest.approx([0, 12, 24, 36, 48], abs=1)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize(("name", "codec", "heard"), [("a.mp4", "libx264", 0.7), ("a.mkv", "ffv1", 0.9)])
def test_damage_that_the_decoder_reports_is_refused(tmp_path, capfd, name, codec, heard) -> None:
    """One flipped bit in each of 40 copies: what decodes to other pictures is refused, as far as a decoder can tell."""
    path = tmp_path / name
    y, x = np.mgrid[:96, :128]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for k in range(24):
            picture = np.stack([x + 3 * k, 2 * y + k, (x ^ y) + 5 * k], -1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    content, wanted, draw = path.read_bytes(), Wanted(24, 30.0, (96, 128)), random.Random(0)
    whole, counts = clip_of(path, wanted), {"same": 0, "refused": 0, "other": 0}
    for number in range(40):
        torn = bytearray(content)
        torn[draw.randrange(len(torn))] ^= 1 << draw.randrange(8)
        copy = tmp_path / f"{number}{path.suffix}"
        copy.write_bytes(torn)
        try:
            view, _ = see(inspect(copy), wanted)
            with complaints():
                if view is None:
                    raise UserError("too short", "damaged")
                check(copy, view.frames, view.marked)
            same = np.array_equal(read(copy, view), whole)
            counts["same" if same else "other"] += 1
        except UserError:
            counts["refused"] += 1
    assert counts["refused"] >= heard * (counts["refused"] + counts["other"]), counts
    assert capfd.readouterr().err == ""


def test_a_damaged_clip_is_left_out_before_anything_is_encoded(tmp_path) -> None:
    """Its headers are whole: only decoding finds it."""
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.mp4", steady(60, 8), (64, 64), mark=17 + 2 * ord(name) % 7)
    content = bytearray((tmp_path / "b.mp4").read_bytes())
    at = content.index(b"mdat") + 1200
    content[at : at + 200] = bytes(200)
    (tmp_path / "b.mp4").write_bytes(content)
    rows, _, video_notes = choose(entries(tmp_path, "train"), Wanted(60, 8.0, (64, 64)), "empty")
    assert [row.file_name for row in rows] == ["a.mp4", "c.mp4"]
    assert video_notes[1].notes[0].startswith("damaged: ")


# ---------------------------------------------------------------- space


@pytest.mark.parametrize(
    ("size", "shape", "box"),
    [
        ((1080, 1920), (256, 256), (0, 420, 1080, 1080)),
        ((1920, 1080), (256, 256), (420, 0, 1080, 1080)),
        ((1920, 1080), (480, 832), (648, 0, 623, 1080)),  # a portrait clip gives a landscape strip
        ((481, 853), (480, 832), (0, 9, 481, 834)),
        ((64, 64), (64, 64), (0, 0, 64, 64)),
    ],
)
def test_the_box_is_the_largest_in_the_middle(size, shape, box) -> None:
    assert centred(size, shape) == box


@pytest.mark.parametrize(
    ("crop", "wide", "tall"),
    [
        ("top", (0, 420, 1080, 1080), (0, 0, 1080, 1080)),
        ("bottom", (0, 420, 1080, 1080), (840, 0, 1080, 1080)),
        ("left", (0, 0, 1080, 1080), (420, 0, 1080, 1080)),
        ("right", (0, 840, 1080, 1080), (420, 0, 1080, 1080)),
    ],
)
def test_the_box_may_lie_at_a_side(crop, wide, tall) -> None:
    for size, box in (((1080, 1920), wide), ((1920, 1080), tall)):
        assert moved(centred(size, (256, 256)), size, crop) == box


def test_without_cropping_another_shape_is_left_out(tmp_path) -> None:
    write(tmp_path / "a.mp4", steady(5, 8), (32, 32))
    write(tmp_path / "b.mp4", steady(5, 8), (32, 34))
    config = DataConfig(clips=str(tmp_path), **WANTED, crop="none", uncaptioned="empty")
    clips = Clips(config, preload=False)
    assert clips.ids == ["a.mp4"]
    assert clips.splits[0].video_notes[1].notes == [
        "another shape: 32 x 34 pixels (height x width), and data.crop is none"
    ]
    with pytest.raises(ValueError, match="crop is only used with frames, fps and size"):
        DataConfig(clips="x", crop="left")


def test_pictures_are_cropped_in_the_middle_and_scaled(tmp_path) -> None:
    path = write(tmp_path / "a.mp4", [0], (32, 64), mark=16)
    whole = clip_of(path, Wanted(1, 8.0, (32, 64)))[0, :, :, 0]
    assert (whole[2:14, 2:14] > 250).all()
    assert whole[20:, 20:].max() < 5
    assert clip_of(path, Wanted(1, 8.0, (32, 32)))[0].max() < 30  # columns 16 to 48, beside the mark
    half = clip_of(path, Wanted(1, 8.0, (16, 32)))[0, :, :, 0]
    assert (half[1:7, 1:7] > 250).all()
    assert half[10:, 10:].max() < 5


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_turned_phone_video_is_upright(tmp_path, turned) -> None:
    path = write(tmp_path / "a.mp4", steady(5, 8), (32, 48), mark=12, turned=turned)
    facts = inspect(path)
    assert facts.size == ((32, 48) if turned == 180 else (48, 32))
    picture = clip_of(path, Wanted(5, 8.0, facts.size))[0, :, :, 0]
    bright = {
        (row, column)
        for row, part in ((0, slice(2, 10)), (1, slice(-10, -2)))
        for column, side in ((0, slice(2, 10)), (1, slice(-10, -2)))
        if picture[part, side].mean() > 200
    }
    assert bright == {{90: (1, 0), 180: (1, 1), -90: (0, 1)}[turned]}  # counterclockwise: down, across, right


@pytest.mark.parametrize(
    ("matrix", "corner", "note"),
    [  # a, b, c, d: x' = a x + c y, y' = b x + d y
        ((-1, 0, 0, 1), (0, 1), "mirrored: left to right"),
        ((1, 0, 0, -1), (1, 0), "mirrored: upside down"),
        ((-1, 0, 0, -1), (1, 1), "turned: by 180 degrees"),
        ((0, 1, 1, 0), (0, 0), "mirrored: and turned"),
        ((0, -1, -1, 0), (1, 1), "mirrored: and turned"),
        ((0, 1, -1, 0), (0, 1), "turned: by 270 degrees"),
        ((0, -1, 1, 0), (1, 0), "turned: by 90 degrees"),
    ],
)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix, corner, note) -> None:
    """A mirrored video is no turned one: in that, things would fall up."""
    path = with_matrix(write(tmp_path / "a.mp4", steady(5, 8), (32, 48), mark=12), matrix)
    facts = inspect(path)
    assert facts.size == ((48, 32) if matrix[0] == 0 else (32, 48))
    wanted = Wanted(5, 8.0, facts.size)
    assert see(facts, wanted)[1] == [f"{note}, as the file says"]
    picture = clip_of(path, wanted)[0, :, :, 0]
    bright = [
        (row, column)
        for row, part in ((0, slice(2, 10)), (1, slice(-10, -2)))
        for column, side in ((0, slice(2, 10)), (1, slice(-10, -2)))
        if picture[part, side].mean() > 200
    ]
    assert bright == [corner]


def test_a_picture_that_lies_askew_is_left_out_by_name(tmp_path) -> None:
    path = with_matrix(write(tmp_path / "a.mp4", steady(5, 8)), (0.87, -0.5, 0.5, 0.87))
    with pytest.raises(UserError, match=r"a\.mp4: is not upright: .* 30 degrees") as error:
        inspect(path)
    assert error.value.code == "format"


def with_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """The mp4 with another display matrix in its track's header."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def test_wide_pixels_are_made_square(tmp_path) -> None:
    path = write(tmp_path / "a.mp4", [0], (32, 32), mark=16, aspect=Fraction(2, 1))
    assert inspect(path).size == (32, 64)
    picture = clip_of(path, Wanted(1, 8.0, (32, 64)))[0, :, :, 0]
    assert picture[8, 28] > 200
    assert picture[8, 36] < 60


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.gif", "gif", "gray"),
    ],
)
def test_other_containers_are_read(tmp_path, name, codec, pixels) -> None:
    path = write(tmp_path / name, steady(8, 10), codec=codec, pixels=pixels, base=10 if name == "a.avi" else 12000)
    assert shown(clip_of(path, Wanted(3, 5.0, (32, 32)))) == [0, 2, 4]


def test_a_title_in_another_encoding_does_no_harm(tmp_path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "faelltUm"
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for k in (*range(5), None):
            picture = np.full((32, 32, 3), LEVEL * (k or 0), np.uint8)
            container.mux(stream.encode(None if k is None else av.VideoFrame.from_ndarray(picture, "rgb24")))
    path.write_bytes(path.read_bytes().replace(b"faelltUm", "fällt Öl".encode("latin-1")))
    assert shown(clip_of(path, Wanted(5, 8.0, (32, 32)))) == [0, 1, 2, 3, 4]


def test_sound_does_not_matter(tmp_path) -> None:
    silent, loud = write(tmp_path / "a.mp4", steady(5, 8)), write(tmp_path / "b.mp4", steady(5, 8), sound=True)
    np.testing.assert_array_equal(clip_of(silent, Wanted(5, 8.0, (16, 16))), clip_of(loud, Wanted(5, 8.0, (16, 16))))
