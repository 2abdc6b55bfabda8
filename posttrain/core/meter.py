"""Count the bytes that PyTorch's tensors use, and its floating point operations, for real or fake tensors."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

ATEN: Any = torch.ops.aten
# PyTorch's own table lacks flash attention on CPUs
FLOPS: dict[Any, Any] = dict(flop_registry) | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Memory:
    """Bytes of the tensor storages in use: now, and at the peak."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.known: set[int] = set()  # addresses of storages

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


class Meter(Memory, TorchDispatchMode):
    """Context that counts bytes in use and floating point operations.

    Attributes:
        live, peak: bytes in use on the device.
        main: bytes in use in main memory, see `offloading`.
        flop: floating point operations so far.
    """

    def __init__(self) -> None:
        Memory.__init__(self)
        TorchDispatchMode.__init__(self)
        self.flop = 0
        self.main = Memory()
        self.current: Memory = self  # which memory new tensors are in

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.current.see(tensor)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out

    @contextmanager
    def offloading(self) -> Iterator[None]:
        """Context in which tensors saved for backward count in `main`, as `save_on_cpu` moves them to main memory."""

        def pack(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            self.current = self.main
            copy = tensor.clone()
            self.current = self
            return copy

        with saved_tensors_hooks(pack, Tensor.clone):
            yield
