"""The published Wan models: the values of their config.json, to check recipes without downloading weights.

Defaults: frames, size and fps are those of the model's training; steps and guidance those of its authors' sampling
code.
"""

from pathlib import Path
from typing import Any, NamedTuple

from posttrain.core.files import read_object
from posttrain.models.base import Defaults
from posttrain.models.wan.folder import diffusers_folder

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

USUAL = Defaults(frames=81, size=(480, 832), fps=16, steps=50, guidance=5.0)
POCKET = Defaults(frames=33, size=(64, 64), fps=16, steps=12, guidance=1.0)


class Published(NamedTuple):
    """A published model: config values of transformer and VAE, number of experts, defaults."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    experts: int
    defaults: Defaults


def _entry(transformer: dict[str, Any], vae: dict[str, Any] = Z16, experts: int = 1, **changes: Any) -> Published:
    return Published(transformer, vae, experts, USUAL._replace(**changes))


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


def defaults(path: str) -> Defaults:
    """The defaults of the model that `path` names.

    A folder counts as the published model of the same name; any other model gets the defaults of a usual Wan.
    """
    known = {"pocket": POCKET} | {Path(name).name: entry.defaults for name, entry in PUBLISHED.items()}
    return known.get(Path(path).name, USUAL)


def read_configs(path: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of transformer and VAE of `model.path`; for published models no download is needed.

    Raises:
        UserError: it is neither a folder nor a published model, and cannot be downloaded from the hub.
    """
    if path in PUBLISHED and not Path(path).is_dir():
        return PUBLISHED[path].transformer, PUBLISHED[path].vae
    root = diffusers_folder(path, revision)
    transformer, vae = (read_object(root / name / "config.json") for name in ("transformer", "vae"))
    return transformer, vae


def needs_picture(path: str, revision: str | None = None) -> bool:
    """Whether `model.path` takes the first frame as further channels, as the image-to-video models do.

    Raises:
        UserError: as read_configs.
    """
    transformer, vae = read_configs(path, revision)
    return bool(transformer.get("in_channels", 16) != vae.get("z_dim", 16))
