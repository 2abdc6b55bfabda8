"""Samples of a base for true clips to win against, as `data.groups` asks for them: made, claimed, judged."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain import files
from posttrain.data.clips import Clips, DataConfig, GroupsConfig
from posttrain.experiment import Recipe, resolved
from posttrain.files import UserError
from posttrain.judges.questions import Judge
from posttrain.loading import base_model, device, load_tracker, main_process, memory, wait
from posttrain.models.base import ModelConfig
from posttrain.models.published import sampler

SAMPLES = "samples.json"  # in a folder of samples, who made them
WHOSE = {"family", "path", "revision", "conditioning", "merge", "start"}  # of a model's config


class Beginning(NamedTuple):
    """A clip's first picture and caption, as `score.imagine` wants them."""

    id: str
    caption: str
    picture: Callable[[], np.ndarray]
    context: str = ""


@memory("sampling", "lower eval.batch, or take smaller or shorter clips (data.size, data.frames)")
def make_samples(plan: Recipe, groups: GroupsConfig) -> None:
    """`groups.samples_each` samples of each true clip, and `groups.judge`'s scores, as far as they are missing.

    Raises:
        UserError: samples there are of another model or kind, or the judge cannot compare them with clips as filmed.
    """
    from posttrain.judges.folder import find, score
    from posttrain.score import imagine

    data = plan.data
    if groups.judge and not (isinstance(data.clips, str) and data.frames is data.fps is data.size is None):
        raise UserError(
            "data.groups.judge: compares with the clips of one folder as they were filmed; name one in data.clips, "
            "without frames, fps and size, or score with `posttrain score`"
        )
    if groups.samples_each and main_process():
        clips, folder = Clips(data, preload=False), Path(groups.samples[0])
        starts = [
            Beginning(clips.video(i).stem, clips.row(i)["caption"], partial(clips.first, i)) for i in range(len(clips))
        ]
        how = sampler(plan.model.path, plan.eval.sampler.model_dump() if plan.eval else {})
        kind, batch = clips.splits[0].kind, plan.eval.batch if plan.eval else 1
        claim_samples(folder, resolved(plan.model), {"kind": kind, "sampler": how})
        made = imagine(lambda: base_model(plan), {"": starts}, folder, kind, groups.samples_each, batch, **how)
        print(f"{folder}: {made} samples made, {groups.samples_each * len(starts) - made} were there", file=sys.stderr)
    if groups.judge and main_process():
        for folder in map(Path, groups.samples):
            found, path = find(folder, Path(str(data.clips)), data.split)
            score(found, path, *simulator_judge(str(data.clips), data.split, "pocket"))
    wait()


def claim_samples(folder: Path, model: ModelConfig, made: dict[str, Any]) -> None:
    """Refuse a folder of samples that another model made, or otherwise; note this one in it."""
    started = [*(adapter.path for adapter in model.merge), *([model.start] if model.start else [])]
    made |= {
        "model": model.model_dump(mode="json", include=WHOSE),
        "weights": {path: files.sha256(path) for path in started if Path(path).is_file()},
    }
    path = folder / SAMPLES
    kept = files.read_json(path) if path.exists() else made
    if other := [name for name in made if kept.get(name) != made[name]]:
        raise UserError(
            f"{path}: the samples there are of another {', '.join(other)}; name another folder in "
            f"data.groups.samples, or delete {folder}"
        )
    files.write_json(path, made)


def simulator_judge(clips: str, split: str, tracker: str) -> tuple[Callable[[], Judge], str]:
    """What makes the judge of samples of these clips ready, and its name, which changes with what it depends on."""
    from posttrain.evaluate import weights_fingerprint
    from posttrain.judges import simulator

    truths, follower = Clips(DataConfig(clips=clips, split=split), preload=False), load_tracker(tracker)
    name = f"simulator with tracker {weights_fingerprint(follower.module)[:8]}, clips {truths.key[:8]}"
    return lambda: simulator.samples(truths, follower, device()), name
