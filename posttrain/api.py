"""What `import posttrain` offers: the functions behind the commands. See docs/python.md.

They work in the current folder as the commands do: runs are in runs/, shared results in runs/cache/. Finished work is
not repeated, and interrupted work continues. Progress goes to standard error; `show=True` also prints the tables and
paths that the command prints. Errors that a user can fix are raised as UserError; if the message names an option of
the command, it means the argument of that name. Under torchrun every process calls the function, and only the first
process gets the results.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from posttrain.commands import sampling, scoring, stages
from posttrain.commands.experiment import Format, alone, members, open_run, resolved
from posttrain.commands.experiment import Recipe as Recipe
from posttrain.commands.experiment import load_recipe as load_recipe
from posttrain.core.codec import read_video as read_video
from posttrain.core.errors import UserError, printable
from posttrain.core.recipe import COUNTS, FACTORS, RATES, SEEDS, SHIPPED
from posttrain.evaluation.records import Record, gather, summary

RECIPES = SHIPPED  # the folder of the recipes that come with the package
Experiment = Recipe | Path | str  # a recipe that was loaded, or what load_recipe takes
FORMATS: tuple[str, ...] = get_args(Format)
RANGES = {"seeds": SEEDS, "frames": COUNTS, "fps": RATES, "steps": COUNTS, "guidance": FACTORS, "guidance_low": FACTORS}


def run(recipe: Experiment, *overrides: str, show: bool = False) -> Path:
    """Do every stage of a recipe, as `posttrain run`: clips, training, evaluation, report, export.

    Args:
        recipe: the result of `load_recipe`, a recipe file, a run's folder, or a run's name in runs/.
        overrides: such as "train.steps=20"; for a loaded recipe, give them to `load_recipe` instead.
        show: print the tables and paths.

    Returns:
        The run's folder, runs/<run>. For a sweep or a table, it contains a folder for each run.

    Raises:
        UserError: the recipe, its clips, its model and the folder do not fit together; see `code`.
    """
    plan, folder = open_run(recipe, overrides)
    for member, place in _each(_checked(plan, folder)):
        stages.run(member, place, show)
    if plan.divided and plan.eval:
        _report_all(plan, folder, show)
    return folder


def train(recipe: Experiment, *overrides: str) -> Path:
    """Make the clips that are missing and train, as `posttrain train`; arguments as for `run`.

    Returns:
        The run's folder. The weights are in its adapter/, the losses of each step in its log.jsonl.

    Raises:
        UserError: as `run`.
    """
    plan, folder = open_run(recipe, overrides)
    for member, place in _each(_checked(plan, folder)):
        stages.prepare(member)
        stages.train(member, place)
    return folder


def groups(recipe: Experiment, *overrides: str, show: bool = False) -> list[Path]:
    """Generate the missing samples of a recipe's groups, as `posttrain groups`; arguments as for `run`.

    Returns:
        The paths of the contact sheets that show the first groups, one for each run.

    Raises:
        UserError: the recipe has no `data.groups`, or the clips of a group are not comparable.
    """
    plan, folder = open_run(recipe, overrides)
    sheets = []
    for member, place in _each(members(plan, folder)):
        if member.data.groups or not plan.divided:  # a run of a table may have none
            stages.prepare(member)
            sheets.append(sampling.groups(member, place, show=show))
    return sheets


def evaluate(recipe: Experiment, *overrides: str, show: bool = False) -> list[dict[str, Any]]:
    """Measure a trained run as its `eval` says, and the base and the reference rows, as `posttrain eval`.

    Returns:
        A row for each model and split, as in report.json: "model", "split", and for each metric (docs/measuring.md) a
        dict of "mean", "low", "high" (95% interval over clips) and "n" (clips). "mean" is None if no clip has a number.
        "physics" has the scorecard, with "median" instead of "mean". For a sweep or a table, the rows of all runs.

    Raises:
        UserError: unfinished: training is not complete; required: the recipe has no `eval`; or as `run`.
    """
    plan, folder = open_run(recipe, overrides)
    records: list[Record] = []
    for member, place in _each(members(plan, folder)):
        records = stages.evaluate(member, place, show)
    return [summary(record) for record in (gather(stages.measured(plan, folder)) if plan.divided else records)]


def report(recipe: Experiment, *overrides: str, show: bool = False) -> Path:
    """Write report.json, report.html and report.gif from the measurements, as `posttrain report`.

    Returns:
        The path of report.html, one file that needs no network. The other two are in the same folder.

    Raises:
        UserError: nothing was measured, or a sample that the page shows is missing.
    """
    plan, folder = open_run(recipe, overrides)
    for member, place in _each(members(plan, folder)):
        if place == folder or stages.is_measured(place):
            stages.report(member, place, show)
    if plan.divided:
        _report_all(plan, folder, show)
    return folder / "report.html"


def export(
    recipe: Experiment, *overrides: str, formats: Sequence[str] = (), check: bool = False, show: bool = False
) -> list[Path]:
    """Write the trained weights for other programs, with a model card, as `posttrain export`.

    Args:
        recipe, overrides, show: as for `run`.
        formats: "diffusers", "comfyui", "merged"; empty: what the recipe's `export` lists.
        check: load each file as its program does, and compare with the trained model.

    Returns:
        The paths: the weights, then the files of `formats`, then the model card.

    Raises:
        UserError: unfinished: training is not complete; mismatch: a file differs from the trained model; conflict: a
            format needs an adapter, but all weights were trained.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        reason = f"{printable(repr(unknown[0]))} is no format; choose from: {', '.join(FORMATS)}"
        raise UserError(f"export: {reason}", "unknown_name", "export")
    if formats and isinstance(recipe, Recipe):
        recipe = recipe.model_copy(update={"export": tuple(formats)})
    elif formats:
        overrides = (*overrides, f"export=[{', '.join(formats)}]")
    runs = members(*open_run(recipe, overrides))
    return [path for member, place in _each(runs) for path in stages.export(member, place, show, check)]


def sample(
    model: Path | str,
    prompt: str,
    image: Path | str | np.ndarray | None = None,
    *,
    negative: str | None = None,
    seeds: Sequence[int] = (0,),
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_low: float | None = None,
    scale: float = 1.0,
    output: Path | str | None = None,
    family: str | None = None,
    show: bool = False,
) -> list[Path]:
    """Sample clips, as `posttrain sample`. With a run, base and tuned model are sampled side by side.

    None means the run's own settings, or those that the model's authors recommend.

    Args:
        model: a run's folder or its name in runs/, "pocket", a diffusers folder or a hub id.
        image: the first frame, a file or uint8 (H, W, 3), cropped around its centre; None for text-to-video models.
        negative: the negative prompt; used only if guidance is above 1.
        seeds: 0 to 2^63 - 1; one clip for each.
        size: (height, width) in pixels.
        frames: the number of frames, including the first; many models need 4k + 1.
        fps: frames per second of the files.
        steps: sampler steps.
        guidance: classifier-free guidance, 1: none. guidance_low: that of the second of two experts.
        scale: strength of the run's adapter.
        output: the folder; None: samples/asked in the run's folder, or runs/samples/<model>.
        family: the family of a model that is not a run, as in model.family.

    Returns:
        The paths of the clips (all seeds of the first model, then of the second), of a contact sheet and of a GIF.
        `read_video` gives a clip as an array.

    Raises:
        UserError: the run or model does not exist, or the first frame or the settings do not fit it.
    """
    wishes: dict[str, Any] = {
        "negative": negative,
        "seeds": tuple(seeds),
        "size": size,
        "frames": frames,
        "fps": fps,
        "steps": steps,
        "guidance": guidance,
        "guidance_low": guidance_low,
    }
    wishes = {"prompt": prompt} | {name: value for name, value in wishes.items() if value is not None}
    for name, (least, most) in RANGES.items():
        values = wishes.get(name, ())
        if any(not least <= value <= most for value in (values if isinstance(values, tuple) else (values,))):
            raise UserError(f"{name}: {printable(values)} is out of range; give {least:g} to {most:g}", "value", name)
    if not seeds:
        raise UserError("seeds: is empty; name one for each clip", "value", "seeds")
    picture = image if isinstance(image, np.ndarray) else _path(image)
    return sampling.sample(str(model), picture, wishes, scale, _path(output), family, show)


def score(
    folder: Path | str,
    judge: Literal["simulator", "vlm", "endpoint"],
    *,
    clips: Path | str | None = None,
    split: str = "train",
    model: str | None = None,
    frames: int | None = None,
    url: str | None = None,
    rate: float | None = None,
    side: int | None = None,
    tracker: str | None = None,
    show: bool = False,
) -> list[dict[str, Any]]:
    """Let a judge score the videos of a folder, as `posttrain score`.

    Args:
        folder: samples that are named after the clips of `clips`, or a folder of videos with captions.
        judge: the simulator's truth, a transformers model, or a model behind an OpenAI-compatible server.
        clips: the dataset whose clips the samples continue; None: `folder` has its own captions.
        split: of the dataset.
        model: for vlm, a folder or hub id; for endpoint, its name there.
        frames: number of frames of each video that the model gets (16).
        url: for endpoint, such as http://localhost:8000/v1; the key is read from OPENAI_API_KEY.
        rate: for endpoint, the largest number of requests per minute.
        side: for endpoint, larger pictures are scaled down to this many pixels along the longer side.
        tracker: for simulator with `clips`: "pocket", or a SAM 2 in a folder or on the hub.

    Returns:
        A row for each video, as in scores.jsonl in its folder: "file_name", "sa" (how well it follows its caption) and
        "pc" (how well it obeys physics), both from 0 to 1, "judge", and for a model "mass", the probability that its
        answer begins with yes or no.

    Raises:
        UserError: the folder, the dataset, the judge or its options are missing or wrong; other_run: the folder has
            scores of another judge.
    """
    asked = {"model": model, "frames": frames, "url": url, "rate": rate, "side": side, "tracker": tracker}
    given = {name: value for name, value in asked.items() if value is not None}
    return scoring.score(Path(folder), judge, _path(clips), split, given, show)


def evaluate_videos(
    benchmark: Path | str,
    clips: Mapping[str, Path | str],
    *,
    tracker: str = "pocket",
    fps: float | None = None,
    truth_fps: float | None = None,
    output: Path | str | None = None,
    show: bool = False,
) -> list[dict[str, Any]]:
    """Measure videos that any model made, as `posttrain eval BENCHMARK --clips`, and write a report.

    Args:
        benchmark: PisaBench's folder, or a dataset folder.
        clips: the name of each row and its folder. A video is named <clip>.mp4 or <clip>-s<seed>.mp4; if the benchmark
            has several splits, each has a subfolder.
        tracker: what follows the object: "pocket" (64 x 64 pixels), or a SAM 2 in a folder or on the hub.
        fps: frame rate of the videos; truth_fps: of the benchmark's clips. None: as their files say.
        output: the folder for scores and report; None: runs/eval-<benchmark>.

    Returns:
        Rows, as from `evaluate`; the report is <output>/report.html.

    Raises:
        UserError: the benchmark or a folder is missing or wrong, or a video does not begin with its clip's first frame.
    """
    rows = [(name, Path(path)) for name, path in clips.items()]
    records = scoring.evaluate_videos(benchmark, rows, (), tracker, fps, truth_fps, output, show=show)
    return [summary(record) for record in records]


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _checked(plan: Recipe, folder: Path) -> list[tuple[Recipe, Path]]:
    """The recipe's runs, all checked before the first one is trained."""
    runs = members(plan, folder)
    for member, _ in runs:
        resolved(member.model)
    return runs


def _each(runs: Sequence[tuple[Recipe, Path]]) -> Iterator[tuple[Recipe, Path]]:
    """Yield one run after the other; each run's folder is locked meanwhile."""
    for plan, folder in runs:
        with alone(plan, folder):
            yield plan, folder


def _report_all(plan: Recipe, folder: Path, show: bool) -> None:
    """The report of a sweep or a table."""
    with alone(plan, folder):
        stages.report(plan, folder, show)
