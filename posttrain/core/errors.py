"""Errors that a user can fix: a message of one line, a stable code, and the recipe key or option concerned."""

from typing import Any, Literal

# Tests, scripts and docs rely on these; the wording of a message may change at any time.
Code = Literal[
    "missing",  # a file, folder, split or clip that is named does not exist
    "damaged",  # a file is damaged, or its content is not what was written
    "format",  # a file is whole, but its format or layout cannot be read
    "outside",  # a path leaves the folder that it has to stay in
    "unknown_key",  # a recipe has a key that nothing reads
    "unknown_name",  # a plug-in, command or column of this name does not exist
    "required",  # a key or option has no value and needs one
    "value",  # a value is of the wrong type or out of range
    "conflict",  # two keys or options exclude each other
    "mismatch",  # two things do not fit: clips and model, adapter and base model, video and true clip
    "no_clips",  # nothing is left to work with
    "duplicate",  # two things share a name that has to be unique
    "other_run",  # the folder holds results of other settings
    "unfinished",  # an earlier stage is not complete
    "busy",  # another process works in this folder
    "disk_full",
    "not_writable",
    "memory",  # the device or the machine has too little memory
    "not_finite",  # a loss, gradient or weight is NaN or infinite
    "not_installed",  # an optional package or a driver is absent
    "unsupported",  # a valid request that is not implemented
    "network",  # the hub or a server does not answer
    "answer",  # a server's answer cannot be used
    "internal",  # a worker was killed, or `sim make` failed
]


class UserError(Exception):
    """An error that the user can fix.

    Args:
        message: one line: what is wrong, where (file and line, key or option), and what to do.
        code: one of Code.
        field: the recipe key ("train.lr"), option ("--clips") or column that is wrong; "" if there is none.
    """

    def __init__(self, message: str, code: Code = "value", field: str = "") -> None:
        super().__init__(message)
        self.code: Code = code
        self.field = field


def printable(text: Any, most: int = 80) -> str:
    """A text or value on one line: at most `most` characters, none of them a control character.

    Use it for text from a user, a file or a server in a message, so that it can neither flood nor control a terminal.
    """
    text = text if isinstance(text, str) else repr(text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def one_line(error: UserError) -> str:
    """The message on one line with its code, for a terminal. docs/troubleshooting.md explains each code."""
    return f"{printable(str(error), 2000)} [{error.code}]"
