"""Show a dataset as a contact sheet, or as a page on which its clips play. Each clip has a line of text below.

Clips of one group (worlds/counterfactual.py, worlds/ambiguous.py) are shown together, each with its violation or depth.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from posttrain.core import pages
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError, printable
from posttrain.core.files import inside, read_jsonl, replacing, write_text

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1rem; color: #222; background: #fff }
section { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: 1.5rem }
h2 { font-size: 1rem; margin: 0 0 .4rem }
figure { margin: 0; width: 128px }
img { width: 128px; image-rendering: pixelated; display: block }
figcaption { font-size: 12px }
"""


def show(folder: Path | str, split: str | None, count: int, output: Path | str) -> Path:
    """Write the first `count` clips (or groups) of one split, or of each split (None), to `output`, a .png or an .html.

    Raises:
        UserError: the folder has no clips, a row of metadata.jsonl is damaged, or `output` or `count` is wrong.
    """
    folder, output = Path(folder), Path(output)
    names = [split] if split else sorted(path.parent.name for path in folder.glob("*/metadata.jsonl"))
    if not names:
        raise UserError(
            f"{folder}: has no split with a metadata.jsonl; make one with `python -m sim make RECIPE`", "no_clips"
        )
    if output.suffix not in (".png", ".html"):
        raise UserError(f"--output: {output} is neither a .png nor an .html", "value", "--output")
    if count < 1:
        raise UserError(f"--count: is {count}; ask for 1 or more", "value", "--count")
    try:
        groups = [group for name in names for group in grouped(folder / name)[:count]]
        _draw(folder.name, groups, output)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else printable(str(error))
        raise UserError(
            f"{folder}: a row of its metadata.jsonl cannot be shown ({why}); film it again", "damaged"
        ) from error
    return output


def _draw(title: str, groups: Sequence[Sequence[tuple[Path, dict[str, Any]]]], output: Path) -> None:
    if output.suffix == ".html":
        write_text(output, page(title, groups))
    else:
        with replacing(output) as temporary:
            sheet([clip for group in groups for clip in group]).save(temporary, format="PNG")


def grouped(folder: Path) -> list[list[tuple[Path, dict[str, Any]]]]:
    """The clips of a split's folder (path, row), a list per group; a clip without a group is a group of its own."""
    groups: dict[Any, list[tuple[Path, dict[str, Any]]]] = {}
    for row in read_jsonl(folder / "metadata.jsonl"):
        key = row.get("group", row["file_name"])
        groups.setdefault(key, []).append((inside(folder, row["file_name"]), row))
    return list(groups.values())


def words(row: dict[str, Any]) -> str:
    """The text below a clip."""
    if "depth" in row:
        return f"{row['motion']} from {row['height']:.2f} m at a depth of {row['depth']:.2f} m"
    if "violation" not in row:
        return str(row["motion"])
    violation = row["violation"]
    if violation is None:
        return "true"
    kind = violation["kind"].replace("_", " ")
    return f"{kind} {violation['value']:g} {violation['meaning']}, severity {violation['severity']:.2f}"


def sheet(clips: Sequence[tuple[Path, dict[str, Any]]], columns: int = 8) -> Image.Image:
    """A strip per clip, `columns` frames from first to last, with its text below."""
    strips = []
    for path, row in clips:
        frames = read_video(path)
        chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        scale = max(1, 128 // frames.shape[1])
        strip = np.concatenate(frames[chosen], axis=1).repeat(scale, 0).repeat(scale, 1)
        picture = Image.new("RGB", (strip.shape[1], strip.shape[0] + 14), "white")
        picture.paste(Image.fromarray(strip))
        text = f"{path.parent.name}/{path.name}  {words(row)}: {row['caption']}"
        ImageDraw.Draw(picture).text((2, strip.shape[0] + 1), text, fill="black")
        strips.append(picture)
    whole = Image.new("RGB", (max(p.width for p in strips), sum(p.height for p in strips)), "white")
    top = 0
    for picture in strips:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def page(title: str, groups: Sequence[Sequence[tuple[Path, dict[str, Any]]]]) -> str:
    """A complete HTML page: a section per group, its clips playing side by side."""
    sections = [
        {
            "heading": f"{group[0][0].parent.name}/{group[0][0].stem}: {group[0][1]['caption']}",
            "clips": [(moving(read_video(clip), row["fps"]), words(row)) for clip, row in group],
        }
        for group in groups
    ]
    return pages.render("sim", "show.html", STYLE, media="img-src data:", title=title, sections=sections)


def moving(frames_FHWC: np.ndarray, fps: float) -> str:
    """An animated WebP in base64 that loops after a pause of half a second."""
    pictures = [Image.fromarray(frame) for frame in frames_FHWC]
    times = [round(1000 / fps)] * (len(pictures) - 1) + [500]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=times, loop=0, lossless=True)
    return base64.b64encode(buffer.getvalue()).decode()
