"""MemoryBank's diary of talks: {user: {"history": {date: [{"query", "response"}, ...]}}}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue, Turn

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(user, dict) and "history" in user for user in value.values())
    )


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue | RecordError]:
    """Yields every exchange of every day, in the order of the file; a user's day is a conversation."""
    for user, about in record.value.items():
        days = about.get("history") if isinstance(about, dict) else None
        if not isinstance(days, dict):
            yield RecordError("missing field: history, an object of days")
            continue
        for date, talk in days.items():
            yield from _day(record, turns.clean(user, "user"), turns.clean(date, "date"), talk, context_turns)


def _day(record: Record, user: str, date: str, talk: Any, context_turns: int) -> Iterator[Dialogue | RecordError]:
    if not isinstance(talk, list):
        yield RecordError(f"wrong type: {date} is no list")
        return
    past: list[Turn] = []
    for exchange in talk:
        try:
            if not isinstance(exchange, dict):
                raise RecordError(f"wrong type: {date} holds something other than objects")
            prompt = turns.filled(exchange.get("query"), "query", "empty prompt")
            response = turns.filled(exchange.get("response"), "response", "empty response")
        except RecordError as problem:
            yield problem
            continue
        context = tuple(past[max(0, len(past) - context_turns) :])
        yield Dialogue(prompt, response, context, None, f"{user} {date}", date, record.source)
        past += [Turn("user", prompt), Turn("assistant", response)]
