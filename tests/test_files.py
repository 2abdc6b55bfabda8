"""Files are whole or absent, and what the system refuses is said in one line."""

import hashlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
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
    with pytest.raises(UserError, match=r"a\.bin: the disk is full; free some space and start again"):
        files.write_bytes(path, bytes(100_000))
    assert path.read_bytes() == b"old" * 5_000
    assert [p.name for p in small_disk.iterdir()] == ["a.bin"]


def test_libraries_that_fill_the_disk_are_understood(small_disk, tmp_path):
    """safetensors and shutil.copytree have their own exceptions for it."""
    with pytest.raises(UserError, match=r"a: the disk is full"), files.replacing(small_disk / "a") as temporary:
        save_file({"w": torch.zeros(50_000)}, temporary)
    for name in "ab":
        files.write_bytes(tmp_path / "from" / name, bytes(50_000))
    with pytest.raises(UserError, match=r"b: the disk is full"), files.replacing(small_disk / "b") as temporary:
        shutil.copytree(tmp_path / "from", temporary)
    assert list(small_disk.iterdir()) == []
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(SafetensorError), files.replacing(tmp_path / "c"):
        load_file(tmp_path / "text")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    for name in ("a", ".hidden", ".somebody.settings/theirs"):
        (tmp_path / name).mkdir(parents=True)
    with files.replacing(tmp_path / "step-1") as temporary:
        temporary.write_text("kept")
        shutil.copytree(temporary.parent, tmp_path / ".step-1.abcdefgh")
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".somebody.settings", "a", "step-1"]


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.bin: is larger than the system allows"):
            files.write_bytes(tmp_path / "a.bin", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.txt: cannot be written \(a folder on the way is a file\)"):
        files.write_text(tmp_path / "file" / "a.txt", "")


def test_a_read_only_disk_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"a\.txt: cannot be written \(read-only file system\); choose another folder"):
        files.write_text(small_disk / "a.txt", "")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: does not exist"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{\n "a": }')
    with pytest.raises(UserError, match=r"a\.json:2: is not JSON"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(UserError, match=r"a\.jsonl:2: is not JSON"):
        files.read_jsonl(tmp_path / "a.jsonl")


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


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "link/a", "b/../../a"])
def test_a_name_may_not_leave_its_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path, root / "link")
    with pytest.raises(UserError, match="points outside the folder"):
        files.inside(root, name)


def test_a_name_inside_is_taken(tmp_path):
    assert files.inside(tmp_path, "b/../a.json") == (tmp_path / "a.json").resolve()


def test_a_value_is_hashed_as_its_json() -> None:
    """What is cached is found by these hashes, so they must stay as they are."""
    text = b'{"a": null, "b": [1, 0.5, "\\u00e4"]}'
    assert files.sha256_json({"b": (1, 0.5, "ä"), "a": None}) == hashlib.sha256(text).hexdigest()
