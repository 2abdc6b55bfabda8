"""Write a dataset folder that Hugging Face `videofolder` reads: parallel, resumable, every file complete or absent.

    <out>/recipe.json                the settings of the clips; a recipe with other settings is refused
    <out>/<split>/metadata.jsonl     a row per clip, written when the split is complete
    <out>/<split>/<id>.mp4, .npz     lossless RGB, and the annotations
    <out>/.rows/<split>/<id>.json    the rows of a scene's clips, with a digest; written after the clips

Scene i of a split is a function of (seed, split, i) alone, so any process can make it at any time. If a world's labels
name a `group`, the clips of scene 3 are 00003-0, 00003-1 and so on (worlds/ambiguous.py; worlds/counterfactual.py, with
the true clip first).
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.console import Console

from posttrain.core.codec import lossless
from posttrain.core.errors import UserError
from posttrain.core.files import (
    alone,
    read_object,
    read_sealed,
    sha256,
    sweep,
    write_bytes,
    write_json,
    write_jsonl,
    write_sealed,
    write_text,
)
from posttrain.core.progress import track
from posttrain.core.recipe import Plugin, PluginFrom, Seed, Strict, flat
from sim.assets import library, surfaces
from sim.worlds.base import Draw, Take

HALF = float(np.finfo(np.float16).max)

CARD = """Clips of a simulated world, made by `python -m sim make` from the recipe in recipe.json.

Each row of `metadata.jsonl` names a lossless video and, beside it, an .npz with `instances` (0 background, i + 1 body
i), `depth` (metres along the optical axis), `flow` (pixels, x right and y down, to the next frame), `positions`
(metres, z up) and `quaternions` (w first) of all bodies at all frames. Units are SI; contacts name bodies by index, -1
is the floor. `distance` is that of the target from the camera along its axis in frame 0.

Clips of one `group` share their scene and first frame. `violation` is null for the true clip; else it says which law
the clip breaks (`kind`), by how much (`value`, `meaning`), how wrong that is (`severity`: mean distance of the bodies
from the truth, as a share of that of the clip in which nothing moves) and in which share of the frames the target is
`seen`. `drop_height` and `gravity` are the true ones, `contact_time` and `contacts` are the clip's own.
"""
VERSION = "3"  # of the generator; increased when the same recipe gives other bytes


class Job(Strict):
    """The settings of clips: a world, a physics engine, a renderer, and a seed."""

    world: Annotated[Plugin, PluginFrom("sim.worlds")]
    physics: Annotated[Plugin, PluginFrom("sim.physics")] = Field({"name": "bullet"}, validate_default=True)
    renderer: Annotated[Plugin, PluginFrom("sim.render")] = Field({"name": "gl"}, validate_default=True)
    seed: Seed = 0

    def describe(self) -> dict[str, Any]:
        """The content of recipe.json without the splits."""
        return {"generator": VERSION, **self.model_dump(mode="json", include=set(Job.model_fields))}


def write(
    out: Path | str, job: Job, splits: dict[str, int], workers: int | None = None, console: Console | None = None
) -> None:
    """Film the clips that are missing in `out`, with `workers` processes (default: one per core).

    `splits`: number of scenes by split.

    Raises:
        UserError: the folder has clips of another recipe, or cannot be written; another process writes there; or a
            worker was killed.
        KeyboardInterrupt: finished clips stay, and the next call continues.
    """
    out, console = Path(out), console or Console(stderr=True, highlight=False, soft_wrap=True)
    wanted = [(split, i) for split, count in splits.items() for i in range(count)]
    if out.is_dir() and not os.access(out, os.W_OK):  # such as a read-only disk; fine if all clips are there
        _kept(out, job, splits)
        listed = all((out / split / "metadata.jsonl").is_file() for split in splits)
        if listed and all(finished(out, *scene) for scene in wanted):
            console.print(
                f"{out}: complete, {len(wanted)} scenes (the folder is not writable, but nothing needs to be written)"
            )
            return
    with alone(out, "makes clips", "out"):
        _claim(out, job, splits)
        sweep(out, deep=True)
        done = {scene for scene in wanted if finished(out, *scene)}
        missing = [scene for scene in wanted if scene not in done]
        if done:
            console.print(f"{out}: {len(done)} of {len(wanted)} scenes exist already")
        if missing:
            _run(out, job, missing, min(workers or os.cpu_count() or 1, len(missing)))
        made = {}
        for split, count in splits.items():
            rows = [row for i in range(count) for row in read_sealed(_row(out, split, i))["clips"]]
            write_jsonl(out / split / "metadata.jsonl", rows)
            made[split] = len(rows)
    console.print(f"{out}: complete, {', '.join(f'{split} {count}' for split, count in made.items())}")


def draw(job: Job, split: str, index: int) -> Draw:
    """The random numbers and assets of scene `index` of `split`.

    Splits whose name ends in "unseen" use the test assets, splits that end in "validation" the validation assets, and
    all others the train assets.
    """
    rng = np.random.default_rng([job.seed, zlib.crc32(split.encode()), index])
    if split.endswith("validation"):
        return Draw(rng, library.validation_ids(), surfaces.validation_ids(), index)
    unseen = split.endswith("unseen")
    objects, backgrounds = (library.split(ids)[unseen] for ids in (library.object_ids(), surfaces.background_ids()))
    return Draw(rng, objects, backgrounds, index)


def takes(job: Job, split: str, index: int) -> Iterator[Take]:
    """The clips of scene `index` of `split`: one, or all of its group."""
    simulate = partial(job.physics.module.simulate, config=job.physics.config)
    render = partial(job.renderer.module.render, config=job.renderer.config)
    yield from job.world.module.takes(draw(job, split, index), job.world.config, simulate, render)


def finished(out: Path, split: str, index: int) -> bool:
    """Whether the scene's clips exist and match the digests in their rows, and the rows match their own digest."""
    try:
        files = ("file_name", "sha256"), ("annotations", "annotations_sha256")
        rows = read_sealed(_row(out, split, index))["clips"]
        return bool(rows) and all(
            sha256(out / split / row[name]) == row[digest] for row in rows for name, digest in files
        )
    except (OSError, UserError, KeyError, TypeError):
        return False


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of an .npz for np.load; without time stamps, so equal arrays give equal bytes. zlib level 1."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


def describe(job: Job, split: str, name: str, take: Take) -> dict[str, Any]:
    """A clip's row of metadata.jsonl, without the files' digests; `name` is the file name without suffix."""
    scene, trajectory = take.scene, take.trajectory
    camera, target = scene.camera, scene.target
    touched = next((c.time for c in trajectory.contacts if target in (c.a, c.b)), None)
    focal = camera.focal / camera.sensor * camera.width
    return {
        "file_name": f"{name}.mp4",
        "caption": scene.caption,
        "fps": scene.fps,
        "frames": scene.frames,
        "size": [camera.height, camera.width],
        "seed": job.seed,
        "annotations": f"{name}.npz",
        "camera": {
            "position": camera.position,
            "focal": camera.focal,
            "sensor": camera.sensor,
            "intrinsics": [[focal, 0.0, camera.width / 2], [0.0, focal, camera.height / 2], [0.0, 0.0, 1.0]],
        },
        "gravity": scene.gravity,
        "bodies": [
            {k: v for k, v in asdict(body).items() if k not in ("position", "orientation", "material", "velocity")}
            for body in scene.bodies
        ],
        "target": target,
        "distance": float(trajectory.positions_TN3[0, target, 1]) - camera.position[1],
        "motion": take.motion,
        "drop_height": None if touched is None else abs(scene.gravity[2]) * touched**2 / 2,
        "contact_time": touched,
        "contacts": [{"time": c.time, "pair": [c.a, c.b], "impulse": c.impulse} for c in trajectory.contacts],
        "background": scene.background.id,
        "split": split,
        "generator": VERSION,
        **take.labels,
    }


def _row(out: Path, split: str, index: int) -> Path:
    return out / ".rows" / split / f"{index:05d}.json"


def make_and_write(out: Path, job: Job, split: str, index: int) -> None:
    """Write all clips of a scene, then their rows."""
    rows = []
    for member, take in enumerate(takes(job, split, index)):
        name = f"{index:05d}-{member}" if "group" in take.labels else f"{index:05d}"
        rows.append(write_take(out, job, split, name, take))
    write_sealed(_row(out, split, index), {"clips": rows}, flush=False)


def write_take(out: Path, job: Job, split: str, name: str, take: Take) -> dict[str, Any]:
    """Write a clip's two files; returns its row."""
    row = describe(job, split, name, take)
    video = lossless(take.clip.rgb, take.scene.fps)
    annotations = pack(
        {
            "instances": take.clip.instances,
            "depth": take.clip.depth.astype(np.float32),
            "flow": take.clip.flow.clip(-HALF, HALF).astype(np.float16),  # flow close to the camera is unbounded
            "positions": take.trajectory.positions_TN3,
            "quaternions": take.trajectory.quaternions_TN4,
        }
    )
    write_bytes(out / split / row["file_name"], video, flush=False)
    write_bytes(out / split / row["annotations"], annotations, flush=False)
    return row | {"sha256": _digest(video), "annotations_sha256": _digest(annotations)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _begin() -> None:
    """Make a worker end when its parent ends for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _run(out: Path, job: Job, scenes: list[tuple[str, int]], workers: int) -> None:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        with _for_workers():
            futures = [pool.submit(make_and_write, out, job, *scene) for scene in scenes]
        for future in track(as_completed(futures), f"{out}: {job.world.name}", len(scenes)):
            future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{out}: a worker was killed, perhaps for lack of memory; start again with fewer --workers",
            "internal",
            "--workers",
        ) from error
    except BaseException:  # a signal or a worker's error; workers may end at once, as files are complete or absent
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _for_workers() -> Iterator[None]:
    """Context in which new workers have one thread for BLAS and Mesa, and ignore Ctrl-C, which the parent handles."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _claim(out: Path, job: Job, splits: dict[str, int]) -> None:
    """Write recipe.json and README.md, or refuse a folder with clips of another recipe or with more scenes."""
    kept = _kept(out, job, splits)
    write_json(out / "recipe.json", job.describe() | {"splits": kept | splits})
    write_text(out / "README.md", card(kept | splits))


def _kept(out: Path, job: Job, splits: dict[str, int]) -> dict[str, int]:
    """The number of scenes of each split in the folder, by its recipe.json. Raises UserError as `_claim`."""
    path, mine = out / "recipe.json", job.describe()
    kept: dict[str, int] = {}
    if path.exists():
        theirs = read_object(path)
        kept = theirs.pop("splits", None)
        if not isinstance(kept, dict) or not all(type(count) is int for count in kept.values()):
            raise UserError(
                f"{path}: splits: should be a mapping of names to numbers; remove {out} and film again", "damaged"
            )
        here, there = flat(mine), flat(theirs)
        differ = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
        if differ:
            what = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differ[:3])
            raise UserError(
                f"{out}: holds clips of another recipe ({what}); choose another `out` or remove the folder",
                "other_run",
                "out",
            )
    for split, count in kept.items():
        if splits.get(split, count) < count:
            raise UserError(
                f"{out}: splits.{split} is {count} there, {splits[split]} here; ask for {count} or more",
                "other_run",
                f"splits.{split}",
            )
    return kept


def card(splits: dict[str, int]) -> str:
    """A dataset card, from which `datasets.load_dataset(folder)` reads the splits' names."""
    files = "\n".join(f"  - split: {split}\n    path: {split}/*" for split in splits)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n{CARD}"
