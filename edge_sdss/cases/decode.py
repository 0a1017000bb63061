"""Writes an answer token by token after a prompt of 16, greedily, one answer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition

ITEM = "token"
PRIMARY = "rate"
_PROMPT = 16


def test(subject: Subject) -> str:
    """The label, as llama-bench writes it."""
    return f"tg{subject.settings.profile.new_tokens}"


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition writes all tokens. The rate counts the N - 1 intervals after the first token."""
    lm, tokens, clock = subject.lm, subject.settings.profile.new_tokens, subject.clock
    prompt = subject.prompt(_PROMPT)

    def repeat() -> Repetition:
        times = [clock()]
        answer = lm.follow(prompt)
        for _ in range(tokens):
            next(answer)
            times.append(clock())
        intervals = [after - before for before, after in pairwise(times)]
        return Repetition(tokens - 1, {"ttft": intervals[:1], "inter_token": intervals[1:]}, times[-1] - times[1])

    yield repeat
