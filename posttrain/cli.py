"""The command line.

Exit codes: 0 done; 1 failed, with one line on stderr that ends in the error's code (core/errors.py) in brackets; 2
unknown command or option; 130 stopped by Ctrl-C, 143 by SIGTERM. Finished work is kept, and the same command continues.
"""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from posttrain.core import recipe
from posttrain.core.errors import UserError, one_line, printable
from posttrain.core.signals import STOPPED, exit_code

COMMANDS = {
    "run": "every stage of a recipe: clips, training, evaluation, report, export; continues where it was stopped",
    "train": "only the clips and the training",
    "eval": "measure a trained run, or videos that any model made (--clips)",
    "report": "write report.html, report.json and report.gif from the measurements",
    "groups": "show a recipe's groups (true clips and the rejected clips); generates the samples that are missing",
    "export": "write the weights in other programs' formats (export=[diffusers, comfyui, merged]), with a model card",
}

TOOLS = {
    "doctor": "check what this machine has and what is missing, and say how to install it",
    "bench": "seconds that each stage of the pocket model takes on this machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe.Parser(
        prog="posttrain", description="Train a pretrained video model further until what it generates obeys physics."
    )
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = parsers.add_parser(name, help=text, description=text)
        command.add_argument("target", metavar="RECIPE|RUN", help="a recipe file, a run's folder, or its name in runs/")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="change a key of the recipe, as in train.steps=20"
        )
        if name == "export":
            command.add_argument(
                "--check",
                action="store_true",
                help="load every file as its program does, and compare with the trained model",
            )
        if name == "eval":
            _scoring(command)
    for name, text in TOOLS.items():
        tool = parsers.add_parser(name, help=text, description=text)
        if name == "doctor":
            tool.add_argument(
                "recipe", nargs="?", metavar="RECIPE", help="also estimate the memory and operations of its training"
            )
            tool.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a key, as in train.batch=4")
            processes = "how many processes share train.batch (default: 1)"
            tool.add_argument("--processes", type=positive, default=1, metavar="N", help=processes)
    _add_status(parsers)
    _add_compare(parsers)
    _add_sample(parsers)
    _add_score(parsers)
    options = recipe.arguments(parser, arguments)
    try:
        return _do(options)
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in UNREACHABLE:
            raise
        print(f"{printable(str(error.filename), 300)}: {str(error.strerror).lower()} [missing]", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(STOPPED, file=sys.stderr)
        return exit_code(error)


UNREACHABLE = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
)  # errors of a file or folder that the user names


def _do(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if options.command == "doctor":
        return _doctor(options.recipe, options.overrides, options.processes)
    if options.command == "bench":
        return _bench()
    if options.command == "status":
        from posttrain.commands import status

        for folder in status.runs(options.target):
            print(status.line(status.status(folder)))
        return 0
    from posttrain import api  # takes seconds, for torch
    from posttrain.commands import scoring

    if options.command == "compare":
        scoring.compare([options.first, *options.others])
    elif options.command == "sample":
        wishes = _given(options, WISHES)
        if (options.height is None) != (options.width is None):
            raise UserError("--height, --width: give both or neither", "required", "--height")
        if options.height is not None:
            wishes["size"] = options.height, options.width
        given = {"scale": options.scale, "output": options.output, "family": options.family}
        api.sample(options.target, image=options.image, **wishes, **given, show=True)
    elif options.command == "score":
        given = {"clips": options.clips, "split": options.split, **_given(options, JUDGING)}
        api.score(options.folder, options.judge, **given, show=True)
    elif options.command == "eval" and (options.clips or options.run):
        if options.overrides:
            word = printable(options.overrides[0])
            raise UserError(
                f"{word}: --clips uses no recipe, so there is nothing to override; leave it out", "conflict", "--clips"
            )
        asked = _given(options, ASKED)
        if asked and not options.run:
            name = f"--{next(iter(asked))}"
            raise UserError(f"{name}: is only for the videos that --run makes; leave it out", "conflict", name)
        tracker = options.tracker or "pocket"
        rows = [named_folder(text) for text in options.clips]
        rates = {"fps": options.fps, "truth_fps": options.truth_fps}
        scoring.evaluate_videos(
            options.target, rows, options.run, tracker, **rates, out=options.out, asked=asked, show=True
        )
    else:
        _stages(options)
    return 0


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options among `names` that the user set, with their values."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _stages(options: argparse.Namespace) -> None:
    """Run one stage of a recipe, or all stages; for a sweep or a table, one run after the other."""
    from posttrain import api

    if options.command == "eval" and (ignored := list(_given(options, SCORING))):
        name = f"--{ignored[0].replace('_', '-')}"
        raise UserError(
            f"{name}: is only for --clips and --run; for a run's own measurement set eval.* in its recipe",
            "conflict",
            name,
        )
    if options.command == "train":
        api.train(options.target, *options.overrides)
    elif options.command == "export":
        api.export(options.target, *options.overrides, check=options.check, show=True)
    else:
        do = {"run": api.run, "eval": api.evaluate, "report": api.report, "groups": api.groups}[options.command]
        do(options.target, *options.overrides, show=True)


def named_folder(text: str) -> tuple[str, Path]:
    """(row name, folder) from the text NAME=FOLDER, or from FOLDER, whose own name is then the row name."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder or name)) if equals else (Path(text).resolve().name, Path(text))


def _scoring(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "videos that any model made",
        "posttrain eval BENCHMARK --clips FOLDER ... measures folders of videos against PisaBench (its folder real or "
        "sim) or a dataset folder. A video is named after its clip, <clip>.mp4 or <clip>-s<seed>.mp4; if the benchmark "
        "has several splits, its videos are in a folder per split.",
    )
    clips = "folders of videos; each is a row of the table, and NAME=FOLDER names the row"
    group.add_argument("--clips", nargs="+", default=[], metavar="FOLDER", help=clips)
    runs = "first sample the videos with a run's base and tuned model, from the benchmark's first frames and prompts"
    group.add_argument("--run", nargs="+", default=[], metavar="RUN", help=runs)
    group.add_argument("--steps", type=positive, help="sampler steps, for --run (default: the run's recipe)")
    group.add_argument(
        "--guidance", type=number, help="classifier-free guidance, for --run; 1: none, and no negative prompt"
    )
    group.add_argument("--seeds", type=positive, metavar="N", help="number of videos that --run samples for each clip")
    group.add_argument(
        "--tracker",
        metavar="FOLDER|HUB",
        help="the network that follows the object: a SAM 2 in transformers' layout, such as "
        "facebook/sam2.1-hiera-large, which PisaBench's real set needs (default: the embedded one, for 64 x 64 pixels)",
    )
    group.add_argument("--fps", type=rate, help="frame rate of the videos (default: as their files say)")
    truth = "frame rate of the benchmark's clips (default: as their clip_info.json says)"
    group.add_argument("--truth-fps", type=rate, metavar="FPS", help=truth)
    group.add_argument("--out", metavar="FOLDER", help="folder for scores and report (default: runs/eval-<benchmark>)")


def _add_status(parsers: Any) -> None:
    text = "what a run has done so far, how long its training still takes, and whether a process works on it"
    command = parsers.add_parser("status", help=text, description=text)
    command.add_argument("target", metavar="RECIPE|RUN", help="a recipe file, a run's folder, or its name in runs/")


def _add_compare(parsers: Any) -> None:
    text = "print several measured runs in one table, and the paired differences of the others from the first"
    command = parsers.add_parser("compare", help=text, description=text)
    command.add_argument("first", metavar="RUN", help="the run that the others are compared with")
    command.add_argument("others", nargs="+", metavar="RUN", help="runs that were measured on the same clips")


ASKED = ("steps", "guidance", "seeds")  # options of `eval --run`
SCORING = ("tracker", "fps", "truth_fps", "out", *ASKED)  # and of `eval --clips`
JUDGING = ("model", "frames", "url", "rate", "side", "tracker")  # options of `score`
WISHES = ("prompt", "negative", "seeds", "frames", "fps", "steps", "guidance", "guidance_low")  # see gallery.Wish


def _add_sample(parsers: Any) -> None:
    text = "sample clips from a picture and a prompt, or a prompt alone; with a run, base and tuned model side by side"
    usual = "Defaults are the run's own settings, or those that a model's authors recommend."
    command = parsers.add_parser("sample", help=text, description=f"{text}. {usual}")
    command.add_argument("target", metavar="RUN|MODEL", help='a run, "pocket", a diffusers folder or a hub id')
    image = "the first frame, cropped to the size around its centre; leave it out for text-to-video models"
    command.add_argument("--image", type=Path, help=image)
    command.add_argument("--family", help="the model's family, as in model.family, if it is not a run")
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative", help="the negative prompt; used only if guidance is above 1")
    command.add_argument(
        "--seed", type=seed, nargs="+", dest="seeds", metavar="SEED", help="random seeds, one clip for each (default 0)"
    )
    for side in ("height", "width"):
        command.add_argument(f"--{side}", type=positive, help="pixels")
    command.add_argument(
        "--frames", type=positive, help="number of frames, including the first; many models need 4k + 1"
    )
    command.add_argument("--fps", type=rate, help="frame rate of the files")
    command.add_argument("--steps", type=positive, help="sampler steps")
    command.add_argument("--guidance", type=number, help="classifier-free guidance; 1: none")
    command.add_argument(
        "--guidance-low", type=number, help="guidance of the second of two experts (default: the same)"
    )
    command.add_argument("--scale", type=number, default=1.0, help="strength of the run's adapter (default 1)")
    command.add_argument(
        "--output", type=Path, help="folder for the clips (default: samples/asked in the run's folder)"
    )


def _add_score(parsers: Any) -> None:
    text = "let a judge score how well videos follow their captions (sa) and obey physics (pc)"
    more = "Scores from 0 to 1 are written to scores.jsonl in the videos' folder, where data.groups.samples reads them."
    command = parsers.add_parser("score", help=text, description=f"{text}. {more}")
    folder = "samples as `posttrain groups` makes them, or a dataset folder (without --clips)"
    command.add_argument("folder", type=Path, metavar="FOLDER", help=folder)
    judges = "the simulator's truth, a transformers model, or a model behind an OpenAI-compatible server"
    command.add_argument("--judge", choices=("simulator", "vlm", "endpoint"), required=True, help=judges)
    command.add_argument("--clips", type=Path, metavar="DATASET", help="the dataset whose clips the samples continue")
    command.add_argument("--split", default="train", help="split of the dataset (default train)")
    model = "for vlm, a model that sees pictures, such as Qwen/Qwen2.5-VL-7B-Instruct; for endpoint, its name there"
    command.add_argument("--model", metavar="FOLDER|HUB|NAME", help=model)
    command.add_argument("--frames", type=positive, help="pictures of each video, for vlm and endpoint (default 16)")
    url = "for endpoint, such as http://localhost:8000/v1; the key is read from OPENAI_API_KEY"
    command.add_argument("--url", help=url)
    command.add_argument(
        "--rate", type=rate, metavar="N", help="for endpoint, the largest number of requests per minute"
    )
    side = "for endpoint, scale larger pictures down to this length of the longer side (default: full size, in PNG)"
    command.add_argument("--side", type=positive, metavar="PIXELS", help=side)
    command.add_argument("--tracker", metavar="FOLDER|HUB", help="for simulator with --clips, as in `posttrain eval`")


def positive(text: str) -> int:
    return _within(text, int, *recipe.COUNTS)


def seed(text: str) -> int:
    return _within(text, int, *recipe.SEEDS)


def rate(text: str) -> float:
    return _within(text, float, *recipe.RATES)


def number(text: str) -> float:
    return _within(text, float, *recipe.FACTORS)


Number = TypeVar("Number", int, float)


def _within(text: str, read: Callable[[str], Number], least: Number, most: Number) -> Number:
    try:
        if least <= (value := read(text)) <= most:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{printable(repr(text))} is no {read.__name__} from {least:g} to {most:g}")


def _doctor(path: str | None, overrides: Sequence[str], processes: int) -> int:
    from posttrain.commands.doctor import check_recipe, doctor, gpu_memory

    if path is None:
        return doctor()
    from posttrain.commands.dry import needs
    from posttrain.commands.experiment import Recipe
    from posttrain.commands.stages import check_groups
    from posttrain.data.dataset import open_split
    from sim.cli import Recipe as Clips

    plan = recipe.load(path, overrides, Recipe)
    groups = check_groups(plan)
    folder, makers = plan.data.folders[0], [plan.data.make] if isinstance(plan.data.make, str) else plan.data.make
    if plan.data.wanted is not None:
        clip = (plan.data.wanted.frames, *plan.data.wanted.size)
    elif makers and not (Path(folder) / plan.data.split / "metadata.jsonl").is_file():  # not filmed yet
        world = recipe.load(makers[0], (), Clips).world.config
        clip = (world.frames, world.height, world.width)
    else:
        split = open_split(folder, plan.data.split)
        clip = (split.frames, *split.size)
    losers = groups.losers if groups else 0
    needed = needs(plan.model, plan.train, plan.method, clip, processes, losers)
    return doctor(lambda: check_recipe(*needed, gpu_memory()))


def _bench() -> int:
    from posttrain.commands import loading
    from posttrain.commands.bench import bench, print_timings
    from posttrain.models.base import AdapterConfig, ModelConfig
    from sim import dataset
    from sim.render import gl

    job = dataset.Job(world={"name": "drop", "width": 64, "height": 64, "frames": 33, "dropped": (1, 1)})
    take = next(dataset.takes(job, "train", 0))
    model = loading.load_model(ModelConfig(path="pocket", adapter=AdapterConfig()))
    print_timings(bench(model, loading.load_tracker(), lambda: gl.render(take.scene, take.trajectory)))
    return 0
