"""Device memory: NumPy arrays at addresses, with checks of bounds and alignment and a count of the bytes moved."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.parser import PtxError

Array = npt.NDArray[Any]
PAGE = 4096


class OutOfBounds(PtxError):
    """A load or store outside every bound array, or off its alignment."""


@dataclass
class Traffic:
    """bytes: moved by all threads together. distinct: of how many different bytes. widest: bytes of the widest move."""

    bytes: int = 0
    widest: int = 0
    touched: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool), repr=False)

    @property
    def distinct(self) -> int:
        return int(self.touched.sum())

    def add(self, where: Array, size: int) -> None:
        self.bytes += where.size
        self.widest = max(self.widest, size)
        self.touched[where] = True


class Allocation:
    def __init__(self, address: int, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("only C-contiguous arrays can be bound")
        self.address = address
        self.data = array.reshape(-1).view(np.uint8)
        self.reads = Traffic(touched=np.zeros(self.data.size, bool))
        self.writes = Traffic(touched=np.zeros(self.data.size, bool))


class Memory:
    """Arrays at device addresses, apart from each other by at least a page."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []
        self._next = 1 << 20

    def bind(self, array: Array, shift: int = 0) -> int:
        """Returns an address for the array's memory: `shift` bytes after a multiple of 256."""
        address = self._next + shift
        self._next = -(-(address + array.nbytes) // PAGE) * PAGE + PAGE
        self.bind_at(address, array)
        return address

    def bind_at(self, address: int, array: Array) -> None:
        place = bisect.bisect(self._starts, address)
        self._starts.insert(place, address)
        self._allocations.insert(place, Allocation(address, array))

    def free(self, address: int) -> None:
        place = self._starts.index(address)
        del self._starts[place], self._allocations[place]

    def traffic(self) -> tuple[dict[int, Traffic], dict[int, Traffic]]:
        """Reads and writes by address since the arrays were bound."""
        reads = {a.address: a.reads for a in self._allocations}
        return reads, {a.address: a.writes for a in self._allocations}

    def load(self, addresses: Array, dtype: npt.DTypeLike, count: int) -> Array:
        """[n, count] values from n int64 addresses."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * count
        values = np.empty((len(addresses), size), np.uint8)
        for allocation, lanes, where in self._places(addresses, size, "load"):
            values[lanes] = allocation.data[where]
            allocation.reads.add(where, size)
        return values.view(dtype)

    def store(self, addresses: Array, values: Array) -> None:
        """values: [n, count] to n int64 addresses."""
        raw = np.ascontiguousarray(values).view(np.uint8)
        size = raw.shape[1]
        for allocation, lanes, where in self._places(addresses, size, "store"):
            if not allocation.data.flags.writeable:
                raise OutOfBounds(f"store to read-only memory at {int(addresses[lanes][0]):#x}")
            allocation.data[where] = raw[lanes]
            allocation.writes.add(where, size)

    def _places(self, addresses: Array, size: int, what: str) -> list[tuple[Allocation, Array, Array]]:
        """(allocation, lanes that use it, [lanes, size] byte positions in it)."""
        if (addresses % size).any():
            raise OutOfBounds(f"{what} of {size} bytes at misaligned {int(addresses[addresses % size != 0][0]):#x}")
        owners = np.searchsorted(np.array(self._starts, np.int64), addresses, side="right") - 1
        places = []
        for owner in np.unique(owners):
            lanes = np.flatnonzero(owners == owner)
            allocation = self._allocations[owner]
            offsets = addresses[lanes] - allocation.address
            outside = (offsets < 0) | (offsets + size > allocation.data.size)
            if owner < 0 or outside.any():
                where = int(addresses[lanes][outside.argmax()])
                raise OutOfBounds(f"{what} of {size} bytes at {where:#x}, outside of all memory")
            places.append((allocation, lanes, offsets[:, None] + np.arange(size)))
        return places
