"""The shared memory of each block, and a watch on races in it between two barriers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.memory import OutOfBounds
from ptx.parser import PtxError

Array = npt.NDArray[Any]
NOBODY, SEVERAL = -1, -2


class Race(PtxError):
    """Two threads used the same byte between barriers, and one of them wrote it."""


class Shared:
    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.data = np.full((blocks, size), 0xFF, np.uint8)
        self.writer = np.full((blocks, size), NOBODY, np.int32)
        self.reader = np.full((blocks, size), NOBODY, np.int32)

    def new_epoch(self, blocks: Array) -> None:
        """After a barrier of these blocks nothing before it can race."""
        self.writer[blocks] = self.reader[blocks] = NOBODY

    def load(self, blocks: Array, threads: Array, addresses: Array, dtype: npt.DTypeLike, count: int) -> Array:
        """[n, count] values from n addresses in the shared memory of n blocks."""
        where, who = self._places(addresses, np.dtype(dtype).itemsize * count), threads[:, None]
        place = (blocks[:, None], where)
        writer, reader = self.writer[place], self.reader[place]
        if ((writer != NOBODY) & (writer != who)).any():
            raise Race("reads shared memory that another thread has written since the last barrier")
        self.reader[place] = np.where((reader == NOBODY) | (reader == who), who, SEVERAL)
        seen = self.reader[place]
        self.reader[place] = np.where(seen == who, seen, SEVERAL)  # several lanes of this very load
        return np.ascontiguousarray(self.data[place]).view(dtype)

    def store(self, blocks: Array, threads: Array, addresses: Array, values: Array) -> None:
        raw, who = np.ascontiguousarray(values).view(np.uint8), threads[:, None]
        place = (blocks[:, None], self._places(addresses, raw.shape[1]))
        for used in (self.writer[place], self.reader[place]):
            if ((used != NOBODY) & (used != who)).any():
                raise Race("writes shared memory that another thread has used since the last barrier")
        self.writer[place] = who
        if (self.writer[place] != who).any():
            raise Race("two threads write the same shared memory at once")
        self.data[place] = raw

    def _places(self, addresses: Array, size: int) -> Array:
        if (addresses % size).any():
            raise OutOfBounds(f"shared memory, {size} bytes, misaligned")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise OutOfBounds(f"shared memory, {size} bytes, outside of its {self.size}")
        return addresses[:, None] + np.arange(size)
