"""Offers a dialogue as `observe` does: embeds it, scores it, decides, and stores the decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, cycle

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition
from edge_sdss.session import Session

ITEM = "offer"


def settings(subject: Subject) -> dict[str, object]:
    """What the figures depend on."""
    chosen = subject.settings
    return {"policy": chosen.selection.policy, "bins": chosen.buffer.bins, "synchronous": chosen.store.synchronous}


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition observes the next dialogue in a session of its own."""
    stream, number = cycle(subject.dialogues), count()
    with Session(subject.scratch(), subject.settings, lm=subject.lm) as session:

        def repeat() -> Repetition:
            dialogue = next(stream)
            session.observe(replace(dialogue, prompt=f"{next(number)} {dialogue.prompt}"))
            return Repetition(1)

        yield repeat
