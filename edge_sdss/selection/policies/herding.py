"""herding: the entries whose mean vector is nearest to the mean of the whole stream.

Source: the objective of Welling (ICML 2009), as iCaRL picks its exemplars (arXiv 1611.07725), as an online exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

REMEMBERS = True
KEPT = "the mean of what is kept comes nearer to the stream's"
DROPPED = "with it the mean of what is kept would not come nearer to the stream's"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries in whose place the offer would bring the mean nearer, the nearest mean first."""
    assert candidate.memory is not None
    vectors = buffer.vectors.astype(np.float64)
    gap = vectors.mean(axis=0) - candidate.memory.mean
    moved = gap + (candidate.vector - vectors) / len(vectors)
    distance = np.einsum("ij,ij->i", moved, moved)
    order = np.argsort(distance, kind="stable")
    better: Slots = buffer.used[order[distance[order] < gap @ gap]]
    return better
