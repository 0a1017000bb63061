"""domain-balanced: a reservoir that keeps the domains of equal size, as far as the stream lets it.

After class-balancing reservoir sampling (Chrysakis and Moens, ICML 2020). That counts each class's offers; here the
chance within a full domain is the whole stream's, K / seq, so that nothing but the buffer is to be remembered: in a
domain that is rarer than the others the older entries stay longer.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.policies import Slots
    from edge_sdss.selection.selector import Candidate

KEPT = "of the domain with most entries"
DROPPED = "its domain has most entries, and it was not drawn"


def replaceable(candidate: Candidate, buffer: Buffer) -> Slots:
    """The entries of the largest domains, in a drawn order; of the offer's own, where that is one, if it is drawn."""
    sizes = buffer.memo("domain sizes", lambda: Counter(e.domain for e in buffer.entries.values()))
    most = max(sizes.values(), default=0)
    domains = {domain for domain, size in sizes.items() if size == most}
    if candidate.domain in domains:
        if candidate.draws.integers(candidate.seq) >= len(buffer):
            return buffer.used[:0]
        domains = {candidate.domain}
    slots = [slot for slot in buffer.used.tolist() if buffer.entries[slot].domain in domains]
    return candidate.draws.permutation(np.array(slots, np.int64))
