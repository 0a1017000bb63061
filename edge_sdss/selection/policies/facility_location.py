"""facility-location: the entries that stand best for the stream: each dialogue of it is near to some entry.

The value of a set is the mean, over a uniform sample of the stream, of the cosine to the nearest entry: monotone
submodular, kept by exchanges as in Lin and Bilmes (ACL 2011), one pass. Vectors are taken about the stream's
mean: an LLM's mean hidden states all point much the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

REMEMBERS = True
KEPT = "the new dialogue stands for more of the stream"
DROPPED = "each entry stands for more of the stream than the new dialogue would"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries in whose place the offer would raise the value, the largest gain first."""
    assert candidate.memory is not None
    mean, sample = candidate.memory.mean, candidate.memory.sample
    to_sample = _about(sample, mean).T
    near = _about(buffer.vectors, mean) @ to_sample  # [K, sample]
    own = _about(candidate.vector[None], mean)[0] @ to_sample
    gain = _without_each(near, own) - near.max(axis=0).mean()
    order = np.argsort(-gain, kind="stable")
    better: Slots = buffer.used[order[gain[order] > 1e-9]]
    return better


def _without_each(near: npt.NDArray[np.float64], own: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[K] float64: the value of the entries and the offer without the k-th entry."""
    best = near.argmax(axis=0)
    top = np.maximum(near.max(axis=0), own)
    second = near.copy()
    second[best, np.arange(near.shape[1])] = -1.0
    left = np.maximum(second.max(axis=0), own)  # where the nearest entry is the one that leaves
    loss = np.bincount(best, top - left, minlength=len(near)) / near.shape[1]
    value: npt.NDArray[np.float64] = top.mean() - loss
    return value


def _about(vectors: npt.NDArray[np.float32], mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[k, d] float64: unit vectors from the mean; zeros for one that equals it."""
    centred = vectors - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = centred / np.where(norms < 1e-12, 1.0, norms)
    return unit
