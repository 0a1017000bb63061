"""perplexity: the dialogues whose response surprises the base model most stay; the most expected gives way.

The reverse of the pruning of Marion et al. (arXiv 2309.04564), who find the middle of the range best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

ASKS = "perplexity"
KEPT = "its response is less surprising"
DROPPED = "no entry has a less surprising response"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries of lower value, the lowest first; the oldest of equals."""
    return buffer.below(buffer.value, candidate.value)
