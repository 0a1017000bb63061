"""sdss: the paper's rule: entries strictly lower in all three scores; one of them, drawn, gives way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "lower in EOE, DSS and IDD"
DROPPED = "no entry is lower in EOE, DSS and IDD"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The candidates of the paper's section 3.1, in a drawn order."""
    s = candidate.scores
    lower = np.flatnonzero((buffer.eoe < s.eoe) & (buffer.dss < s.dss) & (buffer.idd < s.idd))
    return candidate.draws.permutation(lower) if len(lower) > 1 else lower
