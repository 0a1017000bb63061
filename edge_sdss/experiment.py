"""The whole loop on one stream, measured: split, observe, annotate, adapt, evaluate, report.

What `edge-sdss run` and `edge-sdss demo` do. Knows the order of the session's verbs and how a report
is put together; knows no stage from within.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

from edge_sdss import config, device, evaluation, report
from edge_sdss.errors import InputError, message
from edge_sdss.evaluation import Evaluation
from edge_sdss.readers import Reading
from edge_sdss.report import schema
from edge_sdss.rounds import Adapted
from edge_sdss.session import Session
from edge_sdss.statistics import paired_interval
from edge_sdss.store import now
from edge_sdss.types import Dialogue, Example, Interval

EXAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Stream:
    """What is offered, what is only measured on, and where it came from."""

    offered: Sequence[Dialogue]
    held_out: Sequence[Example]
    source: str
    format: str
    rejected: int = 0
    skipped: int = 0
    near_duplicates_removed: int = 0


@dataclass
class Outcome:
    """What is known at the end of a run."""

    adapted: Adapted | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds up the time of a stage."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def held_out_examples(dialogues: Sequence[Dialogue]) -> list[Example]:
    """Held-out dialogues as examples: the preferred response where the stream has one, else its response."""
    wanted = [(d, d.preferred or d.response) for d in dialogues]
    return [Example(d.messages, answer, d.id) for d, answer in wanted if answer]


def read(reading: Reading, settings: config.Evaluation, first: int | None = None) -> Stream:
    """Reads a stream and holds a share of it out, by conversation, near-duplicates removed."""
    dialogues = list(islice(reading, first))
    offered, held_out, removed = evaluation.split(dialogues, settings)
    examples = held_out_examples(held_out)
    return Stream(
        offered, examples, Path(reading.path).name, reading.format, reading.rejected, reading.skipped, removed
    )


def run(session: Session, stream: Stream, *, annotate: bool = True) -> Outcome:
    """Observes the stream, fires a round every `interval` offers and one at the end, and measures.

    A run that was killed goes on where it stopped. With `annotate` the review is answered from the stream.
    Raises InputError where nothing is held out or nothing could be trained on.
    """
    if not stream.held_out:
        raise InputError(message("measure the run", "no dialogue is held out", "give a longer stream or --holdout"))
    outcome = Outcome()
    with outcome.stage("load"):
        offered_before = session.selector.offers
    decisions = session.observe_all(stream.offered, stream.source)
    for done in count(offered_before + 1):
        with outcome.stage("observe"):
            decision = next(decisions, None)
        if decision is None:
            break
        session.progress("observing", done, len(stream.offered))
        if session.round_due and done < len(stream.offered):
            _round(session, outcome, annotate)
    if not session.round_done:
        _round(session, outcome, annotate)
    adapted = outcome.adapted = outcome.adapted or session.last_round()
    with outcome.stage("evaluate"):
        outcome.before = evaluate(session, stream.held_out, None)
        outcome.after = evaluate(session, stream.held_out, adapted.tuned.adapter if adapted else None)
    return outcome


def evaluate(session: Session, examples: Sequence[Example], adapter: Path | None) -> Evaluation:
    """NLL and greedy answers on held-out examples with an adapter; None for the base model."""
    tokens, settings = session.settings.tuning.max_tokens, session.settings.evaluation
    with session.with_adapter(adapter) as lm:
        return evaluation.evaluate(lm, examples, settings, max_tokens=tokens, progress=session.progress)


def _round(session: Session, outcome: Outcome, annotate: bool) -> None:
    if annotate:
        session.annotate_from_stream()
    with outcome.stage("synthesise"):
        session.synthesise()
    with outcome.stage("tune and judge"):
        outcome.adapted = session.adapt()


def save(found: schema.RunReport, outcome: Outcome, out: Path) -> None:
    """Writes adapter/ (adapter-rejected/ where the gate said no), report.html and, last, report.json."""
    if outcome.adapted:
        name = "adapter" if outcome.adapted.verdict.accepted else "adapter-rejected"
        partial = out / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(outcome.adapted.tuned.adapter, partial)
        shutil.rmtree(out / name, ignore_errors=True)
        partial.rename(out / name)
    report.write(found, out)


def clear(out: Path) -> None:
    """Removes what an earlier run wrote to a folder, and nothing else."""
    for name in ("report.json", "report.html", "rejects.jsonl"):
        (out / name).unlink(missing_ok=True)
    for name in ("adapter", "adapter-rejected", "home"):
        shutil.rmtree(out / name, ignore_errors=True)


# the report


def build_report(session: Session, stream: Stream, outcome: Outcome, *, title: str, command: str) -> schema.RunReport:
    """Puts together what a run did."""
    lm = session.lm
    adapted = outcome.adapted
    counts = {"heldout": len(stream.held_out), "near_duplicates_removed": stream.near_duplicates_removed}
    read = {
        "source": stream.source,
        "format": stream.format,
        "rejected": stream.rejected,
        "skipped": stream.skipped,
    }
    model = session.settings.model
    return schema.RunReport(
        title=title,
        command=command,
        created=now(),
        stages=outcome.seconds,
        model=schema.ModelInfo(
            name=lm.name,
            fingerprint=lm.fingerprint,
            parameters=lm.parameters,
            dtype=model.dtype,
            device=str(lm.device),
        ),
        stream=schema.Stream(dialogues=len(stream.offered) + len(stream.held_out), **read, **counts),
        buffer=_buffer(session),
        annotation=_annotation(session),
        synthesis=_synthesis(session, adapted, outcome) if adapted else None,
        tuning=_tuning(adapted) if adapted else None,
        eval=compare(outcome.before, outcome.after) if outcome.before and outcome.after else None,
        forgetting=_forgetting(adapted) if adapted else None,
        gate=_gate(adapted) if adapted else None,
        environment=schema.Environment(**device.environment()),
        settings=session.settings.model_dump(mode="json"),
    )


def _buffer(session: Session) -> schema.Buffer:
    settings, counts, buffer = session.settings.buffer, session.store.counts, session.selector.buffer
    decisions = list(session.store.decisions())
    reasons = {d.seq: d.reason for d in decisions}
    entries = []
    for slot, e in sorted(buffer.entries.items()):
        scores = {"eoe": e.eoe, "dss": e.dss, "idd": float(buffer.idd[slot])}
        wanted = (e.annotation.preferred if e.annotation else None) or e.dialogue.preferred
        entries.append(
            schema.Entry(
                slot=slot,
                id=e.dialogue.id,
                seq=e.seq,
                domain=e.domain,
                **scores,
                prompt=e.dialogue.prompt,
                response=e.dialogue.response,
                preferred=wanted,
                annotation=e.annotation.answer if e.annotation else None,
                reason=reasons.get(e.seq, "older than the log of offers"),
            )
        )
    offers = [
        schema.Offer(
            seq=d.seq,
            id=d.dialogue_id,
            action=d.action,
            domain=d.domain,
            **asdict(d.scores),
            evicted=tuple(d.evicted.values()),
            reason=d.reason,
        )
        for d in decisions
    ]
    return schema.Buffer(
        policy=session.settings.selection.policy,
        **asdict(counts),
        dropped=counts.offers - counts.kept,
        entries_used=len(buffer),
        bins=settings.bins,
        bytes=buffer.bytes,
        max_bytes=settings.max_bytes,
        vectors=settings.vectors,
        entries=tuple(entries),
        decisions=report.thin(offers),
    )


def _annotation(session: Session) -> schema.AnnotationCounts:
    answers = session.store.answers()
    return schema.AnnotationCounts(
        requested=answers.total(),
        accepted=answers["accept"],
        edited=answers["edit"],
        skipped=answers["skip"],
        forgotten=len(session.store.forgotten()),
    )


def _synthesis(session: Session, adapted: Adapted, outcome: Outcome) -> schema.SynthesisInfo:
    originals = {e.dialogue_id: e for e in session.examples(held_out=False)}
    shown = [v for v in adapted.variants if v.dialogue_id in list(originals)[:EXAMPLES_SHOWN]]
    tally = adapted.synthesised
    return schema.SynthesisInfo(
        made=tally.made,
        kept=tally.kept,
        dropped=tally.dropped,
        dropped_by_reason=tally.dropped_by_reason,
        seconds=outcome.seconds.get("synthesise", 0.0),
        examples=tuple(
            schema.SynthesisExample(
                prompt=originals[v.dialogue_id].messages[-1].text,
                response=originals[v.dialogue_id].answer,
                variant_prompt=v.prompt,
                variant_response=v.response,
                rouge1=v.rouge1,
                dropped=v.dropped,
            )
            for v in shown
        ),
    )


def _tuning(adapted: Adapted) -> schema.TuningInfo:
    facts = {f: getattr(adapted.tuned, f) for f in schema.TuningInfo.model_fields if f != "losses"}
    losses = tuple(
        schema.LossPoint(step=s.step, loss=s.loss, learning_rate=s.learning_rate) for s in adapted.tuned.losses
    )
    return schema.TuningInfo(**facts, losses=losses)


def compare(before: Evaluation, after: Evaluation) -> schema.EvalInfo:
    """The same held-out items, measured twice."""
    pairs = list(zip(before.items, after.items, strict=True))
    answered = [(b.rouge1, a.rouge1) for b, a in pairs if b.rouge1 is not None and a.rouge1 is not None]
    rouge = paired_interval(*zip(*answered, strict=True)) if answered else None
    return schema.EvalInfo(
        n=len(pairs),
        before=_quality(before),
        after=_quality(after),
        delta_nll=_delta(paired_interval([b.nll for b, _ in pairs], [a.nll for _, a in pairs])),
        delta_rouge1=_delta(rouge) if rouge else None,
        items=tuple(
            schema.EvalItem(
                prompt=b.prompt,
                reference=b.reference,
                answer_before=b.answer,
                answer_after=a.answer,
                nll_before=b.nll,
                nll_after=a.nll,
                rouge1_before=b.rouge1,
                rouge1_after=a.rouge1,
            )
            for b, a in pairs
        ),
    )


def _quality(e: Evaluation) -> schema.Quality:
    return schema.Quality(nll=e.nll, rouge1=e.rouge1, rougeL=e.rougeL, length_ratio=e.length_ratio)


def _delta(interval: Interval) -> schema.Delta:
    return schema.Delta(**asdict(interval))


def _forgetting(adapted: Adapted) -> schema.Forgetting:
    change = adapted.verdict.general
    return schema.Forgetting(
        n=change.n,
        before=adapted.general_before,
        after=adapted.general_after,
        delta_nll=change.mean,
        lo=change.lo,
        hi=change.hi,
    )


def _gate(adapted: Adapted) -> schema.GateInfo:
    verdict = adapted.verdict
    checks = tuple(schema.Check(**asdict(check)) for check in verdict.checks)
    return schema.GateInfo(accepted=verdict.accepted, reason=verdict.reason, checks=checks)
