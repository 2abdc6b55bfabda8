"""The command line. A refusal is one line and exit code 1; what was done so far is kept and reused."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain.files import UserError

COMMANDS = {
    "run": "every stage of a recipe: clips, training, evaluation, report, export; continues what was cut off",
    "train": "the clips and the training alone",
    "eval": "measure a trained run",
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
    for name, text in TOOLS.items():
        tool = commands.add_parser(name, help=text, description=text)
        if name == "doctor":
            tool.add_argument("recipe", nargs="?", metavar="RECIPE", help="also what its training takes")
            tool.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in train.batch=4")
    options = parser.parse_args(arguments)
    try:
        if options.command in TOOLS:
            return _doctor(options.recipe, options.overrides) if options.command == "doctor" else _bench()
        from posttrain import stages  # takes a second, for torch

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


def _doctor(path: str | None, overrides: Sequence[str]) -> int:
    from posttrain.doctor import check_recipe, doctor

    if path is None:
        return doctor()
    from posttrain import recipe, stages
    from posttrain.data.clips import open_split
    from posttrain.dry import needs
    from sim.cli import Recipe as Film

    plan = recipe.load(path, overrides, stages.Recipe)
    folder, makers = plan.data.folders[0], [plan.data.make] if isinstance(plan.data.make, str) else plan.data.make
    if makers and not (Path(folder) / plan.data.split / "metadata.jsonl").is_file():  # not filmed yet
        world = recipe.load(makers[0], (), Film).world.config
        clip = (world.frames, world.height, world.width)
    else:
        split = open_split(folder, plan.data.split)
        clip = (split.frames, *split.size)
    line, memory = needs(plan.model, plan.train, clip)
    return doctor(lambda: check_recipe(line, memory))


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
