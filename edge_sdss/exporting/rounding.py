"""Weights as symmetric integers with scales by output, or by block of an output, rounded so that outputs move least.

Rounding column after column, what one column is off by is made up for in those not yet rounded, as GPTQ does
(Frantar et al., arXiv 2210.17323). Knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ExportError, message

Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean of the diagonal: inputs that the samples lack
_SHRINKS = {8: np.array([1.0]), 4: np.linspace(0.6, 1.0, 17)}
_BLOCK = 64


@dataclass(frozen=True)
class Rounded:
    """value = scale · code: codes int8 [outputs, inputs], scales float32 [outputs, blocks], all above 0.

    Inputs that follow each other share a block, as many in each.
    """

    codes: npt.NDArray[np.int8]
    scales: Floats

    def values(self) -> Floats:
        """Returns the weight that these stand for, float32 [outputs, inputs]."""
        return _wide(self.scales, self.codes.shape[1]) * self.codes.astype(np.float32)


def rounded(weight: Floats, bits: int, gram: npt.NDArray[Any] | None = None, block: int | None = None) -> Rounded:
    """Rounds `weight` [outputs, inputs] to `bits` (4 or 8), `block` inputs with one scale; None: all of an output.

    `gram` [inputs, inputs] is Σ x xᵀ over samples of what it is multiplied with; without it, each weight goes to the
    nearest code. A block of zeros gets the scale 1. Raises ExportError where `block` does not divide the inputs.
    """
    inputs = weight.shape[1]
    if block is not None and inputs % block:
        found = f"a weight has {inputs} inputs"
        raise ExportError(message(f"round in blocks of {block}", found, "take a block_size that divides them"))
    importance = np.ones(inputs) if gram is None else np.diag(gram)
    scales = _scales(weight, bits, importance, block or inputs)
    if gram is None:
        return Rounded(_nearest(weight, _wide(scales, inputs), bits).astype(np.int8), scales)
    return Rounded(_compensated(weight, _wide(scales, inputs), bits, gram), scales)


def _wide(scales: Floats, inputs: int) -> Floats:
    """Scales [outputs, inputs]."""
    return np.repeat(scales, inputs // scales.shape[1], axis=1)


def _nearest(weight: npt.NDArray[Any], scales: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    top = 2 ** (bits - 1) - 1
    codes: npt.NDArray[Any] = np.clip(np.rint(weight / scales), -top, top)
    return codes


def _scales(weight: Floats, bits: int, importance: npt.NDArray[Any], block: int) -> Floats:
    """The scale of each block, of those tried, with the least error weighted by the inputs' power."""
    blocks = weight.reshape(len(weight), -1, block)
    power = importance.reshape(-1, block)
    widest = np.abs(blocks).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    widest = np.where(widest > 0, widest, 1).astype(np.float32)
    best, least = widest, np.full(widest.shape, np.inf)
    for shrink in _SHRINKS[bits]:
        scales = (widest * shrink).astype(np.float32)
        error = (((_nearest(blocks, scales, bits) * scales - blocks) ** 2) * power).sum(-1, keepdims=True)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best[..., 0].astype(np.float32)


def _compensated(weight: Floats, scales: Floats, bits: int, gram: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """GPTQ: columns by falling power of their input; each error, by the inverse's Cholesky factor, onto the rest.

    scales: [outputs, inputs], settled before.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += _DAMPING * np.diag(hessian).mean() + 1e-12
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)  # upper triangular
    left, codes = weight[:, order].astype(np.float32), np.empty(weight.shape, np.int8)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        errors = np.empty((len(left), end - start), np.float32)
        for at in range(start, end):
            scale = scales[:, order[at]]
            code = _nearest(left[:, at], scale, bits)
            codes[:, order[at]] = code.astype(np.int8)
            error = errors[:, at - start] = (left[:, at] - code * scale) / factor[at, at]
            left[:, at + 1 : end] -= error[:, None] * factor[at, at + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes
