"""A round as a record: which dialogues it learns from, what it did, and how that is stored beside its adapter.

Knows nothing of when a round is due or in which order its stages run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from edge_sdss import gate, synthesis
from edge_sdss.tuning import trainer
from edge_sdss.types import Annotation, Example, Exemplar, Interval, Turn, Variant


@dataclass(frozen=True)
class Adapted:
    """What a round did. `general_*`: mean loss on the general set, nats per token, of base model and adapter."""

    number: int
    tuned: trainer.Round
    verdict: gate.Verdict
    synthesised: synthesis.Tally
    general_before: float
    general_after: float
    variants: tuple[Variant, ...] = ()


def example_of(exemplar: Exemplar, train_on_all: bool) -> Example | None:
    """What is learned from an exemplar: the answer that the user approved or gave; None where there is none.

    With `train_on_all` a dialogue about which nothing was said counts as approved.
    """
    answer: str | None = None
    match exemplar.annotation:
        case Annotation("edit", preferred):
            answer = preferred
        case Annotation("accept"):
            answer = exemplar.dialogue.response
        case None if train_on_all:
            answer = exemplar.dialogue.response
    return Example(exemplar.dialogue.messages, answer, exemplar.dialogue.id) if answer else None


def replayed(examples: Sequence[Example], learnt: Set[str], share: float | None, seed: int) -> list[Example]:
    """The examples of a round: all new ones, and of those `learnt` in earlier rounds so many that they are `share`.

    None takes all of them; so does a round without a new one. Which of the old ones, a hash says.
    """
    old = sorted((e for e in examples if e.dialogue_id in learnt), key=lambda e: _hash(e.dialogue_id, seed))
    new = len(examples) - len(old)
    if share is None or not new:
        return list(examples)
    kept = {e.dialogue_id for e in old[: round(new * share / (1 - share))]}
    return [e for e in examples if e.dialogue_id not in learnt or e.dialogue_id in kept]


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"replay:{seed}:{name}".encode()).hexdigest()


def variant_of(example: Example, variant: Variant) -> Example:
    """An example with the prompt and answer of one of its variants, in the same context."""
    messages = (*example.messages[:-1], Turn("user", variant.prompt))
    return Example(messages, variant.response, example.dialogue_id)


def record(verdict: gate.Verdict, tally: synthesis.Tally, before: float, after: float) -> dict[str, Any]:
    """What of a round is stored beside its adapter."""
    means = {"general_before": before, "general_after": after}
    return {"verdict": asdict(verdict), "synthesis": asdict(tally), **means}


def restored(number: int, tuned: trainer.Round, stored: Mapping[str, Any]) -> Adapted:
    """A round from its record; its variants are not kept."""
    found = stored["verdict"]
    verdict = gate.Verdict(
        accepted=found["accepted"],
        reason=found["reason"],
        checks=tuple(gate.Check(**check) for check in found["checks"]),
        personal=Interval(**found["personal"]) if found["personal"] else None,
        general=Interval(**found["general"]),
    )
    means = stored["general_before"], stored["general_after"]
    return Adapted(number, tuned, verdict, synthesis.Tally(**stored["synthesis"]), *means)
