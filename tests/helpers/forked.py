"""Real processes that start fast: they are forked from a server that has imported the large libraries once."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
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


def two_ranks() -> list[dict[str, str]]:
    """The environment variables that torchrun gives to each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{name: str(value) for name, value in (common | {"RANK": n, "LOCAL_RANK": n}).items()} for n in range(2)]


def together(folder: Path, ranks: Sequence[dict[str, str]], target: Callable[..., None], *arguments: Any) -> str:
    """Run `target(*arguments)` in `folder`, in one process per item of `ranks` (its environment variables).

    Returns:
        What the processes printed. All must exit with 0.
    """
    outputs = [folder / f"output-{number}" for number in range(len(ranks))]
    processes = [
        launch(_rank, folder, output, more, target, arguments) for output, more in zip(outputs, ranks, strict=True)
    ]
    for process in processes:
        process.join()
    said = "".join(output.read_text() for output in outputs)
    assert [process.exitcode for process in processes] == [0] * len(ranks), said
    return said


def _rank(
    folder: Path, output: Path, variables: dict[str, str], target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.chdir(folder)
    os.environ |= variables
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(opened, stream.fileno())
    target(*arguments)
