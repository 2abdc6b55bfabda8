"""The embedded base model: small enough to commit, shaped like Wan2.2 TI2V-5B. README.md says how it was made."""

from functools import lru_cache
from pathlib import Path

from posttrain.core import files
from posttrain.core.errors import UserError

FAMILY = "wan"  # of the embedded video model: the package in posttrain/models


def folder(part: str) -> Path:
    """Where an embedded part lives: `wan` (the diffusers folder), `tracker`, `sam2`, `raft` or `depth`."""
    return Path(__file__).parent / part


@lru_cache
def whole(part: str) -> Path:
    """The same, after a look at its files.

    Raises:
        UserError: damaged: one is missing or not what SHA256SUMS says.
    """
    lines = (folder("") / "SHA256SUMS").read_text().splitlines()
    noted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if wrong := files.changed(folder(""), {name: noted[name] for name in noted if name.startswith(f"{part}/")}):
        raise UserError(
            f"{folder(wrong[0])}: is missing or not what was published; get posttrain's files again", "damaged"
        )
    return folder(part)
