"""random: the paper's baseline Random Replace: every offer comes in, for an entry drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "drawn at random"
DROPPED = "never"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """All entries, in a drawn order."""
    return candidate.draws.permutation(buffer.used)
