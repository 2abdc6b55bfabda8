"""Time a group of clips and its parts: one set-up, and a simulation, a render and a write per member."""

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time

from posttrain.core.errors import UserError
from sim import dataset
from sim.worlds import counterfactual
from sim.worlds.base import Take


def bench(job: dataset.Job, groups: int = 10) -> str:
    """Lines of median CPU seconds over `groups` groups: a group, its parts, and the ratio of group and parts.

    Simulation, render and write are measured on the true clip. One more group is made first and not counted, because
    it loads programs and meshes.

    Raises:
        UserError: the world has no groups.
    """
    if not isinstance(job.world.config, counterfactual.Config):
        raise UserError(
            f"world.name: {job.world.name} has no groups to time; choose counterfactual", "value", "world.name"
        )
    simulate = partial(job.physics.module.simulate, config=job.physics.config)
    render = partial(job.renderer.module.render, config=job.renderer.config)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(groups + 1):
            clock = [process_time()]
            dataset.make_and_write(Path(folder), job, "train", index)
            clock.append(process_time())
            draw = dataset.draw(job, "train", index)
            scene, true, violations = counterfactual.group(draw, job.world.config, simulate)
            clock.append(process_time())
            simulate(scene)
            clock.append(process_time())
            clip = render(scene, true)
            clock.append(process_time())
            dataset.write_take(Path(folder), job, "train", "alone", Take(scene, true, clip))
            clock.append(process_time())
            whole, setup, simulating, rendering, writing = (b - a for a, b in pairwise(clock))
            members = 1 + len(violations)
            times = {
                f"a group of {members}": whole,
                "its set-up": setup,
                "a simulation": simulating,
                "a render": rendering,
                "a write": writing,
                "(group - set-up) / (members x (simulation + render + write))": (whole - setup)
                / (members * (simulating + rendering + writing)),
            }
            for name, time in times.items() if index else ():
                seconds.setdefault(name, []).append(time)
    return "\n".join(f"{median(values):8.4f}  {name}" for name, values in seconds.items())
