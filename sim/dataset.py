"""Clips to a dataset folder that Hugging Face `videofolder` reads: parallel, resumable, every file whole or absent.

    <out>/recipe.json                what the clips are made of; another recipe in the same folder is refused
    <out>/<split>/metadata.jsonl     a row per clip, written when the split is complete
    <out>/<split>/<id>.mp4, .npz     lossless RGB, and the annotations
    <out>/.rows/<split>/<id>.json    the rows of a scene's clips; written last, so it says that they are complete

Scene i of a split is a function of (seed, split, i) alone, so it does not matter who makes it, or when. A world with
`takes` films its scenes itself and tells more in their rows. Where they tell a `group`, the clips of scene 3 are
00003-0, 00003-1 and so on (sim/counterfactual.py, the true one first; sim/ambiguous.py).
"""

import fcntl
import hashlib
import importlib
import io
import json
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
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import av
import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from posttrain.core.errors import UserError
from posttrain.core.files import explain, read_json, sha256, sweep, write_bytes, write_json, write_jsonl, write_text
from posttrain.core.recipe import flat
from sim import assets
from sim.scene import Clip, Scene, Shoot, Trajectory

HALF = float(np.finfo(np.float16).max)

CARD = """Clips of a simulated world, made by `python -m sim make` from the recipe in recipe.json.

Each row of `metadata.jsonl` names a lossless video and, beside it, an .npz with `instances` (0 background, i + 1 body
i), `depth` (metres along the optical axis), `flow` (pixels, x right and y down, to the next frame), `positions`
(metres, z up) and `quaternions` (w first) of all bodies at all frames. Units are SI; contacts name bodies by index, -1
is the floor. `distance` is that of the target from the camera along its axis in frame 0.

Clips of one `group` share their scene and first picture. `violation` tells which law a clip breaks (`kind`), by how
much (`value`, `meaning`), how wrong that is (`severity`: mean distance of the bodies from the truth, as a share of that
of the clip in which nothing moves) and in which share of the frames the target is `seen`; null: the true clip.
`drop_height` and `gravity` are the true ones, `contact_time` and `contacts` are the clip's own.
"""
VERSION = "1"  # of the generator: another one means other bytes for the same recipe


@dataclass(frozen=True)
class Film:
    """How clips are made. `world` and `renderer` name files in sim/ and sim/render/; `config` is the world's Config."""

    world: str
    config: BaseModel
    renderer: str = "gl"
    supersample: int = 2
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        world = {"name": self.world, **self.config.model_dump(mode="json")}
        return {
            "generator": VERSION,
            "seed": self.seed,
            "renderer": {"name": self.renderer, "supersample": self.supersample},
            "world": world,
        }


def write(
    out: Path | str, film: Film, splits: dict[str, int], workers: int | None = None, console: Console | None = None
) -> None:
    """Make the clips that are missing below `out`, on `workers` processes (default: one per core).

    Raises:
        UserError: another recipe's clips lie there, another process writes there, or the disk refuses.
        KeyboardInterrupt: finished clips stay, and the next call continues.
    """
    out, console = Path(out), console or Console(stderr=True, highlight=False, soft_wrap=True)
    with explain(out):
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _claim(out, film, splits)
        _sweep(out, splits)
        wanted = [(split, i) for split, count in splits.items() for i in range(count)]
        done = {job for job in wanted if finished(out, *job)}
        missing = [job for job in wanted if job not in done]
        if done:
            console.print(f"{out}: {len(done)} of {len(wanted)} scenes are there already")
        if missing:
            _run(out, film, missing, min(workers or os.cpu_count() or 1, len(missing)), console)
        made = {}
        for split, count in splits.items():
            rows = [row for i in range(count) for row in read_json(_row(out, split, i))]
            write_jsonl(out / split / "metadata.jsonl", rows)
            made[split] = len(rows)
    console.print(f"{out}: complete, {', '.join(f'{split} {count}' for split, count in made.items())}")


@dataclass(frozen=True)
class Take:
    """A clip and what it is of; `id` names its files, `more` is what its row tells beside the usual."""

    id: str
    scene: Scene
    trajectory: Trajectory
    clip: Clip
    more: dict[str, Any]


def draw(film: Film, split: str, index: int) -> tuple[np.random.Generator, BaseModel, list[str], list[str], int]:
    """What a world makes scene `index` of `split` from: draws, config, objects, backgrounds, the scene's number.

    Splits whose name ends in "unseen" use the test assets, all others the train assets.
    """
    rng = np.random.default_rng([film.seed, zlib.crc32(split.encode()), index])
    unseen = split.endswith("unseen")
    objects, backgrounds = (assets.split(ids)[unseen] for ids in (assets.object_ids(), assets.background_ids()))
    return rng, film.config, objects, backgrounds, index


def takes(film: Film, split: str, index: int) -> Iterator[Take]:
    """The clips of scene `index` of `split`: one, or of a world with groups all of its group."""
    module = importlib.import_module(f"sim.{film.world}")
    renderer = importlib.import_module(f"sim.render.{film.renderer}")
    shoot: Shoot = partial(renderer.render, supersample=film.supersample)
    lot = draw(film, split, index)
    if not hasattr(module, "takes"):
        scene, trajectory = module.make(*lot)
        yield Take(f"{index:05d}", scene, trajectory, shoot(scene, trajectory), {})
        return
    for member, take in enumerate(module.takes(*lot, shoot)):
        scene, trajectory, clip, more = take
        name = f"{index:05d}-{member}" if "group" in more else f"{index:05d}"
        yield Take(name, scene, trajectory, clip, more)


def make(film: Film, split: str, index: int) -> tuple[Scene, Trajectory, Clip]:
    """The clip of scene `index` of `split`, of a group the first one."""
    take = next(takes(film, split, index))
    return take.scene, take.trajectory, take.clip


def finished(out: Path, split: str, index: int) -> bool:
    """Whether the scene's clips lie there with the bytes their rows promise."""
    try:
        files = ("file_name", "sha256"), ("annotations", "annotations_sha256")
        rows = json.loads(_row(out, split, index).read_text())
        return bool(rows) and all(
            sha256(out / split / row[name]) == row[digest] for row in rows for name, digest in files
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def encode(rgb_THW3: np.ndarray, fps: float) -> bytes:
    """uint8 frames as an H.264 RGB mp4 without loss (High 4:4:4 Predictive, qp 0); same frames, same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = rgb_THW3.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.options = {"crf": "0", "preset": "veryfast"}
        stream.thread_count = 1
        for picture in rgb_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """An .npz that np.load reads, with the fastest zlib level and no clock in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue(), zipfile.ZIP_DEFLATED, 1)
    return buffer.getvalue()


def describe(film: Film, split: str, name: str, scene: Scene, trajectory: Trajectory) -> dict[str, Any]:
    """A row of metadata.jsonl, but for the files' digests; `name` is that of the clip."""
    camera, target = scene.camera, scene.target
    touched = next((c.time for c in trajectory.contacts if target in (c.a, c.b)), None)
    focal = camera.focal / camera.sensor * camera.width
    return {
        "file_name": f"{name}.mp4",
        "caption": scene.caption,
        "fps": scene.fps,
        "frames": scene.frames,
        "size": [camera.height, camera.width],
        "seed": film.seed,
        "annotations": f"{name}.npz",
        "camera": {
            "position": camera.position,
            "focal": camera.focal,
            "sensor": camera.sensor,
            "intrinsics": [[focal, 0.0, camera.width / 2], [0.0, focal, camera.height / 2], [0.0, 0.0, 1.0]],
        },
        "gravity": scene.gravity,
        "bodies": [
            {k: v for k, v in asdict(body).items() if k not in ("position", "orientation", "material")}
            for body in scene.bodies
        ],
        "target": target,
        "distance": float(trajectory.positions_TN3[0, target, 1]) - camera.position[1],
        "motion": importlib.import_module(f"sim.{film.world}").label(scene),
        "drop_height": None if touched is None else abs(scene.gravity[2]) * touched**2 / 2,
        "contact_time": touched,
        "contacts": [{"time": c.time, "pair": [c.a, c.b], "impulse": c.impulse} for c in trajectory.contacts],
        "background": scene.background.id,
        "split": split,
        "generator": VERSION,
    }


def _row(out: Path, split: str, index: int) -> Path:
    return out / ".rows" / split / f"{index:05d}.json"


def make_and_write(out: Path, film: Film, split: str, index: int) -> None:
    """All clips of a scene, and then their rows."""
    rows = [write_take(out, film, split, take) for take in takes(film, split, index)]
    write_json(_row(out, split, index), rows, flush=False)


def write_take(out: Path, film: Film, split: str, take: Take) -> dict[str, Any]:
    """Write a clip's two files; returns its row."""
    row = describe(film, split, take.id, take.scene, take.trajectory) | take.more
    video = encode(take.clip.rgb, take.scene.fps)
    annotations = pack(
        {
            "instances": take.clip.instances,
            "depth": take.clip.depth.astype(np.float32),
            "flow": take.clip.flow.clip(-HALF, HALF).astype(np.float16),  # what passes the camera moves without bound
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
    """A worker leaves when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _run(out: Path, film: Film, jobs: list[tuple[str, int]], workers: int, console: Console) -> None:
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        with _for_workers():
            futures = [pool.submit(make_and_write, out, film, *job) for job in jobs]
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{out}: {film.world}", total=len(jobs))
            for future in as_completed(futures):
                future.result()
                progress.advance(task)
    except BrokenProcessPool as error:
        raise UserError(f"{out}: a worker was killed, perhaps for memory; start again, with fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _for_workers() -> Iterator[None]:
    """What workers inherit when they start: one thread each for BLAS and Mesa, and Ctrl-C left to their parent."""
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


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with explain(out), open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process makes clips here; wait for it or choose another folder") from error
        yield


def _claim(out: Path, film: Film, splits: dict[str, int]) -> None:
    """Refuse a folder whose clips were made by another recipe, or are more than this one wants."""
    path, mine = out / "recipe.json", film.describe()
    kept: dict[str, int] = {}
    if path.exists():
        theirs = read_json(path)
        kept = theirs.pop("splits")
        here, there = flat(mine), flat(theirs)
        differ = [key for key in sorted(here | there) if here.get(key) != there.get(key)]
        if differ:
            told = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differ[:3])
            raise UserError(f"{out}: holds clips of another recipe ({told}); choose another `out` or remove the folder")
    for split, count in kept.items():
        if splits.get(split, count) < count:
            raise UserError(f"{out}: splits.{split} is {count} there, {splits[split]} here; ask for {count} or more")
    write_json(path, mine | {"splits": kept | splits})
    write_text(out / "README.md", card(kept | splits))


def card(splits: dict[str, int]) -> str:
    """A dataset card, from which `datasets.load_dataset(folder)` learns the splits' names."""
    files = "\n".join(f"  - split: {split}\n    path: {split}/*" for split in splits)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n{CARD}"


def _sweep(out: Path, splits: dict[str, int]) -> None:
    """Remove what a killed process left half-written."""
    for folder in [out, *(out / split for split in splits), *(out / ".rows" / split for split in splits)]:
        sweep(folder)
