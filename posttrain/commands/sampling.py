"""Sample with a run or a model, and show a recipe's groups."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from posttrain.commands.experiment import BUSY, RUNS, Recipe, need_training, open_run
from posttrain.commands.loading import base_model, device, load_model, main_process, memory, tuned_model
from posttrain.core import files
from posttrain.core.errors import UserError
from posttrain.data.dataset import Clips
from posttrain.models.base import ModelConfig, sampler
from posttrain.models.base import family as family_of
from posttrain.pocket import FAMILY


@memory("sampling", "ask for fewer pixels (--height, --width) or --frames")
def sample(
    target: str,
    image: Path | np.ndarray | None,
    wishes: dict[str, Any],
    scale: float = 1.0,
    output: Path | None = None,
    family: str | None = None,
    show: bool = False,
) -> list[Path]:
    """Sample with a run (base and tuned model side by side) or with one model, from a first frame or from text alone.

    Args:
        target: a run, as in `open_run`, or a value of `model.path`.
        image: the first frame, a file or uint8 (H, W, 3). A run needs one if it was trained with first frames
            (`model.conditioning`) and refuses one otherwise; a model that is not a run may need one.
        wishes: fields of `gallery.Wish`; the other fields are those of the run's training and evaluation.
        scale: strength of a run's adapter.
        output: the folder; None: samples/asked in the run's folder, or runs/samples/<model>.
        family: of a model that is not a run; None: that of the embedded model.
        show: print how the picture was cropped and scaled, and the paths.

    Returns:
        The paths of the clips (all seeds of the first model, then of the second), the contact sheet and the GIF. With
        several processes, only the first one gets them.

    Raises:
        UserError: the run or model does not exist, the picture cannot be read, is missing or is not used, or the
            settings do not fit the model.
    """
    from posttrain.models import lora
    from posttrain.reporting.gallery import Wish, blank, fit, natural_size, open_picture, sample_side_by_side, slug

    picture, run = None if image is None else open_picture(image), Path(target).suffix == ".yaml"
    models: dict[str, Callable[[], AbstractContextManager[Any]]]
    if run or any((parent / "recipe.yaml").is_file() for parent in (Path(target), RUNS / target)):
        plan, folder = open_run(target)
        need_training(folder)
        if plan.model.conditioning == "text" and image is not None:
            raise UserError(
                f"--image: {target} was trained without first frames (model.conditioning=text); leave it out",
                "conflict",
                "--image",
            )
        if plan.model.conditioning == "image" and image is None:
            raise UserError(
                f"--image: is missing; {target} was trained to continue a first frame; name one", "required", "--image"
            )
        if family is not None:
            raise UserError(
                "--family: is only for a model without a run; a run's recipe names its own", "conflict", "--family"
            )
        config, name = plan.model, plan.method.name if scale == 1 else f"{plan.method.name} x{scale:g}"

        @contextmanager
        def tuned() -> Iterator[Any]:
            with tuned_model(plan, folder) as model:
                if scale != 1:
                    if not lora.attached(model.transformer):
                        raise UserError(
                            f"--scale: {folder} has no adapter, because all weights were trained; leave it out",
                            "conflict",
                            "--scale",
                        )
                    lora.rescale(model.transformer, scale)
                yield model

        models = {"base": lambda: base_model(plan), name: tuned}
        usual = as_evaluated(plan)
        output = output or folder / "samples" / "asked"
    else:
        if scale != 1:
            raise UserError(
                f"--scale: {target} is not a run and has no adapter; leave it out or name a run", "conflict", "--scale"
            )
        if image is None and family_of(family or FAMILY).needs_picture(target):
            raise UserError(f"--image: is missing; {target} continues a first frame; name one", "required", "--image")
        config, name, usual = alone(target, image is not None, device(), family or FAMILY), Path(target).name, {}
        models = {name: lambda: nullcontext(load_model(config))}
        output = output or RUNS / "samples" / name
    file = image if isinstance(image, Path) else None
    if file and any((output / f"{file.stem}{s}").resolve() == file.resolve() for s in (".png", ".gif")):
        raise UserError(
            f"--output: the contact sheet would replace {file}; name another folder than {output}",
            "conflict",
            "--output",
        )
    of_model = family_of(config.family)
    defaults = of_model.defaults(config.path)
    asked = {**defaults._asdict(), **usual, **wishes, **sampler(defaults, usual, wishes)}
    if picture and config.path != "pocket" and "size" not in {**usual, **wishes}:
        asked["size"] = natural_size(picture, asked["size"], of_model.SIDE)
    wish, written = Wish(**asked), list[Path]()
    if main_process():
        pixels, done = fit(picture, wish.size) if picture else blank(wish.size)
        if show:
            source = file or ("picture" if picture else "text")
            print(f"{source}: {done}; {wish.frames} frames, {wish.steps} steps, guidance {wish.guidance:g}")
        with files.alone(output, BUSY, "--output"):
            written = sample_side_by_side(models, pixels, wish, output / (file.stem if file else slug(wish.prompt)))
        if show:
            print("samples:", *written)
    return written


def alone(path: str, pictured: bool, device: torch.device, family: str = FAMILY) -> ModelConfig:
    """The config of a model that is not a run: bf16 on a GPU, as in the recipes."""
    dtype: Literal["bf16", "fp32"] = "bf16" if path != "pocket" and device.type == "cuda" else "fp32"
    return ModelConfig(family=family, path=path, conditioning="image" if pictured else "text", dtype=dtype)


def as_evaluated(plan: Recipe) -> dict[str, Any]:
    """The format of a run's clips and the sampler of its evaluation, as fields of `gallery.Wish`."""
    usual: dict[str, Any] = {}
    if plan.eval:
        usual |= plan.eval.sampler.model_dump()
    try:
        clips = Clips(plan.data, preload=False).splits[0]
    except UserError:  # the clips need not be there any more
        return usual
    return usual | {"size": clips.size, "frames": clips.frames, "fps": clips.fps}


def groups(plan: Recipe, folder: Path, shown: int = 8, show: bool = False) -> Path:
    """Write a contact sheet of the first `shown` groups of a recipe, in one process; return its path (`show`: print).

    Raises:
        UserError: the recipe has no groups, or they are not comparable.
    """
    from posttrain.data.groups import gather
    from posttrain.reporting.gallery import contact_sheet

    wanted = plan.data.groups
    if wanted is None:
        raise UserError("data.groups: is missing; name what true clips are compared with", "required", "data.groups")
    path = folder / "groups.png"
    if not main_process():
        return path
    clips = Clips(plan.data, preload=False, violated=wanted.counterfactuals)
    members, all_groups = gather(clips, wanted, plan.model.conditioning == "image")
    rows: dict[str, np.ndarray] = {}
    for number, group in enumerate(all_groups[:shown], 1):
        winner = "true" if group.winner == group.true else f"the best, {members.video(group.winner).name}"
        rows[f"group {number}, {winner}: {members.row(group.winner).caption}"] = members.read(group.winner)[0]
        for index in group.losers:
            scored = (scores := members.scores(index)) and f"sa {scores.sa:.2f}, pc {scores.pc:.2f}"
            name = f"group {number}, {members.video(index).name}: {scored or 'no scores'}"
            violation = members.row(index).violation
            rows[f"{name} {violation.kind if violation else ''}"] = members.read(index)[0]
    contact_sheet(path, rows)
    if show:
        print(f"groups: {len(all_groups)} of {wanted.losers} losers each; {path} shows the first")
    return path
