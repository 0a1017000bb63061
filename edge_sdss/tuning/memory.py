"""Counts the peak bytes of live tensors. Knows nothing of models, nor of memory that is no tensor's.

What a kernel takes for itself while it runs, and what an allocator keeps aside, is not seen on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTensorBytes:
    """Context manager: `peak` is the largest sum of bytes of tensor storages alive at once within it.

    `alive` holds the tensors that exist at the start (weights, optimizer state). Tensors that share a
    storage count once. On CUDA the allocator's own count is taken, `alive` included, in which memory that
    others hold on the device counts too. Costs some microseconds per operation, so it is for single steps.
    """

    def __init__(self, alive: Iterable[torch.Tensor], device: torch.device | str = "cpu"):
        self.peak = 0
        self._device = torch.device(device)
        self._live = _LiveStorages()
        if self._device.type != "cuda":
            for tensor in alive:
                self._live.see(tensor)

    def __enter__(self) -> PeakTensorBytes:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._live.__exit__(*error)  # type: ignore[no-untyped-call]
            self.peak = self._live.peak


class _LiveStorages(TorchDispatchMode):
    """Sees every operation below autograd, hence those of the backward too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # The arguments are looked at after the call: an operation may have made them grow.
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        known = self._known.get(address)
        if known is None:
            self._known[address] = (weakref.ref(storage, lambda _: self._forget(address)), size)
            self.live += size
        elif known[1] != size:
            self._known[address] = (known[0], size)
            self.live += size - known[1]
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        self.live -= self._known.pop(address)[1]
