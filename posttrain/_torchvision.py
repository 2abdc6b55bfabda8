"""Make PyPI's torchvision importable together with a CPU build of torch.

torchvision's wheels on PyPI are built for CUDA. With a CPU build of torch their C++ library does not load. Then `import
torchvision` fails, and so do the imports of transformers, diffusers and peft. Nothing here needs that library. So
when torchvision is first imported, this module declares the two operators that the import needs; calling them still
fails.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_kept: list[Any] = []  # a declaration lasts as long as its object


class _BeforeTorchvision:
    """A module finder that declares the operators when torchvision is searched; it finds no module itself."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(_BeforeTorchvision)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return
        import torch

        try:
            torch.ops.load_library(Path(spec.origin).parent / "_C.so")
        except OSError:
            if hasattr(torch.ops.torchvision, "nms"):
                return  # declared by setup.sh's copy of this file
            operators = torch.library.Library(name, "DEF")
            for operator in ("nms", "qnms"):
                operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(operators)


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _BeforeTorchvision)
