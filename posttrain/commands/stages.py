"""The stages of a recipe: clips, latents, training, evaluation, report, export.

Stages communicate through files. Each checks which files exist, prints what it reuses, computes the rest, and continues
interrupted work:

    data/...                 the clips (made by `sim`)
    runs/cache/              latents and rows of evaluation that runs share, named by hash
    runs/<run>/clips.jsonl   which files are retimed, cropped or left out, and why (if there are any)
    runs/<run>/clips.jpg     a contact sheet of these clips as they are used in training
    runs/<run>/...           recipe and trained weights (see experiment.py)
    runs/<run>/best/         with tripwires: the weights of the best look (see tripwires.py)
    runs/<run>/merged/       the adapter merged into its base, if `export:` lists it
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.commands.experiment import (
    ADAPTER,
    TRAINED,
    Recipe,
    is_trained,
    members,
    need_training,
    resolved,
    trained_files,
)
from posttrain.commands.loading import (
    CACHE,
    TRACKED,
    base_model,
    device,
    load_model,
    load_tracker,
    main_process,
    memory,
    tuned_model,
    wait,
)
from posttrain.commands.losers import make_samples
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.core.signals import Interrupted
from posttrain.core.trackers import check_trackers
from posttrain.data import listing
from posttrain.data.config import GroupsConfig
from posttrain.data.dataset import Clips, Split, check_same_format, open_split, open_splits
from posttrain.evaluation.evaluate import EvalConfig
from posttrain.evaluation.records import Record
from posttrain.methods.base import Source, fingerprints, method_of, sampler
from posttrain.reporting.gallery import contact_sheet
from posttrain.rewards import base
from posttrain.training import tripwires
from posttrain.training.run import Run
from posttrain.training.tripwires import best, ended, watching

CLIPS, SHEET, SHOWN = "clips.jsonl", "clips.jpg", 24  # clips in the contact sheet


def run(plan: Recipe, folder: Path, show: bool = False) -> None:
    """Run every stage that the recipe lists; `show` prints the tables and paths of each."""
    prepare(plan)
    train(plan, folder)
    if plan.eval:
        evaluate(plan, folder, show)
        report(plan, folder, show)
    if plan.export:
        export(plan, folder, show)


def prepare(plan: Recipe) -> None:
    """Make what training reads and does not exist yet: clips, and the samples for preference groups.

    Raises:
        UserError: the recipe and its clips do not fit together.
    """
    film(plan)
    check_data(plan)
    if groups := check_groups(plan):
        make_samples(plan, groups)


def film(plan: Recipe) -> None:
    """Film the missing clips in separate processes, since training code does not import the simulator."""
    makers = [plan.data.make] if isinstance(plan.data.make, str) else plan.data.make or []
    if not main_process():
        makers = []
    for maker in makers:
        make_clips(maker)
    wait()


def make_clips(maker: str) -> None:
    """Film the clips of one recipe with `sim make`, in a process that ends with this one.

    Raises:
        UserError: internal: the clips could not be made; `sim make` has printed why.
        Interrupted: it was asked to stop.
    """
    command = [sys.executable, "-m", "sim", "make", maker, "--parent", str(os.getpid())]
    code = subprocess.run(command, check=False).returncode
    if code in (130, 143):
        raise Interrupted(code - 128)
    if code:
        raise UserError(f"{maker}: its clips could not be made (the line above says why)", "internal", "data.make")


def check_data(plan: Recipe) -> None:
    """Refuse training and test clips that do not fit together, before the long work starts."""
    splits = open_splits(plan.data)
    if plan.eval:
        splits += check_tracker(plan.eval)
    check_same_format(splits)


def check_tracker(measured: EvalConfig) -> list[Split]:
    """The splits that are measured. Raises UserError if they are too large for the embedded tracker."""
    from posttrain.evaluation.evaluate import test_sets

    splits = [open_split(test.folder, test.split) for test in test_sets(measured).values()]
    for split in splits:
        if measured.tracker == "pocket" and max(split.size) > TRACKED:
            height, width = split.size
            raise UserError(
                f"eval.tracker: the embedded tracker was made for {TRACKED} x {TRACKED} pixels, and the clips in "
                f"{split.folder} have {height} x {width}; name a SAM 2, as facebook/sam2.1-hiera-large",
                "mismatch",
                "eval.tracker",
            )
    return splits


@memory(
    "training",
    "raise train.accumulate, set train.block_checkpointing=true, or take smaller or shorter clips (data.size and "
    "data.frames, or what data.make films)",
)
def train(plan: Recipe, folder: Path) -> None:
    """Train and save the weights, unless this is already done.

    Raises:
        UserError: the recipe, its clips, its model and the folder do not fit together, or the GPU is too small.
    """
    check_trackers(plan.train.trackers)
    check_sampler(plan)
    model, method, config = load_model(plan.model), method_of(plan.method), plan.method.config
    groups = check_groups(plan)
    truths = tuple(dict.fromkeys((*method.truths(config), *base.truths(method.rewards(config)))))
    clips = Clips(plan.data, False, bool(groups and groups.counterfactuals), truths)
    tell(clips, folder)
    if method.TRAINS == "video":
        shape = model.latent_shape(clips.splits[0].frames, *clips.splits[0].size)
        if plan.model.conditioning == "image" and shape[1] == 1:
            raise UserError(
                f"data.frames: with {clips.splits[0].frames} frames a clip is one latent frame, and "
                "model.conditioning=image gives that to the model, so nothing is left to learn; use more frames, or "
                "model.conditioning=text",
                "value",
                "data.frames",
            )
    data = method.data(Source(model, clips, groups, plan.model.conditioning == "image", CACHE / "latents"), config)
    depends = method.depends(config) | fingerprints(method.rewards(config))
    rewards = base.load_all(method.rewards(config), device())
    validate, ends, every = None, None, plan.eval.every if plan.eval else 0
    if plan.eval:
        from posttrain.evaluation.evaluate import validation, version_of

        tracker, watched = load_tracker(plan.eval.tracker), dict[str, Any]()
        if wires := plan.tripwires:
            ends, metrics = partial(ended, folder, wires), plan.eval.benchmark.module.BENCHMARK.metrics
            looks = math.ceil(plan.train.steps / every)
            measures = plan.eval.benchmark.module
            version = version_of(measures, *measures.BENCHMARK.sources, tripwires, type(tracker.module))
            look = watching(folder, wires, rewards, model, tracker, metrics, looks, version) if main_process() else None
            watched = {"clips": wires.clips, "split": wires.split, "look": look}
            watched["truths"] = tuple(dict.fromkeys((*truths, *base.truths(wires.watch))))
            measured = plan.eval.model_dump(mode="json", include={"clips", "splits", "every", "sampler", "tracker"})
            depends |= {"tripwires": wires.model_dump(mode="json"), "eval": measured}
        # also where it is not used, so that what evaluation will lack is said before training
        validate = validation(folder, plan.eval, model, tracker, **watched)
        model.unload()  # captions are read
    inputs = method.inputs(model, config) | ({"rewards": rewards} if rewards else {})
    run = Run(folder, model.module, data, plan.train, validate, every, depends, ends)
    if is_trained(folder, run.meaning):
        print(f"training: {folder / ADAPTER} is complete", file=sys.stderr)
        return
    if data is clips:
        clips.preload()
    model.module = run.module
    method.train(run, model, config, **inputs)
    model.module = run.finish()
    if main_process():
        if ends and ends(run.steps):
            step, weights = best(folder)
            print(f"training: rolled back from step {run.steps} to step {step}", file=sys.stderr)
            with files.replacing(folder / ADAPTER) as temporary:
                shutil.copytree(weights, temporary)
        else:
            model.save(folder / ADAPTER)
        files.write_json(folder / TRAINED, {**run.meaning, "sha256": trained_files(folder)})
    wait()


def check_sampler(plan: Recipe) -> None:
    """Refuse to train with one sampler and measure with another: the improvement may not carry over."""
    measured = plan.eval and plan.eval.sampler
    trained = sampler(plan.method.config)
    if measured and trained and trained != measured:
        raise UserError(
            f"method.sampler: trains {trained.model_dump()}, but eval.sampler measures {measured.model_dump()}; "
            "leave method.sampler out, and it is eval's",
            "conflict",
            "method.sampler",
        )


def check_groups(plan: Recipe) -> GroupsConfig | None:
    """The recipe's groups config. Raises UserError if the method needs groups and there are none, or the reverse."""
    groups, wanted = plan.data.groups, method_of(plan.method).GROUPS
    if wanted and groups is None:
        raise UserError(
            f"data.groups: is missing, and method {plan.method.name} needs it to find rejected clips; write for "
            "example data.groups={counterfactuals: true}, or {samples: [FOLDER]}",
            "required",
            "data.groups",
        )
    if groups is not None and not wanted:
        raise UserError(
            f"data.groups: is not for {plan.method.name}, which needs no rejected clips; leave it out",
            "conflict",
            "data.groups",
        )
    return groups


def tell(clips: Clips, folder: Path) -> None:
    """Report which files are retimed, cropped or left out: a summary on the terminal, each file in clips.jsonl."""
    notes = [{"clips": str(split.folder), **note._asdict()} for split in clips.splits for note in split.video_notes]
    if notes and main_process():
        files.write_jsonl(folder / CLIPS, notes)
        for split in clips.splits:
            for line in listing.summary(split.video_notes) if split.video_notes else ():
                print(f"{split.folder}: {line}", file=sys.stderr)
        chosen = dict.fromkeys(np.linspace(0, len(clips) - 1, min(SHOWN, len(clips))).round().astype(int).tolist())
        captions = {index: " ".join(clips.row(index).caption.split())[:150] for index in chosen}
        sheet = {f"{index}  {clips.ids[index]}: {caption}": clips.read(index)[0] for index, caption in captions.items()}
        contact_sheet(folder / SHEET, sheet, columns=6)
        seen = f"{len(chosen)} of {len(clips)} as training sees them are in {folder / SHEET}"
        print(f"clips: all is listed in {folder / CLIPS}; {seen}", file=sys.stderr)


@memory("evaluation", "lower eval.batch, or measure smaller or shorter clips (eval.clips)")
def evaluate(plan: Recipe, folder: Path, show: bool = False) -> list[Record]:
    """Measure the references, the base and the trained model.

    Args:
        show: print the table.

    Returns:
        The records; with several processes, only the first one gets them.

    Raises:
        UserError: the recipe has no `eval` or too small a tracker, or training is not complete.
    """
    from posttrain.evaluation.evaluate import evaluate
    from posttrain.evaluation.records import print_table, read_records

    records: list[Record] = []
    if plan.eval is None:
        raise _no_eval(folder)
    check_tracker(plan.eval)
    need_training(folder)
    if main_process():
        models: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": lambda: base_model(plan),
            plan.method.name: lambda: tuned_model(plan, folder),
        }
        evaluate(folder, plan.eval, models, load_tracker(plan.eval.tracker), CACHE / "evaluation")
        records = read_records(folder)
        if show:
            print_table(records)
    wait()
    return records


def report(plan: Recipe, folder: Path, show: bool = False) -> Path:
    """Write report.json and report.html from the measurements; for several runs, one report of all of them.

    Args:
        show: print the path and, for several runs, the table.

    Returns:
        The path of report.html.

    Raises:
        UserError: unfinished: nothing was measured.
    """
    from posttrain.evaluation.records import comparable, gather, print_differences, print_table, wide
    from posttrain.reporting.report import report

    if plan.eval is None and not plan.divided and not is_measured(folder):
        raise _no_eval(folder)
    if main_process():
        runs = measured(plan, folder)
        if runs and show:
            print_table(records := gather(runs), wide())
            if plan.table and len(runs) > 1:
                print_differences(comparable(records, list(runs)), wide())
        written = report(folder, runs)[1]
        if show:
            print("report:", written)
    return folder / "report.html"


def measured(plan: Recipe, folder: Path) -> dict[str, list[Path]]:
    """The measured runs of a sweep or a table: the folders of each value or row; empty for a single run."""
    runs: dict[str, list[Path]] = {}
    for _, place in members(plan, folder) if plan.divided else ():
        if is_measured(place):
            runs.setdefault(place.relative_to(folder).parts[0], []).append(place)
        else:
            print(f"{place}: is left out because it was not measured; `posttrain run` continues", file=sys.stderr)
    return runs


def _no_eval(folder: Path) -> UserError:
    message = f"{folder / 'recipe.yaml'}: eval: is missing; set what to measure, as in eval.clips=data/drops"
    return UserError(message, "required", "eval")


def is_measured(folder: Path) -> bool:
    return any((folder / "evaluation").glob("*.json"))


def export(plan: Recipe, folder: Path, show: bool = False, checked: bool = False) -> list[Path]:
    """Write the weights in other programs' formats, with a model card; `checked`: load them again and compare.

    Args:
        show: print the paths, and a line about each file that was checked.

    Returns:
        The paths, the model card's last; with several processes, only the first one gets them.

    Raises:
        UserError: training is not complete, or a file does not give the trained model's velocity.
    """
    from posttrain.commands.export import check, export

    need_training(folder)
    written: list[Path] = []
    if main_process():
        config = resolved(plan.model)
        written = export(folder, plan.export, config)
        if show:
            print("export:", *written)
        if checked:
            with tuned_model(plan, folder) as model:
                for line in check(written[:-1], model, config):
                    if show:
                        print("check:", line)
    return written
