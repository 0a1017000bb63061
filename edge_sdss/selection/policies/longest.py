"""longest: the dialogues with most words stay; the shortest gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "has fewer words"
DROPPED = "no entry has fewer words"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries with fewer words, the shortest first; the oldest of equals."""
    used = buffer.used[buffer.words[buffer.used] < candidate.words]
    return used[np.lexsort((buffer.seq[used], buffer.words[used]))]
