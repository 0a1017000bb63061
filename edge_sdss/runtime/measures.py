"""Logits and losses of given tokens. Knows nothing of conversations or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_sdss.runtime.lane import Floats
from edge_sdss.runtime.talk import Talk


def logits(talk: Talk, ids: Sequence[int], first: int) -> Iterator[tuple[int, Floats]]:
    """Yields (position, logits [k, V]) of a fresh talk, from position `first` on; the array is written anew after.

    A graph that gives the last logits only is fed token by token from there on.
    """
    lane, start, step = talk.lane, 0, talk.lane.piece
    if lane.last_logits_only:
        step = 1
        if first:
            talk.feed(ids[:first])
            start = first
    for at in range(start, len(ids), step):
        part = lane.feed(np.array([ids[at : at + step]], np.int64))[0]
        if at + len(part) > first:
            skipped = max(first - at, 0)
            yield at + skipped, part[skipped:]


def loss(talk: Talk, ids: Sequence[int], given: int) -> float:
    """Returns the mean nats per token of ids[given:], each after all before it, in a fresh talk."""
    total = 0.0
    for at, part in logits(talk, ids[:-1], given - 1):
        for row, target in zip(part, ids[at + 1 : at + 1 + len(part)], strict=True):
            highest = row.max()
            total += float(np.log(np.exp(row - highest).sum(dtype=np.float64)) + highest - row[target])
    return total / (len(ids) - given)
