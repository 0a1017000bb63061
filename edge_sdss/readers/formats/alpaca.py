"""Alpaca's {"instruction", "input", "output"} and Dolly's {"instruction", "context", "response"}."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record
from edge_sdss.types import Dialogue

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return isinstance(value, dict) and "instruction" in value and ("output" in value or "response" in value)


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue]:
    """Yields the one exchange of the record: instruction, blank line, input; then the output."""
    value = record.value
    answer = "output" if "output" in value else "response"
    given = "input" if "input" in value else "context"
    yield Dialogue(
        prompt_of(value.get("instruction"), value.get(given)),
        turns.filled(value.get(answer), answer, "empty response"),
        preferred=turns.optional(value.get("preferred"), "preferred"),
        conversation=turns.conversation_of(value),
        time=turns.time_of(value),
        source=record.source,
    )


def prompt_of(instruction: object, given: object) -> str:
    """Returns instruction and input, if there is one, with a blank line between. Raises RecordError."""
    prompt = turns.filled(instruction, "instruction", "empty prompt")
    more = turns.optional(given, "input")
    return f"{prompt}\n\n{more}" if more else prompt
