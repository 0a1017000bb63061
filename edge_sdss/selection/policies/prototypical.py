"""prototypical: a reservoir of the half of the stream that lies nearest to its mean.

Where there is little to learn from, what is typical teaches more than what is rare (Sorscher et al., arXiv 2206.14486,
who keep what is near to the centres of clusters). Half of the stream, and drawn from that, so that the entries are no
copies of each other.
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
KEPT = "typical of the stream, and drawn or in the place of what is not"
DROPPED = "not typical of the stream, or not drawn"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """Entries that are not typical, the farthest first; without one, with probability K / (seq / 2), all, drawn.

    Typical is what is no farther from the mean of the stream than the median of its sample; of half the offers seen,
    each is then as likely to be kept.
    """
    assert candidate.memory is not None
    mean = candidate.memory.mean
    limit = float(np.median(_distance(candidate.memory.sample, mean)))
    if float(_distance(candidate.vector[None], mean)[0]) > limit:
        return buffer.used[:0]
    far = _distance(buffer.vectors, mean)
    order = np.argsort(-far, kind="stable")
    strange: Slots = buffer.used[order[far[order] > limit]]
    if len(strange):
        return strange
    if candidate.draws.integers(candidate.seq) >= 2 * len(buffer):
        return buffer.used[:0]
    return candidate.draws.permutation(buffer.used)


def _distance(vectors: npt.NDArray[np.float32], mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[k] float64: Euclidean, of unit vectors from the mean."""
    found: npt.NDArray[np.float64] = np.linalg.norm(vectors - mean, axis=1)
    return found
