"""The published Wan models: what is needed to check them without their weights, as facts about their config.json.

`frames`, `size` (height, width) and `fps` are those that each was made for; `steps`, `guidance` and `guidance_low` (of
the expert for little noise; None: the same) are those that its authors' code samples with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Z16: dict[str, Any] = {}  # AutoencoderKLWan's own defaults are those of Wan 2.1
Z48: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,  # the numbers themselves are in the published config alone
    "latents_std": [1.0] * 48,
}
SMALL: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}  # WanTransformer3DModel else 14B
MIDDLE: dict[str, Any] = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
CHANNELS = {"in_channels": 36}
BESIDE = {"image_dim": 1280, "added_kv_proj_dim": 5120}

SAMPLER = ("steps", "guidance", "guidance_low")
MADE_FOR = ("frames", "size", "fps", *SAMPLER)
USUAL: dict[str, Any] = dict(zip(MADE_FOR, (81, (480, 832), 16, 50, 5.0, None), strict=True))
POCKET: dict[str, Any] = dict(zip(MADE_FOR, (33, (64, 64), 16, 12, 1.0, None), strict=True))


def _entry(transformer: dict[str, Any], vae: dict[str, Any] = Z16, experts: int = 1, **made_for: Any) -> dict[str, Any]:
    return {"transformer": transformer, "vae": vae, "experts": experts, **USUAL, **made_for}


PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _entry(SMALL),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _entry({}),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _entry(CHANNELS | BESIDE, steps=40),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _entry(
        MIDDLE | {"in_channels": 48, "out_channels": 48}, Z48, frames=121, size=(704, 1280), fps=24
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _entry({}, experts=2, steps=40, guidance=4.0, guidance_low=3.0),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _entry(CHANNELS, experts=2, steps=40, guidance=3.5),
}


def made_for(path: str) -> dict[str, Any]:
    """What `model.path` is used with where nobody says otherwise: the values of MADE_FOR.

    A folder counts as the published model whose name it bears; what is unknown is taken for a usual Wan.
    """
    known = {"pocket": POCKET} | {Path(name).name: entry for name, entry in PUBLISHED.items()}
    return {key: known.get(Path(path).name, USUAL)[key] for key in MADE_FOR}


def sampler(path: str, *asked: Mapping[str, Any]) -> dict[str, Any]:
    """The values of SAMPLER for `model.path`, each where the last of `asked` that has it says so, else as usual.

    A guidance without its own guidance_low is that of both experts.
    """
    chosen = made_for(path)
    for changes in asked:
        both = {"guidance_low": None} if "guidance" in changes else {}
        chosen |= both | {key: changes[key] for key in SAMPLER if key in changes}
    return {key: chosen[key] for key in SAMPLER}
