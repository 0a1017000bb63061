"""Weights of the fast graph: read without torch, and brought into 4 or 8 bits; exactly, where they came from there.

A file that was made from a 4-bit or 8-bit one (such as the default model, from Q4_1 and Q8_0) holds float values of
which each block of 32 has at most 16 (256) equally spaced ones. `four_bits` and `eight_bits` find them again.
Knows no graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ExportError, message
from edge_sdss.exporting.blocks import Codes, Floats, cut, nonzero, packed

_DTYPES: dict[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ON_GRID = 2e-3  # of a step: float32 rounding of scale * code + minimum stays below it, chance does not


class Weights:
    """The tensors of a folder's safetensors files, by name; each is read when it is asked for."""

    def __init__(self, folder: Path):
        self._tensors: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
            header.pop("__metadata__", None)
            self._tensors.update({name: (file, 8 + size, entry) for name, entry in header.items()})
        if not self._tensors:
            found = f"{folder} holds no .safetensors file"
            raise ExportError(message("read the weights", found, "save the model with save_pretrained"))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Floats:
        """Returns the tensor as float32. Raises ExportError where it is missing or of another kind."""
        if name not in self._tensors:
            raise ExportError(message(f"read {name}", "the model has no such tensor", "check its config.json"))
        file, base, entry = self._tensors[name]
        if entry["dtype"] not in _DTYPES:
            found = f"it is stored as {entry['dtype']}"
            raise ExportError(message(f"read {name}", found, "export the model from float32, float16 or bfloat16"))
        begin, end = entry["data_offsets"]
        with file.open("rb") as handle:
            handle.seek(base + begin)
            raw = np.frombuffer(handle.read(end - begin), _DTYPES[entry["dtype"]])
        values = (raw.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else raw
        return np.asarray(values, np.float32).reshape(entry["shape"])


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight [rows, columns] in blocks: value = scale * code + minimum.

    codes: uint8 [rows, blocks, block_size]; scales, minima: float32 [rows, blocks], all exact in float16 unless
    `recovered` found wider ones. `recovered`: the float weights come out bit by bit.
    """

    codes: Codes
    scales: Floats
    minima: Floats
    recovered: bool

    def values(self) -> Floats:
        """Returns the weight that these blocks stand for, float32 [rows, blocks * block_size]."""
        values = self.scales[..., None] * self.codes + self.minima[..., None]
        return values.reshape(len(values), -1)


def four_bits(weight: Floats, block_size: int) -> Blocks:
    """Returns the weight [rows, columns] with 16 levels a block: as it was made, or fitted."""
    blocks = cut(weight, block_size)
    return _recover(blocks) or _fit(blocks)


def eight_bits(weight: Floats, block_size: int) -> Blocks:
    """Returns the weight [rows, columns] with 255 levels a block, symmetric: minimum = -128 * scale."""
    blocks = cut(weight, block_size)
    scales = _half(np.abs(blocks).max(-1) / 127)
    codes = np.rint(blocks / nonzero(scales)[..., None])
    codes = np.clip(codes, -127, 127)
    exact = bool((codes.astype(np.float32) * scales[..., None] == blocks).all())
    return Blocks((codes + 128).astype(np.uint8), scales, -128 * scales, exact)


def _recover(blocks: Floats) -> Blocks | None:
    """Finds scale and codes of blocks that lie on a grid of at most 16 levels; None where one block does not."""
    low = blocks.min(-1)
    span = blocks.max(-1) - low
    scales, open_ = np.zeros_like(span), span > 0
    codes = np.zeros(blocks.shape, np.uint8)
    for steps in range(15, 0, -1):
        index = np.nonzero(open_)
        if not len(index[0]):
            break
        if steps < 15 and len(index[0]) == open_.size:  # not one block has all of its levels: not such a weight
            return None
        step = _exact_half(span[index] / steps)
        position = (blocks[index] - low[index][:, None]) / step[:, None]
        level = np.rint(position)
        fits = np.abs(position - level).max(-1) < _ON_GRID
        taken = tuple(axis[fits] for axis in index)
        scales[taken], codes[taken] = step[fits], level[fits].astype(np.uint8)
        open_[taken] = False
    if open_.any():
        return None
    found = Blocks(codes, scales, low, True)
    return found if np.array_equal(found.values(), blocks.reshape(len(blocks), -1)) else None


def _fit(blocks: Floats) -> Blocks:
    """16 levels from the smallest to the largest value, then the best line through them for the codes chosen."""
    low, high = blocks.min(-1), blocks.max(-1)
    scales, minima = _half((high - low) / 15), _half(low)
    for _ in range(3):
        codes = np.clip(np.rint((blocks - minima[..., None]) / nonzero(scales)[..., None]), 0, 15)
        centred = codes - codes.mean(-1, keepdims=True)
        slope = (centred * blocks).sum(-1) / np.maximum((centred * centred).sum(-1), 1e-12)
        scales = _half(np.where(slope > 0, slope, scales))
        minima = _half(blocks.mean(-1) - scales * codes.mean(-1))
    codes = np.clip(np.rint((blocks - minima[..., None]) / nonzero(scales)[..., None]), 0, 15)
    return Blocks(codes.astype(np.uint8), scales, minima, False)


def _half(values: npt.NDArray[Any]) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def _exact_half(values: Floats) -> Floats:
    """float16 where the value lies within float32 rounding of one (a GGUF's scale does), itself elsewhere."""
    half = _half(values)
    return np.where(np.abs(half - values) <= 1e-5 * values, half, values)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as MatMulNBits takes it: value = scale * (code - zero point).

    codes: uint8 [rows, blocks, block_size * bits / 8]; scales: float32 [rows, blocks]; zero_points: uint8
    [rows, ceil(blocks / 2)] or None for the middle code. With `block_means` the last columns of the weight belong to
    the means of the input's blocks, which have to be put behind the input: `columns` counts them.
    """

    codes: Codes
    scales: Floats
    zero_points: Codes | None
    bits: int
    block_size: int
    columns: int
    block_means: bool = False


def pack_eight(blocks: Blocks, columns: int) -> Packed:
    """Packs what `eight_bits` returned."""
    return Packed(blocks.codes, blocks.scales, None, 8, blocks.codes.shape[2], columns)


def pack_four(blocks: Blocks, columns: int, *, block_means: bool) -> Packed:
    """Packs what `four_bits` returned.

    The fast kernels want a whole number as zero point, -minimum / scale is none: each block is left shifted by up to
    half a step. The shift of a block acts on the sum of its inputs alone, so with `block_means` it becomes one more
    weight, of the mean of these inputs, in 4 bits as well: 1/32 more weights and a sixteenth of the error.
    """
    codes, scales, minima = blocks.codes, blocks.scales, blocks.minima
    flat = (scales == 0) & (minima != 0)
    scales = np.where(flat, np.abs(minima), scales)
    zeros = np.clip(np.rint(-minima / nonzero(scales)), 0, 15)
    zeros = np.where(flat, 8, zeros)
    codes = np.where(flat[..., None], (8 + np.sign(minima)[..., None]).astype(np.uint8), codes)
    shift = np.where(flat, 0, minima + scales * zeros).astype(np.float32)
    block_size = codes.shape[2]
    if block_means := block_means and columns % block_size == 0 and bool(np.abs(shift).max() > 0):
        more = cut(shift * block_size, block_size)
        step = _half(np.abs(more).max(-1) / 7)
        more_codes = np.clip(np.rint(more / nonzero(step)[..., None]) + 8, 0, 15)
        codes = np.concatenate([codes, more_codes.astype(np.uint8)], 1)
        scales = np.concatenate([scales, step], 1)
        zeros = np.concatenate([zeros, np.full(step.shape, 8)], 1)
        columns += shift.shape[1]
    points = packed(zeros, 4)
    return Packed(
        packed(codes, 4), scales.astype(np.float32), None if (zeros == 8).all() else points, 4, block_size, columns,
        block_means,
    )  # fmt: skip
