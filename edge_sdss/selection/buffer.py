"""The buffer B: bins under two budgets, and every entry's current scores. Knows nothing of policies.

An entry's IDD is against the others of its domain. With unit vectors e, 1 - mean cos is
1 - e·mean(e), so one mean vector a domain makes the IDD of an offer O(d). A domain's mean and its
entries' IDD are rebuilt from its rows whenever the domain changes: nothing drifts, and a reopened
buffer equals one that was never closed (ADR 0002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from edge_sdss import config
from edge_sdss.selection.vectors import Codec
from edge_sdss.types import Annotation, Dialogue, Exemplar

T = TypeVar("T")

RECORD_BYTES = 56
"""What an entry takes beside text, vector and annotation: three scores and a value in float64, three int64 numbers."""


def entry_bytes(dialogue: Dialogue, vector_bytes: int, annotation: Annotation | None = None) -> int:
    """The bytes of an entry: text with its context, wanted answer, vector, scores."""
    texts = [dialogue.prompt, dialogue.response, *(turn.text for turn in dialogue.context)]
    wanted = annotation.preferred if annotation and annotation.preferred else dialogue.preferred
    text_bytes = sum(len(text.encode("utf-8")) for text in [*texts, wanted or ""])
    return text_bytes + vector_bytes + RECORD_BYTES


class Buffer:
    """Bins 0 … bins - 1. The arrays hold +inf in a free bin, so that it is lower than nothing."""

    def __init__(self, settings: config.Buffer, width: int) -> None:
        """`width` is d, the length of the vectors."""
        self.bins = settings.bins
        self.max_bytes = settings.max_bytes
        self.max_entry_bytes = min(settings.max_entry_bytes, settings.max_bytes)
        self.codec = Codec(settings.vectors, width)
        self.entries: dict[int, Exemplar] = {}
        self.eoe = np.full(self.bins, np.inf)
        self.dss = np.full(self.bins, np.inf)
        self.seq = np.zeros(self.bins, dtype=np.int64)
        self.words = np.zeros(self.bins, dtype=np.int64)
        self.value = np.zeros(self.bins)
        self.bytes = 0
        self.reserved = 0  # bytes of the budget that are not for entries: a policy's memory
        self._sizes = np.zeros(self.bins, dtype=np.int64)
        self._codes = np.zeros((self.bins, self.codec.row_bytes), dtype=np.uint8)
        self._ids: set[str] = set()
        self._idd = np.full(self.bins, np.inf)
        self._slots: dict[str, set[int]] = {}  # by domain
        self._means: dict[str, npt.NDArray[np.float64]] = {}
        self._changed: set[str] = set()  # domains whose mean and IDD are to be rebuilt
        self._memo: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, dialogue_id: object) -> bool:
        return dialogue_id in self._ids

    @property
    def used(self) -> npt.NDArray[np.int64]:
        """The bins that hold an entry, ascending."""
        return self.memo("used", lambda: np.flatnonzero(np.isfinite(self.eoe)))

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The entries' unit vectors as stored, [len(self), d] float32, in the order of `used`."""
        return self.memo("vectors", lambda: self.codec.decode(self._codes[self.used]))

    def memo(self, key: str, compute: Callable[[], T]) -> T:
        """A value derived from the entries, computed once until they change."""
        if key not in self._memo:
            self._memo[key] = compute()
        return cast(T, self._memo[key])

    @property
    def idd(self) -> npt.NDArray[np.float64]:
        """Each entry's current IDD against the others of its domain, [bins] float64."""
        self._rebuild()
        return self._idd

    def mean(self, domain: str) -> npt.NDArray[np.float64] | None:
        """The mean of a domain's unit vectors, [d] float64; None where it has no entry."""
        self._rebuild()
        return self._means.get(domain)

    def size(self, slot: int) -> int:
        """The bytes of one entry."""
        return int(self._sizes[slot])

    def fits(self, n_bytes: int, without: Iterable[int] = ()) -> bool:
        """Whether an entry of n_bytes fits both budgets once the bins `without` are emptied."""
        gone = list(without)
        freed = int(self._sizes[gone].sum()) if gone else 0
        return len(self) - len(gone) < self.bins and self.bytes + self.reserved - freed + n_bytes <= self.max_bytes

    def free_slot(self, without: Iterable[int] = ()) -> int:
        """The lowest bin that is free once the bins `without` are emptied."""
        gone = set(without)
        return next(slot for slot in range(self.bins) if slot not in self.entries or slot in gone)

    def below(self, values: npt.NDArray[Any], bound: float) -> npt.NDArray[np.int64]:
        """The bins whose entry in `values` [bins] is below `bound`, the lowest first; the oldest of equals."""
        used = self.used[values[self.used] < bound]
        return used[np.lexsort((self.seq[used], values[used]))]

    def put(self, slot: int, exemplar: Exemplar) -> None:
        """Fills a free bin."""
        dialogue = exemplar.dialogue
        size = entry_bytes(dialogue, self.codec.row_bytes, exemplar.annotation)
        self.entries[slot] = exemplar
        self._ids.add(dialogue.id)
        self.eoe[slot], self.dss[slot] = exemplar.eoe, exemplar.dss
        self.seq[slot], self.words[slot], self.value[slot] = exemplar.seq, exemplar.words, exemplar.value
        self._sizes[slot] = size
        self._codes[slot] = np.frombuffer(exemplar.vector, dtype=np.uint8)
        self.bytes += size
        self._slots.setdefault(exemplar.domain, set()).add(slot)
        self._changed.add(exemplar.domain)
        self._memo.clear()

    def remove(self, slot: int) -> Exemplar:
        """Empties a bin and returns what was in it."""
        exemplar = self.entries.pop(slot)
        self._ids.remove(exemplar.dialogue.id)
        self.eoe[slot] = self.dss[slot] = self._idd[slot] = np.inf
        self.bytes -= int(self._sizes[slot])
        self._sizes[slot] = 0
        self._codes[slot] = 0
        self._slots[exemplar.domain].remove(slot)
        self._changed.add(exemplar.domain)
        self._memo.clear()
        return exemplar

    def _rebuild(self) -> None:
        """The mean of each changed domain, and the IDD of its entries against the others, from its rows."""
        for domain in self._changed:
            slots = sorted(self._slots[domain])
            if not slots:
                self._means.pop(domain, None)
                continue
            vectors = self.codec.decode(self._codes[slots])
            total = vectors.sum(axis=0, dtype=np.float64)
            self._means[domain] = total / len(slots)
            own = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
            to_others = np.einsum("ij,j->i", vectors, total) - own
            self._idd[slots] = np.clip(1.0 - to_others / (len(slots) - 1), 0.0, 1.0) if len(slots) > 1 else 1.0
        self._changed.clear()
