"""Compare measured runs, measure videos that any model made, and let a judge score videos."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.commands.experiment import ADAPTER, BUSY, RUNS, TRAINED, need_training, open_run
from posttrain.commands.loading import (
    CACHE,
    TRACKED,
    base_model,
    device,
    load_tracker,
    main_process,
    memory,
    tuned_model,
    wait,
)
from posttrain.commands.losers import simulator_judge
from posttrain.core import codec, files
from posttrain.core.errors import UserError, printable
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips, open_splits
from posttrain.evaluation.evaluate import EvalConfig
from posttrain.evaluation.records import Record
from posttrain.models.base import family, sampler

FRAMES = 16  # pictures of a video that a judge sees


def compare(targets: Sequence[str]) -> None:
    """Print the rows of several runs in one table, and the paired differences of the others from the first.

    Splits that were not measured in all runs are left out.

    Raises:
        UserError: a run is named twice, was not measured, or was measured on other clips or in another way.
    """
    from posttrain.evaluation.records import comparable, gather, print_differences, print_table, wide

    folders: dict[str, list[Path]] = {}
    for plan, folder in map(open_run, targets):
        if plan.run in folders:
            raise UserError(f"{folder}: is named twice; name each run once", "duplicate", "RUN")
        folders[plan.run] = [folder]
    records = gather(folders)
    splits = comparable(records, list(folders))
    names = [rows[0].split for rows in splits]
    print_table([record for record in records if record.split in names], wide())
    print_differences(splits, wide())


def evaluate_videos(
    benchmark: Path | str,
    clips: Sequence[tuple[str, Path]] = (),
    runs: Sequence[str] = (),
    tracker: str = "pocket",
    fps: float | None = None,
    truth_fps: float | None = None,
    out: Path | str | None = None,
    asked: Mapping[str, Any] | None = None,
    show: bool = False,
) -> list[Record]:
    """Measure videos against a benchmark, one row of the table per folder, and write the report.

    Args:
        benchmark: PisaBench's folder, or a dataset folder.
        clips: folders of videos, each with the name of its row.
        runs: runs, as in `open_run`; their base and tuned models first sample the videos.
        tracker: the network that follows the object, see `load_tracker`.
        fps: frame rate of the videos in `clips`; None: as their files say.
        truth_fps: frame rate of the benchmark's clips; None: as their files say.
        out: the folder for scores and report; None: runs/eval-<benchmark>.
        asked: steps, guidance and seeds for the videos of `runs`; what is not given is as in the run's recipe or, if
            that has no `eval`, the model's defaults and one seed.
        show: print the tables, and the path of the report.

    Returns:
        The records; with several processes, only the first one gets them.

    Raises:
        UserError: the benchmark, a folder or a run is missing or unusable.
    """
    from posttrain.evaluation.benchmarks.pisabench import open_benchmark
    from posttrain.evaluation.evaluate import version_of, weights_fingerprint
    from posttrain.evaluation.records import print_table
    from posttrain.evaluation.score import score
    from posttrain.reporting.report import report

    rows, records = [*clips], list[Record]()
    for _, path in rows:
        if not path.is_dir():
            raise UserError(f"{path}: does not exist; --clips names folders of videos", "missing", "--clips")
    folder = Path(out) if out else RUNS / f"eval-{Path(benchmark).resolve().name}"
    written = (folder / "samples").resolve()
    if inner := [path for _, path in rows if path.resolve().is_relative_to(written)]:
        raise UserError(f"--out: what is scored would replace {inner[0]}; name another folder", "conflict", "--out")
    follower = load_tracker(tracker)
    masks = CACHE / "masks"
    follows = f"{weights_fingerprint(follower.module)} {version_of(type(follower), type(follower.module))}"
    truths = open_benchmark(benchmark, getattr(follower, "clicks", None), follows, masks, truth_fps)
    if tracker == "pocket" and any(max(truth.row.size) > TRACKED for split in truths.values() for truth in split):
        print(
            f"the embedded tracker was trained on {TRACKED} x {TRACKED} pixels; name a SAM 2 with --tracker",
            file=sys.stderr,
        )
    with files.alone(folder, BUSY, "--out") if main_process() else nullcontext():
        for target in runs:
            rows += _sample_run(target, truths, folder / "videos", asked or {})
        if len(dict(rows)) < len(rows) or any(not name or "/" in name for name, _ in rows):
            raise UserError(
                "--clips: two rows of the table have the same name; give names, as in kling=videos/k",
                "duplicate",
                "--clips",
            )
        if main_process():
            made = [name for name, _ in rows[len(clips) :]]
            records = score(folder, truths, dict(rows), follower, fps, device(), made)
            if show:
                print_table(records)
                print(
                    "\nas the published code counts (PISA, table 1), cut where the shorter of video and true clip ends:"
                )
                print_table(records, released=True)
            page = report(folder)[1]
            if show:
                print("report:", page)
        wait()
    return records


JUDGES = {  # the options that each may have, and those that it must have
    "simulator": (("tracker",), ()),
    "vlm": (("model", "frames"), ("model",)),
    "endpoint": (("model", "frames", "url", "rate", "side"), ("model", "url")),
}


@memory("scoring", "take a smaller --model, or fewer --frames")
def score(
    folder: Path, by: str, clips: Path | None, split: str, asked: Mapping[str, Any], show: bool = False
) -> list[dict[str, Any]]:
    """Score the videos of a folder that have no scores yet; write scores.jsonl next to them, which groups read.

    Args:
        by: the judge, one of JUDGES, see posttrain/judges.
        clips: the dataset whose clips the videos continue; None: `folder` has its own captions.
        asked: options of the judge; by default the embedded tracker, 16 frames at full size, any rate.
        show: print the mean scores and the path.

    Returns:
        The rows of scores.jsonl, see judges/folder.py; with several processes, only the first one gets them.

    Raises:
        UserError: the folder, the dataset, the judge or its options are missing or wrong.
    """
    from posttrain.judges.folder import find, score_videos

    if by not in JUDGES:
        raise UserError(
            f"--judge: {printable(by)} is not a judge; choose from: {', '.join(JUDGES)}", "unknown_name", "--judge"
        )
    rows, (may, must) = list[dict[str, Any]](), JUDGES[by]
    if wrong := [name for name in asked if name not in may]:
        raise UserError(f"--{wrong[0]}: is not used by --judge {by}; leave it out", "conflict", f"--{wrong[0]}")
    if missing := [name for name in must if name not in asked]:
        raise UserError(f"--{missing[0]}: is missing; --judge {by} needs it", "required", f"--{missing[0]}")
    videos, path = find(folder, clips, split)
    if main_process():
        with files.alone(path.parent, BUSY, "FOLDER"):
            rows = score_videos(videos, path, *_ready(folder, by, clips, split, asked))
        if show:
            sa, pc = (float(np.mean([row[key] for row in rows])) for key in ("sa", "pc"))
            print(f"scores: {len(rows)} videos, on average sa {sa:.3f}, pc {pc:.3f}; they are in {path}")
    wait()
    return rows


def _ready(folder: Path, by: str, clips: Path | None, split: str, asked: Mapping[str, Any]) -> tuple[Any, str, str]:
    """A function that loads a judge, the judge's name and its version; see `simulator_judge`."""
    from posttrain.data import views
    from posttrain.evaluation.evaluate import version_of
    from posttrain.judges import endpoint, questions, simulator
    from posttrain.judges.questions import asking

    if by == "simulator" and clips is None:
        if not (folder / split / "metadata.jsonl").is_file():
            raise UserError(
                f"{folder}: is not a dataset of `sim make`, which --judge simulator needs; name the dataset of these "
                "videos with --clips, or use --judge vlm or endpoint",
                "mismatch",
                "--clips",
            )
        truths = Clips(DataConfig(clips=str(folder), split=split), preload=False, violated=True)
        return lambda: simulator.counterfactuals(truths), "simulator", version_of(simulator)
    if by == "simulator":
        return simulator_judge(str(clips), split, asked.get("tracker", "pocket"))
    model, frames = asked["model"], asked.get("frames", FRAMES)

    def ready() -> Any:
        if by == "endpoint":
            ask = endpoint.connect(asked["url"], model, CACHE / "judges", asked.get("rate"), asked.get("side"))
            return asking(ask, frames)
        from posttrain.judges import vlm  # takes seconds, for transformers

        return asking(vlm.load(model, device()), frames)

    scaled = f" of at most {asked['side']} pixels" if "side" in asked else ""
    return ready, f"{by} {model}, {frames} frames{scaled}", version_of(questions, views, codec)


@memory("sampling", "lower eval.batch in the run's recipe; its videos have the size and frames of its clips")
def _sample_run(target: str, truths: Any, out: Path, asked: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """A run's rows: the folders with the videos of its base and its tuned model. Samples the missing videos."""
    from posttrain.evaluation.benchmarks.pisabench import NEGATIVE
    from posttrain.evaluation.score import sample_missing

    plan, folder = open_run(target)
    need_training(folder)
    clip_format = open_splits(plan.data)[0].clip_format._asdict()
    measured = plan.eval or EvalConfig(clips="", seeds=1, batch=1)
    defaults = family(plan.model.family).defaults(plan.model.path)
    sampler_settings = sampler(defaults, measured.sampler.model_dump() if plan.eval else {}, asked)
    seeds = asked.get("seeds", measured.seeds)
    initial_weights = files.read_object(folder / TRAINED)["model"]  # model.start and model.merge included
    model = plan.model.model_dump(mode="json")
    prompts = [truth.caption + truth.context for split in truths.values() for truth in split]
    # another name of a key would give other digests, and all videos would be made again
    settings = {
        "kind": clip_format,
        "sampler": sampler_settings,
        "seeds": seeds,
        "told": [*prompts, NEGATIVE],
        "model": model,
        "start": initial_weights,
    }
    weights = {path.name: files.sha256(path) for path in sorted((folder / ADAPTER).rglob("*.safetensors"))}
    models: dict[str, tuple[Any, Any]] = {
        "base": (lambda: base_model(plan), {}),
        plan.method.name: (lambda: tuned_model(plan, folder), weights),
    }
    rows = []
    for name, (ready, trained) in models.items():
        digest = files.sha256_json([settings, trained])
        rows.append((name, out / f"{name}-{digest[:8]}"))
        if main_process():
            out_folder = rows[-1][1]
            settings_of_all = {**sampler_settings, "negative": NEGATIVE}
            sample_missing(ready, truths, out_folder, clip_format, seeds, measured.batch, **settings_of_all)
    wait()
    return rows
