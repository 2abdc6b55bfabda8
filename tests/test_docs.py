"""README.md and docs/: what they name exists, what they list is complete, the page made from the code is current."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import get_args

import pytest

import posttrain.cli
import sim.cli
from posttrain.core.errors import Code

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
EXAMPLES = {"sim/render/fog.py", "sim/physics/euler.py"}  # in CONTRIBUTING.md's code
COMMAND = re.compile(r"^(?:\.venv/bin/\S+ .*-m |\.venv/bin/)(posttrain|sim) (\w+)(.*?)(?:  +#.*)?$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title.lower().strip()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(program, command, words) of every line that calls one of ours."""
    for program, name, rest in COMMAND.findall(page.read_text()):
        yield program, name, rest.replace("'", "").split()


@cache
def usage(program: str, *name: str) -> str:
    """What --help says."""
    with redirect_stdout(said := StringIO()), pytest.raises(SystemExit):
        (posttrain.cli.main if program == "posttrain" else sim.cli.main)([*name, "--help"])
    return said.getvalue()


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@each_page
def test_paths_exist(page: Path) -> None:
    paths = set(re.findall(r"(?<![\w./-])(?:recipes|posttrain|sim|tests|docs)/[\w./-]*\w", page.read_text()))
    assert not [path for path in paths - EXAMPLES if not (ROOT / path).exists()]


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = []
    for program, name, words in commands(page):
        if not re.search(rf"\b{name}\b", usage(program)):
            wrong.append(f"{program} {name}")
            continue
        options = [word for word in words if re.match(r"-\w|--\w", word)]
        wrong += [f"{name} {o}" for o in options if not re.search(rf"(?<![\w-]){o}\b", usage(program, name))]
    assert not wrong


def test_there_are_commands_to_check() -> None:
    found = {(program, name) for page in PAGES for program, name, _ in commands(page)}
    assert {("posttrain", "run"), ("posttrain", "groups"), ("sim", "make")} <= found


@each_page
def test_overrides_are_keys_of_recipes(page: Path) -> None:
    known = set(re.findall(r"^\| `([\w.]+)`", (DOCS / "recipes.md").read_text(), re.MULTILINE))
    words = [word for _, _, words in commands(page) for word in words if "=" in word and not word.startswith("-")]
    keys = {word.partition("=")[0] for word in words if re.match(r"[a-z][\w.]*=", word) and "/" not in word}
    assert keys - {"export"} <= known


@each_page
def test_numbers_have_a_digit_before_the_point(page: Path) -> None:
    assert not re.findall(r"(?<![\w.)\]])\.\d+", without_code(page.read_text()))


@each_page
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert not re.findall(r"(?i)to be measured|@@FILL|TODO", page.read_text())


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_key_of_a_recipe_is_explained() -> None:
    """docs/recipes.md is what docs/make_recipes.py writes. Write it again: python docs/make_recipes.py"""
    spec = importlib.util.spec_from_file_location("make_recipes", DOCS / "make_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    page = module.page()
    assert page == (DOCS / "recipes.md").read_text()
    assert not re.findall(r"^.*\|\s*\|$", page, re.MULTILINE)  # a key without a meaning


def test_every_error_code_is_explained() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    entries = re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert sorted(code for code, _ in entries) == sorted(get_args(Code))
    assert not [code for code, entry in entries if "Example: `" not in entry or "Do: " not in entry]


def test_the_log_lists_every_entry_newest_first() -> None:
    index = (DOCS / "log" / "index.md").read_text()
    listed = re.findall(r"\(([\w-]+\.md)#([\w-]+)\)", index)
    dates = [re.findall(r"\d{4}-\d\d-\d\d", anchor)[0] for _, anchor in listed]
    assert dates == sorted(dates, reverse=True)
    entries = [
        (page.name, anchor)
        for page in sorted((DOCS / "log").glob("*.md"))
        for anchor in anchors(page)
        if re.search(r"[a-z].*\d{4}-\d\d-\d\d", anchor)
    ]
    assert sorted(listed) == sorted(entries)
