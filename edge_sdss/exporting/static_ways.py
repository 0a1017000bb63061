"""A model of graphs of fixed shapes, prefilled and decoded as a device does it, on whatever opened its sessions.

Made for checks, as `ways` is. Knows nothing of bundles on the disk and of how sessions are opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import InputError, message
from edge_sdss.exporting.blocks import Floats
from edge_sdss.exporting.static_decoder import Shape
from edge_sdss.exporting.static_feeds import Cache, Feeds

RESCORED = 8
"""Logits of a row that the processor computes again: float16 has steps of 1/64 between 16 and 32, where they lie."""


@dataclass(frozen=True)
class Graphs:
    """The sessions of a shape, one for each part, in order."""

    shape: Shape
    sessions: tuple[Any, ...]

    def run(self, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Runs the parts one after another and returns all outputs by name."""
        known: dict[str, npt.NDArray[Any]] = dict(feed)
        found: dict[str, npt.NDArray[Any]] = {}
        for session in self.sessions:
            names = [value.name for value in session.get_outputs()]
            given = {value.name: known[value.name] for value in session.get_inputs()}
            made = dict(zip(names, session.run(names, given), strict=True))
            known |= {name: array for name, array in made.items() if name.endswith(".out")}
            found |= made
        return found


@dataclass(frozen=True)
class Prefix:
    """The first tokens of every prompt, their keys and values and their logits [n, vocabulary], all as float32 computed
    them under one adapter.

    The first token of a text has activations far beyond all others', which no range of 16 bits fits beside them.
    """

    ids: tuple[int, ...]
    cache: Cache
    logits: Floats


class StaticModel:
    """Prefill and decode graphs; either may be missing where it is not asked for.

    An adapter is given by the graph's inputs, of any rank up to the graph's. `prefix` is that of the adapter given.
    Where the processor has the head's weights, as they are the embedding's, it computes the best logits again.
    """

    def __init__(self, feeds: Feeds, prefill: Graphs | None, decode: Graphs | None) -> None:
        self.feeds, self.prefill, self.decode = feeds, prefill, decode

    def logits(
        self, ids: npt.NDArray[Any], adapter: Mapping[str, Floats] | None = None, prefix: Prefix | None = None
    ) -> Floats:
        """Returns logits [n, vocabulary] of ids [n] by prefill graphs alone; those of a prefix are its own."""
        return self._prefill(ids, self._lora(self.prefill, adapter), prefix)[0]

    def follow(
        self, ids: npt.NDArray[Any], count: int, adapter: Mapping[str, Floats] | None = None,
        prefix: Prefix | None = None,
    ) -> list[int]:  # fmt: skip
        """Returns the `count` most likely ids after the prompt: prefilled, then decoded one at a time."""
        rows, cache, filled = self._prefill(ids, self._lora(self.prefill, adapter), prefix)
        lora, found = self._lora(self.decode, adapter), [int(rows[-1].argmax())]
        while len(found) < count:
            row = self._step(self.decode, np.array(found[-1:]), filled, cache, lora)
            filled += 1
            found.append(int(row[0].argmax()))
        return found

    def decoded(
        self, ids: npt.NDArray[Any], count: int, adapter: Mapping[str, Floats] | None = None,
        prefix: Prefix | None = None,
    ) -> Floats:  # fmt: skip
        """Returns logits [count, vocabulary] of the last `count` ids, each by a decode step, the others prefilled."""
        _, cache, filled = self._prefill(ids[:-count], self._lora(self.prefill, adapter), prefix)
        lora, rows = self._lora(self.decode, adapter), []
        for at in range(len(ids) - count, len(ids)):
            rows.append(self._step(self.decode, ids[at : at + 1], filled, cache, lora))
            filled += 1
        return np.concatenate(rows)

    def _prefill(
        self, ids: npt.NDArray[Any], lora: Mapping[str, Floats], prefix: Prefix | None
    ) -> tuple[Floats, Cache, int]:
        """Returns the logits, the cache and how many of its slots are filled."""
        assert self.prefill is not None
        cache, start = self._begun(ids, prefix)
        rows, step = [], self.prefill.shape.tokens
        while start < len(ids):
            end = min((start // step + 1) * step, len(ids))  # behind a prefix as without one: all slots can be filled
            rows.append(self._step(self.prefill, ids[start:end], start, cache, lora))
            start = end
        return np.concatenate([*([] if prefix is None else [prefix.logits]), *rows]), cache, len(ids)

    def _begun(self, ids: npt.NDArray[Any], prefix: Prefix | None) -> tuple[Cache, int]:
        shapes = [graphs.shape for graphs in (self.prefill, self.decode) if graphs is not None]
        cache = self.feeds.cache(max(shape.past + shape.tokens for shape in shapes))
        if prefix is None:
            return cache, 0
        start = len(prefix.ids)
        if tuple(ids[:start]) != prefix.ids or len(ids) <= start:
            found = f"it begins with {ids[:start].tolist()}, the graphs were made for {list(prefix.ids)}"
            raise InputError(message("answer a prompt", found, "use the model's chat template"))
        for name, array in prefix.cache.items():
            cache[name][:, :, :start] = array
        return cache, start

    def _step(
        self, graphs: Graphs | None, ids: npt.NDArray[Any], at: int, cache: Cache, lora: Mapping[str, Floats]
    ) -> Floats:
        assert graphs is not None
        outputs = graphs.run({**self.feeds.step(ids, at, cache, graphs.shape), **lora})
        self.feeds.keep(outputs, cache, at, len(ids))
        logits: Floats = outputs["logits"][0, : len(ids)]
        head = self.feeds.head
        return logits if head is None else rescored(logits, outputs["norm"][0, : len(ids)], head)

    def _lora(self, graphs: Graphs | None, adapter: Mapping[str, Floats] | None) -> dict[str, Floats]:
        assert graphs is not None
        return self.feeds.adapter(adapter or {}, graphs.shape.rank)


def rescored(logits: Floats, hidden: Floats, head: Floats) -> Floats:
    """Returns logits [n, vocabulary] with the best `RESCORED` of each row computed again in float32.

    hidden [n, width] is what enters the head, head [vocabulary, width] its weights.
    """
    count = min(RESCORED, logits.shape[-1])
    best = np.argpartition(logits, -count, axis=-1)[:, -count:]
    scores = np.einsum("nkw,nw->nk", head[best].astype(np.float32), hidden)
    found = logits.copy()
    np.put_along_axis(found, best, scores, axis=-1)
    return found


def prefix(first: Graphs, feeds: Feeds, ids: Sequence[int], adapter: Mapping[str, Floats] | None = None) -> Prefix:
    """Returns the keys and values of the first tokens by graphs in float32, of which one call takes all."""
    cache = feeds.cache(first.shape.past + first.shape.tokens)
    lora = feeds.adapter(adapter or {}, first.shape.rank)
    outputs = first.run({**feeds.step(list(ids), 0, cache, first.shape), **lora})
    feeds.keep(outputs, cache, 0, len(ids))
    kept = {name: array[:, :, : len(ids)].copy() for name, array in cache.items()}
    return Prefix(tuple(ids), kept, outputs["logits"][0, : len(ids)])
