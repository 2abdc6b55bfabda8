"""Find the diffusers folder that `model.path` of a Wan names."""

from pathlib import Path

from posttrain.core.errors import UserError
from posttrain.core.files import read_object
from posttrain.models.folders import find

EMBEDDED = "wan"  # in posttrain/pocket
EXPERTS = {"high": "transformer", "low": "transformer_2"}  # parts of the folder


def diffusers_folder(path: str, revision: str | None = None) -> Path:
    """The diffusers folder that `path` names: "pocket", a folder, or a hub id.

    Raises:
        UserError: there is none, or it is not a complete model in the layout of diffusers.
    """
    return _diffusers(path, find(path, revision, EMBEDDED))


def _diffusers(path: str, folder: Path) -> Path:
    """`folder`, if it is a complete diffusers model; else raises UserError that names `path`."""
    if (folder / "model_index.json").is_file():
        return folder
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    what, remedy = "is no diffusers folder", "name one, which has a model_index.json"
    if str(config.get("_class_name", "")).endswith("Transformer3DModel"):
        what, remedy = "is a transformer alone", "name the folder of the whole model, and this one in model.start"
    elif "_class_name" in config or any(folder.glob("*.pth")) or any(folder.glob("*.safetensors")):
        what, remedy = "has its authors' own layout", "name the model in that of diffusers (Wan's end in -Diffusers)"
    elif not folder.is_dir() or not any(folder.iterdir()):
        remedy += "; that of its authors is not read (Wan's in diffusers' layout end in -Diffusers)"
    raise UserError(f"model.path: {path} {what}, because it has no model_index.json; {remedy}", "format", "model.path")
