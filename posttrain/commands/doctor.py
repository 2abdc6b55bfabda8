"""`posttrain doctor`: one line for each requirement: whether this machine meets it, and the remedy."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from posttrain.core import files
from posttrain.core.codec import ENCODERS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"  # beside the packages in a checkout
POCKET = Path(__file__).parents[1] / "pocket"
CHECKSUMS = "SHA256SUMS"  # in the format of `sha256sum`
DISK = 5.0  # GiB that a pocket run with its data may need
CPU_STEP = 30.0  # TFLOP of the largest training step that a CPU does within minutes
DRIVER = 2.0  # GiB of a GPU that CUDA, its libraries and the allocator's gaps take


class Finding(NamedTuple):
    """One line of the doctor; the remedy may be empty.

    state: "ok", "note" (works, but slower, partly or on another machine) or "bad" (something will fail).
    """

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    remedy: str = ""


def check_python() -> Iterator[Finding]:
    running = platform.python_version()
    good = platform.python_version_tuple()[:2] in (("3", "11"), ("3", "12"))
    yield Finding("python", "ok" if good else "note", running, "" if good else "tested with Python 3.11 and 3.12")


def check_packages(constraints: Path = CONSTRAINTS) -> Iterator[Finding]:
    """Installed versions against the tested ones."""
    if not constraints.exists():
        yield Finding(
            "packages", "note", "no constraints.txt here", "install from a checkout to get the tested versions"
        )
        return
    tested = re.findall(r"^([\w.-]+)==([\w.+-]+)", constraints.read_text(), re.MULTILINE)
    others, absent = [], []
    for package, wanted in tested:
        try:
            installed = version(package).partition("+")[0]
        except PackageNotFoundError:
            absent.append(package)
            continue
        if installed != wanted.partition("+")[0]:
            others.append(f"{package} {installed}, tested {wanted}")
    text = f"{len(tested) - len(others) - len(absent)} of {len(tested)} as tested"
    if absent:
        text += f", {len(absent)} not installed ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''})"
    remedy = f"{', '.join(others)}: run `pip install -c constraints.txt ...` or `make setup`" if others else ""
    yield Finding("packages", "note" if others else "ok", text, remedy)


def gpu_memory() -> float | None:
    """GiB of the first GPU, None without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else None


def check_torch() -> Iterator[Finding]:
    import torch

    memory = gpu_memory()
    if memory is not None:
        yield Finding("torch", "ok", f"{torch.__version__}, {torch.cuda.get_device_name()} with {memory:.0f} GiB")
    elif shutil.which("nvidia-smi"):
        remedy = "there is an NVIDIA driver: install a CUDA build of torch (`make setup` in a fresh .venv)"
        yield Finding("torch", "bad", f"{torch.__version__} sees no GPU", remedy)
    else:
        yield Finding("torch", "ok", f"{torch.__version__} on the CPU, {torch.get_num_threads()} threads")


def check_renderer() -> Iterator[Finding]:
    """OpenGL without a display, which the default renderer needs."""
    import moderngl

    try:
        # without libGL, which a machine without a display may lack
        settings: Any = {"backend": "egl", "libgl": "libEGL.so.1", "libegl": "libEGL.so.1"}
        context = moderngl.create_context(standalone=True, require=330, **settings)
        yield Finding("renderer", "ok", f"EGL, {context.info['GL_RENDERER']}")
        context.release()
    except Exception as error:  # the loader, EGL and the driver each raise their own types
        reason = str(error).strip().splitlines()[0]
        remedy = "run `apt-get install libegl1 libgl1-mesa-dri`, or set `renderer: {name: tiny}`"
        yield Finding("renderer", "bad", f"no OpenGL ({reason})", remedy)


def check_codecs() -> Iterator[Finding]:
    """The video encoders for datasets (lossless) and samples (for browsers)."""
    import av

    lacking = [name for name in ENCODERS if name not in av.codecs_available]
    remedy = "install PyAV's own wheel: `pip install --force-reinstall --only-binary :all: av`" if lacking else ""
    text = f"PyAV {av.__version__} " + (f"lacks {', '.join(lacking)}" if lacking else "writes H.264")
    yield Finding("codecs", "bad" if lacking else "ok", text, remedy)


def check_weights(folder: Path = POCKET) -> Iterator[Finding]:
    """The embedded models against their checksums."""
    sums = folder / CHECKSUMS
    if not sums.exists():
        yield Finding("weights", "bad", f"{sums} does not exist", "get the package again")
        return
    entries = [line.split(maxsplit=1) for line in sums.read_text().splitlines() if line.strip()]
    wrong = [
        name
        for digest, name in entries
        if not files.inside(folder, name).is_file() or files.sha256(folder / name) != digest
    ]
    if wrong:
        remedy = f"get them again: `git checkout -- {folder.name}` in {folder.parent}"
        yield Finding("weights", "bad", f"missing or changed: {', '.join(wrong)}", remedy)
    else:
        yield Finding("weights", "ok", f"pocket, {len(entries)} files whole")


def check_disk(folder: Path | None = None) -> Iterator[Finding]:
    free = shutil.disk_usage(folder or Path.cwd()).free / 2**30
    remedy = "" if free >= DISK else f"free some: the pocket's data and runs need up to {DISK:.0f} GiB"
    yield Finding("disk", "ok" if free >= DISK else "bad", f"{free:.1f} GiB free here", remedy)


def check_cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    remedy = "" if cores > 1 else "expect the stated times to double"
    yield Finding("machine", "ok" if cores > 1 else "note", f"{cores} cores, {memory:.0f} GiB memory", remedy)


def check_recipe(line: str, memory: float, teraflop: float, gpu: float | None) -> Iterator[Finding]:
    """Whether what a recipe's training takes in one process (`line`, GiB, TFLOP a step) fits the GPU (GiB or None)."""
    state: Literal["ok", "note", "bad"] = "ok"
    remedy = ""
    if gpu is None:
        if teraflop > CPU_STEP:
            state, remedy = "note", f"no GPU here: it needs one with {memory + DRIVER:.0f} GiB or more"
    elif memory + DRIVER > gpu:
        state, remedy = "bad", "raise train.accumulate, set train.block_checkpointing=true, or make smaller clips"
    yield Finding("recipe", state, line, remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_packages,
    check_torch,
    check_renderer,
    check_codecs,
    check_weights,
    check_disk,
    check_cores,
)


def doctor(*more: Callable[[], Iterator[Finding]]) -> int:
    """Print the findings of CHECKS and then of `more`; returns the exit status, 1 if something will fail, else 0."""
    from rich.console import Console

    console, bad = Console(highlight=False, soft_wrap=True), 0
    for check in (*CHECKS, *more):
        for finding in check():
            bad += finding.state == "bad"
            mark = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}[finding.state]
            console.print(f"{mark} {finding.name:<9}", end=" ")
            console.print(finding.text + (f" -> {finding.remedy}" if finding.remedy else ""), markup=False)
    return 1 if bad else 0
