"""Weights as symmetric integers with one scale an output, rounded so that the outputs move least.

Rounding column after column, what one column is off by is made up for in those not yet rounded, as GPTQ does
(Frantar et al., arXiv 2210.17323). Knows nothing of graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean of the diagonal: inputs that the samples lack
_SHRINKS = {8: np.array([1.0]), 4: np.linspace(0.6, 1.0, 17)}
_BLOCK = 64


@dataclass(frozen=True)
class Rounded:
    """value = scale · code: codes int8 [outputs, inputs], scales float32 [outputs], all above 0."""

    codes: npt.NDArray[np.int8]
    scales: Floats

    def values(self) -> Floats:
        """Returns the weight that these stand for, float32 [outputs, inputs]."""
        return self.scales[:, None] * self.codes.astype(np.float32)


def rounded(weight: Floats, bits: int, gram: npt.NDArray[Any] | None = None) -> Rounded:
    """Rounds `weight` [outputs, inputs] to `bits` (4 or 8).

    `gram` [inputs, inputs] is Σ x xᵀ over samples of what it is multiplied with; without it, each weight goes to the
    nearest code. An output of zeros gets the scale 1.
    """
    importance = np.ones(weight.shape[1]) if gram is None else np.diag(gram)
    scales = _scales(weight, bits, importance)
    if gram is None:
        return Rounded(_nearest(weight, scales, bits).astype(np.int8), scales)
    return Rounded(_compensated(weight, scales, bits, gram), scales)


def _nearest(weight: npt.NDArray[Any], scales: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    top = 2 ** (bits - 1) - 1
    codes: npt.NDArray[Any] = np.clip(np.rint(weight / scales[:, None]), -top, top)
    return codes


def _scales(weight: Floats, bits: int, importance: npt.NDArray[Any]) -> Floats:
    """The scale of each output, of those tried, with the least error weighted by the inputs' power."""
    widest = np.abs(weight).max(1) / (2 ** (bits - 1) - 1)
    widest = np.where(widest > 0, widest, 1).astype(np.float32)
    best, least = widest, np.full(len(weight), np.inf)
    for shrink in _SHRINKS[bits]:
        scales = (widest * shrink).astype(np.float32)
        error = (((_nearest(weight, scales, bits) * scales[:, None] - weight) ** 2) * importance).sum(1)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best.astype(np.float32)


def _compensated(weight: Floats, scales: Floats, bits: int, gram: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """GPTQ: columns by falling power of their input; each error, by the inverse's Cholesky factor, onto the rest."""
    order = np.argsort(-np.diag(gram), kind="stable")
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += _DAMPING * np.diag(hessian).mean() + 1e-12
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)  # upper triangular
    left, codes = weight[:, order].astype(np.float32), np.empty(weight.shape, np.int8)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        errors = np.empty((len(left), end - start), np.float32)
        for at in range(start, end):
            code = _nearest(left[:, at : at + 1], scales, bits)[:, 0]
            codes[:, order[at]] = code.astype(np.int8)
            error = errors[:, at - start] = (left[:, at] - code * scales) / factor[at, at]
            left[:, at + 1 : end] -= error[:, None] * factor[at, at + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes
