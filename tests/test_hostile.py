"""Files that were made to do harm: each is refused by one line, quickly, and without taking the memory."""

import io
import resource
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from posttrain.core import codec
from posttrain.core.errors import UserError
from posttrain.data import dataset
from posttrain.models import lora

READERS: tuple[Callable[[Path], Any], ...] = (
    codec.inspect,
    codec.read_video,
    codec.first_picture,
    codec.gif,
    lambda path: list(codec.pictures(path, (0, 1, 2), False)),
)
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 40004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.ts\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile real.ts\n"


def motion_jpeg(path: Path, sizes: list[tuple[int, int]], claimed: list[tuple[int, int]] | None = None) -> Path:
    """A video of JPEG pictures of these heights and widths, which say of themselves that they have the claimed ones."""
    claimed = claimed or sizes
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=16)
        stream.height, stream.width, stream.pix_fmt = *claimed[0], "yuvj420p"
        for k, (size, said) in enumerate(zip(sizes, claimed, strict=True)):
            buffer = io.BytesIO()
            Image.new("RGB", size[::-1], (9 * k, 40, 80)).save(buffer, "JPEG", quality=50)
            content = bytearray(buffer.getvalue())
            at = content.index(b"\xff\xc0") + 5  # start of frame: marker, length, bits, height, width
            content[at : at + 4] = struct.pack(">HH", *said)
            packet = av.Packet(bytes(content))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, k, k, Fraction(1, 16)
            packet.is_keyframe = True
            container.mux(packet)
    return path


@pytest.mark.parametrize("text", [SDP, HLS, CONCAT], ids=["sdp", "hls", "concat"])
def test_a_file_does_not_choose_what_else_is_opened(tmp_path: Path, text: str) -> None:
    motion_jpeg(tmp_path / "real.ts", [(64, 64)] * 3)
    (tmp_path / "clip.mp4").write_text(text)
    for read in READERS:
        with pytest.raises(UserError) as error:
            read(tmp_path / "clip.mp4")
        assert error.value.code in ("format", "damaged")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.bind(("127.0.0.1", 40004))  # nobody listens there


def test_names_are_names_of_files(tmp_path: Path) -> None:
    motion_jpeg(tmp_path / "real.avi", [(64, 64)] * 3)
    name = tmp_path / "concat:a|b %03d.avi"
    (tmp_path / "real.avi").rename(name)
    assert codec.inspect(name).size == (64, 64)
    assert len(codec.read_video(name)) == 3


def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """1 KB that says it has 8192 x 8192 pixels, from the start, or from its third picture on; a GIF of 39 bytes."""
    huge = motion_jpeg(tmp_path / "huge.mp4", [(64, 64)] * 3, [(8192, 8192)] * 3)
    growing = motion_jpeg(tmp_path / "growing.mkv", [(64, 64)] * 3, [(64, 64), (64, 64), (8192, 8192)])
    gif = tmp_path / "huge.gif"
    gif.write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, readers in ((huge, READERS), (gif, READERS), (growing, (READERS[1], READERS[3], READERS[4]))):
        for read in readers:
            with pytest.raises(UserError) as error:
                read(path)
            assert error.value.code in ("format", "damaged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB; one picture takes 96 MiB


def test_pictures_of_several_sizes_are_refused(tmp_path: Path) -> None:
    path = motion_jpeg(tmp_path / "a.mkv", [(64, 64), (64, 64), (128, 96)])
    for read in (READERS[1], READERS[4]):
        with pytest.raises(UserError) as error:
            read(path)
        assert error.value.code == "damaged"


def test_a_long_video_is_not_held_whole(tmp_path: Path) -> None:
    path = motion_jpeg(tmp_path / "a.mkv", [(16, 16)] * 60)
    with pytest.raises(UserError) as error:
        codec.read_video(path, most=50 * 16 * 16)
    assert error.value.code == "format"


@pytest.mark.slow
def test_a_video_in_4k_is_read_one_picture_at_a_time(tmp_path: Path) -> None:
    """16 pictures of 2160 x 4096 are 425 MB in RGB, and half as much as the decoder has them."""
    path = motion_jpeg(tmp_path / "a.mkv", [(2160, 4096)] * 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in codec.pictures(path, range(16), False)) == 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250 << 10  # KiB


STARVED = """
import resource, sys
from pathlib import Path
from posttrain.core import codec
from posttrain.core.errors import UserError

pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (40 << 20),) * 2)
for read, name in ((codec.read_video, "a.mkv"), (codec.first_picture, "a.mkv"), (codec.picture, "a.png")):
    try:
        read(Path(name))
        print("read")
    except UserError as error:
        print(error.code)
"""


@pytest.mark.slow
def test_too_little_memory_is_not_called_damage(tmp_path: Path) -> None:
    motion_jpeg(tmp_path / "a.mkv", [(4096, 4096)] * 2)
    Image.new("RGB", (8000, 8000)).save(tmp_path / "a.png", compress_level=1)
    said = subprocess.run([sys.executable, "-c", STARVED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["memory"] * 3, said.stderr


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has so many pixels, of which it has a few."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = (b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (header, *chunks, data, (b"IEND", b""))
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(ran) (here.txt) (w) file\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///etc/passwd"/></svg>'
HARMFUL = {
    "huge": png(50_000, 50_000),
    "large": png(10_000, 10_000),
    "text": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
    "damaged": png(64, 64),
    "eps": EPS,
    "svg": SVG,
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_pictures_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(HARMFUL[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        codec.picture(tmp_path / "a.png")
    assert error.value.code == "format"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def npz(path: Path, shape: tuple[int, ...], content: bytes) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("instances.npy", header.getvalue() + content)
    return path


def test_arrays_that_lie_about_their_size_are_refused(tmp_path: Path) -> None:
    """A shape of a terabyte with three bytes; a shape without end; a name that is not in it."""
    for number, shape in enumerate([(10**6, 10**6), (2**62, 2**62)]):
        with pytest.raises(UserError) as error:
            dataset.read_annotations(npz(tmp_path / f"{number}.npz", shape, b"abc"), ["instances"])
        assert error.value.code in ("damaged", "memory")
    good = npz(tmp_path / "good.npz", (3,), b"abc")
    assert dataset.read_annotations(good)["instances"].tolist() == [97, 98, 99]
    content = good.read_bytes()
    size = struct.pack("<I", 131)  # header and array
    assert content.count(size) == 2
    (tmp_path / "bomb.npz").write_bytes(content.replace(size, struct.pack("<I", 2**32 - 2)))
    with pytest.raises(UserError) as error:
        dataset.read_annotations(tmp_path / "bomb.npz", ["instances"])
    assert error.value.code in ("format", "damaged")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":'.ljust(60),
        struct.pack("<Q", 78) + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'.ljust(78),
    ],
    ids=["length", "damaged", "offsets"],
)
def test_weights_that_lie_about_their_size_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        lora._check_foreign(tmp_path / "pytorch_lora_weights.safetensors")
    assert error.value.code == "damaged"
