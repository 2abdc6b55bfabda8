"""The package as pip installs it: built from a copy of the tree, used from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from helpers.project import ROOT
from PIL import Image

pytestmark = pytest.mark.slow
PYTHON = [sys.executable, "-P"]  # without the current folder


def repository() -> list[Path]:
    """Every file that is committed or would be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its file, made without network from what is committed or would be."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in repository():
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (tree / "posttrain" / "recipes").symlink_to("../recipes")
    command = [*PYTHON, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    subprocess.run(command, check=True, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [*PYTHON, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", target]
    subprocess.run([*command, wheel], check=True)
    return target


def outside(installed: Path, folder: Path, *words: str | Path) -> str:
    """What `python WORDS` prints in a folder that is no checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([*PYTHON, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"posttrain", "sim", "posttrain-0.1.0.dist-info"}
    suffixes = {Path(name).suffix for name in names if "dist-info" not in name}
    assert suffixes == {".py", ".typed", ".json", ".safetensors", ".yaml", ".md", ".css", ".js", ".html", ""}
    tracked = {path.relative_to(ROOT).as_posix() for path in repository()}
    assert {name for name in tracked if name.startswith("recipes/") and name.endswith(".yaml")} == {
        name.removeprefix("posttrain/") for name in names if name.startswith("posttrain/recipes/")
    }
    assert {n for n in tracked if n.startswith(("posttrain/", "sim/"))} - {"posttrain/recipes"} <= set(names)
    assert wheel.stat().st_size < 40e6


def test_its_metadata_is_what_an_index_asks_for(wheel: Path) -> None:
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("posttrain-0.1.0.dist-info/METADATA").decode()
    metadata = Metadata.from_email(text, validate=True)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.project_urls
    assert metadata.classifiers
    assert str(HeaderParser().parsestr(text).get_payload()).startswith("# posttrain")


def test_it_samples_in_another_folder(installed: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (120, 120, 120)).save(tmp_path / "first.png")
    words = ("sample", "pocket", "--image", "first.png", "--prompt", "a ball falls.", "--frames", "5", "--steps", "1")
    said = outside(installed, tmp_path, installed / "bin" / "posttrain", *words)
    assert "runs/samples/pocket/first-s0-pocket.mp4" in said
    assert (tmp_path / "runs" / "samples" / "pocket" / "first-s0-pocket.mp4").stat().st_size > 0


SCRIPT = """
if __name__ == "__main__":
    import sim, posttrain
    print(posttrain.__file__)
    print(sim.make_dataset("recipes/pocket/drop.yaml", "out=clips", "splits={train: 1}", workers=1))
"""


def test_shipped_recipes_have_the_paths_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    file, out = outside(installed, tmp_path, "script.py").splitlines()
    assert Path(file).is_relative_to(installed)
    assert out == "clips"
    assert (tmp_path / "clips" / "train" / "00000.mp4").is_file()
