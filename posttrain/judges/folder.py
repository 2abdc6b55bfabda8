"""Score the videos of a folder: `posttrain score FOLDER --judge simulator|vlm|endpoint`.

FOLDER contains samples, named <clip>-s<seed>.mp4 after the clips of a dataset, which has their captions. Or it is
itself a dataset folder, or a folder of any videos with captions (data/listing.py). Scores are written next to the
videos, one row of scores.jsonl each, where groups read them (data/groups.py):

    {"file_name": "00012-s0.mp4", "sa": 0.9, "pc": 0.2, "mass": 0.99, "judge": "...", "version": "...", "key": "...",
     "sha256": "..."}

`mass` is the probability that a model's answers begin with yes or no (questions.py); the simulator has none. Each row
is written as soon as it is computed. A second run only scores videos without a row, or whose video or caption has
changed. Scores of different judges are not mixed.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posttrain.core import files
from posttrain.core.errors import UserError, printable
from posttrain.core.parallel import in_order
from posttrain.core.progress import progress
from posttrain.data import listing
from posttrain.data.groups import SCORES, Scores, sample_of, score_rows
from posttrain.judges.questions import Judge, Judgement


class Video(NamedTuple):
    """A video to be scored; `name` is its path from the folder of the scores."""

    path: Path
    name: str
    caption: str


def find(folder: Path, clips: Path | None, split: str) -> tuple[list[Video], Path]:
    """The videos of a folder, and the file for their scores.

    Args:
        clips: the dataset whose clips the videos of `folder` continue; None: they have their own captions.

    Raises:
        UserError: there are no such videos, or one has no caption.
    """
    if clips is None:
        listed = listing.entries(folder, split)
        if not listed:
            raise UserError(
                f"{folder}: has no videos with captions in {split}; for samples, give their dataset as --clips",
                "no_clips",
            )
        found = [_captioned(e, e.folder / e.name, e.name) for e in listed]
        return found, listed[0].folder / SCORES
    true: dict[str, listing.Entry] = {}
    for entry in listing.entries(clips, split):
        if true.setdefault(Path(entry.name).stem, entry) is not entry:
            message = f"--clips: {clips} has two clips called {Path(entry.name).stem}; rename one of them"
            raise UserError(message, "duplicate", "--clips")
    matched = [(sample_of(path.stem, true), path) for path in listing.videos_in(folder)]
    found = [_captioned(true[sample[0]], path, path.name) for sample, path in matched if sample]
    if found and (others := [path.name for sample, path in matched if not sample]):
        print(
            f"{folder}: {len(others)} videos are not named after a clip of {clips}, such as {others[0]}; left out",
            file=sys.stderr,
        )
    if not found:
        message = f"{folder}: has no samples of the clips in {clips}, {split}; name them <clip>-s<seed>.mp4"
        raise UserError(message, "no_clips", "--clips")
    return found, folder / SCORES


def _captioned(entry: listing.Entry, path: Path, name: str) -> Video:
    if entry.caption is None:
        raise UserError(f"{entry.folder / entry.name}: has no caption, which the judge needs; add one", "required")
    if not path.is_file():
        raise UserError(f"{path}: does not exist; remove it from the list, or add the file", "missing")
    return Video(path, name, entry.caption)


def score_videos(
    found: Sequence[Video],
    path: Path,
    ready: Callable[[], Judge],
    name: str,
    version: str,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Score the videos that have no score in `path` with the judge `name`; returns the rows of all videos.

    Args:
        ready: returns the judge; called only if there is something to do.
        version: of the judge's code; scores of another version are computed again, with a message.
        device: the judge's, if two threads may call it at the same time; None: one video after the other.

    Raises:
        UserError: other_run: `path` has scores of another judge; or what the judge raises.
    """
    rows = score_rows(path) if path.exists() else {}
    # what others wrote has no digest
    ours = [video for video, row in rows.items() if "sha256" in row or row.get("judge") == name]
    if damaged := [video for video in ours if files.seal(rows[video]) != rows[video]]:
        print(f"{path}: the row of {printable(damaged[0])} does not match its digest; scored again", file=sys.stderr)
        rows = {video: row for video, row in rows.items() if video not in damaged}
    if other := next((row for row in rows.values() if row.get("judge") != name), None):
        had = printable(other.get("judge", "an unknown judge"))
        raise UserError(f"{path}: has scores of {had}, not of {name}; move that file away to score again", "other_run")
    keys = {video.name: files.sha256_json([name, version, files.sha256(video.path), video.caption]) for video in found}
    if older := sum(video.name in rows and rows[video.name].get("version") != version for video in found):
        print(f"{path}: {older} scores are of another version of {name}; scored again", file=sys.stderr)
    fresh = {video for video, row in rows.items() if row.get("key") == keys.get(video)}
    missing = [video for video in found if video.name not in fresh]
    if not missing:
        return [rows[video.name] for video in found]
    judge = ready()

    def score(video: Video) -> Scores | Judgement:
        return judge(video.path, video.caption)

    with progress("scores", len(found), len(found) - len(missing)) as advance:
        scored = map(score, missing) if device is None else in_order(score, missing, device)
        for video, scores in zip(missing, scored, strict=True):
            row = {
                "file_name": video.name,
                **scores._asdict(),
                "judge": name,
                "version": version,
                "key": keys[video.name],
            }
            rows[video.name] = files.seal(row)
            files.write_jsonl(path, list(rows.values()), flush=False)
            advance(f"sa {scores.sa:.2f}, pc {scores.pc:.2f}")
    return [rows[video.name] for video in found]
