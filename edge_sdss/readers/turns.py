"""From named turns to dialogues: who is the user, what is an exchange. Knows nothing of files."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from edge_sdss.readers.records import Record, RecordError
from edge_sdss.types import Dialogue, Role, Turn

Outcome = tuple[Record, Dialogue | RecordError | None]

NO_EXCHANGE = "no user turn that an assistant turn answers"
_NAMES: dict[Role | None, str] = {
    "user": "user human patient client seeker customer caller family guest_family speaker_a speaker_1",
    "assistant": "assistant gpt chatgpt bot ai model doctor therapist counselor supporter agent nurse "
    "clinician guest_clinician speaker_b speaker_2",
    "system": "system developer",
    None: "tool function function_call function_response observation ipython",
}
_ROLES: dict[str, Role | None] = {name: role for role, names in _NAMES.items() for name in names.split()}
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class Speakers:
    """Gives every speaker of a conversation a role.

    An unknown name takes the role that nobody has yet, the user's first, so that in a conversation of
    two unknown names the first to speak is the user. Tool turns have the role None: they are left out.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._roles: dict[str, Role | None] = {}
        for name in names:
            if _key(name) in _ROLES:
                self.role(name)

    def role(self, name: str) -> Role | None:
        """Returns the role of a speaker, the same one for the same name."""
        key = _key(name)
        if key not in self._roles:
            taken = self._roles.values()
            free: Role = "assistant" if "user" in taken and "assistant" not in taken else "user"
            self._roles[key] = _ROLES.get(key, free)
        return self._roles[key]


Exchange = tuple[tuple[Turn, ...], str, str]


class Talk:
    """The end of a conversation: its last system turn and its last `context_turns` + 2 turns.

    Successive turns of one role are one turn, joined by a line break; empty ones do not count.
    """

    def __init__(self, context_turns: int) -> None:
        self._context_turns = context_turns
        self._system: tuple[Turn, ...] = ()
        self._past: deque[tuple[Role, list[str]]] = deque(maxlen=context_turns + 2)

    def add(self, turn: Turn) -> None:
        """Adds the newest turn."""
        if turn.role == "system":
            self._system = (turn,)
        elif turn.text and self._past and self._past[-1][0] == turn.role:
            self._past[-1][1].append(turn.text)
        elif turn.text:
            self._past.append((turn.role, [turn.text]))

    def exchange(self) -> Exchange | None:
        """Returns (context, prompt, response) where the last turn is the assistant's answer to the user."""
        if len(self._past) < 2 or self._past[-1][0] == "user":
            return None
        *before, prompt, response = [Turn(role, "\n".join(parts)) for role, parts in self._past]
        context = before[max(0, len(before) - self._context_turns) :]
        return (*self._system, *context), prompt.text, response.text


def exchanges(turns: Iterable[Turn], context_turns: int) -> Iterator[Exchange]:
    """Yields (context, prompt, response) for each user turn that an assistant turn answers."""
    talk = Talk(context_turns)
    for turn in turns:
        if turn.role == "user" and turn.text and (exchange := talk.exchange()):
            yield exchange
        talk.add(turn)
    if exchange := talk.exchange():
        yield exchange


@dataclass(frozen=True, slots=True)
class Step:
    """What one record adds to a conversation that stands in many records."""

    record: Record
    conversation: str
    turns: tuple[Turn, ...]
    time: str | None = None
    preferred: str | None = None


def stepwise(steps: Iterable[Step | tuple[Record, RecordError]], context_turns: int) -> Iterator[Outcome]:
    """Yields the newest exchange at each step that ends one; every other step is skipped.

    A step ends an exchange where its last turn is the assistant's and no further assistant's turn
    follows; it is known, and yielded, with the next step.
    """
    talk, waiting = Talk(context_turns), None
    for step in steps:
        if isinstance(step, tuple):
            yield step
            continue
        goes_on = waiting is not None and waiting.conversation == step.conversation
        spoken = [turn for turn in step.turns if turn.text and turn.role != "system"]
        if waiting and not (goes_on and not spoken):
            carried_on = goes_on and spoken[0].role == "assistant"
            yield waiting.record, None if carried_on else _stepped(talk, waiting)
        if not goes_on:
            talk = Talk(context_turns)
        for turn in step.turns:
            talk.add(turn)
        if goes_on and not spoken:
            yield step.record, None
        else:
            waiting = step
    if waiting:
        yield waiting.record, _stepped(talk, waiting)


def _stepped(talk: Talk, step: Step) -> Dialogue | None:
    exchange = talk.exchange()
    if exchange is None:
        return None
    context, prompt, response = exchange
    return Dialogue(prompt, response, context, step.preferred, step.conversation, step.time, step.record.source)


def dialogues(
    record: Record,
    turns: Iterable[Turn],
    context_turns: int,
    *,
    preferred: str | None = None,
    conversation: str | None = None,
    time: str | None = None,
) -> Iterator[Dialogue]:
    """Yields the exchanges of one whole conversation; `preferred` belongs to the last of them.

    Raises RecordError where there is none.
    """
    found = list(exchanges(turns, context_turns))
    if not found:
        raise RecordError(NO_EXCHANGE)
    for number, (context, prompt, response) in enumerate(found, start=1):
        wanted = preferred if number == len(found) else None
        name = conversation or record.source
        yield Dialogue(prompt, response, context, wanted, name, time, record.source)


def per_record(
    parse: Callable[[Record, int], Iterator[Dialogue | RecordError]],
) -> Callable[[Iterable[Record], int], Iterator[Outcome]]:
    """Makes the `outcomes` of a format whose records do not depend on each other."""

    def outcomes(source: Iterable[Record], context_turns: int) -> Iterator[Outcome]:
        for record in source:
            made = False
            try:
                for item in parse(record, context_turns):
                    made = True
                    yield record, item
                if not made:
                    yield record, RecordError(NO_EXCHANGE)
            except RecordError as problem:
                yield record, problem

    return outcomes


def clean(value: object, name: str) -> str:
    """Returns a text without outer white space. Raises RecordError, which names the field."""
    if not isinstance(value, str):
        raise RecordError(f"missing field: {name}" if value is None else f"wrong type: {name} is no text")
    if found := _UNUSABLE.search(value):
        raise RecordError(f"{'NUL character' if found.group() == chr(0) else 'lone surrogate'} in {name}")
    return value.strip()


def filled(value: object, name: str, empty: str) -> str:
    """Returns a text as `clean` does. Raises RecordError(`empty`) where nothing is left."""
    text = clean(value, name)
    if not text:
        raise RecordError(empty)
    return text


def optional(value: object, name: str) -> str | None:
    """Returns a text as `clean` does, or None where it is absent or empty."""
    return None if value is None else clean(value, name) or None


def label(record: dict[str, Any], *names: str) -> str | None:
    """Returns the first of these fields that holds a text or a number, as text."""
    for name in names:
        value = record.get(name)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            return clean(str(value), name)
    return None


def time_of(record: dict[str, Any]) -> str | None:
    """Returns when the record was made, as it is written there."""
    return label(record, "time", "timestamp", "created", "created_at", "date")


def conversation_of(record: dict[str, Any]) -> str | None:
    """Returns the conversation that the record names."""
    return label(record, "conversation", "conversation_id", "dialogue_id", "id")


def listed(items: object, name: str) -> Iterator[Turn]:
    """Yields the turns of a list of {role, content} or {from, value} objects. Raises RecordError."""
    if not isinstance(items, list):
        raise RecordError(f"wrong type: {name} is no list")
    if not all(isinstance(item, dict) for item in items):
        raise RecordError(f"wrong type: {name} holds something other than objects")
    named = [(clean(_first(item, "role", "from"), f"{name}.role"), item) for item in items]
    speakers = Speakers(who for who, _ in named)
    for who, item in named:
        role = speakers.role(who)
        content = _first(item, "content", "value", "text")
        if role is not None and not (content is None and item.get("tool_calls")):
            yield Turn(role, _content(content, f"{name}.content"))


def _content(value: object, name: str) -> str:
    if not isinstance(value, list):
        return clean(value, name)
    parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(clean(part.get("text"), f"{name}.text") for part in parts)


def _first(item: dict[str, Any], *names: str) -> object:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _key(name: str) -> str:
    key = "_".join(name.lower().replace("_", " ").split())
    base = key.rstrip("0123456789").rstrip("_")
    return base if key not in _ROLES and base in _ROLES else key
