"""Writes variants of two dialogues and checks them, as `synth` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_sdss import synthesis
from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition
from edge_sdss.types import Example

ITEM = "variant"
_TOGETHER = 2


def settings(subject: Subject) -> dict[str, object]:
    """What the figures depend on."""
    chosen = subject.settings.synthesis
    return {"variants": chosen.variants, "vary": chosen.vary, "batch_size": chosen.batch_size}


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition writes the variants of the same two dialogues; equal seeds, equal work."""
    lm, chosen = subject.lm, subject.settings.synthesis
    picked = [d for d in subject.dialogues if d.preferred][:_TOGETHER]
    examples = [Example(d.messages, d.preferred or d.response, d.id) for d in picked]

    def repeat() -> Repetition:
        groups = list(synthesis.synthesise(lm, examples, chosen))
        return Repetition(sum(len(made) for group in groups for made in group.values()))

    yield repeat
