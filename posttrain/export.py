"""A finished run as something to hand out: the weights in diffusers' own layout, and a model card."""

import math
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from posttrain.files import UserError, read_json, read_jsonl, write_text
from posttrain.models import lora

ADAPTER = "adapter"  # below the run folder


def export(run: Path | str) -> list[Path]:
    """Check the trained weights in `run`/adapter, write the model card beside them, and return both paths.

    The weights are `pytorch_lora_weights.safetensors` (an adapter) or the folder `transformer` (all weights).

    Raises:
        UserError: the run has no trained weights, or they are damaged.
    """
    run = Path(run)
    adapter, transformer = run / ADAPTER / lora.FILE, run / ADAPTER / "transformer"
    weights = next((path for path in (adapter, transformer) if path.exists()), None)
    if weights is None:
        raise UserError(f"{run / ADAPTER}: has no weights; finish the run first (posttrain run)")
    for file in [weights] if weights.is_file() else sorted(weights.glob("*.safetensors")):
        _check(file)
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run / 'recipe.yaml'}: does not exist; name the folder of a run")
    text = (run / "recipe.yaml").read_text()
    report = read_json(run / "report.json") if (run / "report.json").is_file() else {"rows": []}
    card = run / ADAPTER / "README.md"
    write_text(card, _card(text, report["rows"], weights))
    return [weights, card]


def _check(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            broken = [name for name in tensors.keys() if not tensors.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: is damaged; run the recipe again, it continues from its last checkpoint") from error
    if broken:
        raise UserError(f"{file}: {broken[0]} is not finite; train again with a lower train.lr")


def _card(text: str, rows: list[dict[str, Any]], weights: Path) -> str:
    recipe = yaml.safe_load(text)
    model, method = recipe["model"], recipe["method"]["name"]
    pocket = model["path"] == "pocket"
    local = pocket or Path(model["path"]).exists()
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["video", "physics", method, *(["lora"] if weights.is_file() else [])],
        **({} if local else {"base_model": model["path"]}),
    }
    base = "the embedded pocket model" if pocket else f"`{Path(model['path']).name if local else model['path']}`"
    adapter = model.get("adapter") or {}
    rank, alpha = adapter.get("rank"), adapter.get("alpha") or adapter.get("rank")
    what = f"A LoRA adapter (rank {rank}, alpha {alpha})" if weights.is_file() else "All weights of the transformer"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe['run']}",
        f"{what} for {base}, trained with `{method}` on simulated clips so that things move as physics has it.",
        "## Use",
        f"```python\n{_usage(model['path'], weights, _clip(recipe))}\n```",
        *(["## Results", _table(rows)] if rows else []),
        "## Recipe",
        f"```yaml\n{text.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _clip(recipe: dict[str, Any]) -> dict[str, Any]:
    """The first row of the training clips' metadata, or nothing where they are gone."""
    clips = recipe["data"]["clips"]
    folder = Path(clips if isinstance(clips, str) else clips[0])
    metadata = folder / recipe["data"].get("split", "train") / "metadata.jsonl"
    return read_jsonl(metadata)[0] if metadata.is_file() else {}


def _usage(base: str, weights: Path, clip: dict[str, Any]) -> str:
    adapter = weights.is_file()
    lines = [f"from diffusers import WanImageToVideoPipeline{'' if adapter else ', WanTransformer3DModel'}"]
    lines += ["from diffusers.utils import export_to_video, load_image"]
    if base == "pocket":
        lines += ["from posttrain.pocket import folder", "", 'base = folder("wan")']
    else:
        lines += ["", f"base = {base!r}"]
    if adapter:
        lines += [
            "pipe = WanImageToVideoPipeline.from_pretrained(base, expand_timesteps=True)",
            'pipe.load_lora_weights("adapter")',
        ]
    else:
        lines += [
            'transformer = WanTransformer3DModel.from_pretrained("adapter", subfolder="transformer")',
            "pipe = WanImageToVideoPipeline.from_pretrained(base, transformer=transformer, expand_timesteps=True)",
        ]
    size = f", num_frames={clip['frames']}" if "frames" in clip else ""
    lines += [
        'image = load_image("first_picture.png")',
        f"clip = pipe(image=image, prompt={clip.get('caption', 'a ball falls.')!r}, height=image.height,",
        f"            width=image.width{size}, num_inference_steps=12, guidance_scale=1.0)",
        f'export_to_video(clip.frames[0], "clip.mp4", fps={clip.get("fps", 16)})',
    ]
    return "\n".join(lines)


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
