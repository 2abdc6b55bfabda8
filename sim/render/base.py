"""The protocol of renderers, the modules of this package that a recipe names in `renderer:`.

A renderer has a `Config` and `render(scene, trajectory, config)`, see `Render`. The laws that every renderer must
obey are in tests/helpers/sim_laws.py.
"""

from collections.abc import Callable

from posttrain.core.errors import UserError
from sim.scene import Clip, Scene, Trajectory

PROTOCOL = ("Config", "render")
MOST = 255  # bodies that a uint8 mask can number
Render = Callable[[Scene, Trajectory], Clip]  # a renderer with its config


def check(scene: Scene) -> None:
    """Raise UserError if the scene has more bodies than a uint8 mask can number."""
    if len(scene.bodies) > MOST:
        raise UserError(
            f"scene {scene.seed}: {len(scene.bodies)} bodies, but a mask numbers at most {MOST}; take fewer",
            "unsupported",
        )
