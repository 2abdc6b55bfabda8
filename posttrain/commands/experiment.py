"""An experiment: its recipe, its folder in runs/, and which files its `model.start` and `model.merge` stand for.

    runs/<run>/recipe.yaml   the resolved recipe, including overrides
    runs/<run>/adapter/      the trained weights (also if they are a whole model)
    runs/<run>/trained.json  written when training is complete: what the weights depend on, and their digests
    runs/<run>/.lock         held by the process that works in the folder

A folder belongs to one recipe. A run may start from the weights of another run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from posttrain.core import distributed, files, recipe
from posttrain.core.errors import UserError, printable
from posttrain.core.recipe import Plugin, PluginFrom, Seed, Strict
from posttrain.data.config import DataConfig
from posttrain.evaluation.evaluate import EvalConfig
from posttrain.methods.base import method_of
from posttrain.models import lora
from posttrain.models.base import Defaults, Merged, ModelConfig, family, is_video, sampler
from posttrain.pocket import FAMILY
from posttrain.training.optim import TrainConfig
from posttrain.training.tripwires import BEST, LOOKS, TripwiresConfig, best, chooses_by_the_test

RUNS = Path("runs")
TAKEN = ("cache", "samples")  # folders in it that are no runs
METHODS = ("methods", "pretraining")  # packages
ADAPTER, TRAINED = "adapter", "trained.json"
# may change without changing the trained weights
FREE = (
    *("run", "data.make", "data.groups.judge", "data.groups.batch"),
    *("train.checkpoint_every", "train.trackers", "eval", "export"),
)
Format = Literal["diffusers", "comfyui", "merged"]  # in which weights are exported
Values = Annotated[tuple[int | float | str, ...], Field(min_length=1)]


BUSY = "works"  # what another process may be doing in a run's folder


def _names_a_folder(run: str) -> str:
    """Refuse what is no folder of its own below RUNS."""
    parts = run.split("/")
    odd = [p for p in parts if not p or p[0] == "." or p != p.strip() or not p.isprintable() or "\\" in p]
    if odd or len(run.encode()) > 200 or parts[0] in TAKEN:
        raise PydanticCustomError(
            "value",
            "should name a folder below runs/ in at most 200 letters, without . at its start and not {taken}",
            {"taken": " or ".join(TAKEN)},
        )
    return run


class Table(Strict):
    """Rows of one report. Each row lists the keys that it changes, as in `flow: {method.rewards: [{name: flow}]}`."""

    rows: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], dict[str, Any]], Field(min_length=1)]
    # of training; a row is their mean, clip by clip. None: the recipe's own
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds and len(set(seeds)) < len(seeds):
            raise PydanticCustomError("duplicate", "has a seed twice; keep one")
        return seeds

    @field_validator("rows")
    @classmethod
    def _free(cls, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for row, changes in rows.items():
            for key in ("run", "sweep", "table", "train.seed"):
                if key in changes:
                    raise PydanticCustomError(
                        "part", "{row} sets {key}, which the table itself sets; leave it out", {"row": row, "key": key}
                    )
        return rows


class Recipe(Strict):
    """A whole experiment. `run` names its folder in runs/.

    `sweep: {data.limit: [30, 100]}` makes it a run for each value, runs/<run>/<value>, and one report of them all;
    `table` a run for each row and seed, runs/<run>/<row>/<seed>, and one report.
    """

    run: Annotated[str, AfterValidator(_names_a_folder)]
    model: ModelConfig
    data: DataConfig
    method: Annotated[Plugin, PluginFrom(*METHODS)]
    train: TrainConfig
    eval: EvalConfig | None = None
    tripwires: TripwiresConfig | None = None
    export: tuple[Format, ...] = ()
    sweep: Annotated[dict[str, Values], Field(min_length=1, max_length=1)] | None = None
    table: Table | None = None

    @property
    def divided(self) -> bool:
        """Whether this recipe stands for several runs with one report."""
        return bool(self.sweep or self.table)

    @model_validator(mode="before")
    @classmethod
    def _sampled_as_usual(cls, values: Any) -> Any:
        """Fill in `eval.sampler` with the model's defaults, and `method.sampler` with `eval.sampler`."""
        match values:
            case {"model": {"path": str(path)} as model} if defaults := _defaults(model.get("family", FAMILY), path):
                said: list[dict[str, Any]] = []
                for key in ("eval", "method"):
                    part = values.get(key)
                    if not isinstance(part, dict) or (key == "method" and not _samples(part.get("name"))):
                        continue
                    if isinstance(asked := part.get("sampler", {}), dict):
                        said.append(asked)
                        values = values | {key: part | {"sampler": asked | sampler(defaults, *said)}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _losers_as_usual(cls, values: Any) -> Any:
        """Fill in `data.groups.sampler` with the model's defaults."""
        match values:
            case {"model": {"path": str(path)} as model, "data": {"groups": {**groups}} as data}:
                defaults = _defaults(model.get("family", FAMILY), path)
                if defaults and isinstance(asked := groups.get("sampler", {}), dict):
                    return values | {"data": data | {"groups": groups | {"sampler": asked | sampler(defaults, asked)}}}
        return values

    @field_validator("sweep")
    @classmethod
    def _folders(cls, sweep: dict[str, tuple[Any, ...]] | None) -> dict[str, tuple[Any, ...]] | None:
        for values in (sweep or {}).values():
            names = [_folder(value) for value in values]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise PydanticCustomError(
                    "duplicate", "has two values whose folder is {name}; keep one", {"name": printable(twice)}
                )
            if odd := [n for n in names if n[:1] in (".", "") or not n.isprintable() or len(n) > 100]:
                raise PydanticCustomError(
                    "value", "has a value that cannot be a folder name: {name}", {"name": printable(odd)}
                )
        return sweep

    @field_validator("method")
    @classmethod
    def _trains_this_family(cls, method: Plugin, info: ValidationInfo) -> Plugin:
        """Refuse a method that cannot train this family: it trains video models, or the networks in its TRAINS."""
        model, networks = info.data.get("model"), method_of(method).TRAINS
        if model is None:  # what is wrong with it is said elsewhere
            return method
        if not is_video(model.family) if networks == "video" else model.family not in networks:
            raise PydanticCustomError(
                "part",
                "{name} trains {trained}, and model.family is {family}; change one of them",
                {
                    "name": method.name,
                    "trained": "video models" if networks == "video" else " or ".join(networks),
                    "family": model.family,
                },
            )
        return method

    @field_validator("eval")
    @classmethod
    def _of_a_video_model(cls, measured: EvalConfig | None, info: ValidationInfo) -> EvalConfig | None:
        model = info.data.get("model")
        if measured and model and not is_video(model.family):
            raise PydanticCustomError(
                "part", "is only for video models; leave it out of a recipe for {family}", {"family": model.family}
            )
        return measured

    @field_validator("table")
    @classmethod
    def _one_of_both(cls, table: Table | None, info: ValidationInfo) -> Table | None:
        if table and info.data.get("sweep"):
            raise PydanticCustomError("part", "cannot be used together with sweep; keep one")
        return table

    @field_validator("tripwires")
    @classmethod
    def _in_place(cls, wires: TripwiresConfig | None, info: ValidationInfo) -> TripwiresConfig | None:
        measured, method = info.data.get("eval"), info.data.get("method")
        if wires is None or method is None or "eval" not in info.data:  # what is wrong with those is said elsewhere
            return wires
        if not measured or not measured.every:
            raise PydanticCustomError("part", "need eval.clips and eval.every, the steps between looks; set both")
        if not method_of(method).rewards(method.config):
            raise PydanticCustomError(
                "part",
                "are only for methods that train rewards, and {name} does not; leave them out",
                {"name": method.name},
            )
        if chooses_by_the_test(wires, measured):
            raise PydanticCustomError(
                "part", "choose weights with roll_back, so their split must not be measured; remove it from eval.splits"
            )
        return wires


def _defaults(name: Any, path: str) -> Defaults | None:
    """The defaults of the model that a recipe names; None for a network. An unknown family is reported elsewhere."""
    try:
        return family(name).defaults(path) if isinstance(name, str) else None
    except UserError:
        return None


def _samples(method: Any) -> bool:
    """Whether the method of this name has a `sampler` in its Config. An unknown name is reported elsewhere."""
    try:
        return isinstance(method, str) and "sampler" in recipe.resolve(METHODS, method).Config.model_fields
    except (UserError, AttributeError):
        return False


def load_recipe(target: Path | str, *overrides: str) -> Recipe:
    """Read and check the recipe of an experiment; writes nothing.

    Args:
        target: a recipe file, a run's folder, or its name in runs/. A path that begins with recipes/ and does not exist
            here is that of a shipped recipe.
        overrides: as on the command line: "train.steps=20", "data.clips=my_videos".

    Raises:
        UserError: `target` does not exist, or the recipe is wrong; `field` is the key, as in "train.steps".
    """
    return recipe.load(_recipe_and_folder(target)[0], overrides, Recipe)


def _recipe_and_folder(target: Path | str) -> tuple[Path, Path | None]:
    """The recipe file that `target` stands for, and the run's folder if it stands for a run."""
    for folder in (Path(target), RUNS / target):
        if folder.is_dir():
            path = folder / "recipe.yaml"
            if not path.exists():
                raise UserError(
                    f"{path}: does not exist; {folder} is not a run; give a recipe or a folder below {RUNS}", "missing"
                )
            return path, folder
    return Path(target), None


def run_folder(target: Path | str) -> Path:
    """The folder of the run that `target` names, as for `load_recipe`; writes nothing.

    Raises:
        UserError: the recipe is wrong or missing, or it was not run yet.
    """
    path, folder = _recipe_and_folder(target)
    folder = folder or RUNS / recipe.load(path, (), Recipe).run
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder}: does not exist; `posttrain run {target}` makes it", "missing")
    return folder


def open_run(target: Recipe | Path | str, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """The recipe and folder of a run, given as for `load_recipe` or as a recipe that was loaded.

    Raises:
        UserError: it does not exist, the recipe is wrong, or the folder holds a run of another recipe.
    """
    if isinstance(target, Recipe):
        if overrides:
            raise UserError(
                f"{printable(overrides[0])}: overrides must be given to load_recipe, which checks them", "conflict"
            )
        plan, folder, name = target, None, f"the recipe {target.run}"
    else:
        path, folder = _recipe_and_folder(target)
        plan, name = recipe.load(path, overrides, Recipe), str(path)
    folder = folder or RUNS / plan.run
    claim(plan, folder, name)
    return plan, folder


def claim(plan: Recipe, folder: Path, name: str) -> None:
    """Refuse a folder in which another recipe was run; else write this recipe into it.

    A recipe that was refused before training, for example for a wrong model.path, may be corrected and run again.
    """
    path = folder / "recipe.yaml"
    if path.exists() and ((folder / ADAPTER).exists() or any(folder.glob("checkpoints/step-*"))):
        new, old = (
            recipe.flat(plan.model_dump(mode="json")),
            recipe.flat(recipe.load(path, (), Recipe).model_dump(mode="json")),
        )
        differing = [
            f"{key} ({old.get(key)}, now {new.get(key)})"
            for key in sorted(new.keys() | old.keys())
            if new.get(key) != old.get(key) and not key.startswith(FREE)
        ]
        if differing:
            what = ", ".join(differing)
            raise UserError(
                f"{path}: differs from {name} in {what}; choose another run=... or delete {folder}", "other_run", "run"
            )
    text, process = recipe.dump(plan), distributed.process()
    if process.is_main_process and (not path.exists() or path.read_text(errors="replace") != text):
        with files.alone(folder, BUSY, "run"):
            files.write_text(path, text)
    process.wait_for_everyone()


@contextmanager
def alone(plan: Recipe, folder: Path) -> Iterator[None]:
    """Lock the run's folder for this process; if a run has several processes, the first one locks it.

    Raises:
        UserError: busy: another process holds it, or has started another recipe there.
    """
    if not distributed.process().is_main_process:
        yield
        return
    with files.alone(folder, BUSY, "run"):
        path = folder / "recipe.yaml"
        if not path.exists() or path.read_text(errors="replace") != recipe.dump(plan):
            raise UserError(f"{path}: was changed by another process just now; start again", "busy", "run")
        files.sweep(folder, deep=True)
        yield


def members(plan: Recipe, folder: Path) -> list[tuple[Recipe, Path]]:
    """The runs of an experiment: a single one, or those of `sweep` or `table`, each in its own subfolder.

    Raises:
        UserError: a value gives an invalid recipe, or its folder holds a run of another recipe.
    """
    changes: dict[str, dict[str, Any]] = {}
    if plan.table:
        for seed in plan.table.seeds or (plan.train.seed,):  # all rows once, so that a part of a table is one
            changes |= {f"{row}/{seed}": values | {"train.seed": seed} for row, values in plan.table.rows.items()}
    elif plan.sweep:
        ((key, swept),) = plan.sweep.items()
        changes = {_folder(value): {key: value} for value in swept}
    else:
        return [(plan, folder)]
    path, found = folder / "recipe.yaml", {}
    for name, values in changes.items():
        words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        found[name] = recipe.load(path, [*words, f"run={plan.run}/{name}", "sweep=null", "table=null"], Recipe)
        if plan.table and _measured(found[name]) != _measured(plan):
            raise UserError(
                f"{path}: table.rows.{name.partition('/')[0]}: changes eval, but all rows "
                "must be measured in the same way; leave it out",
                "conflict",
                "table.rows",
            )
        claim(found[name], folder / name, str(path))
    return [(member, folder / name) for name, member in found.items()]


def _folder(value: int | float | str) -> str:
    """The folder of a sweep's run with this value."""
    return str(value).replace("/", "-")


def _measured(plan: Recipe) -> dict[str, Any] | None:
    return plan.eval.model_dump(exclude={"every", "batch"}) if plan.eval else None


def is_trained(folder: Path, meaning: dict[str, Any] | None = None) -> bool:
    """Whether training is complete. `meaning`: what the weights would depend on now.

    Raises:
        UserError: it was completed with other settings.
    """
    if not (folder / TRAINED).exists() or not (folder / ADAPTER).exists():
        return False
    kept = files.read_object(folder / TRAINED)
    digests, said = kept.get("sha256"), isinstance(kept.get("model"), str)
    if wrong := files.changed(folder / ADAPTER, digests) if isinstance(digests, dict) and digests and said else [""]:
        raise UserError(
            f"{folder / ADAPTER / wrong[0]}: is missing or not what training wrote; delete {folder} and train again",
            "damaged",
        )
    if meaning is not None and (other := [key for key, value in meaning.items() if kept.get(key) != value]):
        what = ", ".join(other)
        raise UserError(
            f"{folder / ADAPTER}: was trained with another {what}; choose another run=... or delete {folder}",
            "other_run",
            "run",
        )
    return True


def trained_files(folder: Path) -> dict[str, str]:
    """Digests of the files that training wrote into the run's adapter/; not of those that `export` adds."""
    digests = files.sums(folder / ADAPTER)
    return {name: digests[name] for name in digests if not name.endswith(("README.md", "_comfyui.safetensors"))}


def need_training(folder: Path) -> None:
    if not is_trained(folder):
        raise UserError(
            f"{folder / ADAPTER}: is missing or incomplete; run `posttrain train` to its end first", "unfinished"
        )


def resolved(config: ModelConfig) -> ModelConfig:
    """`config` with start and merge replaced by files and folders; resolving it again changes nothing.

    Raises:
        UserError: one does not exist, or is a run that was trained on another base.
    """
    merge: tuple[Merged, ...] = ()
    for number, adapter in enumerate(config.merge):
        path = _weights(f"model.merge.{number}.path", adapter.path, merge)
        if path.is_dir():
            raise UserError(
                f"model.merge.{number}.path: {path} is a whole transformer; name it in model.start",
                "mismatch",
                f"model.merge.{number}.path",
            )
        merge += (adapter.model_copy(update={"path": str(path)}),)
    start = config.start and str(_weights("model.start", config.start, merge))
    return config.model_copy(update={"start": start, "merge": merge})


def _weights(field: str, source: str, merge: tuple[Merged, ...]) -> Path:
    """The adapter file or transformer folder of `source`, which may depend on no adapters except those in `merge`."""
    for place in (Path(source), RUNS / source):
        if (place / "recipe.yaml").is_file():
            need_training(place)
            place = place / ADAPTER
        for found in (place / "transformer", place, place / lora.FILE):
            if (found / "config.json").is_file():
                return found
            if found.is_file():
                if found.parent.name == BEST and (found.parent.parent / LOOKS).is_file():
                    best(found.parent.parent)
                _check_base(field, source, found.parent.parent, merge)
                return found
    raise UserError(
        f"{field}: {source} is not a run, adapter file or transformer folder; name an existing one", "missing", field
    )


def _check_base(field: str, source: str, run: Path, merge: tuple[Merged, ...]) -> None:
    """Refuse the adapter of a run whose base was more than model.path with `merge`."""
    if not (run / TRAINED).is_file():
        return
    need_training(run)
    try:
        base = resolved(recipe.load(run / "recipe.yaml", (), Recipe).model)
    except UserError as error:
        raise UserError(f"{field}: {source}: its base cannot be read: {error}", error.code, field) from error
    if base.start and Path(base.start).is_dir():
        raise UserError(
            f"{field}: {source} was trained on {base.start}; run "
            f"`posttrain export {run} export=[merged]`, and start from the folder that it writes",
            "mismatch",
            field,
        )
    if base.merge != merge[: len(base.merge)]:
        needed = [item.model_dump() for item in base.merge]
        raise UserError(
            f"{field}: {source} was trained on merged adapters; put {needed} first in model.merge", "mismatch", field
        )
