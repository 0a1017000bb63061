"""eoe-idd: ablation of sdss that looks at EOE and IDD alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "lower in EOE and IDD"
DROPPED = "no entry is lower in EOE and IDD"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries strictly lower in both, in a drawn order."""
    lower = np.flatnonzero((buffer.eoe < candidate.scores.eoe) & (buffer.idd < candidate.scores.idd))
    return candidate.draws.permutation(lower) if len(lower) > 1 else lower
