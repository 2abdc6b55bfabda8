"""`python -m sim make RECIPE [a.b=c ...]` films a dataset; `python -m sim show DATASET` puts clips on one sheet."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field

from posttrain import recipe
from posttrain.files import UserError, inside, read_jsonl, replacing
from posttrain.recipe import In, Part
from sim import dataset


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Renderer(Strict):
    name: str = "gl"
    supersample: int = Field(2, ge=1, le=8)


class Recipe(Strict):
    """A dataset: `out` is its folder, `splits` the number of clips in each."""

    out: str
    world: Annotated[Part, In("sim")]
    renderer: Renderer = Renderer()
    splits: dict[str, Annotated[int, Field(ge=1)]]
    seed: int = 0


def make(path: Path | str, overrides: Sequence[str] = (), workers: int | None = None) -> Path:
    """Film the recipe's dataset and return its folder.

    Raises:
        UserError: the recipe or the folder is wrong; the message is one line.
    """
    plan = recipe.load(path, overrides, Recipe)
    recipe.resolve("sim.render", plan.renderer.name)
    film = dataset.Film(plan.world.name, plan.world.config, plan.renderer.name, plan.renderer.supersample, plan.seed)
    dataset.write(plan.out, film, plan.splits, workers)
    return Path(plan.out)


def show(folder: Path | str, split: str | None, count: int, output: Path | str, columns: int = 8) -> None:
    """Write a contact sheet: a row per clip, `columns` frames from first to last, the caption below."""
    import av

    folder = Path(folder)
    names = [split] if split else sorted(p.parent.name for p in folder.glob("*/metadata.jsonl"))
    if not names:
        raise UserError(f"{folder}: holds no split with a metadata.jsonl; make it with `python -m sim make RECIPE`")
    rows = [(name, row) for name in names for row in read_jsonl(folder / name / "metadata.jsonl")[:count]]
    strips = []
    for name, row in rows:
        with av.open(str(inside(folder / name, row["file_name"]))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        scale = max(1, 128 // frames[0].shape[0])
        strip = np.concatenate([frames[i] for i in chosen], axis=1).repeat(scale, 0).repeat(scale, 1)
        picture = Image.new("RGB", (strip.shape[1], strip.shape[0] + 14), "white")
        picture.paste(Image.fromarray(strip))
        text = f"{name}/{row['file_name']}  {row['motion']}: {row['caption']}"
        ImageDraw.Draw(picture).text((2, strip.shape[0] + 1), text, fill="black")
        strips.append(picture)
    sheet = Image.new("RGB", (max(p.width for p in strips), sum(p.height for p in strips)), "white")
    top = 0
    for picture in strips:
        sheet.paste(picture, (0, top))
        top += picture.height
    with replacing(output) as temporary:
        sheet.save(temporary, format="PNG")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="film the dataset of a recipe; continues where it was stopped")
    making.add_argument("recipe")
    making.add_argument("overrides", nargs="*", metavar="a.b=c")
    making.add_argument("--workers", type=int, help="processes (default: one per core)")
    showing = commands.add_parser("show", help="put clips of a dataset on one sheet")
    showing.add_argument("dataset")
    showing.add_argument("--split")
    showing.add_argument("--count", type=int, default=8, help="clips of each split")
    showing.add_argument("-o", "--output", default="sheet.png")
    options = recipe.arguments(parser, arguments)
    try:
        if options.command == "make":
            make(options.recipe, options.overrides, options.workers)
        else:
            show(options.dataset, options.split, options.count, options.output)
            print(options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished clips are kept and the same command continues", file=sys.stderr)
        return 130
    return 0
