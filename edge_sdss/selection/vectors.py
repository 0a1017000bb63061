"""How a unit vector is stored: int8 with a scale per block, float16 or float32. Knows no dialogue.

An LLM's embeddings have a few dimensions far larger than the rest, which one scale for the whole
vector would drown; a scale per block of 32 keeps them apart (ADR 0003).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.config import VectorType

BLOCK = 32


class Codec:
    """Encodes [d] float32 unit vectors to `row_bytes` bytes each, and back."""

    def __init__(self, kind: VectorType, width: int) -> None:
        self.kind = kind
        self.width = width
        self._blocks = -(-width // BLOCK)
        per_value = {"int8": 1, "float16": 2, "float32": 4}[kind]
        self.row_bytes = width * per_value + (2 * self._blocks if kind == "int8" else 0)

    def encode(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """[d] float32 -> [row_bytes] uint8."""
        if self.kind != "int8":
            return vector.astype(self.kind).view(np.uint8)
        blocks = np.zeros((self._blocks, BLOCK), dtype=np.float32)
        blocks.reshape(-1)[: self.width] = vector
        scales = (np.abs(blocks).max(axis=1) / np.float32(127)).astype(np.float16)
        divisors = scales.astype(np.float32)
        divisors[divisors == 0] = 1.0
        blocks /= divisors[:, None]
        codes = np.rint(np.clip(blocks, -127, 127, out=blocks), out=blocks).astype(np.int8)
        return np.concatenate([codes.reshape(-1)[: self.width].view(np.uint8), scales.view(np.uint8)])

    def decode(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[K, row_bytes] uint8 -> [K, d] float32, each row L2-normalised again (0 stays 0)."""
        values = self._values(rows)
        norms = np.sqrt(np.einsum("ij,ij->i", values, values))[:, None]
        norms[norms == 0] = 1.0
        values /= norms
        return values

    def _values(self, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if self.kind != "int8":
            return np.ascontiguousarray(rows).view(self.kind).astype(np.float32)
        blocks: npt.NDArray[Any] = np.zeros((len(rows), self._blocks, BLOCK), dtype=np.float32)
        values = blocks.reshape(len(rows), -1)[:, : self.width]
        values[...] = rows[:, : self.width].view(np.int8)
        blocks *= np.ascontiguousarray(rows[:, self.width :]).view(np.float16)[:, :, None].astype(np.float32)
        return np.ascontiguousarray(values)
