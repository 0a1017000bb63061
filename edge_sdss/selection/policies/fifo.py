"""fifo: the oldest entry gives way (a baseline of the paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "the oldest"
DROPPED = "never"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """All entries, the oldest first."""
    return buffer.used[np.argsort(buffer.seq[buffer.used])]
