"""The torch backend: the scores are computed where the embeddings lie; only the result is copied back.

Knows nothing of dialogues, domains or the buffer. See `backends.Backend` for shapes and dtypes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_sdss.backends import HISTOGRAM_BINS
from edge_sdss.config import EoeVariant


def entropy(tokens: Any, offsets: npt.NDArray[np.int64], variant: EoeVariant) -> npt.NDArray[np.float64]:
    """EOE(T) = -sum_i p_i ln p_i / ln n (paper, eq. 1), p by `variant`."""
    weights = _WEIGHTS[variant]
    rows = torch.as_tensor(tokens).float()
    zero = rows.new_zeros((), dtype=torch.float64)
    values = [_entropy_of(*weights(rows[a:b])) if b - a > 1 else zero for a, b in pairwise(offsets.tolist())]
    return _numpy(torch.stack(values)) if values else np.zeros(0)


def pool(tokens: Any, offsets: npt.NDArray[np.int64], pooling: str) -> npt.NDArray[np.float32]:
    """The mean or last token of each dialogue, L2-normalised."""
    rows = torch.as_tensor(tokens).float()
    pooled = rows.new_zeros((len(offsets) - 1, rows.shape[1]))
    for row, (a, b) in zip(pooled, pairwise(offsets.tolist()), strict=True):
        if b > a:
            row.copy_(rows[b - 1] if pooling == "last" else rows[a:b].mean(dim=0))
    unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(pooled, eps=torch.finfo().tiny).cpu().numpy()
    return unit


def dissimilarity(vectors: Any, means: Any) -> npt.NDArray[np.float64]:
    """1 - v·m per row, clipped to [0, 1]."""
    cosine = (torch.as_tensor(vectors).double() * torch.as_tensor(means).double()).sum(dim=1)
    return _numpy((1.0 - cosine).clamp(0.0, 1.0))


def _numpy(values: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.cpu().numpy()
    return array


def _entropy_of(weights: Tensor, states: int) -> Tensor:
    w = weights.double()
    z = w.sum()
    s = torch.special.xlogy(w, w).sum()
    h = (torch.log(z) - s / z) / np.log(states)
    return torch.where(z == 0, torch.zeros_like(h), h.clamp(0.0, 1.0))


def _token(rows: Tensor) -> tuple[Tensor, int]:
    return rows.square().sum(dim=1), len(rows)


def _centered(rows: Tensor) -> tuple[Tensor, int]:
    return _token(rows - rows.mean(dim=0))


def _spectral(rows: Tensor) -> tuple[Tensor, int]:
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(gram.double()).clamp(min=0.0), max(len(gram), 2)


def _histogram(rows: Tensor) -> tuple[Tensor, int]:
    mean = rows.mean(dim=0).cpu()
    return torch.histc(mean, bins=HISTOGRAM_BINS, min=float(mean.min()), max=float(mean.max())), HISTOGRAM_BINS


_WEIGHTS = {"token": _token, "centered": _centered, "spectral": _spectral, "histogram": _histogram}
