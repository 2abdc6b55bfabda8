"""Load the models that recipes and runs name, on this process's device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posttrain.commands.experiment import ADAPTER, RUNS, TRAINED, Recipe, resolved
from posttrain.core import distributed, files, recipe
from posttrain.core.errors import UserError
from posttrain.models.base import ModelConfig
from posttrain.training.checkpoints import start_fingerprint

CACHE = RUNS / "cache"
TRACKED = 64  # pixels that the sides of clips may have for the embedded tracker


@contextmanager
def memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a GPU out-of-memory error into a UserError; other errors are raised unchanged."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(" GPU ")[0]  # the rest is for who tunes the allocator
        raise UserError(f"{what}: the GPU's memory is full ({reason}); {remedy}", "memory") from error


@contextmanager
def base_model(plan: Recipe) -> Iterator[Any]:
    """The model that training started from; for `init: random`, the pretrained model, for comparison.

    An adapter that training continued stays an adapter, as in training: merged into low-precision weights it would be
    rounded.
    """
    config = resolved(plan.model).model_copy(update={"init": "pretrained", "other_adapter": None})
    if not (config.start and Path(config.start).is_file()):
        config = config.model_copy(update={"adapter": None})
    yield load_model(config)


@contextmanager
def tuned_model(plan: Recipe, folder: Path) -> Iterator[Any]:
    """The model with its saved weights, so that the measured weights are the exported ones."""
    model = load_model(plan.model)
    if files.read_object(folder / TRAINED)["model"] != start_fingerprint(model.module):
        name = f"model.path {plan.model.path}"
        raise UserError(
            f"{folder / ADAPTER}: was trained on other weights than {name} has now; train again with another run=...",
            "mismatch",
            "model.path",
        )
    model.restore(folder / ADAPTER)
    yield model


def load_model(config: ModelConfig) -> Any:
    """The model, or the network from nets/, that a recipe names, on this process's device."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # one per part of a model
    return recipe.resolve(("models", "nets"), config.family).load(resolved(config), device())


def load_tracker(path: str = "pocket") -> Any:
    """The tracker for measuring: the embedded one, a folder with one like it, or a SAM 2 in a folder or on the hub."""
    config = Path(path) / "config.json"
    ours = path == "pocket" or (config.exists() and "widths" in files.read_object(config))
    return load_model(ModelConfig(family="tracker" if ours else "sam2", path=path))


def device() -> torch.device:
    return distributed.process().device


def main_process() -> bool:
    return distributed.process().is_main_process


def wait() -> None:
    distributed.process().wait_for_everyone()
