"""Write files so that each is complete or absent: to a temporary name, flushed, then renamed.

Files that are read back later have a SHA-256 digest: inside the file (`write_sealed`) or next to it (`note_digest`).
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.core.errors import UserError, printable


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Context that turns the operating system's errors while writing `path` into a UserError.

    Raises:
        UserError: disk_full or not_writable. Errors about other paths are raised unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as found:
        error = _refusal(found)
        if not _concerns(error, path):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "the disk is full; free space and start again, nothing is lost"
            raise UserError(f"{path}: {message}", "disk_full") from error
        if error.errno not in REMEDIES:
            raise
        raise UserError(f"{path}: cannot be written {REMEDIES[error.errno]}", "not_writable") from error


REMEDIES = {
    errno.EFBIG: "(it is larger than the system allows, see ulimit -f); raise the limit",
    errno.ENOENT: "(its folder was removed, or cannot be created there); start again, or choose another folder",
    errno.ENOTDIR: "(a folder on the way is a file); choose another folder",
    errno.EEXIST: "(a folder on the way is a file); choose another folder",
    errno.ENAMETOOLONG: "(its name is too long); choose a shorter one",
    errno.EACCES: "(permission denied); choose another folder, or change its permissions",
    errno.EPERM: "(operation not permitted); choose another folder, or change its permissions",
    errno.EROFS: "(read-only file system); choose another folder",
}


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about a path next to or below `path`, or about a folder above `path`."""
    if not isinstance(error.filename, str):
        return True
    failed, parent = Path(error.filename).absolute(), path.absolute().parent
    return failed.is_relative_to(parent) or parent.is_relative_to(failed)


def _refusal(error: Exception) -> OSError:
    """The operating system's error, also if safetensors or shutil.copytree raised their own error for it."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            if any(f"[Errno {number}]" in why for _, _, why in error.args[0]):
                return OSError(number, os.strerror(number))
    if isinstance(error, SafetensorError) and (said := re.search(r"os error (\d+)", str(error))):
        return OSError(int(said[1]), str(error))
    return error if isinstance(error, OSError) else OSError(str(error))


def _flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path | str, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; the file or folder written there is renamed to `path` at the end.

    With `flush` the data are on the disk at the end, so they survive a power cut; without it they survive only a killed
    process. Files that are numerous, cheap to make again and checked by a digest are written without it.

    Raises:
        UserError: disk_full or not_writable; `path` is then unchanged.
    """
    path = Path(path)
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        holder, lock = _holder(path)
        try:
            temporary = holder / path.name
            yield temporary
            for part in (temporary, *temporary.rglob("*")) if flush else ():
                _flush(part)
            if temporary.is_dir() and path.exists():
                path.rename(holder / "old")
            temporary.replace(path)
            if flush:
                _flush(path.parent)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
            os.close(lock)


def _holder(path: Path) -> tuple[Path, int]:
    """A new temporary folder next to `path`, and its lock, which tells `sweep` that the folder is in use."""
    while True:
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name[:200]}.", suffix=PART, dir=path.parent))
        lock = os.open(holder, os.O_RDONLY)
        with suppress(OSError):  # some network disks have no locks; `sweep` removes nothing there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # 0: `sweep` removed the folder before it was locked
            return holder, lock
        os.close(lock)


PART = ".part"  # suffix of the temporary folders of `replacing`


def sweep(folder: Path, deep: bool = False) -> None:
    """Remove temporary files that killed processes left in `folder`; `deep`: in its subfolders too."""
    remnants: list[Path] = []
    with suppress(OSError):  # other processes may remove files meanwhile
        remnants += (folder.rglob if deep else folder.glob)(f".*.????????{PART}")
    for remnant in remnants:
        with suppress(OSError):
            lock = os.open(remnant, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if a process still writes there
                shutil.rmtree(remnant)
            finally:
                os.close(lock)


@lru_cache(maxsize=4096)
def _sweep_once(folder: Path) -> None:
    """`sweep` a folder once per process, before the process first writes there."""
    sweep(folder)


@contextmanager
def alone(folder: Path, what: str, field: str = "", patience: float = 3.0) -> Iterator[None]:
    """Context in which only this process holds the lock of `folder`; a killed process loses its lock.

    Args:
        what: for the message, what another process would be doing there, such as "makes clips".
        field: the key or option that names the folder.
        patience: seconds to wait for another process that may be about to end.

    Raises:
        UserError: busy, disk_full or not_writable.
    """
    with explain(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"{folder}: another process {what} here; wait for it, or choose another folder", "busy", field
                    ) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def write_bytes(path: Path | str, content: bytes, flush: bool = True) -> None:
    with replacing(path, flush) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, content: str, flush: bool = True) -> None:
    write_bytes(path, content.encode(), flush)


def write_json(path: Path | str, value: Any, flush: bool = True) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", flush)


def read_json(path: Path | str) -> Any:
    """The value in a JSON file: UTF-8, UTF-16 or UTF-32, with a byte order mark or without; every number finite.

    Raises:
        UserError: missing; format (not text, or not JSON), with the line.
    """
    text = read_text(path)
    try:
        return _parsed(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}); fix the file", "format") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({_reason(error)}); fix the file", "format") from error


def read_object(path: Path | str) -> dict[str, Any]:
    """As `read_json`, for a file that must contain an object.

    Raises:
        UserError: as `read_json`; format: it contains something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {printable(value)}, not an object; fix the file", "format")
    return value


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file, in the encodings of `read_json`; blank lines are skipped.

    Raises:
        UserError: missing; format (not text, or a line that is not a JSON object), with the line.
    """
    rows = []
    # not splitlines: text in JSON may hold U+2028 and the like
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parsed(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else _reason(error)
            raise UserError(f"{path}:{number}: is not JSON ({reason}); fix the line", "format") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: is {printable(value)}, not an object; fix the line", "format")
        rows.append(value)
    return rows


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """As `read_jsonl`, for a log to which lines are appended: lines without a JSON object are left out with a warning.

    Raises:
        UserError: missing.
    """
    rows, torn = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        try:
            value = _parsed(line.decode()) if line.strip() else {}
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows += [value] if value else []
        else:
            torn.append(number)
    if torn:
        print(f"{path}:{torn[0]}: is damaged and left out ({len(torn)} such lines)", file=sys.stderr)
    return rows


def read_text(path: Path | str) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32 (recognised by its first bytes), without byte order mark.

    All line ends become "\\n".

    Raises:
        UserError: missing; format (another encoding).
    """
    content = read_bytes(path)
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not {encoding.upper()} text; save the file as UTF-8", "format") from error


def read_bytes(path: Path | str) -> bytes:
    """The content of a file.

    Raises:
        UserError: missing: the file does not exist, is a folder, or may not be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{printable(str(path), 300)}: does not exist", "missing") from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{printable(str(path), 300)}: is not a valid file name", "missing") from error
    except OSError as error:
        if error.errno not in UNREADABLE:  # such as a disk that does not answer: the file may exist
            raise
        why = os.strerror(error.errno).lower()
        raise UserError(f"{printable(str(path), 300)}: cannot be read ({why})", "missing") from error


UNREADABLE = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


def _parsed(text: str) -> Any:
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{printable(text)} is not finite")
    return number


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error), 200)


def write_jsonl(path: Path | str, rows: list[dict[str, Any]], flush: bool = True) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), flush)


def sha256(path: Path | str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value; the order of a mapping's keys does not matter."""
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def inside(root: Path | str, name: str) -> Path:
    """The path of `name` below `root`.

    Raises:
        UserError: outside: `name` leads out of `root` (absolute, "..", or through a link), or is not a valid path.
    """
    root = Path(root).resolve()
    try:
        path = (root / name).resolve()
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long; a NUL; links in a circle
        raise UserError(
            f"{root}: the entry {printable(repr(name))} is not a valid file name; fix it", "outside"
        ) from error
    if not path.is_relative_to(root):
        raise UserError(f"{root}: the entry {printable(repr(name))} points outside the folder; fix it", "outside")
    return path


def write_sealed(path: Path | str, value: dict[str, Any], flush: bool = True) -> None:
    """Write an object together with its own digest as the field `sha256`, which is replaced if it exists."""
    write_json(path, seal(value), flush)


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The object with its own digest as the field `sha256`."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    return rest | {"sha256": sha256_json(rest)}


def read_sealed(path: Path | str) -> dict[str, Any]:
    """The object that `write_sealed` wrote, including the digest.

    Raises:
        UserError: missing; damaged: its content does not match its digest.
    """
    try:
        value = read_object(path)
    except UserError as error:
        if error.code == "format":
            raise UserError(f"{path}: is damaged ({error}); delete it and make it again", "damaged") from error
        raise
    if value.get("sha256") != seal(value)["sha256"]:
        raise UserError(
            f"{path}: is damaged (its content is not what was written); delete it and make it again",
            "damaged",
        )
    return value


def sums(folder: Path | str) -> dict[str, str]:
    """The SHA-256 of every file in a folder and its subfolders, by relative path."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(folder: Path | str, noted: dict[str, str]) -> list[str]:
    """The files of `noted` (from `sums`) that are missing in the folder or have changed."""
    paths = {name: Path(folder) / name for name in noted}
    return [name for name, path in paths.items() if not path.is_file() or sha256(path) != noted[name]]


def note_digest(path: Path, written: Path) -> None:
    """Write the digest of `written`, which will be renamed to `path`, into the hidden folder .sha256 next to `path`.

    Call it before renaming, so that a killed process leaves no file without a digest.
    """
    write_text(_note(path), sha256(written) + "\n", flush=False)


def _note(path: Path) -> Path:
    return path.parent / ".sha256" / f"{path.name}.txt"  # a suffix that no video has


def intact(path: Path) -> bool:
    """Whether a file matches its noted digest. True for a file without one: another program may have written it."""
    note = _note(path)
    return not note.is_file() or note.read_text(errors="replace").strip() == sha256(path)
