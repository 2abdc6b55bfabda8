"""The house's own rules: who imports whom, what the repository may hold, what the recipes may name."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.project import MODULES, ROOT

from posttrain.core.recipe import load

# Who may import whom, from the ground up: a package may import itself and what stands in its row. Nothing imports
# upwards, so there is no circle.
GROUND = ["types", "core", "flow", "pocket", "metrics"]
MODELS = [*GROUND, "models", "nets"]
DATA = [*MODELS, "data"]
SEEING = [*DATA, "rewards", "judges", "evaluation"]
TRAINING = [*SEEING, "training", "reporting"]
METHODS = [*TRAINING, "methods", "pretraining"]
MAY_IMPORT = {
    "types": [],
    "core": [],
    "pocket": ["core"],
    "flow": ["types", "core"],
    "metrics": ["types", "core", "flow"],
    "models": GROUND,
    "nets": [*GROUND, "models"],
    "data": MODELS,
    "rewards": DATA,
    "evaluation": DATA,
    "judges": [*DATA, "evaluation"],
    "training": SEEING,
    "reporting": [*SEEING, "training"],
    "methods": [*SEEING, "training"],
    "pretraining": [*SEEING, "training", "methods"],
    "commands": METHODS,
    "studies": [*METHODS, "commands"],
    "api": [*METHODS, "commands"],
    "cli": [*METHODS, "commands", "api", "studies", "sim"],
    "__main__": ["core", "cli"],
    "_torchvision": [],
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


def package(module: str) -> str:
    """The row of a module: "posttrain.core.files" has "core", all of sim "sim"."""
    return "sim" if below(module, "sim") else module.split(".")[1]


@pytest.mark.slow
def test_imports_follow_the_table() -> None:
    broken = []
    for module, path in MODULES.items():
        if module == "posttrain":
            allowed = ["_torchvision", "core", "api"]
        elif below(module, "sim"):
            allowed = ["core", "sim"]
        else:
            assert package(module) in MAY_IMPORT, f"{module}: give it a row in MAY_IMPORT"
            allowed = [*MAY_IMPORT[package(module)], package(module)]
        for line, name in imports(path):
            if (
                (below(name, "posttrain") or below(name, "sim"))
                and name != "posttrain"
                and package(name) not in allowed
            ):
                broken.append(f"{path.relative_to(ROOT)}:{line}: {module} may not import {name}")
    assert not broken, "\n".join(broken)


def test_nothing_imports_upwards() -> None:
    """The table itself has no circle: a package stands below all that may import it."""
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        for other in allowed:
            assert other == "sim" or other in order, f"{name} may import {other}, which is no package"
            assert name not in MAY_IMPORT.get(other, []), f"{name} and {other} may import each other"


@pytest.mark.slow
def test_modules_say_what_they_are() -> None:
    trees = {module: ast.parse(path.read_text()) for module, path in MODULES.items() if path.stem != "__main__"}
    assert not [module for module, tree in trees.items() if tree.body and not ast.get_docstring(tree)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads(recipe: str) -> None:
    import posttrain.commands.experiment
    import sim.cli

    values = yaml.safe_load((ROOT / recipe).read_text())
    load(ROOT / recipe, [], sim.cli.Recipe if "world" in values else posttrain.commands.experiment.Recipe)
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


@pytest.mark.slow
def test_no_file_is_read_that_could_run_code() -> None:
    found = []
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        lines = [node.lineno for node in calls if unsafe_read(node)]
        lines += [line for line, name in imports(path) if name in ("pickle", "dill", "joblib", "shelve")]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found


def test_functions_in_the_guide_s_code_are_annotated() -> None:
    """Who copies them passes `make lint`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    functions = [n for block in blocks for n in ast.walk(ast.parse(block)) if isinstance(n, ast.FunctionDef)]
    assert len(functions) >= 6
    for function in functions:
        assert function.returns, function.name
        assert all(argument.annotation for argument in function.args.args), function.name
