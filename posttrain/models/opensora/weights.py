"""Read Open-Sora's weights in all their layouts into our classes, which use the published parameter names.

A folder holds config.json and, in safetensors, whole or in shards with an index, diffusers' or transformers' file; a
training checkpoint holds model/ with pytorch_model*.bin, or ema.pt. Pickles are read for tensors alone.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core.errors import UserError
from posttrain.core.files import read_object, replacing

CONFIG, FILE = "config.json", "model.safetensors"


def files_of(path: Path) -> list[Path]:
    """The files of weights that `path` means: itself, what an index in it lists, its only ones, or a checkpoint's.

    Raises:
        UserError: there are none, or the index names what is no file of the folder.
    """
    if path.is_file():
        return [path]
    for ending in ("safetensors", "bin"):
        if indexes := sorted(path.glob(f"*.{ending}.index.json")):
            maps = [read_object(index).get("weight_map", {}) for index in indexes]
            names = sorted({str(name) for entries in maps for name in entries.values()})
            if wrong := [name for name in names if Path(name).name != name]:
                raise UserError(f"{indexes[0]}: lists {wrong[0]!r}, which is not a file of its folder", "outside")
            return [path / name for name in names]
        if files := sorted(path.glob(f"*.{ending}")):
            return files
    for inner in (path / "model", path / "ema.pt"):
        if inner.exists():
            return files_of(inner)
    raise UserError(
        f"{path}: has no weights (*.safetensors, pytorch_model*.bin, model/ or ema.pt); get them again", "missing"
    )


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of the weights at `path`, by name.

    Raises:
        UserError: a file is missing or damaged, holds other things than tensors, or two files hold the same name.
    """
    weights: dict[str, Tensor] = {}
    for file in files_of(path):
        if not file.is_file():
            raise UserError(f"{file}: does not exist; get this file of the model again", "missing")
        try:
            if file.suffix == ".safetensors":
                tensors = load_file(file)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{file}: is damaged ({_reason(error)}); get this file of the model again", "damaged"
            ) from error
        except Exception as error:  # of the unpickler, for all that is no tensor
            raise UserError(
                f"{file}: has objects other than tensors, which are not read ({_reason(error)}); save its tensors as "
                "safetensors",
                "format",
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UserError(
                f"{file}: should hold tensors by name and nothing else; save the model's state_dict() alone", "format"
            )
        if twice := sorted(tensors.keys() & weights.keys()):
            raise UserError(
                f"{file}: has {twice[0]}, and so does another file here; remove one of the two", "duplicate"
            )
        weights |= tensors
    return weights


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Published(ModelMixin, ConfigMixin):
    """A diffusers model that is read from, and can be written to, the published layout too."""

    @classmethod
    def constants(cls, config: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors that the weights may lack, with the values that they then have."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        output_loading_info: bool = False,
        **_: Any,
    ) -> Any:
        """The model in a local folder, in eval mode.

        Args:
            torch_dtype: None: as the files have it.
            output_loading_info: also return a dict of what is missing, which is nothing.

        Raises:
            UserError: as `read` and `build`.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        model = cls.build(cls.read_config(folder), read(folder), folder, torch_dtype)
        return (model, {"missing_keys": []}) if output_loading_info else model

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any]:
        """The fields of a folder's config.json that our class has; {} for a training checkpoint without config.json.

        Raises:
            UserError: a folder with safetensors has no config.json.
        """
        bare = not (folder / CONFIG).exists() and files_of(folder)[0].suffix != ".safetensors"
        config, known = {} if bare else read_object(folder / CONFIG), inspect.signature(cls.__init__).parameters
        return {name: value for name, value in config.items() if name in known}

    @classmethod
    def build(
        cls, config: dict[str, Any], weights: dict[str, Tensor], source: Path, dtype: torch.dtype | None = None
    ) -> Self:
        """The model of this config with these weights, in eval mode.

        Args:
            source: where they come from, for messages.
            dtype: None: as the weights have it.

        Raises:
            UserError: a weight is missing, unknown or of another shape; the message names it.
        """
        with torch.device("meta"):
            model = cls(**config)
        wanted, constants = model.state_dict(), cls.constants(dict(model.config) | config)
        weights = constants | weights
        if missing := sorted(wanted.keys() - weights.keys()):
            raise UserError(f"{source}: lacks {missing[0]}; get this part of the model again", "damaged")
        if unknown := sorted(weights.keys() - wanted.keys()):
            raise UserError(
                f"{source}: has {unknown[0]}, which this model does not have; use the model that it belongs to",
                "mismatch",
            )
        for name, tensor in wanted.items():
            if weights[name].shape != tensor.shape:
                shapes = f"{list(weights[name].shape)}, and the model's is {list(tensor.shape)}"
                raise UserError(f"{source}: {name} is of shape {shapes}; use what belongs together", "mismatch")
        common = dtype or next(tensor.dtype for name, tensor in weights.items() if name not in constants)
        for name in weights:
            if dtype is not None or name in constants:
                weights[name] = weights[name].to(common)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_published(self, folder: Path) -> None:
        """Write config.json and model.safetensors as the published model has them."""
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        names = {"_class_name": type(self).__name__, "model_type": type(self).__name__}
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / CONFIG).write_text(json.dumps(names | config, indent=2) + "\n")
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            save_file(tensors, temporary / FILE, {"format": "pt"})
