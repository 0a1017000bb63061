"""first: keep the first that come, then freeze: what the paper's public scripts do in effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "never"
DROPPED = "the buffer is full and frozen"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """None."""
    return buffer.used[:0]
