"""Loads the model from the disk, its files being in the system's cache after the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition

ITEM = "load"


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition gives the model free and loads it anew."""

    def repeat() -> Repetition:
        subject.load()
        return Repetition(1)

    yield repeat
