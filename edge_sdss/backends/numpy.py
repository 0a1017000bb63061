"""The reference backend, in NumPy: small enough to be read against the formulas.

Knows nothing of dialogues, domains or the buffer. See `backends.Backend` for shapes and dtypes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.backends import HISTOGRAM_BINS
from edge_sdss.config import EoeVariant

Array = npt.NDArray[Any]


def entropy(tokens: Array, offsets: npt.NDArray[np.int64], variant: EoeVariant) -> npt.NDArray[np.float64]:
    """EOE(T) = -sum_i p_i ln p_i / ln n (paper, eq. 1), p by `variant`."""
    weights = _WEIGHTS[variant]
    rows = np.asarray(tokens, dtype=np.float32)
    return np.array([_entropy_of(*weights(rows[a:b])) if b - a > 1 else 0.0 for a, b in pairwise(offsets.tolist())])


def pool(tokens: Array, offsets: npt.NDArray[np.int64], pooling: str) -> npt.NDArray[np.float32]:
    """The mean or last token of each dialogue, L2-normalised."""
    rows = np.asarray(tokens, dtype=np.float32)
    pooled = np.zeros((len(offsets) - 1, rows.shape[1]), dtype=np.float32)
    for row, (a, b) in zip(pooled, pairwise(offsets.tolist()), strict=True):
        if b > a:
            row[:] = rows[b - 1] if pooling == "last" else _mean(rows[a:b])
            row /= np.sqrt(np.dot(row, row)) or np.float32(1)
    return pooled


def dissimilarity(vectors: Array, means: Array) -> npt.NDArray[np.float64]:
    """1 - v·m per row, clipped to [0, 1]."""
    cosine = np.einsum("ij,ij->i", vectors, means, dtype=np.float64)
    clipped: npt.NDArray[np.float64] = np.clip(1.0 - cosine, 0.0, 1.0)
    return clipped


def _entropy_of(weights: Array, states: int) -> float:
    """Entropy of p = w / Z over its maximum ln(states), as (ln Z - S / Z) / ln(states) with S = sum w ln w."""
    w = weights.astype(np.float64)
    if not w.all():
        w = w[w != 0]  # 0 ln 0 = 0
    z = float(w.sum())
    if z == 0.0:
        return 0.0
    h = (math.log(z) - float(np.dot(w, np.log(w))) / z) / math.log(states)
    return h if math.isnan(h) else min(max(h, 0.0), 1.0)


def _mean(rows: Array) -> Array:
    """The mean token as one product, several times as fast as ndarray.mean along that axis."""
    return np.full(len(rows), 1 / len(rows), dtype=np.float32) @ rows


def _token(rows: Array) -> tuple[Array, int]:
    return np.einsum("ij,ij->i", rows, rows), len(rows)


def _centered(rows: Array) -> tuple[Array, int]:
    return _token(rows - _mean(rows))


def _spectral(rows: Array) -> tuple[Array, int]:
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return np.maximum(np.linalg.eigvalsh(gram.astype(np.float64)), 0.0), max(len(gram), 2)


def _histogram(rows: Array) -> tuple[Array, int]:
    return np.histogram(_mean(rows), bins=HISTOGRAM_BINS)[0], HISTOGRAM_BINS


_WEIGHTS = {"token": _token, "centered": _centered, "spectral": _spectral, "histogram": _histogram}
