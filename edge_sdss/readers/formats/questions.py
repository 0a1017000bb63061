"""Lists of questions by user, {name: [question, ...]}: dialogues without a response, to probe a model."""

from __future__ import annotations

from collections.abc import Iterator

from edge_sdss.readers import turns
from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue

container = "json"


def matches(value: object) -> bool:
    """Whether this looks like a record of this format."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(questions, list) and questions and all(isinstance(text, str) for text in questions)
            for questions in value.values()
        )
    )


@turns.per_record
def outcomes(record: Record, context_turns: int) -> Iterator[Dialogue | RecordError]:
    """Yields a dialogue with an empty response for each question."""
    for name, questions in record.value.items():
        if not isinstance(questions, list):
            yield RecordError(f"wrong type: {turns.clean(name, 'name')} is no list")
            continue
        for question in questions:
            try:
                prompt = turns.filled(question, "question", "empty prompt")
                who = turns.clean(name, "name")
            except RecordError as problem:
                yield problem
            else:
                yield Dialogue(prompt, "", conversation=who or None, source=record.source)
