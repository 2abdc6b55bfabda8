"""Files are whole or absent, and what the system refuses is said in one line."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from posttrain.core import files
from posttrain.core.errors import UserError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for names in (["a", "b"], ["c"]):
        with files.replacing(tmp_path / "folder") as temporary:
            (temporary / "inner").mkdir(parents=True)
            for name in names:
                (temporary / "inner" / name).write_text(name)
    assert [p.name for p in (tmp_path / "folder" / "inner").iterdir()] == ["c"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def interrupted(path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError):
        interrupted(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def write_for_ever(path: Path) -> None:
    for number in range(10**9):
        files.write_text(path, str(number) * 10_000)


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(0.03)
        writer.kill()
        writer.join()
        text = path.read_text()
        assert len(text) % 10_000 == 0
        assert text == text[: len(text) // 10_000] * 10_000
        path.unlink()


def test_a_full_disk_is_one_line_and_loses_nothing(small_disk):
    path = small_disk / "a.bin"
    files.write_bytes(path, b"old" * 5_000)
    with pytest.raises(UserError, match=r"a\.bin") as raised:
        files.write_bytes(path, bytes(100_000))
    assert raised.value.code == "disk_full"
    assert path.read_bytes() == b"old" * 5_000
    assert [p.name for p in small_disk.iterdir()] == ["a.bin"]


def test_libraries_that_fill_the_disk_are_understood(small_disk, tmp_path):
    """safetensors and shutil.copytree have their own exceptions for it."""
    with pytest.raises(UserError) as raised, files.replacing(small_disk / "a") as temporary:
        save_file({"w": torch.zeros(50_000)}, temporary)
    for name in "ab":
        files.write_bytes(tmp_path / "from" / name, bytes(50_000))
    assert raised.value.code == "disk_full"
    with pytest.raises(UserError) as raised, files.replacing(small_disk / "b") as temporary:
        shutil.copytree(tmp_path / "from", temporary)
    assert raised.value.code == "disk_full"
    assert list(small_disk.iterdir()) == []
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(SafetensorError), files.replacing(tmp_path / "c"):
        load_file(tmp_path / "text")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    for name in ("a", ".hidden", ".somebody.settings/theirs"):
        (tmp_path / name).mkdir(parents=True)
    with files.replacing(tmp_path / "step-1") as temporary:
        temporary.write_text("kept")
        shutil.copytree(temporary.parent, tmp_path / ".step-1.abcdefgh.part")
        files.sweep(tmp_path)
        assert temporary.exists()  # its writer is alive
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".somebody.settings", "a", "step-1"]


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.bin: .*ulimit") as raised:
            files.write_bytes(tmp_path / "a.bin", bytes(20_000))
        assert raised.value.code == "not_writable"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "file" / "a.txt",
        tmp_path / "file" / "b" / "a.txt",
        Path("/proc/a/b"),
        tmp_path / ("a" * 300),
    ):
        with pytest.raises(UserError) as raised:
            files.write_text(path, "")
        assert raised.value.code == "not_writable"


def test_what_fails_elsewhere_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "out" / "a"):
        (tmp_path / "nowhere" / "b").read_bytes()


def test_a_read_only_disk_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError) as raised:
        files.write_text(small_disk / "a.txt", "")
    assert raised.value.code == "not_writable"


def code(read: Callable[[Path], object], path: Path, content: bytes) -> tuple[str, str]:
    """With which code a file of this content is refused, and for which line ("" for none)."""
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
    return raised.value.code, str(raised.value).removeprefix(f"{path}").partition(" ")[0].strip(":")


def test_what_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "a.json", tmp_path, tmp_path / ("a" * 300), Path("a\0b")):
        for read in (files.read_json, files.read_jsonl):
            with pytest.raises(UserError) as raised:
                read(path)
            assert raised.value.code == "missing"
    path = tmp_path / "a.json"
    for content, line in (
        (b'{\n "a": }', "2"), (b"", "1"), (b'"\xe4"', "1"), (b'{\n"a": "\xe4"}', "2"), (b"\x00\x01\x02", "1"),
        (b"NaN", ""), (b"[-Infinity]", ""), (b"1e999", ""), (b"[" * 100_000, ""), (b"9" * 5000, ""),
        (b'"' + b"x" * 10_000, "1"),
    ):  # fmt: skip
        assert code(files.read_json, path, content) == ("format", line), content[:20]
    for content in (b"[1]", b"null", b"3", b'"text"'):
        assert code(files.read_object, path, content) == ("format", "")
    for content, line in (
        (b'{"a": 1}\n{"a"', "2"), (b'{"a": 1}\nnull\n', "2"), (b"\n\n[1, 2]", "3"), (b'"text"', "1"), (b"3\n", "1"),
        (b'{"a": NaN}', "1"), (b'{"a": 1}\n{"a": "\xe4"}', "2"), (b'{"a": "\x00"}', "1"),
        (b'{"a": 1}\n' + b'{"a":' * 50_000, "2"),
    ):  # fmt: skip
        assert code(files.read_jsonl, path, content) == ("format", line), content[:20]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_several_encodings_is_one(tmp_path, encoding):
    """U+2028 and U+0085 end no line."""
    rows = [{"caption": "über\u2028alles\u0085"}, {"caption": "b"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "a").write_bytes(text.encode(encoding))
    assert files.read_jsonl(tmp_path / "a") == rows
    (tmp_path / "a").write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
    assert files.read_json(tmp_path / "a") == rows


def test_rows_read_back(tmp_path):
    rows = [{"a": 1, "b": "x\ny"}, {"a": None}]
    files.write_jsonl(tmp_path / "a.jsonl", rows)
    assert files.read_jsonl(tmp_path / "a.jsonl") == rows
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n \n')
    assert files.read_jsonl(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_the_hash_is_that_of_the_standard(tmp_path):
    (tmp_path / "a").write_text("abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "a") == files.sha256_bytes(b"abc") == expected


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "link/a", "b/../../a", "a\0b", "a" * 300])
def test_a_name_may_not_leave_its_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path, root / "link")
    with pytest.raises(UserError) as raised:
        files.inside(root, name)
    assert raised.value.code == "outside"


def test_a_name_inside_is_taken(tmp_path):
    assert files.inside(tmp_path, "b/../a.json") == (tmp_path / "a.json").resolve()


def test_a_value_is_hashed_as_its_json() -> None:
    """What is cached is found by these hashes, so they must stay as they are."""
    text = b'{"a": null, "b": [1, 0.5, "\\u00e4"]}'
    assert files.sha256_json({"b": (1, 0.5, "ä"), "a": None}) == hashlib.sha256(text).hexdigest()
