"""The embedded base model: small enough to commit, shaped like Wan2.2 TI2V-5B. README.md says how it was made."""

from pathlib import Path

FAMILY = "wan"  # of the embedded video model: the package in posttrain/models


def folder(part: str) -> Path:
    """Where an embedded part lives: `wan` (the diffusers folder), `tracker`, `sam2`, `raft` or `depth`."""
    return Path(__file__).parent / part
