"""OpenAI's chat records: {"messages": [{"role", "content"}, ...]}, with preferred, id and time if known."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record
from edge_sdss.types import Dialogue

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return isinstance(value, dict) and "messages" in value


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue]:
    """Yields every exchange of the conversation."""
    value = record.value
    return turns.dialogues(
        record,
        turns.listed(value.get("messages"), "messages"),
        context_turns,
        preferred=turns.optional(value.get("preferred"), "preferred"),
        conversation=turns.conversation_of(value),
        time=turns.time_of(value),
    )
