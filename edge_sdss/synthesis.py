"""Variants of a pair, written by the model itself and checked (paper, section 3.2).

The model is asked for a semantically similar text between brackets; its answer is opened with the
bracket, so that even a small model writes nothing else. Knows nothing of the buffer or the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_sdss import config, metrics
from edge_sdss.types import Example, Progress, Turn, Variant, no_progress

if TYPE_CHECKING:
    from edge_sdss.lm import Generation, LanguageModel

OPEN, CLOSE = "[", "]"

PROMPT = (
    "Write a text that means the same as the text below but uses other words. "
    f"Keep names, numbers and facts. Write it between {OPEN} and {CLOSE}, nothing else.\n\nText: {{text}}"
)


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
) -> Iterator[tuple[str, list[Variant]]]:
    """Yields (dialogue id, its `variants` variants, dropped ones included) example by example.

    The draws depend on the seed and the text alone, so that work cut short goes on to the same result.
    """
    for done, example in enumerate(examples):
        progress("synthesising", done, len(examples))
        yield example.dialogue_id, _variants(lm, example, settings)
    progress("synthesising", len(examples), len(examples))


def _variants(lm: LanguageModel, example: Example, settings: config.Synthesis) -> list[Variant]:
    if not settings.variants:
        return []
    prompt = example.messages[-1].text
    texts = [prompt, example.answer] if settings.vary == "both" else [prompt]
    requests = [[Turn("user", PROMPT.format(text=text))] for text in texts for _ in range(settings.variants)]
    written = lm.generate(
        requests,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed + int(example.dialogue_id or "0", 16) % (1 << 31),
        batch_size=settings.batch_size,
        stop=(CLOSE,),
        prefix=OPEN,
    )
    prompts, answers = written[: settings.variants], written[settings.variants :]
    if settings.vary == "prompt":
        return [_checked(example, [p], example.answer, settings) for p in prompts]
    return [_checked(example, [p, a], a.text, settings) for p, a in zip(prompts, answers, strict=True)]


def _checked(example: Example, written: Sequence[Generation], answer: str, settings: config.Synthesis) -> Variant:
    """A variant with the reason for which it is dropped, if any."""
    texts = [example.messages[-1].text, example.answer][: len(written)]
    scores = [metrics.rouge1(text, made.text) for text, made in zip(texts, written, strict=True)]
    dropped = None
    if not all(made.text.strip() for made in written):
        dropped = "empty"
    elif not all(made.finished for made in written):
        dropped = "cut off"
    elif min(scores) >= settings.max_rouge1:
        dropped = "copy"
    elif min(scores) < settings.min_rouge1:
        dropped = "unlike the original"
    return Variant(example.dialogue_id, written[0].text.strip(), answer.strip(), min(scores), dropped)
