"""What all tests share: no network, and GPU tests only where there is a GPU."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: a test that reaches for the hub fails at once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
