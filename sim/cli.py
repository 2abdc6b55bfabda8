"""`python -m sim make RECIPE [a.b=c ...]` films a dataset; `python -m sim show DATASET` shows its first clips."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from posttrain.core import recipe
from posttrain.core.errors import UserError, one_line
from posttrain.core.signals import end_with, exit_code
from sim import dataset
from sim.bench import bench
from sim.show import show

Split = Annotated[str, Field(pattern=r"^\w[\w-]*$")]  # also a folder's name


class Recipe(dataset.Job):
    """A dataset: `out` is its folder, `splits` the number of scenes in each."""

    out: str
    splits: dict[Split, Annotated[int, Field(ge=1)]] = Field(min_length=1)


def make(path: Path | str, overrides: Sequence[str] = (), workers: int | None = None) -> Path:
    """Film the recipe's dataset and return its folder.

    Raises:
        UserError: the recipe or the folder is wrong; the message is one line.
    """
    plan = recipe.load(path, overrides, Recipe)
    dataset.write(plan.out, plan, plan.splits, workers)
    return Path(plan.out)


def positive(text: str) -> int:
    if not 1 <= (number := int(text)) <= 10**6:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = recipe.Parser(prog="python -m sim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="film the dataset of a recipe; finished clips are kept")
    making.add_argument("recipe")
    making.add_argument("overrides", nargs="*", metavar="a.b=c")
    making.add_argument("--workers", type=positive, help="processes (default: one per core)")
    making.add_argument("--parent", type=positive, metavar="PID", help="end when the parent process PID ends")
    timing = commands.add_parser("bench", help="measure the CPU seconds of a recipe's groups and of their parts")
    timing.add_argument("recipe")
    timing.add_argument("overrides", nargs="*", metavar="a.b=c")
    showing = commands.add_parser(
        "show", help="write a contact sheet of a dataset's clips, or a page on which they play"
    )
    showing.add_argument("dataset")
    showing.add_argument("--split")
    showing.add_argument("--count", type=positive, default=8, help="number of clips, or groups, of each split")
    showing.add_argument(
        "-o", "--output", default="sheet.png", help="the file to write, a .png or an .html (default: %(default)s)"
    )
    options = recipe.arguments(parser, arguments)
    try:
        if options.command == "make":
            if options.parent:
                end_with(options.parent)
            make(options.recipe, options.overrides, options.workers)
        elif options.command == "bench":
            print(bench(recipe.load(options.recipe, options.overrides, Recipe)))
        else:
            print(show(options.dataset, options.split, options.count, options.output))
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("stopped; finished clips are kept and the same command continues", file=sys.stderr)
        return exit_code(error)
    return 0
