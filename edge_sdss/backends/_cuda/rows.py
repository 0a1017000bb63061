"""A matrix where it lies, and how it comes to the device: in place, or in chunks through page-locked memory.

Knows nothing of kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_sdss.backends._cuda.gpu import Gpu, Memory, open_gpu
from edge_sdss.backends._cuda.launches import ITEM_BYTES, Type
from edge_sdss.errors import InputError, message

CHUNK_BYTES = 64 << 20
"""Of uploaded rows at a time, twice: while one chunk is computed the next is copied. A longer dialogue is a chunk."""

_TYPES: dict[str, Type] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_STORED = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}


@dataclass(frozen=True)
class Rows:
    """[n, d] values of one of the kernels' types: `host`, or at `address` on the device, which `kept` keeps alive."""

    type: Type
    shape: tuple[int, int]
    host: npt.NDArray[Any] | None = None
    address: int = 0
    kept: Any = field(default=None, repr=False)
    device: int = 0

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.shape[1] * ITEM_BYTES[self.type]

    @classmethod
    def of(cls, given: Any, *, only: Type | None = None) -> Rows:
        """Takes a NumPy array or a torch tensor; what is no float32, float16 or bfloat16 (or not `only`) is cast."""
        if isinstance(given, Rows):
            return given
        if getattr(given, "is_cuda", False):
            return cls._in_place(given, only)
        if hasattr(given, "detach"):  # a torch tensor in the host's memory
            given = given.detach()
            if str(given.dtype) == "torch.bfloat16":
                import torch

                given = given.view(torch.int16).numpy().view(np.uint16) if only is None else given.float()
                if only is None:
                    return cls("bf16", _matrix(given.shape), given)
        array = np.asarray(given)
        type_ = _TYPES.get(array.dtype.name, "f32")
        return cls(type_ if only is None else only, _matrix(array.shape), array)

    @classmethod
    def _in_place(cls, tensor: Any, only: Type | None) -> Rows:
        tensor = tensor.detach()
        type_ = _TYPES.get(str(tensor.dtype).removeprefix("torch."))
        if type_ is None or only not in (None, type_):
            tensor, type_ = tensor.float(), "f32"
        tensor = tensor.contiguous()
        index = tensor.device.index or 0
        return cls(type_, _matrix(tensor.shape), None, tensor.data_ptr(), tensor, index)


@dataclass(frozen=True)
class Chunk:
    """Dialogues `first` to `last` of a batch, on the device."""

    gpu: Gpu
    work: Workspace
    first: int
    last: int
    offsets: npt.NDArray[np.int64]  # beginning with 0
    rows: int  # address of the first row
    offsets_at: int
    type: Type
    width: int

    @property
    def n(self) -> int:
        """Dialogues."""
        return self.last - self.first

    @property
    def tokens(self) -> int:
        """Rows."""
        return int(self.offsets[-1])

    @property
    def longest(self) -> int:
        """Rows of the longest dialogue."""
        return int(np.diff(self.offsets).max())


class _Slot(NamedTuple):
    memories: defaultdict[str, Memory]
    done: Any  # event: what was computed from it is through


class Workspace:
    """A device's memories by name; each of two slots has its own, so that one is filled while the other is read."""

    def __init__(self, gpu: Gpu) -> None:
        self.memories: defaultdict[str, Memory] = defaultdict(gpu.memory)
        self.slots = tuple(_Slot(defaultdict(gpu.memory), gpu.event()) for _ in range(2))


@cache
def workspace(index: int) -> Workspace:
    """Of a device; asked for while it is active."""
    return Workspace(open_gpu(index))


def chunks(rows: Rows, offsets: npt.NDArray[np.int64], extra: Rows | None = None) -> Iterator[tuple[Chunk, int]]:
    """Yields the batch chunk by chunk, on the device, with the address of the same rows of `extra` (0 without).

    Raises InputError for offsets that do not lie in the rows in rising order: a kernel would read beyond them.
    """
    offsets = _checked(offsets, rows.shape[0])
    gpu = open_gpu(rows.device)
    work = workspace(rows.device)
    for matrix in (rows, extra):
        if matrix is not None and getattr(matrix.kept, "is_cuda", False):
            gpu.after(matrix.kept)
    for index, (first, last) in enumerate(_ranges(offsets, rows.row_bytes)):
        memories, done = work.slots[index % 2]
        done.synchronize()  # the chunk before the last has left this slot
        a, b = int(offsets[first]), int(offsets[last])
        local = offsets[first : last + 1] - a
        other = 0 if extra is None else _placed(extra, a, b, memories["extra"])
        where = memories["offsets"].upload(local, np.int64)
        at = _placed(rows, a, b, memories["rows"])
        yield Chunk(gpu, work, first, last, local, at, where, rows.type, rows.shape[1]), other
        done.record(gpu.stream)


def _placed(rows: Rows, a: int, b: int, memory: Memory) -> int:
    if rows.host is None:
        return rows.address + a * rows.row_bytes
    return memory.upload(rows.host[a:b], _STORED[rows.type])


def _ranges(offsets: npt.NDArray[np.int64], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Splits the dialogues where their rows would be more than CHUNK_BYTES."""
    most = max(CHUNK_BYTES // max(row_bytes, 1), 1)
    first, n = 0, len(offsets) - 1
    while first < n:
        last = int(np.searchsorted(offsets, offsets[first] + most, side="right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def _checked(offsets: Any, n: int) -> npt.NDArray[np.int64]:
    bounds = np.asarray(offsets, dtype=np.int64)
    if bounds.ndim != 1 or not len(bounds) or bounds[0] < 0 or bounds[-1] > n or (np.diff(bounds) < 0).any():
        found = f"the offsets do not rise from 0 or more to at most {n}"
        raise InputError(message(f"score a batch of {n} rows", found, "give [B + 1] bounds in order"))
    return bounds


def _matrix(shape: Any) -> tuple[int, int]:
    if len(shape) != 2:
        raise InputError(message("score on the GPU", f"an array of shape {tuple(shape)}", "give [n, d]"))
    return int(shape[0]), int(shape[1])
