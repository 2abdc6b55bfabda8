"""Files that are whole or absent: written to a temporary name, flushed, renamed. Errors a user can act on."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.core.errors import UserError


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `path` into one clear line."""
    try:
        yield
    except (OSError, SafetensorError) as found:
        error = _refusal(found)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; free some space and start again, nothing is lost") from error
        if error.errno == errno.EFBIG:
            raise UserError(f"{path}: is larger than the system allows (ulimit -f); raise the limit") from error
        if error.errno == errno.ENOENT:
            raise UserError(f"{path}: cannot be written (its folder was removed meanwhile); start again") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: cannot be written (a folder on the way is a file); choose another") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = os.strerror(error.errno).lower()
            raise UserError(f"{path}: cannot be written ({why}); choose another folder or mend its rights") from error
        raise


def _refusal(error: Exception) -> OSError:
    """What the operating system said, also where safetensors or shutil.copytree told it in their own way."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            if any(f"[Errno {number}]" in why for _, _, why in error.args[0]):
                return OSError(number, os.strerror(number))
    if isinstance(error, SafetensorError) and (told := re.search(r"os error (\d+)", str(error))):
        return OSError(int(told[1]), str(error))
    return error if isinstance(error, OSError) else OSError(str(error))


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path | str, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there (a file or a folder) becomes `path` at the end.

    `flush` waits until the disk has it, so that it survives a power cut; without, only a killed process. Files that are
    many, cheap to make again and checked by their digest do without.

    Raises:
        UserError: the disk is full or the place cannot be written; `path` keeps what it had.
    """
    path = Path(path)
    with explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
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


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`; nobody else may be writing there."""
    for remnant in folder.glob(".*.????????"):  # as `replacing` names its own
        if remnant.is_dir() and {path.name for path in remnant.iterdir()} <= {remnant.name[1:-9], "old"}:
            shutil.rmtree(remnant, ignore_errors=True)


def write_bytes(path: Path | str, content: bytes, flush: bool = True) -> None:
    with replacing(path, flush) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, content: str, flush: bool = True) -> None:
    write_bytes(path, content.encode(), flush)


def write_json(path: Path | str, value: Any, flush: bool = True) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", flush)


def read_bytes(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "missing") from error


def read_text(path: Path | str) -> str:
    """UTF-8 text, with or without a byte order mark; lines end by "\\n", however they did in the file.

    Raises:
        UserError: it is not there, or in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: does not exist", "missing") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "missing") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8", "format") from error


def read_json(path: Path | str) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg}); make the file again", "damaged") from error


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; blank lines are none. A line ends by a line feed alone: text may hold other breaks."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: is not JSON ({error.msg}); make the file again", "damaged") from error
    return rows


def write_jsonl(path: Path | str, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def sha256(path: Path | str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """Of what JSON can hold; the order of a mapping's keys does not count."""
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def inside(root: Path | str, name: str) -> Path:
    """The path of `name` below `root`.

    Raises:
        UserError: `name` would leave `root` (absolute, "..", or through a link).
    """
    root = Path(root).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{root}: {name[:80]!r} points outside the folder; give a path inside, without ..", "outside")
    return path
