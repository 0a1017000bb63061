"""How a unit vector is stored: int8 with a scale per block, float16 or float32. Knows no dialogue.

An LLM's embeddings have a few dimensions far larger than the rest, which one scale for the whole
vector would drown; a scale per block of 64 keeps them apart (ADR 0003).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edge_sdss.config import VectorType

BLOCK = 64
T = TypeVar("T", bound=np.generic)


class Codec:
    """Encodes [d] float32 unit vectors to `row_bytes` bytes each, and back."""

    def __init__(self, kind: VectorType, width: int) -> None:
        self.kind = kind
        self.width = width
        self._blocks = -(-width // BLOCK)
        per_value = {"int8": 1, "float16": 2, "float32": 4}[kind]
        self.row_bytes = width * per_value + (4 * self._blocks if kind == "int8" else 0)

    def encode(self, vector: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """[d] float32 -> its [row_bytes] uint8, and the [d] float32 unit vector that `decode` gives back."""
        if self.kind != "int8":
            code = vector.astype(self.kind).view(np.uint8)
            return code, self.decode(code[None])[0]
        blocks = self._padded(vector[None]).reshape(self._blocks, BLOCK)
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        levels = np.rint(blocks / (scales if scales.all() else np.where(scales == 0, 1, scales)))
        codes = levels.astype(np.int8).reshape(-1)[: self.width]
        values = (levels * scales).reshape(1, -1)[:, : self.width]
        return np.concatenate([codes.view(np.uint8), scales.reshape(-1).view(np.uint8)]), _unit(values)[0]

    def decode(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[K, row_bytes] uint8 -> [K, d] float32, each row L2-normalised again (0 stays 0)."""
        if self.kind != "int8":
            return _unit(np.ascontiguousarray(rows).view(self.kind).astype(np.float32))
        codes = self._padded(rows[:, : self.width].view(np.int8)).reshape(len(rows), self._blocks, BLOCK)
        scales = np.ascontiguousarray(rows[:, self.width :]).view(np.float32)
        return _unit((codes * scales[:, :, None]).reshape(len(rows), -1)[:, : self.width])

    def _padded(self, rows: npt.NDArray[T]) -> npt.NDArray[T]:
        """Rows with zeros up to a whole number of blocks."""
        missing = self._blocks * BLOCK - self.width
        return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))[:, None]
    if not norms.all():
        norms[norms == 0] = 1.0
    unit: npt.NDArray[np.float32] = values / norms
    return unit
