"""Embeds a dialogue: E(T), the last hidden states of all its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition

ITEM = "dialogue"


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition embeds the next dialogue of the stream."""
    lm, limit = subject.lm, subject.settings.model.max_tokens
    stream = cycle(subject.dialogues)

    def repeat() -> Repetition:
        lm.token_embeddings(next(stream).text, limit)
        return Repetition(1)

    yield repeat
