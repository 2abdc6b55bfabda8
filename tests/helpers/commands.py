"""Call commands in this process, and read the files of a folder."""

import contextlib
import io
from pathlib import Path

from posttrain import cli


def command(home: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `posttrain ARGUMENTS`, called in this process."""
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    paths = folder.rglob("*") if folder.is_dir() else [folder]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
