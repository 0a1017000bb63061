"""Blocks of weights as bytes: cut, packed and unpacked as `MatMulNBits` stores them. Knows no rule of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def cut(weight: Floats, size: int) -> Floats:
    """Returns [rows, blocks, size] of a weight [rows, columns]; zeros fill the last block."""
    rows, columns = weight.shape
    return np.pad(weight, ((0, 0), (0, -columns % size))).reshape(rows, -1, size)


def packed(codes: npt.NDArray[Any], bits: int) -> Codes:
    """Returns codes [.., n] as bytes [.., ⌈n · bits / 8⌉]: of 4 bits two in one, the first in its lower half."""
    codes = codes.astype(np.uint8)
    if bits == 8:
        return codes
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    pairs: Codes = even[..., 0::2] | even[..., 1::2] << 4
    return pairs


def unpacked(data: Codes, bits: int) -> Codes:
    """Returns the codes in these bytes; an odd number of 4 bits has a zero more."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)


def nonzero(scales: npt.NDArray[Any]) -> Floats:
    """Returns the scales with 1 in the place of 0, to divide by: where all of a block is 0, any scale is right."""
    return np.where(scales == 0, 1, scales).astype(np.float32)
