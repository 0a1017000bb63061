"""Reads a prompt and gives the first token of the answer, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition

ITEM = "token"
PRIMARY = "rate"


def test(subject: Subject) -> str:
    """The label, as llama-bench writes it."""
    return f"pp{subject.settings.profile.prompt_tokens}"


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition reads the prompt into an empty cache; `ttft` is the time to the first token."""
    lm = subject.lm
    prompt = subject.prompt(subject.settings.profile.prompt_tokens)
    clock = subject.clock

    def repeat() -> Repetition:
        start = clock()
        next(lm.follow(prompt))
        return Repetition(len(prompt), {"ttft": [clock() - start]})

    yield repeat
