"""What all tests share: no network, slow files first, GPU tests only where there is a GPU, and a tiny Wan."""

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import forked

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: a test that reaches for the hub fails at once


if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core for each process of pytest-xdist: FFmpeg's and OpenGL's short threads need not wait for the other process.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_configure() -> None:
    """Leave the garbage collector off while tests are imported.

    The libraries make half a million lasting objects. The collector would walk through them again and again, which
    takes as long as the imports.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    forked.start_server()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no process waits long for another in the end.

    Skip what is marked `gpu` on a machine without one.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Wan of helpers/tiny.py, to be read: a test that changes it takes a copy."""
    from helpers.tiny import wan_folder  # here, as the simulator's tests need no such heavy libraries

    return wan_folder(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="module")
def wan(folder: Path) -> Any:
    """It, loaded once for the tests of a file."""
    from posttrain.models.base import ModelConfig
    from posttrain.models.wan.loading import load

    return load(ModelConfig(path=str(folder)))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA of helpers/llava.py."""
    from helpers.llava import llava_folder

    return llava_folder(tmp_path_factory.mktemp("judges") / "llava")


@pytest.fixture(scope="module")
def port(llava: Path) -> Iterator[int]:
    """That of a server of it, helpers/vlm_server.py, in a process of its own."""
    from helpers import vlm_server

    here, there = multiprocessing.Pipe()
    server = forked.launch(vlm_server.serve, llava, there)
    there.close()
    yield here.recv()
    server.kill()
    server.join()
