"""Packages of `./setup.sh extras`: tests that need one are skipped without it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: ./setup.sh extras")


def events(folder: Path) -> Any:
    """What TensorBoard reads of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()
