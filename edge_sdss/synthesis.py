"""Variants of a pair, written by the model itself and checked (paper, section 3.2).

The model is asked for a semantically similar text between brackets; its answer is opened with the
bracket, so that even a small model writes nothing else. Knows nothing of the buffer or the store.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_sdss import config, metrics
from edge_sdss.types import Example, Progress, Turn, Variant, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import Generation, LanguageModel

OPEN, CLOSE = "[", "]"

PROMPT = f"Say this in other words, keep every name, number and fact, and put it between {OPEN} and {CLOSE}: "
_SYSTEM = Turn("system", "You rewrite texts in other words. You never answer them.")
_SHOWN = (  # worked examples: without them a small model answers the text, or repeats it (ADR 0005)
    (
        "My brother starts his new job at the bakery on 3 June, so I will drive him there at 5 in the morning.",
        "On 3 June my brother begins his new job at the bakery, and I am taking him there by car at 5 in the morning.",
    ),
    (
        "How many eggs do I need for two cakes if one cake takes three eggs?",
        "If a single cake takes three eggs, what number of eggs should I have for two cakes?",
    ),
)


def request(text: str) -> list[Turn]:
    """The fixed prompt that asks for a text semantically similar to `text`, between brackets."""
    shown = [(Turn("user", PROMPT + a), Turn("assistant", f"{OPEN}{b}{CLOSE}")) for a, b in _SHOWN]
    return [_SYSTEM, *(turn for pair in shown for turn in pair), Turn("user", PROMPT + text)]


@dataclass(frozen=True, slots=True)
class Tally:
    """How many variants were made, kept, and dropped for which reason."""

    made: int
    kept: int
    dropped_by_reason: dict[str, int]

    @property
    def dropped(self) -> int:
        """Made but not kept."""
        return self.made - self.kept


def tally(variants: Sequence[Variant]) -> Tally:
    """Counts variants by what became of them."""
    dropped = Counter(v.dropped for v in variants if v.dropped is not None)
    return Tally(len(variants), len(variants) - dropped.total(), dict(dropped))


def synthesise(
    lm: LanguageModel,
    examples: Sequence[Example],
    settings: config.Synthesis,
    progress: Progress = no_progress,
) -> Iterator[dict[str, list[Variant]]]:
    """Yields the variants of a few examples at a time, `variants` each, dropped ones included, by dialogue id.

    An example's draws depend on the seed and its id alone, so that work cut short goes on to the same result.
    """
    parts = 2 if settings.vary == "both" else 1
    together = max(1, settings.batch_size // max(parts * settings.variants, 1))
    for done in range(0, len(examples), together):
        progress("synthesising", done, len(examples))
        yield _variants(lm, examples[done : done + together], settings)
    progress("synthesising", len(examples), len(examples))


def _variants(lm: LanguageModel, group: Sequence[Example], settings: config.Synthesis) -> dict[str, list[Variant]]:
    texts = [text for example in group for text in _parts(example, settings)]
    requests = [(text, n) for text in texts for n in range(settings.variants)]
    written = iter(
        lm.generate(
            [request(text) for text, _ in requests],
            max_new_tokens=max(_limit(text, settings) for text in texts),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=[_seed(settings.seed, text, n) for text, n in requests],
            batch_size=settings.batch_size,
            prefix=OPEN,
            stop=(CLOSE,),
        )
    )
    made: dict[str, list[Variant]] = {}
    for example in group:
        columns = [[next(written) for _ in range(settings.variants)] for _ in _parts(example, settings)]
        made[example.dialogue_id] = [_checked(example, row, settings) for row in zip(*columns, strict=True)]
    return made


def _parts(example: Example, settings: config.Synthesis) -> list[str]:
    """The texts of a pair that are varied: the prompt, and with `vary = both` the answer too."""
    prompt = example.messages[-1].text
    return [prompt, example.answer] if settings.vary == "both" else [prompt]


def _limit(text: str, settings: config.Synthesis) -> int:
    """Tokens that a variant may have: twice what its original has at about four letters a token."""
    return min(settings.max_new_tokens, 8 + len(text) // 2)


def _seed(seed: int, text: str, number: int) -> int:
    content = f"{seed}:{number}:{text}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big")


def _checked(example: Example, written: Sequence[Generation], settings: config.Synthesis) -> Variant:
    """A variant with the reason for which it is dropped, if any."""
    texts = _parts(example, settings)
    scores = [metrics.rouge1(text, made.text) for text, made in zip(texts, written, strict=True)]
    dropped = None
    if not all(made.text.strip() for made in written):
        dropped = "empty"
    elif not all(made.finished for made in written):
        dropped = "cut off"
    elif any(made.tokens > _limit(text, settings) for text, made in zip(texts, written, strict=True)):
        dropped = "too long"
    elif min(scores) >= settings.max_rouge1:
        dropped = "copy"
    elif min(scores) < settings.min_rouge1:
        dropped = "unlike the original"
    answer = written[1].text.strip() if len(written) > 1 else example.answer
    return Variant(example.dialogue_id, written[0].text.strip(), answer, min(scores), dropped)
