"""The house's own rules: who imports whom, what the repository may hold, what the README and the recipes may name."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from posttrain.recipe import load

ROOT = Path(__file__).parent.parent
CONTRACT = ["posttrain.types", "posttrain.files", "posttrain.progress"]
ROOMS = [f"posttrain.{room}" for room in ("flow", "models", "rewards", "data", "metrics", "run")]

# Who may import whom. A row holds for all modules below its name that have none of their own; a room may import itself.
MAY_IMPORT = {
    "posttrain.types": [],
    "posttrain.files": [],
    "posttrain.progress": [],
    "posttrain.pocket": ["posttrain.files"],
    "posttrain.pocket.build": [*CONTRACT, "posttrain.models", "posttrain.pocket"],
    "posttrain.pocket.check": [*CONTRACT, *ROOMS, "posttrain.benchmarks", "posttrain.sample"],
    "posttrain.recipe": ["posttrain.files"],
    "posttrain.flow": CONTRACT,
    "posttrain.models": [*CONTRACT, "posttrain.flow", "posttrain.pocket"],
    "posttrain.rewards": [*CONTRACT, "posttrain.models"],
    "posttrain.data": [*CONTRACT, "posttrain.flow", "posttrain.models.base"],
    "posttrain.metrics": [*CONTRACT, "posttrain.flow"],
    "posttrain.distributed": CONTRACT,
    "posttrain.trackers": CONTRACT,
    "posttrain.run": [*CONTRACT, "posttrain.flow", "posttrain.distributed", "posttrain.trackers"],
    "posttrain.methods": [*CONTRACT, *ROOMS],
    "posttrain.methods.oro": [*CONTRACT, *ROOMS, "posttrain.recipe"],  # its rewards are named parts
    "posttrain.benchmarks": [*CONTRACT, "posttrain.metrics", "posttrain.data"],
    "posttrain.benchmarks.preference_cost": [*CONTRACT, *ROOMS, "posttrain.methods", "posttrain.dry"],
    "posttrain.benchmarks.rewards": [
        *(*CONTRACT, "posttrain.data", "posttrain.rewards", "posttrain.recipe", "posttrain.metrics"),
        *("posttrain.models.base", "posttrain.models.tracker"),
    ],
    "posttrain.judges": [*CONTRACT, "posttrain.metrics", "posttrain.data"],
    "posttrain.sample": [*CONTRACT, "posttrain.flow", "posttrain.data", "posttrain.models.base"],
    "posttrain.gallery": [*CONTRACT, "posttrain.models.base", "posttrain.sample"],
    "posttrain.records": [*CONTRACT, "posttrain.benchmarks"],
    "posttrain.evaluate": [
        *CONTRACT,
        *("posttrain.flow", "posttrain.data", "posttrain.models.base"),
        *("posttrain.metrics", "posttrain.benchmarks", "posttrain.sample", "posttrain.records"),
    ],
    "posttrain.score": [
        *(*CONTRACT, "posttrain.data", "posttrain.metrics", "posttrain.benchmarks"),
        *("posttrain.models.base", "posttrain.sample", "posttrain.evaluate", "posttrain.records"),
    ],
    "posttrain.charts": [],
    "posttrain.fall_times": ["posttrain.charts"],
    "posttrain.players": [*CONTRACT, "posttrain.charts", "posttrain.data"],
    "posttrain.report": [
        *(*CONTRACT, "posttrain.charts", "posttrain.fall_times", "posttrain.data", "posttrain.benchmarks"),
        *("posttrain.records", "posttrain.gallery", "posttrain.players"),
    ],
    "posttrain.export": [*CONTRACT, "posttrain.models"],
    "posttrain.doctor": [*CONTRACT, "posttrain.pocket"],
    "posttrain.meter": [],
    "posttrain.dry": [*CONTRACT, *ROOMS, "posttrain.methods", "posttrain.meter"],
    "posttrain.bench": [*CONTRACT, *ROOMS, "posttrain.methods", "posttrain.sample"],
    "posttrain.tripwires": [
        *(*CONTRACT, *ROOMS, "posttrain.recipe", "posttrain.benchmarks", "posttrain.evaluate", "posttrain.records"),
    ],
    "posttrain.experiment": [*CONTRACT, *ROOMS, "posttrain.recipe", "posttrain.evaluate", "posttrain.tripwires"],
    "posttrain.loading": [
        *(*CONTRACT, "posttrain.models", "posttrain.recipe", "posttrain.run", "posttrain.distributed"),
        "posttrain.experiment",
    ],
    "posttrain.losers": [
        *(*CONTRACT, "posttrain.data", "posttrain.models", "posttrain.experiment", "posttrain.loading"),
        *("posttrain.judges", "posttrain.score", "posttrain.evaluate", "posttrain.distributed"),
    ],
    "posttrain.preferences": [
        *(*CONTRACT, "posttrain.data", "posttrain.models.base", "posttrain.methods"),
        *("posttrain.experiment", "posttrain.records", "posttrain.loading"),
    ],
    "posttrain.stages": [
        *(*CONTRACT, *ROOMS, "posttrain.recipe", "posttrain.experiment", "posttrain.evaluate", "posttrain.records"),
        *("posttrain.report", "posttrain.export", "posttrain.distributed", "posttrain.trackers", "posttrain.tripwires"),
        *("posttrain.loading", "posttrain.losers"),
    ],
    "posttrain.commands": [
        *(*CONTRACT, *ROOMS, "posttrain.benchmarks", "posttrain.experiment", "posttrain.evaluate", "posttrain.score"),
        *("posttrain.records", "posttrain.gallery", "posttrain.report", "posttrain.loading", "posttrain.losers"),
        "posttrain.judges",
    ],
    "posttrain.cli": ["posttrain", "sim"],
    "posttrain.__main__": ["posttrain.cli"],
    "sim.scene": [],
    "sim.assets": ["sim.scene", "posttrain.files"],
    "sim.physics": ["sim.scene", "sim.assets"],
    "sim.render": ["sim.scene", "sim.assets", "posttrain.files"],
    "sim.render.tiny": [
        "sim.scene",
        "sim.assets",
        "sim.render",
        "sim.physics",
        "posttrain.files",
    ],  # PyBullet is its renderer too
    "sim.drop": ["sim.scene", "sim.assets", "sim.physics", "posttrain.files"],
    "sim.motion": ["sim.scene", "sim.assets", "sim.drop", "sim.physics", "posttrain.files"],
    "sim.counterfactual": ["sim.scene", "sim.drop", "sim.physics"],
    "sim.ambiguous": ["sim.scene", "sim.drop", "sim.physics", "posttrain.files"],
    "sim.grid": ["sim.scene", "sim.drop", "posttrain.files"],
    "sim.dataset": ["sim.scene", "sim.assets", "posttrain.files"],
    "sim.show": ["posttrain.files"],
    "sim.bench": ["sim.dataset", "sim.counterfactual", "sim.physics", "posttrain.files"],
    "sim.cli": ["sim", "posttrain.recipe", "posttrain.files"],
    "sim.__main__": ["sim.cli"],
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("posttrain", "sim")
    for path in sorted((ROOT / package).rglob("*.py"))
}
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name != "launch"  # these are accelerate's, see test_distributed.py
)


def repository() -> list[Path]:
    """Every file that is committed or would be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file: at the top, inside functions, and import_module("a.literal")."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in MODULES else str(node.module)) for name in inner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def test_imports_follow_the_table() -> None:
    broken = []
    for module, path in MODULES.items():
        if module in ("posttrain", "sim"):
            allowed, room = [], module
        else:
            row = max((name for name in MAY_IMPORT if below(module, name)), key=len, default=None)
            assert row is not None, f"{module}: give it a row in MAY_IMPORT"
            allowed, room = MAY_IMPORT[row], row
        for line, name in imports(path):
            ours = below(name, "posttrain") or below(name, "sim")
            if ours and not any(below(name, permitted) for permitted in [*allowed, room]):
                broken.append(f"{path.relative_to(ROOT)}:{line}: {module} may not import {name}")
    assert not broken, "\n".join(broken)


def test_modules_say_what_they_are() -> None:
    trees = {module: ast.parse(path.read_text()) for module, path in MODULES.items() if path.stem != "__main__"}
    assert not [module for module, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads(recipe: str) -> None:
    import posttrain.experiment
    import sim.cli

    values = yaml.safe_load((ROOT / recipe).read_text())
    load(ROOT / recipe, [], sim.cli.Recipe if "world" in values else posttrain.experiment.Recipe)
    made_by = values.get("data", {}).get("make") or []
    for other in [made_by] if isinstance(made_by, str) else made_by:
        assert other in RECIPES, f"{recipe}: data.make names {other}, which is not there"


def test_weights_are_small_and_safe() -> None:
    """Weights are safetensors, 40 MB together; everything else is text or a picture of at most 2 MB."""
    files = repository()
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 40e6
    unsafe = {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth"}
    assert not [path for path in files if path.suffix in unsafe]
    assert not [path for path in files if path not in weights and path.stat().st_size > 2e6]


def test_nothing_names_one_machine() -> None:
    personal = re.compile(rf"(?<![\w.])(/(home|root|Users|work|mnt|tmp)/\w|{re.escape(str(ROOT))}/)")
    named = []
    for path in repository():
        if path.suffix not in {".safetensors", ".png", ".jpg", ".webp", ".gif", ".mp4", ".model"}:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if personal.search(line):
                    named.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not named, "\n".join(named)


def unsafe_read(node: ast.Call) -> bool:
    """Whether a call could run code that a file brings along."""
    called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    return (
        (called == "torch.load" and given.get("weights_only", "True") != "True")
        or (called.endswith(".load") and given.get("allow_pickle") == "True")
        or called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
    )


def test_no_file_is_read_that_could_run_code() -> None:
    found = []
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        lines = [node.lineno for node in calls if unsafe_read(node)]
        lines += [line for line, name in imports(path) if name in ("pickle", "dill", "joblib", "shelve")]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", readme, re.MULTILINE)) <= targets
    paths = re.findall(r"\b(?:recipes|posttrain|sim|tests|docs)/[\w./-]*\w", readme)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_readme_has_no_number_left_to_measure() -> None:
    assert not re.findall(r"(?i)to be measured|@@FILL", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("package", ["posttrain", "sim"])
def test_readme_names_commands_that_exist(package: str) -> None:
    used = set(re.findall(rf"^(?:\.venv/bin/)?{package} ([a-z]+)\b", (ROOT / "README.md").read_text(), re.MULTILINE))
    command = [sys.executable, "-m", package, "--help"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert used
    assert not [name for name in used if not re.search(rf"\b{name}\b", told)]
