"""Write docs/recipes.md: every key of a recipe, with its type, its default and its meaning, from the code.

    python docs/make_recipes.py

The tables come from the pydantic configs. A key's meaning is the comment beside it in the code, or its line in MEANINGS
below. tests/test_docs.py checks that the page is current and that no meaning is empty.
"""

import ast
import inspect
import json
import sys
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).parent.parent))

from posttrain.commands.experiment import Recipe, Table
from posttrain.core.recipe import Plugin, plugins, resolve
from sim.cli import Recipe as Clips

PAGE = Path(__file__).with_name("recipes.md")
# By dotted key; "*.key" for a key of several plug-ins. They stand before the comments in the code.
MEANINGS = {
    "run": "The name of the run. Its folder is `runs/<run>/`.",
    "model": "The model that is trained, see below.",
    "data": "The clips to train on, see below.",
    "method": "The training method and its keys: `{name: psft, …}`, see below.",
    "train": "The optimiser and its schedule, see below.",
    "eval": "What is measured after training, see below. Left out: nothing.",
    "tripwires": "Quantities that are measured while a reward is trained, see below.",
    "export": "Formats that `posttrain run` writes at the end.",
    "sweep": "One key and its values. Each value is a run of its own, `runs/<run>/<value>/`, and one report shows all.",
    "table": "Several changes of this recipe, each with several seeds, in one report, see below.",
    "table.rows": "Row name → the keys that this row changes.",
    "table.seeds": "Seeds (`train.seed`) of each row. A row of the report is the mean over its seeds.",
    "model.family": "The model family: `wan` or `opensora`. In `posttrain/pretraining`: the name of the network.",
    "model.path": "`pocket` (the embedded model), a local diffusers folder, or a hub id `owner/name`.",
    "model.revision": "Branch, tag or commit of a hub id.",
    "model.init": "`random`: keep the architecture, draw new weights from `model.seed`.",
    "model.dtype": "Precision of frozen weights and of the text encoder. An adapter is always fp32.",
    "model.adapter": "A LoRA adapter. Left out: all weights are trained.",
    "model.adapter.rank": "Rank of the LoRA matrices.",
    "model.adapter.alpha": "LoRA alpha; the scale is alpha / rank. Left out: alpha = rank.",
    "model.adapter.targets": "Endings of the names of the linear layers that get an adapter. Left out: the family's.",
    "model.seed": "Seed of the adapter's first weights, and of `init: random`.",
    "model.conditioning": "`image`: condition on the first frame and the caption. `text`: on the caption alone.",
    "model.expert": "Wan2.2-A14B has two experts; this one is trained. `high`: the one for high noise.",
    "model.other_adapter": "Folder of the other expert's adapter, used for sampling only.",
    "model.start": "A run, an adapter or a transformer folder from which training continues.",
    "model.merge": "Adapters that are merged into the base weights before training.",
    "model.merge.path": "A run, an adapter folder, or an adapter file.",
    "model.merge.scale": "Strength of the adapter. 1: as trained.",
    "data.clips": "Folder of the dataset, or a list of folders.",
    "data.split": "The split to train on.",
    "data.limit": "Use only this many clips of each folder, from the first on.",
    "data.make": "Recipes of `sim make` that film the clips if they are missing.",
    "data.frames": "Retime clips to this many frames. Give `frames`, `fps` and `size` together.",
    "data.fps": "Retime clips to this frame rate.",
    "data.size": "Crop and scale clips to (height, width).",
    "data.crop": "Which part of a picture of another shape is kept. `none`: leave out such videos.",
    "data.uncaptioned": "What to do with a video without a caption: leave it out, or use an empty caption.",
    "data.groups": "The clips that true clips are compared with (preference methods only).",
    "data.groups.losers": "Number of rejected clips in a group (m in the paper).",
    "data.groups.counterfactuals": "Use clips of the same scene that break a law as rejected clips.",
    "data.groups.samples": "Folders of samples, `<clip>-s<seed>.mp4`, used as rejected clips.",
    "data.groups.winner": "`true`: the true clip is preferred. `sample`: the sample with the best scores is.",
    "data.groups.samples_each": "Sample the base this many times for each clip. 0: use the samples in the folder.",
    "data.groups.sampler": "Sampler settings for these samples.",
    "data.groups.negative": "Negative prompt of these samples, used if guidance is above 1.",
    "data.groups.batch": "Number of clips that each process samples at once.",
    "data.groups.judge": "`simulator`: score the samples by the simulator's truth. Other judges: `posttrain score`.",
    "train.steps": "Optimiser steps.",
    "train.batch": "Clips in one optimiser step, over all processes and micro-batches.",
    "train.lr": "Learning rate.",
    "train.seed": "Seed of all random draws in training.",
    "train.accumulate": "Micro-batches in one step. Higher: less memory, same result.",
    "train.precision": "Precision of the computation (autocast). Weights keep their own precision.",
    "train.schedule": "Learning rate schedule.",
    "train.lr_end": "Learning rate at the end of the cosine schedule. Left out: 0.",
    "train.warmup": "Steps in which the learning rate rises from 0 to `lr`.",
    "train.betas": "Betas of AdamW.",
    "train.eps": "Epsilon of AdamW.",
    "train.weight_decay": "Weight decay of AdamW.",
    "train.clip": "Gradient clipping: the largest norm.",
    "train.ema": "Decay of the moving average of the weights. 0: no average.",
    "train.checkpoint_every": "Steps between checkpoints.",
    "train.block_checkpointing": "Recompute each transformer block in the backward pass: less memory, more time.",
    "train.trackers": "Trackers that also show the log: `tensorboard`, `wandb` or `trackio`.",
    "eval.benchmark": "The benchmark and its keys: `{name: pisa, grid: …, falls: …}`, see below.",
    "eval.clips": "Dataset folder of the test clips.",
    "eval.splits": "Splits that are measured.",
    "eval.every": "Training steps between validations, in which a few clips are sampled. 0: never.",
    "eval.seeds": "Samples of each clip.",
    "eval.limit": "Use only this many clips of each split, from the first on.",
    "eval.batch": "Clips sampled at once.",
    "eval.sampler": "Sampler settings. Left out: those of the model's authors.",
    "eval.tracker": "Network that follows the object: `pocket` (for 64 × 64 pixels), or a SAM 2 folder or hub id.",
    "benchmark.pisa.grid": "Dataset of `world: {name: grid}`: depths and heights in and outside the training range.",
    "benchmark.pisa.falls": "Dataset of `world: {name: ambiguous}`: tests the distribution of fall times, p(t \\| y).",
    "benchmark.pisa.falls.clips": "Folder of the ambiguous dataset.",
    "benchmark.pisa.falls.seeds": "Samples of each of its clips.",
    "tripwires.watch": "Rewards that are measured but not trained.",
    "tripwires.split": "Split of `eval.clips` that is sampled. Left out: the last of `eval.splits`.",
    "tripwires.clips": "Number of clips, from the first on; 12 or more.",
    "tripwires.tolerance": "Smallest change that trips a wire, as a share of the value at the first look.",
    "tripwires.on_trip": "`roll_back`: stop, and keep the weights of the best look. `warn`: print a line.",
    "*.sampler.steps": "Denoising steps.",
    "*.sampler.guidance": "Classifier-free guidance. 1: no guidance.",
    "*.sampler.guidance_low": "Guidance of the second expert (Wan2.2-A14B), if it differs.",
    "*.timesteps": "Distribution of the training timesteps.",
    "method.psft.drop_caption": "Probability that a clip is trained without its caption, which guidance needs.",
    "*.shift": "Shift of the timesteps. Above 1: more training near noise, where motion is decided.",
    "method.gdpo": "PhyGDPO: prefer true clips to rejected ones, see [PhyGDPO](phygdpo.md).",
    "method.oro": "ORO: maximise differentiable rewards of sampled clips, see [ORO](oro.md).",
    "method.psft": "PSFT: fine-tune on true clips with the rectified-flow loss, see [PSFT](psft.md).",
    "reward.depth": "Depth Anything's depth against the true depth.",
    "reward.flow": "RAFT's optical flow against the true flow.",
    "reward.object": "`segmentation` and `trajectory` together, with one pass of SAM 2.",
    "reward.segmentation": "SAM 2's soft masks against the true masks.",
    "reward.trajectory": "The centre of SAM 2's soft mask against the true centre.",
    "benchmark.pisa": "PISA's metrics and the scorecard, see [Measuring](measuring.md).",
    "physics.analytic": "Free fall and bounces in closed form, for balls that touch only the floor.",
    "physics.bullet": "Rigid bodies in PyBullet.",
    "method.oro.rewards": "The rewards to maximise, `[{name: object, weight: 1.0}, …]`.",
    "method.oro.sampler": "Left out: as `eval.sampler`.",
    "method.oro.grad": "Sampler steps with a gradient: `all`, `{last: 2}` or `{active: [0, 5, 11]}`.",
    "method.oro.frames": "Decode and reward only this many frames, from the first on. Left out: all.",
    "method.oro.recompute": "What the backward pass recomputes instead of storing: less memory, more time.",
    "method.oro.offload": "Keep the decoder's activations in main memory.",
    "method.gdpo.mode": "`pair`: one rejected clip, drawn (eq. 13). `sum`: all (eq. 8). `exact`: all (eq. 6).",
    "method.gdpo.beta_T": "β T: strength of the preference; the factor of the error differences in the loss.",
    "method.gdpo.loser_weight": "Weight of the rejected clips' errors. Below 1: DPO-Shift.",
    "method.gdpo.physics": "Constants of physics rewarding (eq. 9). `null`: α = γ = 1.",
    "method.gdpo.physics.alpha_min": "α_min of eq. 9.",
    "method.gdpo.physics.k_alpha": "k_α of eq. 9.",
    "method.gdpo.physics.b_alpha": "b_α of eq. 9.",
    "method.gdpo.physics.k_gamma": "k_γ of eq. 9.",
    "method.gdpo.physics.b_gamma": "b_γ of eq. 9.",
    "method.gdpo.physics.strength": "λ of eq. 9.",
    "method.gdpo.noise": "One noise for the whole group, or one for each clip in it.",
    "method.gdpo.weighting": "`bell`: weight errors by their timestep, as the released code does.",
    "method.gdpo.reference": "`lora`: the model with its adapter switched off. `full_copy`: a frozen copy.",
    "method.gdpo.cached_draws": "Fixed (timestep, noise) draws per group, each with one reference pass. 0: new draws.",
    "method.gdpo.backward": "`in_turn`: one backward pass per clip: the memory of one clip, one more forward pass.",
    "reward.*.weight": "Weight in the sum of rewards.",
    "reward.*.path": "Weights of the network: `pocket`, a folder, or a hub id.",
    "reward.flow.path": "Weights of RAFT: `pocket`, `raft_large`, `raft_small`, a folder, or a file.",
    "reward.flow.region": "`objects`: only pixels where the true clip has a body. `image`: all pixels.",
    "reward.object.distance": "Weight of the position (`trajectory`) relative to the shape (`segmentation`).",
    "pretraining.*.recolour": "Probability that bodies, or the whole picture, get other colours.",
    "pretraining.*.degrade": "Probability of noise and blur.",
    "pretraining.*.noise": "Largest standard deviation of the noise, for pixels in [-1, 1].",
    "pretraining.*.decoded": "Encode and decode a share of the clips with an autoencoder. Left out: none.",
    "*.decoded.path": "Model folder of that autoencoder; `pocket` is the embedded one.",
    "*.decoded.share": "Share of the clips that go through it.",
    "pretraining.*.bodies": "Extra weight of the bodies' pixels in the loss, added to 1.",
    "pretraining.depth_net.pictures": "Frames from each clip.",
    "pretraining.depth_net.difference": "Weight of the difference between neighbouring pixels in the loss.",
    "pretraining.flow_net.pairs": "Pairs of neighbouring frames from each clip.",
    "pretraining.flow_net.tries": "Number of pairs that are drawn; the one with the most motion is used.",
    "pretraining.flow_net.shifted": "Share of the pairs whose second frame is shifted.",
    "pretraining.flow_net.max_shift": "Largest shift along each axis, pixels.",
    "pretraining.segmenter.lengths": "Lengths of the training windows, frames. One is drawn for each step.",
    "pretraining.*.max_stride": "Largest stride in time between the frames of a window.",
    "pretraining.segmenter.min_pixels": "Smallest body that is followed, pixels in the window's first frame.",
    "pretraining.segmenter.tries": "Windows and bodies drawn from each clip; the one with the most motion is used.",
    "pretraining.segmenter.crowded": "Probability that the body that touches others most is used instead.",
    "pretraining.segmenter.teacher": "Probability that a step puts true masks into the memory, not predicted ones.",
    "pretraining.segmenter.twin": "Probability of a copy of the body elsewhere in the picture.",
    "pretraining.segmenter.bce": "Weight of the binary cross-entropy in the loss.",
    "pretraining.vae.pictures": "Number of first steps, which train on single frames.",
    "pretraining.vae.lengths": "Clip lengths, frames (4k + 1 for Wan). One is drawn for each step.",
    "pretraining.vae.weights": "Probabilities of these lengths.",
    "pretraining.vae.frames": "Frames per process in one step.",
    "pretraining.vae.flying": "Number of other clips whose bodies fly through each clip.",
    "pretraining.vae.max_speed": "Largest speed of these bodies, pixels per frame.",
    "pretraining.vae.object_weight": "Weight of the bodies' pixels in the loss.",
    "pretraining.vae.difference": "Weight of the differences between neighbouring pixels and frames in the loss.",
    "pretraining.vae.kl": "Weight of the KL divergence.",
    "out": "Folder of the dataset.",
    "splits": "Split name → number of scenes.",
    "seed": "Seed of all scenes.",
    "world": "The world and its keys, see below.",
    "physics": "The physics engine: `{name: bullet}` or `{name: analytic}`.",
    "renderer": "The renderer and its keys: `{name: gl, supersample: 2}` or `{name: tiny}`.",
    "renderer.*.supersample": "Colour samples per pixel, along each side.",
    "world.*.width": "Picture width, pixels.",
    "world.*.height": "Picture height, pixels.",
    "world.*.frames": "Frames of a clip. Wan needs 4k + 1.",
    "world.*.fps": "Frames per second.",
    "world.*.dropped": "Number of objects that fall.",
    "world.*.pile": "Number of objects that lie below each of them.",
    "world.*.drop": "Height of an object's lowest point above what is below it, m.",
    "world.*.size": "Longest side of an object, m.",
    "world.*.region": "Ground on which objects start: width and depth, m.",
    "world.*.camera_gap": "Distance from the camera to the region before it retreats, m.",
    "world.*.camera_height": "Height of the camera, m.",
    "world.*.camera_step": "Length of one retreat of the camera, m. It retreats until all objects are in view.",
    "world.*.target_pixels": "Size of the scored object in frame 0: square root of its bounding box's area, pixels.",
    "world.*.hidden": "Largest share of the scored object's box that another object's box may cover.",
    "world.*.texture": "Contrast of procedural patterns, 0 to 1.",
    "world.*.studio": "A backdrop of the floor's colour, without wall or horizon.",
    "world.*.contrast": "Smallest distance (sRGB) of the scored object's colour from floor and background.",
    "world.*.shapes": "Kinds of object, such as `ball`. Empty: all.",
    "world.*.density": "Density of objects, kg/m³.",
    "world.*.friction": "Friction of objects.",
    "world.*.restitution": "Restitution. A bounce on the floor keeps this times `floor_restitution` of the speed.",
    "world.*.floor_friction": "Friction of the floor.",
    "world.*.floor_restitution": "Restitution of the floor.",
    "world.*.sun": "Height of the sun above the horizon, degrees.",
    "world.*.gravity": "Gravity, m/s².",
    "world.*.depth": "Distance of the object from the camera, m.",
    "world.*.members": "Clips of one scene (one group).",
    "world.*.seen_depth": "Depths that count as inside the training range (`id` in the metadata), m.",
    "world.*.seen_height": "Heights that count as inside the training range, m.",
    "world.throw.speed": "Launch speed, m/s.",
    "world.throw.angle": "Launch angle above the horizontal, degrees.",
    "world.throw.horizontal": "Share of horizontal throws.",
    "world.ramp.rolls": "Share of scenes in which a ball rolls. In the others a box slides.",
    "world.ramp.slope": "Angle of the ramp, whole degrees.",
    "world.ramp.ramp": "Length of the ramp along the floor, m.",
    "world.pendulum.arm": "From the pivot to the ball's centre, m.",
    "world.pendulum.amplitude": "Angle from straight down at the release, degrees.",
    "world.collide.speed": "Speed of each ball, m/s.",
    "world.collide.gap": "Gap between the balls at time 0, m.",
    "world.collide.resting": "Share of scenes in which the second ball is at rest.",
    "world.topple.boxes": "Number of boxes.",
    "world.topple.margin": "Least distance of a centre of mass from the edge below it, as a share of a box's width.",
    "world.topple.stands": "Share of towers that stand. The others topple.",
    "world.*.violations": "Kind → values. Left out: all kinds, four values each, see [worlds](worlds.md).",
    "world.counterfactual.members": "Largest number of clips of one scene, including the true clip. Left out: all.",
    "world.*.bob": "Amplitude of hovering, m.",
    "world.*.drift": "Speed of drifting, m/s.",
    "world.*.spin": "Speed of spinning, rad/s.",
    "world.*.radius": "Radius of an orbit, m.",
    "world.*.period": "Time of one orbit, s.",
    "world.*.push": "Initial speed of objects that slide or roll, m/s.",
    "world.*.slide": "Distance that they take to stop, m.",
}
HEAD = """# Recipes

<!-- Written by docs/make_recipes.py from the code. Do not edit. -->

A recipe is one YAML file. It holds everything that a run depends on.

- An unknown key is refused, with the file, the line and the key that was probably meant.
- Every key can be changed on the command line: `.venv/bin/posttrain run RECIPE train.steps=20`.
- The resolved recipe, with these changes, is saved as `runs/<run>/recipe.yaml`.
- `{name: …}` chooses a module of the package that the section names. The other keys are keys of that module.

Two kinds of recipe exist: an experiment (`posttrain run`) and a dataset (`sim make`).
"""


def comments(model: type[BaseModel]) -> dict[str, str]:
    """The comment next to or above each field, by the field's name."""
    source = inspect.getsource(model)
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    told = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    code, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign):
            lines = [told[n] for n in range(node.lineno, (node.end_lineno or 0) + 1) if n in told]
            above = node.lineno - 1
            while not lines and above in told and code[above - 1].lstrip().startswith("#"):
                lines.insert(0, told[above])
                above -= 1
            found[ast.unparse(node.target)] = " ".join(lines)
    return found


def meaning(model: type[BaseModel], key: str) -> str:
    """The meaning of a dotted key; "" if there is none."""
    parts = key.split(".")
    for pattern in (key, *(f"*.{'.'.join(parts[n:])}" for n in range(1, len(parts))), f"{parts[0]}.*.{parts[-1]}"):
        if pattern in MEANINGS:
            return MEANINGS[pattern]
    for kind in model.__mro__:
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            if text := comments(kind).get(parts[-1]):
                return f"{text[0].upper()}{text[1:].rstrip('.')}."
    return ""


def values(annotation: Any) -> str:
    """The allowed values, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(values(part) for part in parts if part is not NoneType))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (tuple, list):
        inner = [part for part in parts if part is not Ellipsis]
        many = origin is list or Ellipsis in parts
        return f"list of {values(inner[0])}" if many else "[" + ", ".join(values(part) for part in inner) + "]"
    if origin is dict or annotation is Plugin or (inspect.isclass(annotation) and issubclass(annotation, BaseModel)):
        return "mapping"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[annotation]


def default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Plugin):
        return f"`{value.name}`"
    if isinstance(value, BaseModel):
        return "as below"
    if value in (None, (), ""):
        return "none"
    if isinstance(value, dict):
        return f"`{value['name']}`" if "name" in value else "all"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def inner(annotation: Any) -> type[BaseModel] | None:
    """The config that a key's value is, itself or as an item of a list."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict or any(get_origin(part) is Literal for part in get_args(annotation)):
        return None
    return next((found for part in get_args(annotation) if (found := inner(part))), None)


def rows(model: type[BaseModel], prefix: str, written: str = "", skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Table rows of a config and of the configs in it; `prefix` finds meanings, `written` stands in the recipe."""
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        key, shown = f"{prefix}{name}", f"{written}{name}"
        yield f"| `{shown}` | {values(field.annotation)} | {default(field)} | {meaning(model, key)} |"
        if nested := inner(field.annotation):
            yield from rows(nested, f"{key}.", f"{shown}.")


def table(model: type[BaseModel], prefix: str, written: str = "", skip: tuple[str, ...] = ()) -> str:
    lines = [*rows(model, prefix, written, skip)]
    if not lines:
        return "It has no keys of its own."
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *lines])


def named(package: str, prefix: str, written: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """A section for each plug-in of a package."""
    for name in plugins(package):
        module = resolve(package, name)
        first = MEANINGS.get(f"{prefix}.{name}") or (module.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        yield f"### `{{name: {name}}}`\n\n{first}\n\n{table(module.Config, f'{prefix}.{name}.', written, skip)}"


def parts(model: type[BaseModel]) -> dict[str, Any]:
    return {name: inner(field.annotation) for name, field in model.model_fields.items()}


def page() -> str:
    experiment, world = parts(Recipe), resolve("sim.worlds", "drop").Config
    top = [
        f"| `{name}` | {values(field.annotation)} | {default(field)} | {meaning(Recipe, name)} |"
        for name, field in Recipe.model_fields.items()
    ]
    usual = tuple(world.model_fields)
    sections = [
        HEAD,
        "## Experiments: `posttrain run`\n\n| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(top),
        "## `model`\n\n" + table(experiment["model"], "model.", "model."),
        "## `data`\n\n" + table(experiment["data"], "data.", "data."),
        "## `method`\n\nA file of `posttrain/methods/`: " + ", ".join(f"`{n}`" for n in plugins("methods")) + ".",
        *named("methods", "method", "method."),
        "## Rewards\n\nFiles of `posttrain/rewards/`, named in `method.rewards` and `tripwires.watch`.",
        *named("rewards", "reward", ""),
        "## `train`\n\n" + table(experiment["train"], "train.", "train."),
        "## `eval`\n\n" + table(experiment["eval"], "eval.", "eval."),
        "## `eval.benchmark`\n\nA file of `posttrain/evaluation/benchmarks/`.",
        *named("evaluation.benchmarks", "benchmark", "eval.benchmark."),
        "## `tripwires`\n\n" + table(experiment["tripwires"], "tripwires.", "tripwires."),
        "## `table`\n\n" + table(Table, "table.", "table."),
        "## Training the pocket's own parts\n\nFiles of `posttrain/pretraining/`, also named in `method`. "
        "You need them only to make the pocket model again.",
        *named("pretraining", "pretraining", "method."),
        "## Datasets: `sim make`\n\n" + table(Clips, ""),
        "## `world`\n\nA file of `sim/worlds/`. Ranges `[least, most]` are inclusive, and values are drawn from them "
        f"uniformly.\n\n### `{{name: drop}}`\n\n{table(world, 'world.drop.', 'world.')}",
        "The other worlds have these keys too, some with other defaults, and their own:",
        *(
            f"### `{{name: {name}}}`\n\n{table(config, f'world.{name}.', 'world.', same(config, world, usual))}"
            for name in plugins("sim.worlds")
            if name != "drop" and (config := resolve("sim.worlds", name).Config)
        ),
        "## `physics`",
        *named("sim.physics", "physics", "physics."),
        "## `renderer`",
        *named("sim.render", "renderer", "renderer."),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def same(config: type[BaseModel], usual: type[BaseModel], names: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that are as in another config."""
    return tuple(n for n in names if str(config.model_fields.get(n)) == str(usual.model_fields[n]))


if __name__ == "__main__":
    PAGE.write_text(page())
