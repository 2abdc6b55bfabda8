"""Post-training that makes pretrained video models obey physics.

    import posttrain as pt
    recipe = pt.load_recipe("recipes/pocket/psft.yaml", "train.steps=200")
    pt.train(recipe)
    rows = pt.evaluate(recipe)

docs/python.md lists the functions. They are in posttrain/api.py, which is imported when one is first used, because this
takes seconds.
"""

from typing import TYPE_CHECKING, Any

from posttrain import _torchvision as _torchvision  # before anything looks for torchvision
from posttrain.core.errors import UserError

if TYPE_CHECKING:
    from posttrain.api import (
        RECIPES,
        Recipe,
        evaluate,
        evaluate_videos,
        export,
        groups,
        load_recipe,
        read_video,
        report,
        run,
        sample,
        score,
        train,
    )

__all__ = [
    "RECIPES",
    "Recipe",
    "UserError",
    "evaluate",
    "evaluate_videos",
    "export",
    "groups",
    "load_recipe",
    "read_video",
    "report",
    "run",
    "sample",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import posttrain/api.py when one of its functions is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    from posttrain import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
