"""Tables with a header (CSV, TSV): one turn in a row, one whole visit in a row, or prompt and response.

Turns: columns for speaker and text, and usually for the conversation, whose rows stand together.
Visits: a column of lines `Speaker: text` (MTS-Dialog). Pairs: the columns of `pairs` or `alpaca`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from edge_sdss.readers import turns
from edge_sdss.readers.formats import alpaca, pairs
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue, Turn

container = "table"
SPEAKERS = ("role", "speaker", "from", "author")
TEXTS = ("text", "content", "utterance", "message", "value")
CONVERSATIONS = (
    "conversation",
    "conversation_id",
    "dialogue",
    "dialogue_id",
    "dialog_id",
    "session",
    "session_id",
)
VISITS = ("dialogue", "dialog", "conversation", "transcript")
_SPOKEN = re.compile(r"""\s*["']?([^\W\d_][\w .'-]{0,39}?)\s*:\s*(.*)""", re.DOTALL)


def matches(value: object) -> bool:
    """Whether a row, cells by column, looks like one of this format."""
    return isinstance(value, dict) and (
        _is_turns(value) or pairs.matches(value) or alpaca.matches(value) or _column(value, VISITS) is not None
    )


def outcomes(source: Iterable[Record], context_turns: int) -> Iterator[turns.Outcome]:
    """Yields the exchanges of the table; its columns decide how."""
    rows = iter(source)
    first = next(rows, None)
    if first is None:
        return
    yield from _layout(first.value)(chain([first], rows), context_turns)


def _layout(row: dict[str, Any]) -> Callable[[Iterable[Record], int], Iterator[turns.Outcome]]:
    if _is_turns(row):
        return _turn_rows
    return pairs.outcomes if pairs.matches(row) else alpaca.outcomes if alpaca.matches(row) else _visits


@turns.per_record
def _visits(record: Record, context_turns: int) -> Iterator[Dialogue]:
    row = record.value
    name = _column(row, VISITS) or VISITS[0]
    said = spoken(turns.filled(row.get(name), name, f"empty {name}"))
    conversation = None if name == "conversation" else record.source
    return turns.dialogues(record, said, context_turns, conversation=conversation, time=turns.time_of(row))


def spoken(text: str) -> list[Turn]:
    """Returns the turns of lines `Speaker: text`; a line without a speaker goes on with the turn before."""
    named: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = _SPOKEN.fullmatch(line.strip())
        if match:
            named.append((match[1], match[2].strip()))
        elif named and line.strip():
            named[-1] = (named[-1][0], f"{named[-1][1]}\n{line.strip()}")
    speakers = turns.Speakers(name for name, _ in named)
    return [Turn(role, said) for name, said in named if (role := speakers.role(name))]


def _turn_rows(rows: Iterable[Record], context_turns: int) -> Iterator[turns.Outcome]:
    return turns.stepwise(_steps(rows), context_turns)


def _steps(rows: Iterable[Record]) -> Iterator[turns.Step | tuple[Record, RecordError]]:
    whole, name, speakers = "", "", turns.Speakers()
    for record in rows:
        row = record.value
        whole = whole or record.source
        try:
            conversation = turns.label(row, *CONVERSATIONS) or whole
            if conversation != name:
                name, speakers = conversation, turns.Speakers()
            role = speakers.role(turns.filled(row.get(_column(row, SPEAKERS) or ""), "speaker", "empty speaker"))
            said = turns.filled(row.get(_column(row, TEXTS) or ""), "text", "empty text")
            added = (Turn(role, said),) if role else ()
            preferred = turns.optional(row.get("preferred"), "preferred")
            yield turns.Step(record, name, added, turns.time_of(row), preferred)
        except RecordError as problem:
            yield record, problem


def _is_turns(row: dict[str, Any]) -> bool:
    return _column(row, SPEAKERS) is not None and _column(row, TEXTS) is not None


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)
