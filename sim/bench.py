"""What a group of clips costs against its parts: one set-up, and a simulation, a render and a write for each member."""

import importlib
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import process_time

from posttrain.core.errors import UserError
from sim import counterfactual, dataset
from sim.physics import bullet


def bench(film: dataset.Film, groups: int = 10) -> str:
    """Median CPU seconds of `groups` groups and of their parts, and of the ratio of the two.

    Simulation, render and write are those of the true clip. The first group, which loads programs and meshes, does not
    count.

    Raises:
        UserError: the world has no groups.
    """
    if not isinstance(film.config, counterfactual.Config):
        raise UserError(f"world.name: {film.world} has no groups to time; choose counterfactual")
    renderer = importlib.import_module(f"sim.render.{film.renderer}")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(groups + 1):
            clock = [process_time()]
            dataset.make_and_write(Path(folder), film, "train", index)
            clock.append(process_time())
            rng, _, objects, backgrounds, seed = dataset.draw(film, "train", index)
            scene, true, violations = counterfactual.group(rng, film.config, objects, backgrounds, seed)
            clock.append(process_time())
            bullet.simulate(scene)
            clock.append(process_time())
            clip = renderer.render(scene, true, supersample=film.supersample)
            clock.append(process_time())
            dataset.write_take(Path(folder), film, "train", dataset.Take("alone", scene, true, clip, {}))
            clock.append(process_time())
            whole, setup, simulation, render, write = (b - a for a, b in pairwise(clock))
            members = 1 + len(violations)
            times = {
                f"a group of {members}": whole,
                "its set-up": setup,
                "a simulation": simulation,
                "a render": render,
                "a write": write,
                "(group - set-up) / (members x (simulation + render + write))": (whole - setup)
                / (members * (simulation + render + write)),
            }
            for name, seconds in times.items() if index else ():
                found.setdefault(name, []).append(seconds)
    return "\n".join(f"{median(values):8.4f}  {name}" for name, values in found.items())
