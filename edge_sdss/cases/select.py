"""Scores an embedded dialogue against a full buffer and decides: what selection costs beyond the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, cycle

from edge_sdss import lexicon, surprise
from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition
from edge_sdss.selection import Buffer, Selector

ITEM = "offer"
_EMBEDDED = 64
_TOGETHER = 32


def settings(subject: Subject) -> dict[str, object]:
    """What the figures depend on."""
    chosen = subject.settings
    return {"policy": chosen.selection.policy, "bins": chosen.buffer.bins, "eoe": chosen.selection.eoe}


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition offers the next 32 dialogues, embedded before, to a selector without a store."""
    chosen, lm = subject.settings, subject.lm
    selector = Selector(
        chosen.selection,
        Buffer(chosen.buffer, lm.width),
        lexicon.load(chosen.selection.lexicons),
        device=lm.device.type,
    )
    embedded = [(d, lm.token_embeddings(d.text, chosen.model.max_tokens)) for d in subject.dialogues[:_EMBEDDED]]
    values = {d.id: surprise.of(lm, d, selector.asks, chosen) for d, _ in embedded} if selector.asks else {}
    stream, number = cycle(embedded), count()

    def repeat() -> Repetition:
        for _ in range(_TOGETHER):
            dialogue, rows = next(stream)
            # The selector drops a dialogue that it holds already: a number makes each one another.
            another = replace(dialogue, prompt=f"{next(number)} {dialogue.prompt}")
            selector.offer(another, rows, values.get(dialogue.id))
        return Repetition(_TOGETHER)

    for _ in range(-(-2 * chosen.buffer.bins // _TOGETHER)):
        repeat()  # until the buffer is full
    yield repeat
