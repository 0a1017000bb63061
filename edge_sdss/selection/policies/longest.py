"""longest: the dialogues with most words stay; the shortest gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "has fewer words"
DROPPED = "no entry has fewer words"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries with fewer words, the shortest first; the oldest of equals."""
    return buffer.below(buffer.words, candidate.words)
