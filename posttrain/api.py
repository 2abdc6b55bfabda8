"""What `import posttrain` offers: the functions behind the commands. See docs/python.md.

They work in the current folder as the commands do: runs are in runs/, shared results in runs/cache/. What is done is
not done again, and what was cut off continues. Progress goes to standard error; `show=True` also prints the tables and
paths that the command prints. What a user can fix is raised as UserError; where its message names an option of the
command, the argument of that name is meant. Under torchrun every process calls the function, and the first has the
results.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posttrain.commands import sampling, scoring, stages
from posttrain.commands.experiment import Recipe, alone, load_recipe, members, open_run, resolved
from posttrain.core.codec import read_video
from posttrain.core.errors import UserError, printable
from posttrain.core.recipe import SHIPPED as RECIPES
from posttrain.evaluation.records import Record, gather, summary

__all__ = [
    "RECIPES",
    "Recipe",
    "UserError",
    "evaluate",
    "evaluate_videos",
    "export",
    "groups",
    "load_recipe",
    "read_video",
    "report",
    "run",
    "sample",
    "score",
    "train",
]

Experiment = Recipe | Path | str  # a recipe that was loaded, or what load_recipe takes
FORMATS = ("diffusers", "comfyui", "merged")
LEAST: dict[str, float] = {"seeds": 0, "frames": 1, "fps": 1e-3, "steps": 1, "guidance": -1e3, "guidance_low": -1e3}


def run(recipe: Experiment, *overrides: str, show: bool = False) -> Path:
    """Do every stage of a recipe, as `posttrain run`: clips, training, evaluation, report, export.

    Args:
        recipe: of `load_recipe`, or what that takes: a recipe file, a run's folder, its name in runs/.
        overrides: as "train.steps=20"; for a recipe that was loaded, give them to `load_recipe`.
        show: print the tables and paths.

    Returns:
        The run's folder, runs/<run>. Of a sweep or a table it holds a folder for each run.

    Raises:
        UserError: the recipe, its clips, its model and the folder do not go together; `code` says how.
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
    """Make what a recipe's true clips are compared with, as `posttrain groups`; arguments as for `run`.

    Returns:
        The paths of the sheets that show the first groups, one of each run.

    Raises:
        UserError: the recipe has no `data.groups`, or they are not comparable.
    """
    plan, folder = open_run(recipe, overrides)
    sheets = []
    for member, place in _each(members(plan, folder)):
        if member.data.groups or not plan.divided:  # a run of a table may have none
            stages.prepare(member)
            sheets.append(sampling.groups(member, place, show=show))
    return sheets


def evaluate(recipe: Experiment, *overrides: str, show: bool = False) -> list[dict[str, Any]]:
    """Measure a trained run as its `eval` says, beside the base and the references, as `posttrain eval`.

    Returns:
        A row for each model and split, as in report.json: "model", "split", and of each metric (docs/measuring.md) a
        dict of "mean", "low", "high" (95% interval over clips) and "n" (clips). "mean" is None if no clip has a number.
        "physics" holds the scorecard, with "median" in place of "mean". Of a sweep or a table, the rows of all runs.

    Raises:
        UserError: unfinished: training is not complete; required: the recipe has no `eval`; or as `run`.
    """
    plan, folder = open_run(recipe, overrides)
    records: list[Record] = []
    for member, place in _each(members(plan, folder)):
        records = stages.evaluate(member, place, show)
    return [summary(record) for record in (gather(stages.measured(plan, folder)) if plan.divided else records)]


def report(recipe: Experiment, *overrides: str, show: bool = False) -> Path:
    """Write report.json, report.html and report.gif from what was measured, as `posttrain report`.

    Returns:
        The path of report.html, one file that needs no network; the others are beside it.

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
        The paths: the weights, then what `formats` adds, then the model card.

    Raises:
        UserError: unfinished: training is not complete; mismatch: a file does not give what was trained; conflict: a
            format needs an adapter, and all weights were trained.
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
    """Sample clips, as `posttrain sample`: with a run, of base and tuned model side by side.

    None stands for the run's own settings, or those that the model's authors recommend.

    Args:
        model: a run's folder or its name in runs/, "pocket", a diffusers folder or a hub id.
        image: the first frame, a file or uint8 (H, W, 3), cropped in the middle to the size; None for models of text.
        negative: the negative prompt; used only if guidance is above 1.
        seeds: one clip each, 0 to 2^63 - 1.
        size: (height, width) in pixels.
        frames: the number of pictures, the first included; many models need 4k + 1.
        fps: frames per second of the files.
        steps: of the sampler.
        guidance: 1 is none. guidance_low: of the second of two experts.
        scale: factor of the run's adapter.
        output: the folder; None: samples/asked in the run's, or runs/samples/<model>.
        family: of a model that is no run, as in model.family.

    Returns:
        The paths of the clips (all seeds of the first model, then of the second), of a contact sheet and of a GIF.
        `read_video` gives a clip as an array.

    Raises:
        UserError: the run or model does not exist, or the picture and the settings do not fit it.
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
    for name, least in LEAST.items():
        values = wishes.get(name, ())
        if any(not value >= least for value in (values if isinstance(values, tuple) else (values,))):
            raise UserError(f"{name}: {printable(values)} is too small; give {least:g} or more", "value", name)
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
        folder: samples that are named by the clips of `clips`, or a folder of videos with captions.
        judge: the simulator's truth, a transformers model, or a model behind an OpenAI-compatible server.
        clips: the dataset whose clips the samples continue; None: `folder` has captions itself.
        split: of the dataset.
        model: for vlm, a folder or hub id; for endpoint, its name there.
        frames: pictures of each video that the model sees (16).
        url: for endpoint, such as http://localhost:8000/v1; the key is read from OPENAI_API_KEY.
        rate: for endpoint, at most so many requests per minute.
        side: for endpoint, pixels of the longer side of larger pictures after scaling down.
        tracker: for simulator with `clips`: "pocket", or a SAM 2 in a folder or on the hub.

    Returns:
        A row for each video, which is also in scores.jsonl beside it: "file_name", "sa" (how well it follows its text)
        and "pc" (how well it obeys physics), both from 0 to 1, "judge", and of a model "mass", the probability that its
        answer began with yes or no.

    Raises:
        UserError: the folder, the dataset, the judge or its options are not what they should be; other_run: the folder
            has scores of another judge.
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
        clips: the name of each row and its folder. A video is called <clip>.mp4 or <clip>-s<seed>.mp4; if the benchmark
            has several splits, there is a folder for each.
        tracker: what follows the object: "pocket" (64 x 64 pixels), or a SAM 2 in a folder or on the hub.
        fps: of the videos. truth_fps: of the benchmark's clips. None: as their files say.
        output: the folder for scores and report; None: runs/eval-<benchmark>.

    Returns:
        Rows as those of `evaluate`; the report is <output>/report.html.

    Raises:
        UserError: the benchmark or a folder is not what it should be, or a video does not begin as its clip.
    """
    rows = [(name, Path(path)) for name, path in clips.items()]
    records = scoring.evaluate_videos(benchmark, rows, (), tracker, fps, truth_fps, output, show=show)
    return [summary(record) for record in records]


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _checked(plan: Recipe, folder: Path) -> list[tuple[Recipe, Path]]:
    """Its runs; a mistake in the last one's model is found before the first is trained."""
    runs = members(plan, folder)
    for member, _ in runs:
        resolved(member.model)
    return runs


def _each(runs: Sequence[tuple[Recipe, Path]]) -> Iterator[tuple[Recipe, Path]]:
    """One run after the other, each while its folder is held."""
    for plan, folder in runs:
        with alone(plan, folder):
            yield plan, folder


def _report_all(plan: Recipe, folder: Path, show: bool) -> None:
    """The report of a sweep or a table."""
    with alone(plan, folder):
        stages.report(plan, folder, show)
