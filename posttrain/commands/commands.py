"""What is asked of models and finished runs beside a recipe's stages: compare, sample, score, judge."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from posttrain.commands.experiment import ADAPTER, RUNS, TRAINED, Recipe, need_training, open_run
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
from posttrain.commands.losers import simulator_judge
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data.config import DataConfig
from posttrain.data.dataset import Clips, open_splits
from posttrain.evaluation.evaluate import EvalConfig
from posttrain.models.base import ModelConfig, sampler
from posttrain.models.base import family as family_of
from posttrain.pocket import FAMILY

FRAMES = 16  # of a video that a model is shown


def compare(targets: Sequence[str]) -> None:
    """Print the rows of several runs in one table, and what the later ones differ by from the first, clip by clip.

    Only the splits count on which each of them was measured.

    Raises:
        UserError: a run is named twice, was not measured, or on other clips, or in another way.
    """
    from posttrain.evaluation.records import comparable, gather, print_differences, print_table, wide

    folders: dict[str, list[Path]] = {}
    for plan, folder in map(open_run, targets):
        if plan.run in folders:
            raise UserError(f"{folder}: is named twice; name each run once")
        folders[plan.run] = [folder]
    records = gather(folders)
    splits = comparable(records, list(folders))
    names = [rows[0].split for rows in splits]
    print_table([record for record in records if record.split in names], wide())
    print_differences(splits, wide())


@memory("sampling", "ask for fewer pixels (--height, --width) or --frames")
def sample(
    target: str,
    image: Path | None,
    wishes: dict[str, Any],
    scale: float = 1.0,
    output: Path | None = None,
    family: str | None = None,
) -> None:
    """Let a run (the base and what it became, side by side) or a model continue a picture, or follow a text alone.

    Args:
        target: a run, as in `open_run`, or what `model.path` may be.
        image: the picture. A run takes one exactly if it was trained so (`model.conditioning`); a model alone that is
            made for pictures needs one, and any other may have one.
        wishes: fields of `gallery.Wish`; those that are missing are as the run was trained and measured.
        scale: how much a run's adapter counts.
        output: the folder; None: samples/asked in the run's folder, or runs/samples/<model>.
        family: of a model that is no run; None: that of the embedded model.

    Raises:
        UserError: there is no such thing, the picture cannot be read, is missing or is not wanted, or the wishes do not
            fit the model.
    """
    from posttrain.models import lora
    from posttrain.reporting.gallery import Wish, blank, film, fit, natural_size, open_picture, slug

    picture, run = image and open_picture(image), Path(target).suffix == ".yaml"
    models: dict[str, Callable[[], AbstractContextManager[Any]]]
    if run or any((place / "recipe.yaml").is_file() for place in (Path(target), RUNS / target)):
        plan, folder = open_run(target)
        need_training(folder)
        if plan.model.conditioning == "text" and image is not None:
            raise UserError(f"--image: {target} was trained on text alone (model.conditioning); leave it out")
        if plan.model.conditioning == "image" and image is None:
            raise UserError(f"--image: is missing; {target} was trained to continue a first picture, name one")
        if family is not None:
            raise UserError("--family: is for a model alone; a run's recipe names its own", "conflict", "--family")
        config, name = plan.model, plan.method.name if scale == 1 else f"{plan.method.name} x{scale:g}"

        @contextmanager
        def tuned() -> Iterator[Any]:
            with tuned_model(plan, folder) as model:
                if scale != 1:
                    if not lora.attached(model.transformer):
                        raise UserError(f"--scale: {folder} has no adapter, all weights were trained; leave it out")
                    lora.rescale(model.transformer, scale)
                yield model

        models = {"base": lambda: base_model(plan), name: tuned}
        usual = _usual(plan)
        output = output or folder / "samples" / "asked"
    else:
        if scale != 1:
            raise UserError(f"--scale: {target} is no run and has no adapter; leave it out or name a run")
        if image is None and family_of(family or FAMILY).needs_picture(target):
            raise UserError(
                f"--image: is missing; {target} is made to continue a first picture, name one", "required", "--image"
            )
        config, name, usual = alone(target, image is not None, device(), family or FAMILY), Path(target).name, {}
        models = {name: lambda: nullcontext(load_model(config))}
        output = output or RUNS / "samples" / name
    of_model = family_of(config.family)
    defaults = of_model.defaults(config.path)
    asked = {**defaults._asdict(), **usual, **wishes, **sampler(defaults, usual, wishes)}
    if picture and config.path != "pocket" and "size" not in {**usual, **wishes}:
        asked["size"] = natural_size(picture, asked["size"], of_model.SIDE)
    wish = Wish(**asked)
    if main_process():
        pixels, done = fit(picture, wish.size) if picture else blank(wish.size)
        print(f"{image or 'text'}: {done}; {wish.frames} frames, {wish.steps} steps, guidance {wish.guidance:g}")
        print("samples:", *film(models, pixels, wish, output / (image.stem if image else slug(wish.prompt))))


def alone(path: str, pictured: bool, device: torch.device, family: str = FAMILY) -> ModelConfig:
    """How a model that is no run is loaded: on a GPU in half the memory, as the recipes have it."""
    dtype: Literal["bf16", "fp32"] = "bf16" if path != "pocket" and device.type == "cuda" else "fp32"
    return ModelConfig(family=family, path=path, conditioning="image" if pictured else "text", dtype=dtype)


def _usual(plan: Recipe) -> dict[str, Any]:
    """What a run's clips and evaluation have, as fields of `gallery.Wish`."""
    usual: dict[str, Any] = {}
    if plan.eval:
        usual |= plan.eval.sampler.model_dump()
    try:
        clips = Clips(plan.data, preload=False).splits[0]
    except UserError:  # the clips need not be there any more
        return usual
    return usual | {"size": clips.size, "frames": clips.frames, "fps": clips.fps}


def groups(plan: Recipe, folder: Path, shown: int = 8) -> Path:
    """A sheet of the first groups of a recipe, `shown` of them, which one process makes; its path.

    Raises:
        UserError: the recipe has no groups, or they are not comparable.
    """
    from posttrain.data.groups import gather
    from posttrain.reporting.gallery import contact_sheet

    wanted = plan.data.groups
    if wanted is None:
        raise UserError("data.groups: is missing; say what the true clips are compared with")
    path = folder / "groups.png"
    if not main_process():
        return path
    clips = Clips(plan.data, preload=False, violated=wanted.counterfactuals)
    members, found = gather(clips, wanted, plan.model.conditioning == "image")
    rows: dict[str, Any] = {}
    for number, group in enumerate(found[:shown], 1):
        what = "true" if group.winner == group.true else f"the best, {members.video(group.winner).name}"
        rows[f"group {number}, {what}: {members.row(group.winner).caption}"] = members.read(group.winner)[0]
        for index in group.losers:
            told = (scores := members.scores(index)) and f"sa {scores.sa:.2f}, pc {scores.pc:.2f}"
            name = f"group {number}, {members.video(index).name}: {told or 'no scores'}"
            violation = members.row(index).violation
            rows[f"{name} {violation.kind if violation else ''}"] = members.read(index)[0]
    contact_sheet(path, rows)
    print(f"groups: {len(found)} of {wanted.losers} losers each; the first are shown in {path}")
    return path


def score(
    benchmark: str,
    clips: Sequence[str] = (),
    runs: Sequence[str] = (),
    tracker: str = "pocket",
    fps: float | None = None,
    out: str | None = None,
    asked: Mapping[str, Any] | None = None,
) -> None:
    """Score videos against a benchmark, a row of the table each; print the tables and write the report.

    Args:
        benchmark: PisaBench's folder, or a dataset folder.
        clips: folders of videos, each FOLDER or NAME=FOLDER.
        runs: runs, as in `open_run`, whose base and tuned model make videos first.
        tracker: what follows the object, see `load_tracker`.
        fps: of the videos in `clips`, where their files say it wrongly.
        out: the folder for scores and report; None: runs/eval-<benchmark>.
        asked: steps, guidance and seeds for the videos of `runs`; what is left out is as in the run's recipe, and where
            that has no `eval`, as usual for the model, with one seed.

    Raises:
        UserError: the benchmark, a folder or a run is not what it should be; the line says how.
    """
    from posttrain.evaluation.benchmarks.pisabench import open_benchmark
    from posttrain.evaluation.evaluate import weights_fingerprint
    from posttrain.evaluation.records import print_table
    from posttrain.evaluation.score import score
    from posttrain.reporting.report import report

    named = [text.partition("=") for text in clips]
    rows = [(name if equals else Path(name).resolve().name, Path(path or name)) for name, equals, path in named]
    for _, path in rows:
        if not path.is_dir():
            raise UserError(f"{path}: does not exist; --clips names folders of videos")
    follower = load_tracker(tracker)
    masks = CACHE / "masks"
    truths = open_benchmark(benchmark, getattr(follower, "clicks", None), weights_fingerprint(follower.module), masks)
    if tracker == "pocket" and any(max(truth.row.size) > TRACKED for split in truths.values() for truth in split):
        print(
            f"the embedded tracker was made for {TRACKED} x {TRACKED} pixels; name a SAM 2 with --tracker",
            file=sys.stderr,
        )
    folder = Path(out) if out else RUNS / f"eval-{Path(benchmark).resolve().name}"
    for target in runs:
        rows += _sample_run(target, truths, folder / "videos", asked or {})
    if len(dict(rows)) < len(rows) or any(not name or "/" in name for name, _ in rows):
        raise UserError("--clips: each row of the table needs a name of its own; give one, as in kling=videos/k")
    if main_process():
        records = score(folder, truths, dict(rows), follower, fps, device())
        print_table(records)
        print("\nas the published code counts (PISA, table 1):")
        print_table(records, released=True)
        print("report:", report(folder)[1])
    wait()


JUDGES = {  # what each may be asked, and what it must be
    "simulator": (("tracker",), ()),
    "vlm": (("model", "frames"), ("model",)),
    "endpoint": (("model", "frames", "url", "rate"), ("model", "url")),
}


@memory("scoring", "take a smaller --model, or fewer --frames")
def judge(folder: Path, by: str, clips: Path | None, split: str, asked: Mapping[str, Any]) -> None:
    """Score the videos of a folder, as far as they are not; the scores lie beside them, where groups look for them.

    Args:
        by: one of JUDGES, see posttrain/judges.
        clips: the dataset whose clips the videos continue; None: `folder` has captions itself.
        asked: what is left out is as usual: the embedded tracker, 16 frames, any rate.

    Raises:
        UserError: the folder, the dataset, the judge or what it is asked are not what they should be.
    """
    from posttrain.judges.folder import find, score

    may, must = JUDGES[by]
    if wrong := [name for name in asked if name not in may]:
        raise UserError(f"--{wrong[0]}: is not for --judge {by}; leave it out")
    if missing := [name for name in must if name not in asked]:
        raise UserError(f"--{missing[0]}: is missing; --judge {by} needs it")
    found, path = find(folder, clips, split)
    if main_process():
        rows = score(found, path, *_judge(folder, by, clips, split, asked))
        sa, pc = (float(np.mean([row[key] for row in rows])) for key in ("sa", "pc"))
        print(f"scores: {len(rows)} videos, on average sa {sa:.3f}, pc {pc:.3f}; they are in {path}")
    wait()


def _judge(folder: Path, by: str, clips: Path | None, split: str, asked: Mapping[str, Any]) -> tuple[Any, str]:
    """What makes a judge ready, and its name, which changes with what its scores depend on."""
    from posttrain.judges import endpoint, simulator
    from posttrain.judges.questions import asking

    if by == "simulator" and clips is None:
        truths = Clips(DataConfig(clips=str(folder), split=split), preload=False, violated=True)
        return lambda: simulator.counterfactuals(truths), "simulator"
    if by == "simulator":
        return simulator_judge(str(clips), split, asked.get("tracker", "pocket"))
    model, frames = asked["model"], asked.get("frames", FRAMES)

    def ready() -> Any:
        if by == "endpoint":
            return asking(endpoint.connect(asked["url"], model, CACHE / "judges", asked.get("rate")), frames)
        from posttrain.judges import vlm  # takes seconds, for transformers

        return asking(vlm.load(model, device()), frames)

    return ready, f"{by} {model}, {frames} frames"


@memory("sampling", "lower eval.batch in the run's recipe; its videos have the size and frames of its clips")
def _sample_run(target: str, truths: Any, out: Path, asked: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Rows for a run: the folders with the videos of its base and of its tuned model, made where they are missing."""
    from posttrain.evaluation.benchmarks.pisabench import NEGATIVE
    from posttrain.evaluation.score import sample_missing

    plan, folder = open_run(target)
    need_training(folder)
    kind = open_splits(plan.data)[0].kind
    measured = plan.eval or EvalConfig(clips="", seeds=1, batch=1)
    how = sampler(
        family_of(plan.model.family).defaults(plan.model.path),
        measured.sampler.model_dump() if plan.eval else {},
        asked,
    )
    seeds = asked.get("seeds", measured.seeds)
    start = files.read_json(folder / TRAINED)["model"]  # also what model.start and model.merge put into it
    model = plan.model.model_dump(mode="json")
    told = [truth.caption + truth.context for split in truths.values() for truth in split]
    settings = {"kind": kind, "sampler": how, "seeds": seeds, "told": [*told, NEGATIVE], "model": model, "start": start}
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
            sample_missing(ready, truths, rows[-1][1], kind, seeds, measured.batch, **how, negative=NEGATIVE)
    wait()
    return rows
