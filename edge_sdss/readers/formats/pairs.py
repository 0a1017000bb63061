"""Prompt and response under their usual names; context, preferred, conversation and time if known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue, Turn

container = "json"
PROMPTS = ("input", "prompt", "question", "query", "user")
RESPONSES = ("response", "output", "answer", "completion", "assistant", "reply")


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return (
        isinstance(value, dict)
        and "instruction" not in value
        and any(name in value for name in PROMPTS)
        and any(name in value for name in RESPONSES)
    )


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue]:
    """Yields the one exchange of the record."""
    value = record.value
    before = context(value.get("context"))
    yield Dialogue(
        turns.filled(*_field(value, PROMPTS), "empty prompt"),
        turns.filled(*_field(value, RESPONSES), "empty response"),
        tuple(before[max(0, len(before) - context_turns) :]),
        turns.optional(value.get("preferred"), "preferred"),
        turns.conversation_of(value),
        turns.time_of(value),
        record.source,
    )


def context(value: object) -> list[Turn]:
    """Returns the turns before a prompt. Raises RecordError.

    A text is a system turn; texts in a list are turns that alternate, the last by the assistant.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [Turn("system", turns.clean(value, "context"))]
    if not isinstance(value, list):
        raise RecordError("wrong type: context is neither text nor list")
    if not any(isinstance(item, str) for item in value):
        return [turn for turn in turns.listed(value, "context") if turn.text]
    texts = [turns.clean(item, "context") for item in value]
    return [
        Turn("assistant" if (len(texts) - number) % 2 else "user", text) for number, text in enumerate(texts) if text
    ]


def _field(value: dict[str, Any], names: tuple[str, ...]) -> tuple[object, str]:
    name = next((name for name in names if value.get(name) is not None), names[0])
    return value.get(name), name
