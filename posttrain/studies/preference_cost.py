"""Memory and time of a step of preference learning, compared with learning from true clips only, as Markdown.

    python -m posttrain.studies.preference_cost --blocks 6
    python -m posttrain.studies.preference_cost --blocks 30 --geometry 81x480x832 --device cuda

A transformer of Wan2.1-1.3B's width with random weights in bf16 is trained as in recipes/wan2.1-1.3b/gdpo.yaml, by
`psft.train` and `gdpo.train` in a `Run`: AdamW, block checkpointing, an adapter of rank 48 on attn1. A step has two
groups of random latents with captions of all 512 tokens. Each row is measured in its own process.

    GiB      peak memory: PyTorch's on a GPU; on a CPU the process's, minus its memory before training
    dry run  peak memory predicted by dry.py, as in `posttrain doctor`
    s        median seconds of a step; the first step, which fills the cache of references, is left out
    work     floating point operations by dry.py, relative to the first row. If backward costs as much as forward, as
             in linear layers under an adapter, this is 8/3 for a pair, 10/3 for a pair in turn, 16/3 for three losers
             and 6/3 for a cached reference.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn

from posttrain.commands.dry import Step, dry_step
from posttrain.core.files import read_jsonl
from posttrain.core.progress import markdown, track
from posttrain.core.recipe import Plugin
from posttrain.methods import gdpo, psft
from posttrain.methods.base import method_of
from posttrain.models.base import AdapterConfig, ModelConfig
from posttrain.models.wan.model import TEXT_TOKENS, Wan
from posttrain.models.wan.shapes import of_configs
from posttrain.training.optim import TrainConfig
from posttrain.training.run import Run
from posttrain.types import Batch

GROUPS = 2
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
ADAPTED = ModelConfig(path="x", dtype="bf16", conditioning="text", adapter=AdapterConfig(rank=48, targets=ATTENTION))
WHOLE = ModelConfig(path="x", conditioning="text")
Geometry = tuple[int, int, int]  # frames, height, width


class Row(NamedTuple):
    label: str
    method: Plugin
    losers: int = 1
    model: ModelConfig = ADAPTED


PSFT = Plugin("psft", psft, psft.Config())


def pair(**settings: Any) -> Plugin:
    return Plugin("gdpo", gdpo, gdpo.Config(physics=None, **settings))


ROWS = {
    "psft": Row("LoRA, true clips", PSFT),
    "pair": Row("LoRA-SR, pair", pair()),
    "in_turn": Row("LoRA-SR, pair in turn", pair(backward="in_turn")),
    "sum": Row("LoRA-SR, three losers", pair(mode="sum"), losers=3),
    "cached": Row("LoRA-SR, pair, cached reference", pair(cached_draws=1)),
    "copy": Row("LoRA, pair, copied reference", pair(reference="full_copy")),
    "all": Row("all weights in fp32, pair, copied reference", pair(reference="full_copy"), model=WHOLE),
}


def shape_of(heads: int, blocks: int) -> dict[str, Any]:
    """Settings of the transformer; Wan2.1-1.3B has 12 heads and 30 blocks."""
    return {"num_attention_heads": heads, "ffn_dim": 8960 * heads // 12, "num_layers": blocks}


class Enough(Exception):
    """All measured steps are done. Ends the run before its checkpoint, which would need more memory."""


class Groups:
    """Groups of random latents, each a true clip and its losers; `load` raises Enough after `steps` calls."""

    ids, key = tuple("ab"[:GROUPS]), "random"

    def __init__(self, shape: Sequence[int], losers: int, text_dim: int, steps: int) -> None:
        self.members, self.steps = torch.randn(GROUPS, 1 + losers, *shape), steps
        self.text_BLD = torch.randn(GROUPS, TEXT_TOKENS, text_dim)

    def __len__(self) -> int:
        return GROUPS

    def load(self, indices: Sequence[int]) -> Batch:
        if not self.steps:
            raise Enough
        self.steps -= 1
        chosen, ids = list(indices), tuple(self.ids[index] for index in indices)
        members = self.members[chosen]
        return Batch(ids, members[:, 0], self.text_BLD[chosen], losers_BMCFHW=members[:, 1:])


def train(row: Row, shape: dict[str, Any], geometry: Geometry, steps: int, device: str) -> float:
    """Train `steps` steps; returns the median seconds of a step, without the first."""
    transformer: Any = of_configs(row.model, shape, {}, *geometry).model.transformer.to_empty(device=device)
    config = transformer.config
    transformer.rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len).to(
        device
    )
    for name, parameter in transformer.named_parameters():
        nn.init.normal_(parameter, std=0.0 if ".lora_B." in name else 0.02)
    with torch.device("meta"):
        vae = AutoencoderKLWan()
    model = Wan(transformer, vae.config, {}, None, None, conditioning="text", device=device)
    data = Groups(model.latent_shape(*geometry), row.losers, config.text_dim, steps)
    settings = TrainConfig(steps=steps + 1, batch=GROUPS, lr=1e-6, precision="bf16", block_checkpointing=True)
    method, settings_of_method = method_of(row.method), row.method.config
    inputs = method.inputs(model, settings_of_method)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, model.module, data, settings)
        model.module = run.module
        with suppress(Enough):
            method.train(run, model, settings_of_method, **inputs)
        return statistics.median(step["seconds"] for step in read_jsonl(Path(folder) / "log.jsonl")[1:])


def measure(row: Row, shape: dict[str, Any], geometry: Geometry, steps: int, device: str) -> tuple[float, float]:
    """Peak GiB of this process, and seconds of a step."""
    train(row, shape_of(1, 1), (5, 32, 32), 2, device)  # imports and initialises all libraries
    before = resident("VmRSS")
    seconds = train(row, shape, geometry, steps, device)
    most = resident("VmHWM") - before if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    return most, seconds


def resident(field: str) -> float:
    """GiB of main memory that this process has now (VmRSS) or had at its peak (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 2**20


def elsewhere(name: str, arguments: Sequence[str], device: str) -> tuple[float, float] | None:
    """The result of `measure` in a process of its own; None if the process failed, for example for lack of memory."""
    command = [sys.executable, "-m", "posttrain.studies.preference_cost", *arguments, "--alone", name]
    env = os.environ | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None
    gib, seconds = json.loads(done.stdout.splitlines()[-1])
    return gib, seconds


def table(measurements: dict[str, tuple[float, float] | None], estimates: dict[str, Step]) -> str:
    """Markdown: a line per row; "of the first" is relative to row `psft`."""
    first, lines = measurements["psft"], []
    for name, measured in measurements.items():
        step, cells = estimates[name], ["failed", "", "", ""]
        if measured and first:
            shares = [f"{value / reference:.2f}" for value, reference in zip(measured, first, strict=True)]
            cells = [f"{measured[0]:.2f}", shares[0], f"{measured[1]:.2f}", shares[1]]
        # the dry run computes the reference even if training would take it from the cache
        work = 2.0 if name == "cached" else step.teraflop / estimates["psft"].teraflop
        lines.append([ROWS[name].label, *cells[:2], f"{step.memory:.2f}", *cells[2:], f"{work:.2f}"])
    return markdown(["", "GiB", "of the first", "dry run", "s", "of the first", "work"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="memory and time of preference learning")
    parser.add_argument("--blocks", type=int, default=6, help="transformer blocks (default: 6; Wan2.1-1.3B has 30)")
    parser.add_argument("--heads", type=int, default=12, help="attention heads of 128 channels each")
    parser.add_argument("--geometry", default="9x128x128", help="frames x height x width of the clips, in pixels")
    parser.add_argument("--steps", type=int, default=4, help="steps; the first is not timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--alone", choices=tuple(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    shape = shape_of(options.heads, options.blocks)
    frames, height, width = (int(number) for number in options.geometry.split("x"))
    geometry = frames, height, width
    if options.alone:
        print(json.dumps(measure(ROWS[options.alone], shape, geometry, options.steps, options.device)))
        return 0
    names = list(dict.fromkeys(["psft", *options.rows]))
    estimates = {}
    for name in names:
        row = ROWS[name]
        outline = partial(of_configs, row.model, shape, {})
        estimates[name] = dry_step(outline, *geometry, row.method, GROUPS, losers=row.losers)
    measurements = {name: elsewhere(name, words, options.device) for name in track(names, "measuring", len(names))}
    size = f"{estimates['psft'].parameters / 1e6:,.0f}M weights, {GROUPS} x {estimates['psft'].tokens:,} tokens"
    print(f"{size}, {options.device}\n\n{table(measurements, estimates)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
