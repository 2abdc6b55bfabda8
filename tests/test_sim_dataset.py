"""A dataset folder is whole, the same however it was made, and never mixes what must stay apart."""

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.worlds import SMALL
from PIL import Image

from posttrain.core.errors import UserError
from posttrain.core.files import alone
from sim import cli, dataset
from sim.assets import library, surfaces
from sim.physics import bullet
from sim.render import gl
from sim.worlds.base import Draw, Take

ROOT = Path(__file__).parent.parent
WORLD = {**SMALL, "region": [0.5, 0.5]}
RECIPE = """
out: {out}
world: {world}
renderer: {{name: gl, supersample: 1}}
splits: {{train: {train}, test_unseen: 2}}
"""
GL = {"name": "gl", "supersample": 1}
JOB = dataset.Job(world=WORLD, renderer=GL)


def recipe(folder: Path, train: int = 10) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "clips", world=json.dumps(WORLD), train=train))
    return path


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sim", "make", str(path), "--workers", "1"]
    # a shell's background job ignores SIGINT, and its children would too
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def files(folder: Path) -> dict[str, str]:
    """Digests of all files below `folder`, but for the lock."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed dataset of 10 + 2 clips. Tests that harm it take a copy."""
    folder = tmp_path_factory.mktemp("made")
    return cli.make(recipe(folder), workers=1)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "clips"))


def remake(folder: Path, **splits: int) -> None:
    dataset.write(folder, JOB, {"train": 10, "test_unseen": 2} | splits, workers=1)


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_the_page_says(made: Path):
    import av

    take = next(dataset.takes(JOB, "train", 1))
    scene, trajectory, clip = take.scene, take.trajectory, take.clip
    row = rows(made, "train")[1]
    assert row["file_name"] == "00001.mp4"
    assert row["sha256"] == hashlib.sha256((made / "train/00001.mp4").read_bytes()).hexdigest()
    assert row["annotations_sha256"] == hashlib.sha256((made / "train/00001.npz").read_bytes()).hexdigest()
    assert (row["fps"], row["frames"], row["size"]) == (16.0, 5, [32, 32])
    assert row["caption"] == scene.caption
    assert row["camera"]["intrinsics"] == [[35.0, 0.0, 16.0], [0.0, 35.0, 16.0], [0.0, 0.0, 1.0]]
    assert [body["asset"] for body in row["bodies"]] == [body.asset for body in scene.bodies]
    assert (row["target"], row["motion"], row["split"]) == (0, "drop", "train")
    with av.open(str(made / "train/00001.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    np.testing.assert_array_equal(frames, clip.rgb)  # without loss
    with np.load(made / "train/00001.npz", allow_pickle=False) as stored:
        assert {name: (stored[name].dtype.str, stored[name].shape) for name in stored} == {
            "instances": ("|u1", (5, 32, 32)),
            "depth": ("<f4", (5, 32, 32)),
            "flow": ("<f2", (5, 32, 32, 2)),
            "positions": ("<f8", (5, 1, 3)),
            "quaternions": ("<f8", (5, 1, 4)),
        }
        np.testing.assert_array_equal(stored["depth"], clip.depth)
        np.testing.assert_array_equal(stored["positions"], trajectory.positions_TN3)


def test_what_passes_the_camera_has_the_largest_flow_that_fits(tmp_path: Path):
    """A point of the body comes within a micrometre of the camera's plane: it moves by millions of pixels."""
    take = next(dataset.takes(JOB, "train", 0))
    scene, trajectory, clip = take.scene, take.trajectory, take.clip
    row, column = np.argwhere(clip.instances[0] == scene.target + 1)[0]
    positions = trajectory.positions_TN3.copy()
    positions[1:, scene.target, 1] -= clip.depth[0, row, column] - 1e-6
    passing = replace(trajectory, positions_TN3=positions)
    clip = gl.render(scene, passing, gl.Config(supersample=1))
    assert np.abs(clip.flow[0, row, column]).max() > 1e6
    assert np.isfinite(clip.flow).all()
    (tmp_path / "train").mkdir()
    dataset.write_take(tmp_path, JOB, "train", "00000", Take(scene, passing, clip))
    with np.load(tmp_path / "train/00000.npz", allow_pickle=False) as stored:
        np.testing.assert_allclose(stored["flow"], clip.flow.clip(-65504, 65504), rtol=2**-11, atol=2**-25)


def test_contact_times_give_drop_heights():
    job = dataset.Job(world=WORLD | {"frames": 17})
    row = dataset.describe(job, "train", "00000", next(dataset.takes(job, "train", 0)))
    assert row["contact_time"] == row["contacts"][0]["time"]
    assert row["drop_height"] == pytest.approx(9.81 * row["contact_time"] ** 2 / 2)
    assert 0.45 < row["drop_height"] < 1.55


@pytest.mark.slow
def test_videofolder_reads_it(made: Path, tmp_path: Path):
    import datasets

    loaded = datasets.load_dataset(str(made), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 10, "test_unseen": 2}
    split = loaded["train"].cast_column("video", datasets.Video(decode=False))
    assert split[2]["video"]["path"].endswith("train/00002.mp4")
    assert split[2]["caption"] == rows(made, "train")[2]["caption"]
    assert split[2]["bodies"] == rows(made, "train")[2]["bodies"]
    plain = datasets.load_dataset("videofolder", data_dir=str(made / "train"), cache_dir=str(tmp_path / "cache"))
    assert plain["train"].num_rows == 10


@pytest.mark.slow
def test_killed_and_continued_is_the_same(made: Path, tmp_path: Path):
    path = recipe(tmp_path)
    process = start(path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("clips/.rows/train/0*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "clips/test_unseen/metadata.jsonl").exists()
    (tmp_path / "clips/train/.00003.mp4.abcdefgh.part").mkdir(
        exist_ok=True
    )  # what a kill in the middle of a write leaves
    deadline = time.monotonic() + 60
    while True:  # until the orphaned worker has left, the folder may still change
        before = files(tmp_path / "clips")
        time.sleep(1.0)
        if files(tmp_path / "clips") == before:
            break
        assert time.monotonic() < deadline
    remake(tmp_path / "clips")
    assert files(tmp_path / "clips") == files(made)
    assert not list(tmp_path.glob("clips/*/.0*"))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_it_leaves_with_one_line(tmp_path: Path, times: int):
    process = start(recipe(tmp_path, train=2000))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("clips/.rows/train/0*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "continues" in said.splitlines()[-1]
    with alone(tmp_path / "clips", "makes clips"):  # and its lock is free
        pass


FILMING = """
import sys
from pathlib import Path
from posttrain.commands import stages
from posttrain.core.signals import launch
sys.modules["filming"] = sys.modules["__main__"]
def main():
    stages.make_clips(sys.argv[1])
sys.exit(launch("filming"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_asked_for_the_clips_is_killed_and_nobody_films_on(tmp_path: Path, number: signal.Signals):
    path = recipe(tmp_path, train=2000)
    process = subprocess.Popen([sys.executable, "-c", FILMING, path], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("clips/.rows/train/0*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    with alone(tmp_path / "clips", "makes clips", patience=60):  # within seconds, on an idle machine, its maker left
        made = files(tmp_path / "clips")
        time.sleep(1.0)
        assert files(tmp_path / "clips") == made


@pytest.mark.slow
def test_whole_clips_on_a_disk_that_cannot_be_written_are_taken_as_they_are(made: Path, tmp_path: Path):
    mounted = subprocess.run(["mount", "--bind", str(made), str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
        dataset.write(tmp_path, JOB, {"train": 10, "test_unseen": 2})
        with pytest.raises(UserError) as error:
            dataset.write(tmp_path, JOB, {"train": 11, "test_unseen": 2})
        assert error.value.code == "not_writable"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_damaged_rows_and_no_clips_are_not_shown(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = copy / "train" / "metadata.jsonl"
    for text in ('{"file_name": "00000.mp4"}\n', '{"file_name": 3}\n', '{"fps": 8}\n'):
        table.write_text(text)
        assert cli.main(["show", str(copy), "-o", str(tmp_path / "sheet.html")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["show", str(copy), "--count", "0"])


@pytest.mark.slow
def test_damaged_files_are_made_again(made: Path, copy: Path):
    clip, annotations, row = copy / "train/00000.mp4", copy / "train/00001.npz", copy / ".rows/train/00002.json"
    os.truncate(clip, 100)
    annotations.unlink()
    row.write_text(row.read_text()[:50])
    other = copy / ".rows/train/00003.json"
    other.write_text(other.read_text().replace("fall", "rise", 1))  # not damaged, and its clip is whole
    (copy / "train/metadata.jsonl").write_text('{"file_name": "00')
    remake(copy)
    assert files(copy) == files(made)


@pytest.mark.slow
def test_what_is_there_is_reused_and_more_can_be_added(made: Path, copy: Path):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/0*")}
    remake(copy, train=11)
    assert len(rows(copy, "train")) == 11
    assert rows(copy, "train")[:10] == rows(made, "train")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_recipe_in_the_same_folder_is_refused(copy: Path):
    before = files(copy)
    for changed in (
        {"world": WORLD | {"fps": 24.0}},
        {"renderer": GL | {"supersample": 2}},
        {"physics": {"name": "analytic"}},
    ):
        with pytest.raises(UserError) as error:
            dataset.write(copy, dataset.Job(**{"world": WORLD, "renderer": GL} | changed), {"train": 10}, workers=1)
        assert (error.value.code, error.value.field) == ("other_run", "out")
    with pytest.raises(UserError) as error:
        remake(copy, train=3)
    assert (error.value.code, error.value.field) == ("other_run", "splits.train")
    assert files(copy) == before


@pytest.mark.slow
def test_two_makers_do_not_meet(copy: Path):
    with alone(copy, "makes clips", patience=0.1), pytest.raises(UserError) as error:
        remake(copy)
    assert error.value.code == "busy"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    path = recipe(tmp_path)
    assert cli.main(["make", str(path), f"out={tmp_path}/file/clips"]) == 1
    said = capsys.readouterr().err
    assert "file/clips" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path):
    """A file system of 300 kB in a private name space, where the machine lets us have one."""
    path, small = recipe(tmp_path, train=40), tmp_path / "clips"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=300k none {small} && "
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    command = f"{sys.executable} -m sim make {path} --workers 1; echo code $?; ls {small}/.rows/train | wc -l"
    process = subprocess.run(["unshare", "-rm", "sh", "-c", mount + command], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.splitlines()[0] == "code 1"
    assert int(process.stdout.splitlines()[1]) >= 1
    assert "the disk is full" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_splits_share_no_assets(made: Path):
    train, unseen = (set(ids) for ids in library.split(library.object_ids()))
    seen_backgrounds, unseen_backgrounds = (set(ids) for ids in library.split(surfaces.background_ids()))
    for split, objects, backgrounds in (
        ("train", train, seen_backgrounds),
        ("test_unseen", unseen, unseen_backgrounds),
    ):
        for row in rows(made, split):
            assert {body["asset"] for body in row["bodies"]} <= objects
            assert row["background"] in backgrounds
    assert not train & unseen
    assert not seen_backgrounds & unseen_backgrounds
    for split in ("validation", "hard_validation"):
        draw = dataset.draw(JOB, split, 0)
        assert not set(draw.objects) & (train | unseen)
        assert not set(draw.backgrounds) & (seen_backgrounds | unseen_backgrounds)
    take = next(dataset.takes(JOB, "validation", 0))
    assert {body.asset for body in take.scene.bodies} <= set(library.validation_ids())


def test_each_split_has_clips_of_its_own():
    scenes = [next(dataset.takes(JOB, split, i)).scene for split in ("train", "test_seen") for i in (0, 1)]
    assert len({scene.bodies for scene in scenes}) == 4


@pytest.mark.slow
def test_shipped_recipes_load_and_their_worlds_can_be_made():
    from posttrain.core import recipe as recipes

    for name in ("pocket/drop", "pocket/fresh", "pocket/motion", "sim/pisa"):
        plan = recipes.load(ROOT / "recipes" / f"{name}.yaml", ["world.width=64", "world.height=64"], cli.Recipe)
        draw = Draw(np.random.default_rng(1), library.object_ids()[:9], surfaces.background_ids(), 0)
        take = next(plan.world.module.takes(draw, plan.world.config, bullet.simulate, gl.render))
        assert take.clip.rgb.shape[:2] == (33, 64)


def test_a_typo_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("supersample", "supersampel"))
    assert cli.main(["make", str(path)]) == 1
    assert "recipe.yaml:4: renderer.supersampel" in capsys.readouterr().err


def test_show_puts_clips_on_one_sheet(made: Path, tmp_path: Path):
    assert cli.main(["show", str(made), "--count", "2", "-o", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 128, 4 * (128 + 14))
    with pytest.raises(UserError) as error:
        cli.show(tmp_path, None, 2, tmp_path / "none.png")
    assert error.value.code == "no_clips"
