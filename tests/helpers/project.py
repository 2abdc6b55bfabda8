"""The project's folder, and its modules: dotted name -> file."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("posttrain", "sim")
    for path in sorted((ROOT / package).rglob("*.py"))
}
