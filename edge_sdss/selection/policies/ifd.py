"""ifd: the dialogues whose prompt helps the base model least to find the response stay (arXiv 2308.12032)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

ASKS = "ifd"
KEPT = "its prompt says more of its response"
DROPPED = "no entry's prompt says more of its response"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries of lower value, the lowest first; the oldest of equals."""
    return buffer.below(buffer.value, candidate.value)
