"""What a recipe asks for, stage by stage: clips, latents, training, evaluation, report, export.

Stages meet in files. Each looks at what is there, says what it reuses, does the rest, and continues what was cut off:

    data/...                 the clips (made by `sim`)
    runs/cache/              latents and rows of evaluation that runs share, by content
    runs/<run>/clips.jsonl   which files are retimed, cropped or left out, and why (where any is)
    runs/<run>/...           recipe and trained weights (see experiment.py)
    runs/<run>/merged/       the adapter folded into its base, where `export:` lists it
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from posttrain import distributed, files, recipe
from posttrain.data import videos
from posttrain.data.clips import Clips, Split, check_same_kind, open_split, open_splits
from posttrain.evaluate import EvalConfig
from posttrain.experiment import ADAPTER, RUNS, TRAINED, Recipe, is_trained, members, need_training, open_run, resolved
from posttrain.files import UserError
from posttrain.models.base import Merged, ModelConfig
from posttrain.models.published import made_for, sampler
from posttrain.run import Run, start_fingerprint
from posttrain.trackers import check_trackers

CACHE = RUNS / "cache"
CLIPS = "clips.jsonl"
TRACKED = 64  # pixels that the sides of clips may have for the embedded tracker


@contextmanager
def memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a GPU that is full into one clear line; other errors stay what they are."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(" GPU ")[0]  # the rest is for who tunes the allocator
        raise UserError(f"{what}: the GPU's memory is full ({reason}); {remedy}") from error


def run(plan: Recipe, folder: Path) -> None:
    """Every stage that the recipe lists."""
    make(plan)
    check_data(plan)
    train(plan, folder)
    if plan.eval:
        evaluate(plan, folder)
        report(plan, folder)
    if plan.export:
        export(plan, folder)


def make(plan: Recipe) -> None:
    """Film the clips that are missing, in processes of their own: this package knows nothing of simulation."""
    makers = [plan.data.make] if isinstance(plan.data.make, str) else plan.data.make or []
    if not _main_process():
        makers = []
    for maker in makers:
        code = subprocess.run([sys.executable, "-m", "sim", "make", maker], check=False).returncode
        if code in (-2, 130):
            raise KeyboardInterrupt
        if code:
            raise UserError(f"{maker}: its clips could not be made (the line above says why)")
    _wait()


def check_data(plan: Recipe) -> None:
    """Refuse clips for training and testing that do not go together, before hours are spent."""
    splits = open_splits(plan.data)
    if plan.eval:
        splits += check_tracker(plan.eval)
    check_same_kind(splits)


def check_tracker(measured: EvalConfig) -> list[Split]:
    """The splits that are measured. Raises UserError where they are too large for the embedded tracker."""
    splits = [open_split(measured.clips, split) for split in measured.splits]
    for split in splits:
        if measured.tracker == "pocket" and max(split.size) > TRACKED:
            height, width = split.size
            raise UserError(
                f"eval.tracker: the embedded one was made for {TRACKED} x {TRACKED} pixels, and the clips in "
                f"{split.folder} have {height} x {width}; name a SAM 2, as facebook/sam2.1-hiera-large"
            )
    return splits


@memory(
    "training",
    "raise train.accumulate, set train.block_checkpointing=true, or take smaller or shorter clips (data.size and "
    "data.frames, or what data.make films)",
)
def train(plan: Recipe, folder: Path) -> None:
    """Train and save the weights, unless that is done.

    Raises:
        UserError: the recipe, its clips, its model and the folder do not go together, or the GPU is too small.
    """
    check_trackers(plan.train.trackers)
    model, method = load_model(plan.model), plan.method.module
    clips = Clips(plan.data, preload=False)
    tell(clips, folder)
    if method.DATA == "clips" and not clips.annotated:
        bare = next(split.folder for split in clips.splits if not split.annotated)
        raise UserError(f"{bare}: has no masks, which {plan.method.name} learns from; use clips that `sim make` filmed")
    if hasattr(model, "latent_shape"):
        model.latent_shape(clips.splits[0].frames, *clips.splits[0].size)
    data: Any = clips
    if method.DATA == "latents":
        from posttrain.data.latents import Latents

        data = Latents(model, clips, CACHE / "latents")
    validate = None
    if plan.eval:
        from posttrain.evaluate import validation

        # also where it is not used, so that what evaluation will lack is said before training
        validate = validation(folder, plan.eval, model, load_tracker(plan.eval.tracker))
        if hasattr(model, "unload"):
            model.unload()  # captions are read
    every = plan.eval.every if plan.eval else 0
    depends = method.depends(plan.method.config) if hasattr(method, "depends") else {}
    run = Run(folder, model.module, data, plan.train, validate, every, depends)
    if is_trained(folder, run.meaning):
        print(f"training: {folder / ADAPTER} is complete", file=sys.stderr)
        return
    if data is clips:
        clips.preload()
    model.module = run.module
    method.train(run, model, plan.method.config)
    model.module = run.finish()
    if _main_process():
        files.sweep(folder)
        files.sweep(folder / ADAPTER)
        model.save(folder / ADAPTER)
        files.write_json(folder / TRAINED, run.meaning)
    _wait()


def tell(clips: Clips, folder: Path) -> None:
    """Say which files are retimed, cropped or left out: in short on the terminal, each of them in clips.jsonl."""
    told = [{"clips": str(split.folder), **row} for split in clips.splits for row in split.told]
    if told and _main_process():
        files.write_jsonl(folder / CLIPS, told)
        for split in clips.splits:
            for line in videos.summary(split.told) if split.told else ():
                print(f"{split.folder}: {line}", file=sys.stderr)
        print(f"clips: all is listed in {folder / CLIPS}", file=sys.stderr)


@memory("evaluation", "lower eval.batch, or measure smaller or shorter clips (eval.clips)")
def evaluate(plan: Recipe, folder: Path) -> None:
    """Measure the references, the base and the trained model, and print the table.

    Raises:
        UserError: the recipe has no `eval` or too small a tracker, or training is not complete.
    """
    from posttrain.evaluate import evaluate, print_table, read_records

    if plan.eval is None:
        raise UserError(f"{folder / 'recipe.yaml'}: eval: is missing; say what to measure, as in eval.clips=data/drops")
    check_tracker(plan.eval)
    need_training(folder)
    if _main_process():
        models: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "base": lambda: _base(plan),
            plan.method.name: lambda: _tuned(plan, folder),
        }
        evaluate(folder, plan.eval, models, load_tracker(plan.eval.tracker), CACHE / "evaluation")
        print_table(read_records(folder))
    _wait()


def report(plan: Recipe, folder: Path) -> None:
    """Write report.json and report.html from what was measured; of a sweep, those of all its runs together."""
    from posttrain.evaluate import print_table
    from posttrain.report import gather, report

    if _main_process():
        runs = {place.name: place for _, place in members(plan, folder)} if plan.sweep else {}
        if runs:
            print_table(gather(runs))
        print("report:", report(folder, runs)[1])


def compare(targets: Sequence[str]) -> None:
    """Print the rows of several runs in one table, and what the later ones differ by from the first, clip by clip.

    Only the splits count on which each of them was measured.

    Raises:
        UserError: a run is named twice, was not measured, or on other clips, or in another way.
    """
    from posttrain.evaluate import position, print_differences, print_table, read_records

    measured: dict[str, dict[str, dict[str, Any]]] = {}  # run -> split -> row
    for plan, folder in map(open_run, targets):
        if plan.run in measured:
            raise UserError(f"{folder}: is named twice; name each run once")
        found = {(record["split"], record["model"]): record for record in read_records(folder)}
        whole = {split for split, model in found if model == plan.method.name}
        measured[plan.run] = {
            split: {
                plan.run if model == plan.method.name else model: r for (s, model), r in found.items() if s == split
            }
            for split in sorted(whole, reverse=True)
        }
    first, *others = measured
    splits = [split for split in measured[first] if all(split in measured[run] for run in others)]
    if not splits:
        raise UserError(f"{', '.join(measured)}: no split on which all of them were measured; `posttrain eval` each")
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for run, split in ((run, split) for split in splits for run in measured):
        rows, reference = measured[run][split], measured[first][split]
        # what the tracker finds in the true clips is the same where clips, tracker and the code that measures are
        if rows["truth"]["key"] != reference["truth"]["key"]:
            raise UserError(f"{run}: was measured on other clips than {first}, by another tracker or by older code")
        if any(rows["truth"]["settings"][key] != reference["truth"]["settings"][key] for key in ("seeds", "sampler")):
            raise UserError(f"{run}: was measured with other eval.seeds or eval.sampler than {first}; measure it again")
        for model, record in rows.items():
            same = table.get((split, model), record)["key"] == record["key"]
            label = model if same or model == run else f"{model} {run}"
            table[split, label] = record | {"model": label}
    console = Console()
    console = console if console.is_terminal else Console(width=120)  # the names of runs are long
    print_table(sorted(table.values(), key=position), console)
    print_differences([[table[split, run] for run in measured] for split in splits], console)


def export(plan: Recipe, folder: Path, checked: bool = False) -> None:
    """Write the weights as others load them, with a model card; `checked` loads them so and compares.

    Raises:
        UserError: training is not complete, or a file does not give the trained model's velocity.
    """
    from posttrain.export import check, export

    need_training(folder)
    if _main_process():
        family, config = recipe.resolve("models", plan.model.family), resolved(plan.model)
        written = export(folder, plan.export, config, lambda adapter, path: family.save_merged(config, adapter, path))
        print("export:", *written)
        if checked:
            with _tuned(plan, folder) as model:
                for line in check(written[:-1], model, lambda: family.bare(config)):
                    print("check:", line)


@memory("sampling", "ask for fewer pixels (--height, --width) or --frames")
def sample(
    target: str, image: Path | None, wishes: dict[str, Any], scale: float = 1.0, output: Path | None = None
) -> None:
    """Let a run (the base and what it became, side by side) or a model continue a picture, or follow a text alone.

    Args:
        target: a run, as in `open_run`, or what `model.path` may be.
        image: the picture. A run takes one exactly if it was trained so (`model.conditioning`); a model alone that is
            made for pictures needs one, and any other may have one.
        wishes: fields of `gallery.Wish`; those that are missing are as the run was trained and measured.
        scale: how much a run's adapter counts.
        output: the folder; None: samples/asked in the run's folder, or runs/samples/<model>.

    Raises:
        UserError: there is no such thing, the picture cannot be read, is missing or is not wanted, or the wishes do not
            fit the model.
    """
    from posttrain.gallery import Wish, blank, film, fit, natural_size, open_picture, slug
    from posttrain.models import lora
    from posttrain.models.folders import concatenates

    picture, run = image and open_picture(image), Path(target).suffix == ".yaml"
    models: dict[str, Callable[[], AbstractContextManager[Any]]]
    if run or any((place / "recipe.yaml").is_file() for place in (Path(target), RUNS / target)):
        plan, folder = open_run(target)
        need_training(folder)
        if plan.model.conditioning == "text" and image is not None:
            raise UserError(f"--image: {target} was trained on text alone (model.conditioning); leave it out")
        if plan.model.conditioning == "image" and image is None:
            raise UserError(f"--image: is missing; {target} was trained to continue a first picture, name one")
        path, name = plan.model.path, plan.method.name if scale == 1 else f"{plan.method.name} x{scale:g}"

        @contextmanager
        def tuned() -> Iterator[Any]:
            with _tuned(plan, folder) as model:
                if scale != 1:
                    if not lora.attached(model.transformer):
                        raise UserError(f"--scale: {folder} has no adapter, all weights were trained; leave it out")
                    lora.rescale(model.transformer, scale)
                yield model

        models = {"base": lambda: _base(plan), name: tuned}
        usual = _usual(plan)
        output = output or folder / "samples" / "asked"
    else:
        if scale != 1:
            raise UserError(f"--scale: {target} is no run and has no adapter; leave it out or name a run")
        if image is None and concatenates(target):
            raise UserError(f"--image: is missing; {target} is made to continue a first picture, name one")
        path, name, usual = target, Path(target).name, {}
        conditioning: Literal["image", "text"] = "text" if image is None else "image"
        large = path != "pocket" and _device().type == "cuda"  # in half the memory, as the recipes have it
        config = ModelConfig(path=path, conditioning=conditioning, dtype="bf16" if large else "fp32")
        models = {name: lambda: nullcontext(load_model(config))}
        output = output or RUNS / "samples" / name
    asked = {**made_for(path), **usual, **wishes, **sampler(path, usual, wishes)}
    if picture and path != "pocket" and "size" not in {**usual, **wishes}:
        asked["size"] = natural_size(picture, asked["size"])
    wish = Wish(**asked)
    if _main_process():
        pixels, done = fit(picture, wish.size) if picture else blank(wish.size)
        print(f"{image or 'text'}: {done}; {wish.frames} frames, {wish.steps} steps, guidance {wish.guidance:g}")
        print("samples:", *film(models, pixels, wish, output / (image.stem if image else slug(wish.prompt))))


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
    from posttrain.benchmarks.pisabench import open_benchmark
    from posttrain.evaluate import print_table, weights_fingerprint
    from posttrain.report import report
    from posttrain.score import score

    named = [text.partition("=") for text in clips]
    rows = [(name if equals else Path(name).resolve().name, Path(path or name)) for name, equals, path in named]
    for _, path in rows:
        if not path.is_dir():
            raise UserError(f"{path}: does not exist; --clips names folders of videos")
    follower = load_tracker(tracker)
    masks = CACHE / "masks"
    truths = open_benchmark(benchmark, getattr(follower, "clicks", None), weights_fingerprint(follower.module), masks)
    if tracker == "pocket" and any(max(truth.size) > TRACKED for split in truths.values() for truth in split):
        print(
            f"the embedded tracker was made for {TRACKED} x {TRACKED} pixels; name a SAM 2 with --tracker",
            file=sys.stderr,
        )
    folder = Path(out) if out else RUNS / f"eval-{Path(benchmark).resolve().name}"
    for target in runs:
        rows += _imagine(target, truths, folder / "videos", asked or {})
    if len(dict(rows)) < len(rows) or any(not name or "/" in name for name, _ in rows):
        raise UserError("--clips: each row of the table needs a name of its own; give one, as in kling=videos/k")
    if _main_process():
        records = score(folder, truths, dict(rows), follower, fps, _device())
        print_table(records)
        print("\nas the published code counts (PISA, table 1):")
        print_table(records, released=True)
        print("report:", report(folder)[1])
    _wait()


@memory("sampling", "lower eval.batch in the run's recipe; its videos have the size and frames of its clips")
def _imagine(target: str, truths: Any, out: Path, asked: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Rows for a run: the folders with the videos of its base and of its tuned model, made where they are missing."""
    from posttrain.benchmarks.pisabench import NEGATIVE
    from posttrain.score import imagine

    plan, folder = open_run(target)
    need_training(folder)
    kind = open_splits(plan.data)[0].kind
    measured = plan.eval or EvalConfig(clips="", seeds=1, batch=1)
    how = sampler(plan.model.path, measured.sampler.model_dump() if plan.eval else {}, asked)
    seeds = asked.get("seeds", measured.seeds)
    start = files.read_json(folder / TRAINED)["model"]  # also what model.start and model.merge put into it
    model = plan.model.model_dump(mode="json")
    told = [truth.caption + truth.context for split in truths.values() for truth in split]
    settings = {"kind": kind, "sampler": how, "seeds": seeds, "told": [*told, NEGATIVE], "model": model, "start": start}
    weights = {path.name: files.sha256(path) for path in sorted((folder / ADAPTER).rglob("*.safetensors"))}
    models: dict[str, tuple[Any, Any]] = {
        "base": (lambda: _base(plan), {}),
        plan.method.name: (lambda: _tuned(plan, folder), weights),
    }
    rows = []
    for name, (ready, trained) in models.items():
        digest = files.sha256_json([settings, trained])
        rows.append((name, out / f"{name}-{digest[:8]}"))
        if _main_process():
            imagine(ready, truths, rows[-1][1], kind, seeds, measured.batch, **how)
    _wait()
    return rows


@contextmanager
def _base(plan: Recipe) -> Iterator[Any]:
    """The model that training started from; for random weights, the pretrained one they compete with.

    An adapter that training continued is folded into it, so that it has none, as any base.
    """
    config = resolved(plan.model).model_copy(update={"adapter": None, "init": "pretrained", "other_adapter": None})
    if config.start and Path(config.start).is_file():
        config = config.model_copy(update={"start": None, "merge": (*config.merge, Merged(path=config.start))})
    yield load_model(config)


@contextmanager
def _tuned(plan: Recipe, folder: Path) -> Iterator[Any]:
    """The model as its saved weights make it, so that what is measured is what is handed out."""
    model = load_model(plan.model)
    if files.read_json(folder / TRAINED)["model"] != start_fingerprint(model.module):
        name = f"model.path {plan.model.path}"
        raise UserError(f"{folder / ADAPTER}: was trained on other weights than {name} has now; train again as run=...")
    model.restore(folder / ADAPTER)
    yield model


def load_model(config: ModelConfig) -> Any:
    """The model of `models/<family>.py` that a recipe names, on this process's device."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one per part of a model
    model = recipe.resolve("models", config.family).load(resolved(config), _device())
    if (config.start or config.merge) and not hasattr(model, "transformer"):
        raise UserError(
            f"model: start and merge are for video models; name the folder of a {config.family} in model.path"
        )
    return model


def load_tracker(path: str = "pocket") -> Any:
    """The segmenter that scores: the embedded one, one like it in a folder, or a SAM 2 in a folder or on the hub."""
    config = Path(path) / "config.json"
    ours = path == "pocket" or (config.exists() and "widths" in files.read_json(config))
    return load_model(ModelConfig(family="tracker" if ours else "sam2", path=path))


def _device() -> Any:
    return distributed.process().device


def _main_process() -> bool:
    return distributed.process().is_main_process


def _wait() -> None:
    distributed.process().wait_for_everyone()
