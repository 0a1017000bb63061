"""dedup-reservoir: a reservoir into which no near-duplicate of an entry comes; near-duplicates in it leave first.

Two dialogues are near-duplicates where their vectors' cosine is at least NEAR. Mean hidden states all point much the
same way: with the default model two of Alpaca's dialogues have a median of 0.72, and one in a hundred has a neighbour
this near.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

NEAR = 0.97
KEPT = "drawn for the reservoir, near-duplicates first"
DROPPED = "a near-duplicate, or not drawn for the reservoir"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """With probability K / seq all entries in a drawn order, near-duplicates first; none for a near-duplicate."""
    drawn = candidate.draws.integers(candidate.seq) < len(buffer)
    if not drawn or float((buffer.vectors @ candidate.vector).max(initial=-1.0)) >= NEAR:
        return buffer.used[:0]
    order = candidate.draws.permutation(len(buffer))
    twin = buffer.memo("twins", lambda: _has_twin(buffer.vectors))
    return buffer.used[order[np.argsort(~twin[order], kind="stable")]]


def _has_twin(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """[K] bool: whether another row is nearly the same."""
    alike = vectors @ vectors.T >= NEAR
    np.fill_diagonal(alike, False)
    return np.asarray(alike.any(axis=1))
