"""Runs a whole round on eight dialogues: one variant each, one epoch of LoRA, the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition
from edge_sdss.session import Session

ITEM = "round"
RUNS = 3
REPETITIONS = 1
_DIALOGUES = 8


def settings(subject: Subject) -> dict[str, object]:
    """What the figures depend on."""
    return {"dialogues": _DIALOGUES, "variants": 1, "epochs": 1, "rank": subject.settings.tuning.rank}


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition observes nothing: the buffer is filled before, in a home of its own, and answered."""
    chosen = subject.settings.override(
        {"buffer": {"bins": _DIALOGUES}, "synthesis": {"variants": 1}, "tuning": {"epochs": 1}}
    )
    with Session(subject.scratch(), chosen, lm=subject.lm) as session:
        for dialogue in subject.dialogues[:_DIALOGUES]:
            session.observe(dialogue)
        session.annotate_from_stream()

        def repeat() -> Repetition:
            session.adapt()
            return Repetition(1)

        yield repeat
