"""Self-Instruct's tasks: an instruction with instances of {"input", "output"}."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.formats.alpaca import prompt_of
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return isinstance(value, dict) and "instruction" in value and "instances" in value


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue | RecordError]:
    """Yields an exchange for each instance; all of them belong to one conversation."""
    value = record.value
    instances = value.get("instances")
    if not isinstance(instances, list):
        raise RecordError("wrong type: instances is no list")
    name = turns.conversation_of(value) or record.source
    for instance in instances:
        try:
            if not isinstance(instance, dict):
                raise RecordError("wrong type: instances holds something other than objects")
            prompt = prompt_of(value["instruction"], instance.get("input"))
            response = turns.filled(instance.get("output"), "output", "empty response")
        except RecordError as problem:
            yield problem
        else:
            yield Dialogue(prompt, response, conversation=name, source=record.source)
