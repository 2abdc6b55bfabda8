"""Real processes that start fast: forked from a server which has imported the heavy libraries once."""

import multiprocessing
from collections.abc import Callable
from typing import Any

HEAVY = (
    "accelerate",
    "peft",
    "diffusers.training_utils",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "transformers.models.umt5.modeling_umt5",
)


def launch(target: Callable[..., None], *arguments: Any) -> Any:
    """A started process that runs `target(*arguments)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    process = context.Process(target=target, args=arguments)
    process.start()
    return process
