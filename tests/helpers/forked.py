"""Real processes that start at once: they are forked from a server, which is a fork of this process.

conftest.py starts the server when all tests are imported and none has run: PyTorch's threads do not survive a fork.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HEAVY = (  # what nearly all processes need, if a test has not imported it
    "accelerate",
    "peft",
    "diffusers.training_utils",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "posttrain.api",
    "posttrain.models.wan.loading",
    "scipy.stats",
)

_requests: Connection


class Process:
    """A process that the server started; `exitcode` is None until it ended, and -signal if a signal ended it."""

    def __init__(self, pid: int, end: Connection) -> None:
        self.pid, self._end, self._exitcode = pid, end, None

    @property
    def exitcode(self) -> int | None:
        self.join(0)
        return self._exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, seconds: float | None = None) -> None:
        if self._exitcode is None and self._end.poll(seconds):
            self._exitcode = self._end.recv()

    def kill(self) -> None:
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def start_server() -> None:
    """Fork this process into a server, which ends with it."""
    global _requests
    theirs, _requests = multiprocessing.Pipe(duplex=False)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.fork():
        theirs.close()
        return
    try:
        _requests.close()
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ended ones need not be waited for
        while True:
            request = theirs.recv()
            for name in HEAVY:  # once, before the first process
                importlib.import_module(name)
            gc.freeze()
            if not os.fork():
                _watch(*request)
                break
    except (EOFError, KeyboardInterrupt):
        pass
    finally:
        os._exit(0)


def _watch(answers: Connection, target: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Run what was asked for in a process, and send its number, and its exit code when it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    answers.send(process.pid)
    process.join()
    answers.send(process.exitcode)


def launch(target: Callable[..., None], *arguments: Any) -> Process:
    """A started process that runs `target(*arguments)`."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    _requests.send((theirs, target, arguments))
    process = Process(ours.recv(), ours)
    theirs.close()
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
