"""Samples of a base for true clips to win against, as `data.groups` asks for them: made, claimed, judged."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.commands.experiment import Recipe, resolved
from posttrain.commands.loading import base_model, device, load_tracker, main_process, memory, wait
from posttrain.core import distributed, files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import names
from posttrain.judges.questions import Judge
from posttrain.models.base import ModelConfig

SAMPLES = "samples.json"  # in a folder of samples, who made them
WHOSE = {"family", "path", "revision", "conditioning", "merge", "start"}  # of a model's config


class Beginning(NamedTuple):
    """A clip's first picture and caption, as `score.sample_missing` wants them."""

    id: str
    caption: str
    picture: Callable[[], np.ndarray]
    context: str = ""


@memory("sampling", "lower data.groups.batch, or take smaller or shorter clips (data.size, data.frames)")
def make_samples(plan: Recipe, groups: GroupsConfig) -> None:
    """`groups.samples_each` samples of each true clip, and `groups.judge`'s scores, as far as they are missing.

    Of several processes each makes its share.

    Raises:
        UserError: samples there are of another model or kind, two clips have one name, or the judge cannot compare
            samples with clips as filmed.
    """
    from posttrain.judges.folder import find, score_videos

    data = plan.data
    if groups.judge and not (isinstance(data.clips, str) and data.frames is data.fps is data.size is None):
        raise UserError(
            "data.groups.judge: compares with the clips of one folder as they were filmed; name one in data.clips, "
            "without frames, fps and size, or score with `posttrain score`"
        )
    folders = [Path(folder) for folder in groups.samples]
    if main_process():
        for folder in folders[bool(groups.samples_each) :]:
            claim_samples(folder, resolved(plan.model))
    if groups.samples_each:
        _sample(plan, groups, folders[0])
    if groups.judge and main_process():
        for folder in folders:
            found, path = find(folder, Path(str(data.clips)), data.split)
            score_videos(found, path, *simulator_judge(str(data.clips), data.split, "pocket"))
    wait()


def _sample(plan: Recipe, groups: GroupsConfig, folder: Path) -> None:
    """This process's share of the samples; all are there when it returns."""
    from posttrain.evaluation.score import sample_missing

    clips = Clips(plan.data, preload=False)
    starts = [Beginning(name, clips.row(i).caption, partial(clips.first, i)) for name, i in names(clips).items()]
    kind, how = clips.splits[0].kind, groups.sampler.model_dump()
    if main_process():
        negative = groups.negative if groups.sampler.guided else None
        claim_samples(folder, resolved(plan.model), {"kind": kind, "sampler": how, "negative": negative})
    wait()
    process, each = distributed.process(), groups.samples_each
    share = starts[process.process_index :: process.num_processes]
    how |= {"negative": groups.negative}
    made = sample_missing(lambda: base_model(plan), {"": share}, folder, kind, each, groups.batch, **how)
    print(f"{folder}: {made} samples made, {each * len(share) - made} were there", file=sys.stderr)
    wait()


def claim_samples(folder: Path, model: ModelConfig, made: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder of samples that another model made, or otherwise than those to come; note these in it.

    Args:
        model: resolved.
        made: kind, sampler and negative of samples that are to be made there; None: those that are there are used,
            however they were made, and where nothing is noted, whoever made them.
    """
    path = folder / SAMPLES
    if made is None and not path.exists():
        return
    started = [*(adapter.path for adapter in model.merge), *([model.start] if model.start else [])]
    wanted = {
        **(made or {}),
        "model": model.model_dump(mode="json", include=WHOSE),
        "weights": {path: weights(Path(path)) for path in started},
    }
    kept = files.read_json(path) if path.exists() else wanted
    if other := [name for name in wanted if kept.get(name) != wanted[name]]:
        remedy = str(folder) if made is not None else f"{path} to use them all the same"
        raise UserError(
            f"{path}: the samples there are of another {', '.join(other)}; name another folder in "
            f"data.groups.samples, or delete {remedy}"
        )
    if made is not None:
        files.write_json(path, wanted)


def weights(path: Path) -> str:
    """Hash of an adapter file, or of the weights in a transformer folder."""
    if path.is_file():
        return files.sha256(path)
    return files.sha256_json({part.name: files.sha256(part) for part in sorted(path.glob("*.safetensors"))})


def simulator_judge(clips: str, split: str, tracker: str) -> tuple[Callable[[], Judge], str]:
    """What makes the judge of samples of these clips ready, and its name, which changes with what it depends on."""
    from posttrain.evaluation.evaluate import weights_fingerprint
    from posttrain.judges import simulator

    truths, follower = Clips(DataConfig(clips=clips, split=split), preload=False), load_tracker(tracker)
    name = f"simulator with tracker {weights_fingerprint(follower.module)[:8]}, clips {truths.key[:8]}"
    return lambda: simulator.samples(truths, follower, device()), name
