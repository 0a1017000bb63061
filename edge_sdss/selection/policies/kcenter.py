"""kcenter: streaming greedy k-center on cosine distance: the closest pair loses a member to a farther offer.

Source: the objective of Sener and Savarese (arXiv 1708.00489), as an online exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "closer to another entry than the new dialogue is to any"
DROPPED = "closer to an entry than the two closest entries are to each other"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries whose nearest neighbour is nearer than the offer's, the nearest first; the newest of equals."""
    nearest = buffer.memo("nearest", lambda: _nearest(buffer.vectors))
    own = 1.0 - float((buffer.vectors @ candidate.vector).max(initial=-1.0))
    closer = np.flatnonzero(nearest < own)
    order = np.lexsort((-buffer.seq[buffer.used[closer]], nearest[closer]))
    return buffer.used[closer[order]]


def _nearest(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[K] float32: each row's cosine distance to its nearest other row; 2 where there is no other."""
    distance = 1.0 - vectors @ vectors.T
    np.fill_diagonal(distance, 2.0)
    nearest: npt.NDArray[np.float32] = distance.min(axis=1, initial=2.0)
    return nearest
