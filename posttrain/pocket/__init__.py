"""The embedded models: small enough to commit, shaped like Wan2.2 TI2V-5B and Open-Sora v1.2; README.md has more."""

from functools import lru_cache
from pathlib import Path

from posttrain.core import files
from posttrain.core.errors import UserError

FAMILY = "wan"  # of the embedded video model: the package in posttrain/models


def folder(part: str) -> Path:
    """The folder of an embedded part: `wan` or `opensora` (whole models), `tracker`, `sam2`, `raft` or `depth`."""
    return Path(__file__).parent / part


@lru_cache
def whole(part: str) -> Path:
    """The folder of a part, after checking its files.

    Raises:
        UserError: damaged: a file is missing or does not match SHA256SUMS.
    """
    lines = (folder("") / "SHA256SUMS").read_text().splitlines()
    noted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not folder(part).is_dir():
        raise UserError(f"{folder(part)}: is missing; reinstall posttrain or restore the folder with git", "damaged")
    if wrong := files.changed(folder(""), {name: noted[name] for name in noted if name.startswith(f"{part}/")}):
        raise UserError(
            f"{folder(wrong[0])}: is missing or was changed; reinstall posttrain or restore the file with git",
            "damaged",
        )
    return folder(part)
