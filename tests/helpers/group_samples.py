"""Samples of the groups of helpers/falling.py."""

import json
from pathlib import Path
from typing import Any

from helpers.falling import FPS, film, rows_of

from posttrain.evaluation.sample import write_video


def samples(out: Path, scores: bool = True, seeds: int = 2, **change: Any) -> Path:
    """What a model made of the first frames of `write_groups`: falls that never end, twice compressed."""
    rows = []
    for group in range(2):
        for seed in range(seeds):
            options = {"frames": 5, "column": 4 + 12 * group, "fps": FPS} | change
            video, _ = film(rows_of(2, options["frames"]) + seed, options["column"], 200)
            video[0] = film(rows_of(2, 1), options["column"], 200)[0][0]
            path = out / f"{group:05d}-0-s{seed}-base.mp4"
            write_video(path, video, options["fps"])
            rows.append({"file_name": path.name, "sa": 0.25 * seed, "pc": 0.5})
    if scores:
        (out / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out
