"""ESConv's windows: a line is `score speaker turn [Strategy] text EOS score speaker turn ...`.

A line ends in the newest turn of its conversation and repeats some before it. Speaker 0 seeks support
(the user), speaker 1 gives it. A line whose last turn is the user's, has no user turn before it, or is
carried on by the next line has no answer of its own yet: it is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Turn

container = "lines"
_TURN = re.compile(r"\s*-?\d+(?:\.\d+)?\s+([01])\s+(\d{1,9})(?:\s+(.*))?", re.DOTALL)
_NEXT = re.compile(r"\s+EOS\s+(?=-?\d+(?:\.\d+)?\s+[01]\s+\d)")
_STRATEGY = re.compile(r"^\[[^\]]*\]\s*")


def matches(value: object) -> bool:
    """Whether this looks like a line of this format."""
    return isinstance(value, str) and _TURN.fullmatch(_NEXT.split(value, 1)[0]) is not None


def outcomes(source: Iterable[Record], context_turns: int) -> Iterator[turns.Outcome]:
    """Yields the newest exchange of each line that completes one."""
    return turns.stepwise(_steps(source), context_turns)


def _steps(source: Iterable[Record]) -> Iterator[turns.Step | tuple[Record, RecordError]]:
    name, before = "", dict[int, Turn]()
    for record in source:
        try:
            window = _window(record.text)
        except RecordError as problem:
            yield record, problem
            continue
        if not before or not _goes_on(before, window):
            name, before = record.source, {}
        newest = max(before, default=-1)
        yield turns.Step(record, name, tuple(turn for number, turn in window.items() if number > newest))
        before = window


def _goes_on(before: dict[int, Turn], window: dict[int, Turn]) -> bool:
    """Whether a line goes on with the conversation: it is later and agrees on the turns that both hold."""
    return max(window) > max(before) and all(before[n] == window[n] for n in before.keys() & window.keys())


def _window(text: str) -> dict[int, Turn]:
    window: dict[int, Turn] = {}
    for part in _NEXT.split(text):
        parsed = _TURN.fullmatch(part)
        if parsed is None:
            raise RecordError("a turn is not `score speaker turn text`")
        speaker, number, said = parsed.groups()
        said = turns.clean(said or "", "text")
        window[int(number)] = Turn("assistant", _STRATEGY.sub("", said)) if speaker == "1" else Turn("user", said)
    return window
