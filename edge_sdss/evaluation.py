"""How well a model answers held-out dialogues, and how they are held out. Knows nothing of training."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_sdss import config
from edge_sdss.errors import InputError, message
from edge_sdss.metrics import rouge, rouge1, words
from edge_sdss.types import Dialogue, Example, Progress, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import LanguageModel

__all__ = ["NEAR_DUPLICATE", "Evaluation", "Item", "evaluate", "rouge1", "split"]

NEAR_DUPLICATE = 0.9


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out dialogue. What belongs to a greedy answer is None where none was generated.

    `nll` is in nats per token of the reference. `length_ratio` is words of the answer / words of the
    reference, None where the reference has no word.
    """

    prompt: str
    reference: str
    answer: str | None
    nll: float
    rouge1: float | None
    rougeL: float | None  # noqa: N815
    length_ratio: float | None


@dataclass(frozen=True)
class Evaluation:
    """Items in an order that depends on the examples and the seed only, so that two models' items pair up."""

    items: tuple[Item, ...]

    @property
    def nll(self) -> float | None:
        """Mean over items, nats per token; None where there is no item."""
        return _mean(item.nll for item in self.items)

    @property
    def rouge1(self) -> float | None:
        """Mean ROUGE-1 F1 over the answered items; None where there is none."""
        return _mean(item.rouge1 for item in self.items)

    @property
    def rougeL(self) -> float | None:  # noqa: N802
        """Mean ROUGE-L F1 over the answered items; None where there is none."""
        return _mean(item.rougeL for item in self.items)

    @property
    def length_ratio(self) -> float | None:
        """Mean over the answered items; None where there is none."""
        return _mean(item.length_ratio for item in self.items)


def evaluate(
    lm: LanguageModel,
    examples: Sequence[Example],
    settings: config.Evaluation,
    *,
    max_tokens: int,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measures the loss of at most `max_items` examples and the greedy answers to `rouge_items` of them.

    Which ones depends on `seed` and the examples, not on their order. Raises InputError without examples.
    """
    if not examples:
        raise InputError(message("evaluate the model", "no held-out dialogue", "give more dialogues"))
    chosen = sorted(examples, key=lambda e: _hash(settings.seed, repr((e.messages, e.answer))))
    chosen = chosen[: settings.max_items]
    losses = lm.nll(chosen, max_tokens=max_tokens, batch_size=settings.batch_size, progress=progress)
    answers: list[str | None] = [None] * len(chosen)
    asked = [example.messages for example in chosen[: settings.rouge_items]]
    if asked:
        made = lm.generate(
            asked, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, progress=progress
        )
        answers[: len(made)] = [generation.text for generation in made]
    scored = zip(chosen, losses, answers, strict=True)
    return Evaluation(tuple(_item(example, float(nll), answer) for example, nll, answer in scored))


def split(dialogues: Sequence[Dialogue], settings: config.Evaluation) -> tuple[list[Dialogue], list[Dialogue], int]:
    """Returns the stream, the held-out dialogues (both in the order given) and how many were removed.

    Whole conversations go to one side; those held out are drawn by the hash of their name and `seed`, so
    the order of the dialogues does not matter, until the share `holdout` is met as nearly as they allow.
    A single conversation is not held out. A held-out dialogue whose words are nearly those of one in the
    stream (Jaccard index of the sets >= 0.9) is removed and counted.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, dialogue in enumerate(dialogues):
        groups[_group(dialogue)].append(index)
    names = _held_out({name: len(rows) for name, rows in groups.items()}, settings)
    stream = [dialogue for dialogue in dialogues if _group(dialogue) not in names]
    held = [dialogue for dialogue in dialogues if _group(dialogue) in names]
    repeats = _repeats([_terms(d.text) for d in held], [_terms(d.text) for d in stream])
    kept = [dialogue for dialogue, repeat in zip(held, repeats, strict=True) if not repeat]
    return stream, kept, len(held) - len(kept)


def _item(example: Example, nll: float, answer: str | None) -> Item:
    prompt, reference = example.messages[-1].text, example.answer
    if answer is None:
        return Item(prompt, reference, None, nll, None, None, None)
    length = len(words(reference))
    ratio = len(words(answer)) / length if length else None
    return Item(prompt, reference, answer, nll, *rouge(reference, answer), ratio)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _terms(text: str) -> list[str]:
    return words(text) or [text.strip()]


def _hash(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _group(dialogue: Dialogue) -> str:
    return dialogue.id if dialogue.conversation is None else f"conversation:{dialogue.conversation}"


def _held_out(sizes: dict[str, int], settings: config.Evaluation) -> set[str]:
    """Names of the groups to hold out; one that would lead further from the target is passed over."""
    if len(sizes) < 2:
        return set()
    target = settings.holdout * sum(sizes.values())
    chosen: set[str] = set()
    count = 0
    for name in sorted(sizes, key=lambda name: _hash(settings.seed, name)):
        if abs(count + sizes[name] - target) < abs(count - target):
            chosen.add(name)
            count += sizes[name]
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def _repeats(held: Sequence[Sequence[str]], stream: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each held-out text is nearly one of the stream, exactly, by prefix filtering.

    Two sets with a Jaccard index of at least t share one of their rarest |x| - ceil(t |x|) + 1 words
    (Bayardo, Ma and Srikant, WWW 2007), so only texts that meet there are compared.
    """
    rarity = Counter(word for words in (*held, *stream) for word in set(words))
    ranked = [sorted(set(words), key=lambda word: (rarity[word], word)) for words in (*held, *stream)]
    sets = [frozenset(words) for words in ranked]
    index: dict[str, list[int]] = defaultdict(list)
    for row in range(len(held), len(ranked)):
        for word in _prefix(ranked[row]):
            index[word].append(row)
    return [
        any(
            _jaccard(sets[row], sets[other]) >= NEAR_DUPLICATE for word in _prefix(ranked[row]) for other in index[word]
        )
        for row in range(len(held))
    ]


def _prefix(ranked: list[str]) -> list[str]:
    return ranked[: len(ranked) - math.ceil(NEAR_DUPLICATE * len(ranked) - 1e-9) + 1]


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
