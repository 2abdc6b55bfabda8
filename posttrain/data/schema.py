"""A row of metadata.jsonl: the facts about one clip. sim/dataset.py writes it; only this module reads it.

If only some worlds write a field, they are named in brackets. Units are SI; posttrain/types.py defines the axes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from posttrain.core import files
from posttrain.core.errors import UserError

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Camera:
    """A level pinhole that looks along +y of the world.

    Attributes:
        position: metres.
        intrinsics: 3 x 3, row by row, in pixels of the clip's own size.
        focal, sensor: focal length and the sensor's width, metres.
    """

    position: Vector
    intrinsics: tuple[Vector, Vector, Vector]
    focal: float | None = None
    sensor: float | None = None


@dataclass(frozen=True)
class Body:
    """A rigid body.

    Attributes:
        name: the noun that captions use.
        size: metres, the longest side of its bounding box.
        mass: kilograms.
        role: `dropped` falls, `pile` rests below, `moved` follows a given path.
    """

    asset: str
    name: str
    size: float
    mass: float
    friction: float
    restitution: float
    role: str


@dataclass(frozen=True)
class Contact:
    """One touch of two bodies: time in seconds, their indices (-1 is the floor), normal impulse in newton seconds."""

    time: float
    pair: tuple[int, int]
    impulse: float | None = None


@dataclass(frozen=True)
class Violation:
    """The law that a clip breaks on purpose (sim/worlds/counterfactual.py).

    Attributes:
        kind: which law, and how.
        severity: 0: as the true clip; 1: as far from it as a clip in which nothing moves.
        value: how much, in the kind's own unit.
        meaning: that unit in words.
        seen: share of the frames in which the scored object is visible.
    """

    kind: str
    severity: float
    value: float = 0.0
    meaning: str = ""
    seen: float | None = None


@dataclass(frozen=True)
class ClipRow:
    """The facts about one clip. For a user's own video and for a sample, only the fields without a default are known.

    Attributes:
        file_name, annotations: the video and its .npz, relative to the split's folder.
        size: height, width in pixels.
        sha256, annotations_sha256: digests of the two files; "" and None if they were not computed.
        target: index of the scored body; its id among the instances is one more.
        distance: metres along the optical axis from the camera to the target's centre in frame 0.
        motion: what the target does.
        drop_height, contact_time: metres and seconds until the target first touches anything, None if it never does. In
            a clip that breaks a law, drop_height is the true clip's.
        group: clips that continue the same first frame have the same number.
        violation: None for a true clip.
        depth, height: of the target in frame 0, metres (grid, ambiguous).
        depths: metres, between which `depth` was drawn (ambiguous).
        beta: how fast the ray from the camera through the target's lowest point rises (ambiguous).
        id: whether depth and height are as in training (grid).
        law: the true values of the scorecard's quantities, and what it must know of the scene (throw, ramp, pendulum,
            collide, topple).
        written: the row as it is in its file; None for a row that was built in memory. See `to_json`.
    """

    file_name: str
    caption: str
    fps: float
    frames: int
    size: tuple[int, int]
    sha256: str = ""
    annotations: str | None = None
    annotations_sha256: str | None = None
    target: int | None = None
    seed: int | None = None
    camera: Camera | None = None
    gravity: Vector | None = None
    bodies: tuple[Body, ...] = ()
    distance: float | None = None
    motion: str | None = None
    drop_height: float | None = None
    contact_time: float | None = None
    contacts: tuple[Contact, ...] = ()
    background: str | None = None
    split: str | None = None
    generator: str | int | None = None
    group: int | None = None
    violation: Violation | None = None
    depth: float | None = None
    height: float | None = None
    depths: tuple[float, float] | None = None
    beta: float | None = None
    id: bool | None = None
    law: dict[str, float] | None = None
    written: dict[str, Any] | None = field(default=None, repr=False, compare=False)


FIELDS = tuple(field.name for field in fields(ClipRow) if field.name != "written")
_ROW = TypeAdapter(ClipRow)


def read(metadata: Path) -> list[ClipRow]:
    """The rows of a metadata.jsonl.

    Raises:
        UserError: the file is missing, or a field is of the wrong type; the message names file, line and field.
    """
    return [from_json(row, f"{metadata}:{number}") for number, row in enumerate(files.read_jsonl(metadata), 1)]


def from_json(row: Mapping[str, Any], where: str) -> ClipRow:
    """A row of a file, checked. Fields that ClipRow does not have are kept in `written`.

    Raises:
        UserError: a field is missing or of the wrong type; `where` (file and line) begins the message.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: should be a mapping of fields; make the dataset again", "format")
    try:
        checked = _ROW.validate_json(json.dumps({name: row[name] for name in FIELDS if name in row}), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        wrong = "is missing" if first["type"] == "missing" else f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UserError(f"{where}: {name}: {wrong}; make the dataset again", "format", name) from error
    return replace(checked, written=dict(row))


def to_json(row: ClipRow) -> dict[str, Any]:
    """The row as it was read; for a row that was made in memory, its fields that have a value."""
    if row.written is not None:
        return row.written
    made: dict[str, Any] = json.loads(json.dumps(asdict(row)))
    return {name: value for name, value in made.items() if value not in (None, [], "")}


def facts(row: ClipRow, names: Sequence[str]) -> dict[str, Any]:
    """These fields as JSON values, None if unknown."""
    known = to_json(row)
    return {name: known.get(name) for name in names}
