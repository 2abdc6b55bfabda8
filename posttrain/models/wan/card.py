"""How diffusers makes a clip with a trained Wan: the code in the model card of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.models.base import ModelConfig
from posttrain.models.wan.folder import EMBEDDED, EXPERTS
from posttrain.models.wan.published import defaults, needs_picture


def pipeline_code(
    config: ModelConfig, adapter: bool, clip: Mapping[str, Any], sampler: Mapping[str, Any]
) -> str | None:
    """Python that makes a clip with diffusers' pipeline, see `Family`.

    None for an image-to-video model without a first frame, which diffusers cannot sample, and if only the low-noise
    expert has guidance: with guidance_scale 1, diffusers uses no guidance for either.
    """
    if sampler["guidance"] <= 1 < (sampler["guidance_low"] or 0):
        return None
    start, image = config.start, config.conditioning == "image"
    channels = needs_picture(config.path, config.revision)
    if channels and not image:
        return None
    pipeline, name = "WanImageToVideoPipeline" if image else "WanPipeline", EXPERTS[config.expert or "high"]
    transformer = "adapter/transformer" if not adapter else start if start and Path(start).is_dir() else None
    options = ["base", *([f"revision={config.revision!r}"] if config.revision else [])]
    bf16 = config.dtype == "bf16"
    options += ['torch_dtype={"vae": torch.float32, "default": torch.bfloat16}'] if bf16 else []
    options += [f"{name}=transformer"] if transformer else []
    options += ["expand_timesteps=True"] if image and not channels else []  # the picture is a clean latent
    lines = ["import torch"] if bf16 else []
    lines += [f"from diffusers import {pipeline}{', WanTransformer3DModel' if transformer else ''}"]
    lines += [
        f"from diffusers.utils import encode_video{', load_image' if image else ''}  # needs PyAV (pip install av)"
    ]
    if config.path == "pocket":
        lines += ["from posttrain.pocket import folder", "", f'base = folder("{EMBEDDED}")']
    else:
        lines += ["", f"base = {config.path!r}"]
    if transformer:
        dtype = ", torch_dtype=torch.bfloat16" if bf16 else ""
        lines += [f"transformer = WanTransformer3DModel.from_pretrained({transformer!r}{dtype})"]
    moved = "" if config.path == "pocket" else '.to("cuda")'
    lines += [f"pipe = {pipeline}.from_pretrained({', '.join(options)}){moved}"]
    own, other = ("", ", load_into_transformer_2=True")[:: -1 if config.expert == "low" else 1]
    if adapter and config.merge:  # the run's adapter is a change to a base that has them
        names = [f"merged_{number}" for number in range(len(config.merge))]
        for key, item in zip(names, config.merge, strict=True):
            lines += [f"pipe.load_lora_weights({item.path!r}, adapter_name={key!r}{own})"]
        lines += [
            f'pipe.load_lora_weights("adapter", adapter_name="trained"{own})',
            f"pipe.{name}.set_adapters({[*names, 'trained']!r}, {[*(item.scale for item in config.merge), 1.0]!r})",
        ]
    elif adapter:
        lines += [f'pipe.load_lora_weights("adapter"{own})']
    if config.other_adapter:  # of the expert that was not trained
        lines += [f"pipe.load_lora_weights({config.other_adapter!r}{other})"]
    arguments = [f"prompt={clip.get('caption', 'a ball falls.')!r}"]
    if image:
        lines += ['image = load_image("first_picture.png")']
        arguments = ["image=image", *arguments, "height=image.height", "width=image.width"]
    elif "size" in clip:
        arguments += [f"height={clip['size'][0]}", f"width={clip['size'][1]}"]
    arguments += [f"num_frames={clip['frames']}"] if "frames" in clip else []
    arguments += [f"num_inference_steps={sampler['steps']}", f"guidance_scale={sampler['guidance']}"]
    arguments += [f"guidance_scale_2={sampler['guidance_low']}"] if sampler["guidance_low"] else []
    lines += [
        "clip = pipe(",
        *(f"    {argument}," for argument in arguments),
        ")",
        f'encode_video(clip.frames[0], fps={clip.get("fps") or defaults(config.path).fps}, output_path="clip.mp4")',
    ]
    return "\n".join(lines)
