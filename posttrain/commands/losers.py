"""Generate and score the base model's samples for `data.groups`, the rejected clips."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posttrain.commands.experiment import Recipe, resolved
from posttrain.commands.loading import base_model, device, load_tracker, main_process, memory, wait
from posttrain.core import codec, distributed, files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig, GroupsConfig
from posttrain.data.dataset import Clips
from posttrain.data.groups import names
from posttrain.judges.questions import Judge
from posttrain.models.base import ModelConfig

SAMPLES = "samples.json"  # in a folder of samples: the model that made them
MODEL_KEYS = {"family", "path", "revision", "conditioning", "merge", "start"}  # of a model's config


class FirstPicture(NamedTuple):
    """A clip's first frame and caption, in the form that `score.sample_missing` takes."""

    id: str
    caption: str
    picture: Callable[[], np.ndarray]
    context: str = ""


@memory("sampling", "lower data.groups.batch, or take smaller or shorter clips (data.size, data.frames)")
def make_samples(plan: Recipe, groups: GroupsConfig) -> None:
    """Generate the missing samples (`groups.samples_each` for each true clip) and the missing scores of `groups.judge`.

    With several processes, each generates its share.

    Raises:
        UserError: the samples in the folder are from another model or in another format, two clips have the same name,
            or the judge cannot compare samples with retimed or cropped clips.
    """
    from posttrain.judges.folder import find, score_videos

    data = plan.data
    if groups.judge and not (isinstance(data.clips, str) and data.frames is data.fps is data.size is None):
        raise UserError(
            "data.groups.judge: compares with the clips of one folder, not retimed or cropped; name one folder in "
            "data.clips, without frames, fps and size, or score with `posttrain score`",
            "conflict",
            "data.groups.judge",
        )
    folders = [Path(folder) for folder in groups.samples]
    if main_process():
        for folder in folders[bool(groups.samples_each) :]:
            claim_samples(folder, resolved(plan.model))
    if groups.samples_each:
        _sample(plan, groups, folders[0])
    if groups.judge and main_process():
        for folder in folders:
            videos, path = find(folder, Path(str(data.clips)), data.split)
            score_videos(videos, path, *simulator_judge(str(data.clips), data.split, "pocket"), device())
    wait()


def _sample(plan: Recipe, groups: GroupsConfig, folder: Path) -> None:
    """Generate this process's share of the samples, then wait for the other processes."""
    from posttrain.evaluation.score import sample_missing

    clips = Clips(plan.data, preload=False)
    first_pictures = [
        FirstPicture(name, clips.row(i).caption, partial(clips.first, i)) for name, i in names(clips).items()
    ]
    clip_format, sampler_settings = clips.splits[0].clip_format._asdict(), groups.sampler.model_dump()
    if main_process():
        negative = groups.negative if groups.sampler.guided else None
        claim_samples(
            folder, resolved(plan.model), {"kind": clip_format, "sampler": sampler_settings, "negative": negative}
        )
    wait()
    process, each = distributed.process(), groups.samples_each
    share = first_pictures[process.process_index :: process.num_processes]
    sampler_settings |= {"negative": groups.negative}
    ready = partial(base_model, plan)
    made = sample_missing(ready, {"": share}, folder, clip_format, each, groups.batch, **sampler_settings)
    print(f"{folder}: {made} samples made, {each * len(share) - made} existed", file=sys.stderr)
    wait()


def claim_samples(folder: Path, model: ModelConfig, made: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder with samples of another model or other settings; else write model and settings into it.

    Args:
        model: resolved.
        made: format ("kind"), sampler and negative prompt of the samples to be generated there. None: nothing is
            generated; samples with any settings are used and, if the folder does not record its model, of any model.
    """
    path = folder / SAMPLES
    if made is None and not path.exists():
        return
    adapters = [*(adapter.path for adapter in model.merge), *([model.start] if model.start else [])]
    wanted = {
        **(made or {}),
        "model": model.model_dump(mode="json", include=MODEL_KEYS),
        "weights": {path: weights(Path(path)) for path in adapters},
    }
    kept = files.read_object(path) if path.exists() else wanted
    if "sha256" in kept and files.seal(kept) != kept:  # a note of another program has no digest
        message = (
            f"{path}: is damaged (its content is not what was written); delete {folder}, and its samples are made anew"
        )
        raise UserError(message, "damaged", "data.groups.samples")
    if other := [name for name in wanted if kept.get(name) != wanted[name]]:
        remedy = str(folder) if made is not None else f"{path} to use them anyway"
        raise UserError(
            f"{path}: the samples there were made with another {', '.join(other)}; name another folder in "
            f"data.groups.samples, or delete {remedy}",
            "mismatch",
            "data.groups.samples",
        )
    if made is not None:
        files.write_sealed(path, wanted)


def weights(path: Path) -> str:
    """Hash of an adapter file, or of the weights in a transformer folder."""
    if path.is_file():
        return files.sha256(path)
    return files.sha256_json({part.name: files.sha256(part) for part in sorted(path.glob("*.safetensors"))})


def simulator_judge(clips: str, split: str, tracker: str) -> tuple[Callable[[], Judge], str, str]:
    """A function that loads the judge for samples of these clips, its name, and its version.

    Name or version changes with everything that the scores depend on.
    """
    from posttrain.data import views
    from posttrain.evaluation.evaluate import version_of, weights_fingerprint
    from posttrain.judges import simulator
    from posttrain.metrics import masks, pisa

    truths, follower = Clips(DataConfig(clips=clips, split=split), preload=False), load_tracker(tracker)
    name = f"simulator with tracker {weights_fingerprint(follower.module)[:8]}, clips {truths.key[:8]}"
    version = version_of(simulator, pisa, masks, views, codec, type(follower.module))
    return lambda: simulator.samples(truths, follower, device()), name, version
