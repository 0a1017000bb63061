"""reservoir: every offer so far is equally likely to be in the buffer (Vitter 1985, algorithm R)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "drawn for the reservoir"
DROPPED = "not drawn for the reservoir"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """With probability K / seq all entries in a drawn order; K is the number of entries."""
    if candidate.draws.integers(candidate.seq) >= len(buffer):
        return buffer.used[:0]
    return candidate.draws.permutation(buffer.used)
