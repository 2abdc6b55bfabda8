"""Export a finished run: the weights in other programs' formats, a model card, and a check that they load.

    adapter/pytorch_lora_weights.safetensors   diffusers, always; or adapter/transformer if all weights were trained
    adapter/<run>_comfyui.safetensors          the same adapter for ComfyUI
    merged/transformer                         a diffusers transformer with the adapter merged

If a model has two experts, each has its own run. The name of the ComfyUI file contains "high_noise" or "low_noise",
and the merged low-noise expert is the folder `transformer_2`, as in diffusers.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from posttrain.core.errors import UserError
from posttrain.core.files import read_jsonl, read_object, write_text
from posttrain.models import lora
from posttrain.models.base import Family, ModelConfig, VideoModel, family, sampler

ADAPTER, MERGED = "adapter", "merged"  # below the run folder
EXPERTS = {"high": ("high_noise", "transformer"), "low": ("low_noise", "transformer_2"), None: ("", "transformer")}


def export(
    run: Path | str,
    formats: Sequence[str] = ("diffusers",),
    config: ModelConfig | None = None,
) -> list[Path]:
    """Check the trained weights in `run`, write what `formats` lists and the model card; return the paths, card last.

    Args:
        formats: "diffusers" (the files that training wrote, and the card), "comfyui", "merged".
        config: the model config with start and merge resolved to files; None: from the run's recipe.

    Raises:
        UserError: the run has no trained weights, they are damaged, a format needs an adapter and there is none, or
            the model's configs are missing.
    """
    run = Path(run)
    adapter, transformer = run / ADAPTER / lora.FILE, run / ADAPTER / "transformer"
    weights = next((path for path in (adapter, transformer) if path.exists()), None)
    if weights is None:
        raise UserError(f"{run / ADAPTER}: has no weights; finish the run first (posttrain run)", "unfinished")
    for file in [weights] if weights.is_file() else sorted(weights.glob("*.safetensors")):
        _check(file)
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run / 'recipe.yaml'}: does not exist; name the folder of a run", "missing")
    text = (run / "recipe.yaml").read_text()
    model = yaml.safe_load(text)["model"]
    if weights.is_dir() and (other := sorted(set(formats) - {"diffusers"})):
        raise UserError(
            f"{run}: export: {other[0]} is made from an adapter, and this run trained all weights; leave it out, use "
            f"{weights}",
            "conflict",
            "export",
        )
    written = [weights]
    config = config or ModelConfig(**model)
    noise, name = EXPERTS[config.expert]
    if "comfyui" in formats:
        written += [run / ADAPTER / ("_".join(filter(None, (run.resolve().name, noise, "comfyui"))) + ".safetensors")]
        lora.save_comfyui(weights, written[-1], family(config.family).original_name)
    if "merged" in formats:
        written += [run / MERGED / name]
        family(config.family).save_merged(config, weights, written[-1])
    report = read_object(run / "report.json") if (run / "report.json").is_file() else {"rows": []}
    card = run / ADAPTER / "README.md"
    write_text(card, _card(text, report["rows"], written, config))
    return [*written, card]


@torch.no_grad()
def check(files: Sequence[Path], model: VideoModel, config: ModelConfig) -> Iterator[str]:
    """Load each file as other programs do and compare it with the trained model; yield a line about each.

    Only one transformer at a time is on the device.

    Args:
        files: adapters (safetensors) and transformer folders, as `export` returns them.
        model: the trained model.
        config: its config; `start` and `merge` are files and folders.

    Raises:
        UserError: the stock pipeline cannot load a file, or its velocity differs. Allowed are 1% of the adapter's own
            change plus rounding errors: 1e-5 of the largest velocity in float32, 2e-2 in lower precision (4 x 2^-8 with
            a margin). A small adapter would be hidden by this rounding, so its share in the weights must also be 1:
            within 1e-3, or within 0.02 if it is merged into low-precision weights. If such weights cannot represent so
            small an adapter, the share is printed but not checked.
    """
    stock = family(config.family)
    ours, device, random = model.transformer, model.device, torch.Generator().manual_seed(0)
    side, frames = 2 * stock.SIDE, stock.FRAMES
    z_BCFHW = torch.randn((1, *model.latent_shape(frames, side, side)), generator=random).to(device)
    low, high = model.times
    t_BF = torch.full((1, z_BCFHW.shape[2]), low + 0.9 * (high - low), device=device)
    text_BLD = model.encode_text(["a ball falls."])
    with torch.no_grad():
        condition = model.condition((2 * torch.rand((1, 3, 1, side, side), generator=random) - 1).to(device), frames)
    model.unload()

    def velocity(transformer: nn.Module) -> torch.Tensor:
        model.transformer = transformer
        try:
            return model.velocity(z_BCFHW, t_BF, text_BLD, condition).float()
        finally:
            model.transformer = ours

    expected, adapted = velocity(ours), lora.attached(ours)
    largest = effect = expected.abs().max().item()
    if adapted:
        with lora.disabled(ours):
            effect = (expected - velocity(ours)).abs().max().item()
    ours.to("cpu")
    for file in files:
        if file.is_file():
            transformer = stock.bare(config)
            _load_stock(stock, transformer, file)
        else:
            dtype = next(ours.parameters()).dtype
            transformer = type(lora.unwrap(ours)).from_pretrained(file, torch_dtype=dtype)
        error = (velocity(transformer) - expected).abs().max().item()
        share = lora.share(ours, transformer) if adapted else 1.0
        coarse = _coarse(file) or any(p.dtype != torch.float32 for p in ours.parameters())
        allowed = 0.01 * effect * adapted + largest * (2e-2 if coarse else 1e-5)
        changes = f", of which the adapter makes {effect:.2g}; {share:.1%} of it in the weights" if adapted else ""
        numbers = f"largest error {error:.1e} of a velocity up to {largest:.2g}{changes}"
        if not error <= allowed:
            raise UserError(
                f"{file}: {numbers}; more than {allowed:.1e} is wrong: delete it and export again", "mismatch"
            )
        merged = coarse and file.is_dir()
        hidden = file.is_dir() and effect < (2**-8 if coarse else 2**-20) * largest  # too small for sums to hold
        if not hidden and not abs(share - 1) <= (1 - lora.SURVIVES if merged else 1e-3):
            rounded = ", or distribute the adapter file: rounding to these weights removes it" if merged else ""
            raise UserError(f"{file}: {numbers}, which should be 100%: delete it and export again{rounded}", "mismatch")
        transformer.to("cpu")  # before the next one comes
        yield f"{file}: {numbers}"


def _load_stock(stock: Family, transformer: nn.Module, file: Path) -> None:
    try:
        stock.load_stock_adapter(transformer, file)
    except Exception as error:  # diffusers and peft each raise their own kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise UserError(
            f"{file}: the stock pipeline cannot load it ({reason}); delete it and leave its format out of export:, or "
            "train with other model.adapter.targets",
            "unsupported",
            "export",
        ) from error


def _coarse(path: Path) -> bool:
    """Whether weights are stored in lower precision than float32."""
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if any(tensors.get_tensor(name).dtype != torch.float32 for name in tensors.keys()):
                return True
    return False


def _check(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            broken = [name for name in tensors.keys() if not tensors.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: is damaged; run the recipe again, it continues from its last checkpoint", "damaged"
        ) from error
    if broken:
        raise UserError(f"{file}: {broken[0]} is not finite; train again with a lower train.lr", "not_finite")


def _card(text: str, rows: list[dict[str, Any]], written: Sequence[Path], config: ModelConfig) -> str:
    recipe, weights = yaml.safe_load(text), written[0]
    model, method = recipe["model"], recipe["method"]["name"]
    pocket = model["path"] == "pocket"
    local = pocket or Path(model["path"]).exists()
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if config.conditioning == "image" else "text-to-video",
        "tags": ["video", "physics", method, *(["lora"] if weights.is_file() else [])],
        **({} if local else {"base_model": model["path"]}),
    }
    base = "the embedded pocket model" if pocket else f"`{Path(model['path']).name if local else model['path']}`"
    adapter = model.get("adapter") or {}
    rank, alpha = adapter.get("rank"), adapter.get("alpha") or adapter.get("rank")
    what = f"A LoRA adapter (rank {rank}, alpha {alpha})" if weights.is_file() else "All weights of the transformer"
    merged = [f"`{item['path']}` (times {item['scale']:g})" for item in model.get("merge") or ()]
    origin = f" with {' and '.join(merged)} merged into it" if merged else ""
    origin += f", continued from `{model['start']}`" if model.get("start") else ""
    clips = "the clips that the recipe below names"
    if _simulated(recipe["data"]):
        clips = "simulated clips so that things move as physics has it"
    others = [f"- `{path.parent.name}/{path.name}`: {_purpose(path)}" for path in written[1:]]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe['run']}",
        f"{what} for {base}{origin}, trained with `{method}` on {clips}.",
        "## Use",
        _usage(config, weights, recipe),
        *(["Beside it:", "\n".join(others)] if others else []),
        *(["## Results", _table(rows)] if rows else []),
        "## Recipe",
        f"```yaml\n{text.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _first_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The first row of metadata.jsonl of each folder of clips; empty if there is none."""
    rows = []
    for folder in [data["clips"]] if isinstance(data["clips"], str) else data["clips"]:
        metadata = Path(folder) / data.get("split", "train") / "metadata.jsonl"
        rows.append(next(iter(read_jsonl(metadata) if metadata.is_file() else []), {}))
    return rows


def _simulated(data: dict[str, Any]) -> bool:
    """Whether all clips were filmed by `sim make`: the recipe says so, or they have its annotations."""
    return bool(data.get("make")) or all("annotations" in row for row in _first_rows(data))


def _clip(recipe: dict[str, Any]) -> dict[str, Any]:
    """Those of caption, frames, size and fps of the first training clip that are known."""
    data = recipe["data"]
    row = _first_rows(data)[0]
    return row | {key: data[key] for key in ("frames", "size", "fps") if data.get(key)}


def _purpose(path: Path) -> str:
    if path.is_file():
        return "the same adapter for ComfyUI (`models/loras`)"
    return "the whole transformer with the adapter merged, for `from_pretrained` of diffusers"


def _usage(config: ModelConfig, weights: Path, recipe: dict[str, Any]) -> str:
    """Markdown: code that samples a clip with the stock pipeline and the sampler of the evaluation."""
    model, asked = family(config.family), (recipe.get("eval") or {}).get("sampler") or {}
    how = sampler(model.defaults(config.path), asked)
    code = model.pipeline_code(config, weights.is_file(), _clip(recipe), how)
    if code is None:
        return "No stock pipeline makes such a clip; `posttrain sample` does, from the run."
    return f"```python\n{code}\n```"


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of every metric in the report's rows: mean [95% interval]."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, dict)))
    names = [name for name in names if any("mean" in row.get(name, {}) for row in rows)]

    def cell(value: dict[str, Any] | None) -> str:
        if value is None or value.get("mean") is None or not math.isfinite(value["mean"]):
            return "–"
        interval = f" [{value['low']:.3f}, {value['high']:.3f}]" if value.get("low") is not None else ""
        return f"{value['mean']:.3f}{interval}"

    lines = ["| " + " | ".join(["model", "split", *names]) + " |", "|---" * (len(names) + 2) + "|"]
    lines += [
        "| " + " | ".join([str(row["model"]), str(row["split"]), *(cell(row.get(name)) for name in names)]) + " |"
        for row in rows
    ]
    return "\n".join(lines)
