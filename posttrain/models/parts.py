"""The parts of a video model beside its transformer: read from their files when first needed."""

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import nn


class Parts:
    """Parts by name, on `device` while they are used.

    Args:
        read: name -> function that reads the part; called when the part is first needed, and again after `unload`.
        device: where `here` moves a part.
    """

    def __init__(self, read: Mapping[str, Callable[[], nn.Module]], device: torch.device) -> None:
        self._read, self._held, self._device, self._lock = read, dict[str, Any](), device, Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def __getitem__(self, name: str) -> Any:
        with self._lock:  # two threads may ask for a part at the same time
            if name not in self._held:
                self._held[name] = self._read[name]()
            return self._held[name]

    @property
    def held(self) -> list[str]:
        """The names of the parts in memory."""
        return [*self._held]

    def here(self, part: Any) -> Any:
        """Move a part, or the transformer, to the device if it is elsewhere."""
        if next(part.parameters()).device != self._device:
            part.to(self._device)
        return part

    def release(self) -> None:
        """All parts go to main memory, until they are used again."""
        for part in [*self._held.values()]:
            part.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def unload(self) -> None:
        """Free the main memory of the parts too; each is read from its file again when it is next used."""
        self._held.clear()
        self.release()
