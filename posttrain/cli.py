"""The command line. A refusal is one line and exit code 1; what was done so far is kept and reused."""

import argparse
import sys
from collections.abc import Sequence

from posttrain.files import UserError

COMMANDS = {
    "run": "every stage of a recipe: clips, training, evaluation, report, export; continues what was cut off",
    "train": "the clips and the training alone",
    "eval": "measure a trained run, or videos that any model made (--clips)",
    "report": "write report.html and report.json from what was measured",
    "export": "write the adapter as a diffusers LoRA with a model card",
}

TOOLS = {
    "doctor": "what this machine has, what it lacks, and what to do about it",
    "bench": "seconds that each stage of the pocket model takes on this machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="posttrain", description="Teach a video model physics.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("target", metavar="RECIPE|RUN", help="a recipe file, a run's folder, or its name in runs/")
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in train.steps=20")
        if name == "eval":
            _scoring(command)
    for name, text in TOOLS.items():
        commands.add_parser(name, help=text, description=text)
    options = parser.parse_args(arguments)
    try:
        if options.command in TOOLS:
            return _doctor() if options.command == "doctor" else _bench()
        from posttrain import stages  # takes a second, for torch

        if options.command == "eval" and (options.clips or options.run):
            if options.overrides:
                raise UserError(f"{options.overrides[0]}: with --clips there is no recipe whose values could change")
            stages.score(options.target, options.clips, options.run, options.tracker, options.fps, options.out)
            return 0
        plan, folder = stages.open_run(options.target, options.overrides)
        if options.command == "run":
            stages.run(plan, folder)
        elif options.command == "train":
            stages.make(plan)
            stages.check_data(plan)
            stages.train(plan, folder)
        elif options.command == "eval":
            stages.evaluate(plan, folder)
        elif options.command == "report":
            stages.report(plan, folder)
        else:
            stages.export(plan, folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def _scoring(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "videos that any model made",
        "posttrain eval BENCHMARK --clips FOLDER ... scores folders of videos against PisaBench (its folder real or "
        "sim) or a dataset folder. A video is named by its clip, <clip>.mp4 or <clip>-s<seed>.mp4, in a folder per "
        "split where the benchmark has several.",
    )
    clips = "a row of the table each; NAME=FOLDER names it"
    group.add_argument("--clips", nargs="+", default=[], metavar="FOLDER", help=clips)
    runs = "let a run's base and tuned model make the videos first, from the benchmark's pictures and prompts"
    group.add_argument("--run", nargs="+", default=[], metavar="RUN", help=runs)
    group.add_argument(
        "--tracker",
        default="pocket",
        metavar="FOLDER|HUB",
        help="what follows the object: a SAM 2 in transformers' layout, as facebook/sam2.1-hiera-large, which the real "
        "set needs; by default the embedded tracker, made for 64 x 64 pixels",
    )
    group.add_argument("--fps", type=float, help="of the videos, where their files say it wrongly")
    group.add_argument("--out", metavar="FOLDER", help="where scores and report go (runs/eval-<benchmark>)")


def _doctor() -> int:
    from posttrain.doctor import doctor

    return doctor()


def _bench() -> int:
    from posttrain import stages
    from posttrain.bench import bench, print_timings
    from posttrain.models.base import AdapterConfig, ModelConfig
    from sim import dataset, drop
    from sim.render import gl

    world = drop.Config(width=64, height=64, frames=33, dropped=(1, 1))
    scene, trajectory, _ = dataset.make(dataset.Film("drop", world), "train", 0)
    model = stages.load_model(ModelConfig(path="pocket", adapter=AdapterConfig()))
    print_timings(bench(model, stages.load_tracker(), lambda: gl.render(scene, trajectory)))
    return 0
