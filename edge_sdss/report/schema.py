"""The records of `report.json`: every key, its unit and what None means.

Knows nothing of files, plots or HTML. A number that was not measured is None, never 0; NaN and
infinity become None in what is measured on a model, since a round may diverge, and are refused elsewhere.
Sections that a run did not reach are None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import to_jsonable_python

UTC_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, BeforeValidator(_finite)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Record):
    """The language model that learned."""

    name: str = Field(description="name or folder of the base model")
    fingerprint: str = Field(description="hash of the base model's weights; an adapter fits no other")
    parameters: int = Field(ge=0, description="parameters of the base model, count")
    dtype: str = Field(description="type of the weights in memory, such as float32")
    device: str = Field(description="where it ran, such as cpu or cuda")


class Stream(_Record):
    """What was read, and what of it was set aside before the first offer."""

    source: str = Field(description="file, folder or name of the stream")
    format: str = Field(description="reader that understood it")
    dialogues: int = Field(ge=0, description="dialogues read, count")
    rejected: int = Field(ge=0, description="records that could not be read, count")
    skipped: int = Field(ge=0, description="records that hold no dialogue, count")
    heldout: int = Field(ge=0, description="dialogues held out: never offered, only measured on, count")
    near_duplicates_removed: int = Field(
        ge=0,
        description="dialogues removed because a near-duplicate was on the other side of the split, count",
    )


class Entry(_Record):
    """A dialogue that is in the buffer at the end of the run."""

    slot: int = Field(ge=0, description="bin of the buffer")
    id: str = Field(description="identity of the dialogue, a hash of its text")
    seq: int = Field(ge=0, description="number of the offer that brought it in")
    domain: str = Field(description="domain whose lexicon it hits most")
    eoe: float = Field(description="entropy of embedding, 0 to 1")
    dss: float = Field(description="domain-specific score, 0 to 1")
    idd: float = Field(description="in-domain dissimilarity against the buffer as it is now, 0 to 1")
    prompt: str = Field(description="what the user asked")
    response: str = Field(description="what the model answered at that time")
    preferred: str | None = Field(default=None, description="the answer the user wanted; None if not said")
    annotation: Literal["accept", "edit", "skip"] | None = Field(
        default=None, description="what the user said of it; None if not asked"
    )
    reason: str = Field(description="why it was kept, in words")


class Offer(_Record):
    """What became of one dialogue of the stream; the scores are those at the time of the offer."""

    seq: int = Field(ge=0, description="number of the offer")
    id: str = Field(description="identity of the dialogue, as in `evicted` of later offers")
    action: Literal["kept", "dropped"] = Field(description="kept or dropped")
    domain: str = Field(description="domain whose lexicon it hits most")
    eoe: float = Field(description="entropy of embedding, 0 to 1")
    dss: float = Field(description="domain-specific score, 0 to 1")
    idd: float = Field(description="in-domain dissimilarity against the buffer of that moment, 0 to 1")
    evicted: tuple[str, ...] = Field(default=(), description="ids of the dialogues that left for it")
    reason: str = Field(description="why, in words")


class Buffer(_Record):
    """The buffer at the end of the run, and how it came to be."""

    policy: str = Field(description="replacement policy")
    offers: int = Field(ge=0, description="dialogues offered, count")
    kept: int = Field(ge=0, description="offers that entered the buffer, count; some left it later")
    evicted: int = Field(ge=0, description="dialogues that left the buffer for another, count")
    dropped: int = Field(ge=0, description="offers that never entered the buffer, count")
    entries_used: int = Field(ge=0, description="bins in use, count")
    bins: int = Field(ge=1, description="bins in all, count")
    bytes: int = Field(ge=0, description="size of text, vectors, scores and annotations, bytes")
    max_bytes: int = Field(ge=1, description="budget of that size, bytes")
    vectors: str = Field(description="stored type of the vectors, such as int8")
    entries: tuple[Entry, ...] = Field(description="the dialogues in the buffer")
    decisions: tuple[Offer, ...] = Field(
        description="the offers in order of `seq`; may be thinned, see `edge_sdss.report.thin`"
    )


class AnnotationCounts(_Record):
    """How often the user was asked, and what came back."""

    requested: int = Field(ge=0, description="dialogues shown to the user, count")
    accepted: int = Field(ge=0, description="answers found right, count")
    edited: int = Field(ge=0, description="answers corrected by the user, count")
    skipped: int = Field(ge=0, description="requests left unanswered, count")
    forgotten: int = Field(ge=0, description="dialogues deleted at the user's wish, count")


class SynthesisExample(_Record):
    """A pair and one variant of it that the model wrote."""

    prompt: str = Field(description="prompt of the original")
    response: str = Field(description="response of the original")
    variant_prompt: str = Field(description="prompt of the variant")
    variant_response: str = Field(description="response of the variant")
    rouge1: float = Field(description="ROUGE-1 F1 of variant and original, 0 to 1")
    dropped: str | None = Field(default=None, description="why it was dropped; None if it was kept")


class SynthesisInfo(_Record):
    """Variants of the annotated pairs, written by the model itself."""

    made: int = Field(ge=0, description="variants written, count")
    kept: int = Field(ge=0, description="variants that passed the checks, count")
    dropped: int = Field(ge=0, description="variants that did not, count")
    dropped_by_reason: dict[str, int] = Field(description="variants dropped, count by reason")
    seconds: float = Field(ge=0, description="duration, s")
    examples: tuple[SynthesisExample, ...] = Field(description="some of them, variants of one pair together")


class LossPoint(_Record):
    """One step of the optimiser."""

    step: int = Field(ge=0, description="number of the step")
    loss: Measured = Field(description="training loss on the responses' tokens, nats per token")
    learning_rate: float = Field(ge=0, description="learning rate of that step")


class TuningInfo(_Record):
    """The LoRA round."""

    steps: int = Field(ge=0, description="optimiser steps, count")
    seconds: float = Field(ge=0, description="duration, s")
    tokens: int = Field(ge=0, description="tokens processed over all epochs, count")
    examples: int = Field(ge=0, description="examples trained on, count")
    trainable_parameters: int = Field(ge=0, description="parameters of the adapter, count")
    adapter_bytes: int = Field(ge=0, description="size of the adapter on disk, bytes")
    peak_tensor_bytes: int | None = Field(
        default=None, ge=0, description="most memory held by tensors at once, bytes; None if not measured"
    )
    losses: tuple[LossPoint, ...] = Field(description="the loss curve, in order of steps")


class Quality(_Record):
    """How good the answers to held-out prompts are. None where no item was answered or NLL is not finite."""

    nll: Measured = Field(description="negative log-likelihood of the wanted answers, nats per token; lower is better")
    rouge1: Measured = Field(default=None, description="ROUGE-1 F1 with the wanted answers, 0 to 1")
    rougeL: Measured = Field(default=None, description="ROUGE-L F1 with the wanted answers, 0 to 1")  # noqa: N815
    length_ratio: Measured = Field(
        default=None, description="length of the answers over that of the wanted answers, ratio"
    )


class Delta(_Record):
    """A mean paired difference, after minus before, with its 95 % interval."""

    mean: Measured = Field(description="mean difference, in the measure's unit")
    lo: Measured = Field(description="lower end of the 95 % interval, in the measure's unit")
    hi: Measured = Field(description="upper end of the 95 % interval, in the measure's unit")
    n: int = Field(ge=0, description="paired items, count")


class EvalItem(_Record):
    """One held-out dialogue, before and after the round. Answers are None where only NLL was measured."""

    prompt: str = Field(description="held-out prompt")
    reference: str = Field(description="the answer the user wants")
    answer_before: str | None = Field(default=None, description="greedy answer without the new adapter")
    answer_after: str | None = Field(default=None, description="greedy answer with it")
    nll_before: Measured = Field(description="NLL of the reference without the new adapter, nats per token")
    nll_after: Measured = Field(description="NLL of the reference with it, nats per token")
    rouge1_before: float | None = Field(default=None, description="ROUGE-1 F1 of answer_before, 0 to 1")
    rouge1_after: float | None = Field(default=None, description="ROUGE-1 F1 of answer_after, 0 to 1")


class EvalInfo(_Record):
    """Held-out dialogues: before and after the round."""

    n: int = Field(ge=0, description="held-out dialogues measured, count")
    before: Quality = Field(description="without the new adapter")
    after: Quality = Field(description="with it")
    delta_nll: Delta = Field(description="difference of NLL, nats per token; below 0 is better")
    delta_rouge1: Delta | None = Field(
        default=None,
        description="difference of ROUGE-1 F1; above 0 is better; None where no item was answered",
    )
    items: tuple[EvalItem, ...] = Field(description="the held-out dialogues")


class Forgetting(_Record):
    """NLL on a fixed general set that has nothing to do with the user."""

    n: int = Field(ge=0, description="general items, count")
    before: Measured = Field(description="NLL without the new adapter, nats per token")
    after: Measured = Field(description="NLL with it, nats per token")
    delta_nll: Measured = Field(description="mean difference, nats per token; above 0 is forgetting")
    lo: Measured = Field(description="lower end of its 95 % interval, nats per token")
    hi: Measured = Field(description="upper end of its 95 % interval, nats per token")


class Check(_Record):
    """One condition of the gate."""

    name: str = Field(description="what is checked")
    passed: bool = Field(description="whether it holds")
    value: Measured = Field(default=None, description="what was found, in `unit`; None if not measured")
    limit: Measured = Field(default=None, description="what was allowed, in `unit`; None if there is none")
    unit: str = Field(description="unit of value and limit; empty for a plain number")


class GateInfo(_Record):
    """Whether the new adapter may be used."""

    accepted: bool = Field(description="true: the new adapter is active; false: the previous one stays")
    reason: str = Field(description="why, in words")
    checks: tuple[Check, ...] = Field(description="the conditions, in the order they were tested")


class Environment(_Record):
    """The machine and the software of the run."""

    edge_sdss: str = Field(description="version of this package")
    python: str = Field(description="version of Python")
    platform: str = Field(description="operating system and architecture")
    processor: str = Field(description="name of the processor")
    cores: int = Field(ge=1, description="processor cores usable, count")
    memory_bytes: int | None = Field(default=None, ge=0, description="main memory, bytes; None if unknown")
    packages: dict[str, str] = Field(description="versions of the packages that shape the result")
    commit: str | None = Field(default=None, description="commit of the source; None outside a checkout")
    emulated: str | None = Field(default=None, description="board whose limits were emulated; None on a real one")


class RunReport(_Record):
    """Everything that a run did."""

    schema_version: Literal["1"] = Field(default="1", description="version of these keys")
    title: str = Field(description="title of the report")
    command: str = Field(description="the command that was given")
    created: str = Field(pattern=UTC_TIME, description="end of the run, ISO 8601, UTC")
    stages: dict[str, float] = Field(description="duration of each stage in order, s")
    model: ModelInfo = Field(description="the language model")
    stream: Stream = Field(description="what was read")
    buffer: Buffer = Field(description="what was kept")
    annotation: AnnotationCounts | None = Field(default=None, description="what the user said; None if not asked")
    synthesis: SynthesisInfo | None = Field(default=None, description="variants written; None if not run")
    tuning: TuningInfo | None = Field(default=None, description="the LoRA round; None if not run")
    eval: EvalInfo | None = Field(default=None, description="held-out quality; None if not run")
    forgetting: Forgetting | None = Field(default=None, description="general quality; None if not run")
    gate: GateInfo | None = Field(default=None, description="the decision; None if not run")
    environment: Environment = Field(description="machine and software")
    settings: dict[str, Any] = Field(description="every setting of the run, by section")

    @field_validator("settings", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return to_jsonable_python(value, inf_nan_mode="null")


def thin(offers: Sequence[Offer], limit: int = 5000) -> tuple[Offer, ...]:
    """Returns at most `limit` offers in order: the newest kept ones first, then evenly spaced dropped ones.

    Only kept offers change the buffer, so its history can still be drawn from what is left.
    """
    if len(offers) <= limit:
        return tuple(offers)
    kept = [offer for offer in offers if offer.action == "kept"][-limit:] if limit > 0 else []
    dropped = [offer for offer in offers if offer.action == "dropped"]
    room = min(limit - len(kept), len(dropped))
    spaced = [dropped[i * len(dropped) // room] for i in range(room)]
    return tuple(sorted([*kept, *spaced], key=lambda offer: offer.seq))


def json_schema() -> str:
    """Returns the JSON Schema (draft 2020-12) of `report.json`, as text."""
    return json.dumps(RunReport.model_json_schema(), indent=2) + "\n"
