"""Packages of `./setup.sh extras`. A test that needs one is skipped if it is not installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: ./setup.sh extras")


def events(folder: Path) -> Any:
    """The events in a folder, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()
