"""ShareGPT's conversations: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record
from edge_sdss.types import Dialogue

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return isinstance(value, dict) and "conversations" in value


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue]:
    """Yields every exchange of the conversation."""
    return turns.dialogues(
        record,
        turns.listed(record.value.get("conversations"), "conversations"),
        context_turns,
        conversation=turns.conversation_of(record.value),
        time=turns.time_of(record.value),
    )
