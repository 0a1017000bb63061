"""The orders in which a set's dialogues are offered. Every policy sees the identical stream.

Knows nothing of buffers, nor of what a topic is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from edge_sdss.errors import InputError, message
from edge_sdss.types import Dialogue

CHATTER_SHARE = 0.3


def arrange(order: str, dialogues: Sequence[Dialogue], topics: Sequence[str], seed: int) -> list[Dialogue]:
    """Returns the stream. `topics` go with the dialogues, which are in their natural order.

    `shuffled`; `sticky-R`: the topic stays with probability R, else it is that of a dialogue drawn from all that are
    left (a Markov chain, whose stationary distribution is the set's); `blocked`: topic after topic; `natural`;
    `noisy`: shuffled, and 30 % of the offers are small talk, near-duplicates of each other.
    Raises InputError for another name.
    """
    draws = random.Random(f"{order}:{seed}")
    kind, _, given = order.partition("-")
    shuffled = draws.sample(list(zip(dialogues, topics, strict=True)), len(dialogues))
    if order == "natural":
        return list(dialogues)
    if order == "shuffled":
        return [dialogue for dialogue, _ in shuffled]
    if order == "blocked":
        turn = {topic: draws.random() for topic in sorted(set(topics))}
        return [dialogue for dialogue, topic in sorted(shuffled, key=lambda pair: turn[pair[1]])]
    if order == "noisy":
        return _noisy([dialogue for dialogue, _ in shuffled], draws)
    if kind == "sticky" and _share(given) is not None:
        return _sticky(shuffled, _share(given) or 0.0, draws)
    choose = "choose shuffled, sticky-0.9, sticky-0.99, blocked, natural or noisy"
    raise InputError(message(f"arrange a stream as {order}", "no such order", choose))


def _share(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _sticky(shuffled: Sequence[tuple[Dialogue, str]], stay: float, draws: random.Random) -> list[Dialogue]:
    left: dict[str, list[Dialogue]] = {}
    for dialogue, topic in shuffled:
        left.setdefault(topic, []).append(dialogue)
    stream: list[Dialogue] = []
    topic = ""
    while any(left.values()):
        if not left.get(topic) or draws.random() >= stay:
            open_topics = [name for name, rest in left.items() if rest]
            topic = draws.choices(open_topics, [len(left[name]) for name in open_topics])[0]
        stream.append(left[topic].pop())
    return stream


def _noisy(dialogues: Sequence[Dialogue], draws: random.Random) -> list[Dialogue]:
    said = chatter()
    count = round(len(dialogues) * CHATTER_SHARE / (1 - CHATTER_SHARE))
    stream = [*dialogues, *(draws.choice(said) for _ in range(count))]
    draws.shuffle(stream)
    return stream


_GREETINGS = ("hi", "hey", "hello", "good morning", "good evening", "ok", "okay", "thanks", "thank you", "great")
_TAILS = ("", " there", "!", " again", " assistant", ", how are you", ", how are you today", ", talk to you later")
_ANSWERS = ("Hello! How can I help you today?", "You're welcome! Is there anything else?")


def chatter() -> list[Dialogue]:
    """Small talk, each piece nearly another one: what a user says without meaning to be remembered."""
    said = [
        Dialogue(f"{greeting}{tail}".capitalize(), answer)
        for greeting in _GREETINGS
        for tail in _TAILS
        for answer in _ANSWERS
    ]
    return list({dialogue.id: dialogue for dialogue in said}.values())
