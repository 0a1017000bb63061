"""Session: the only place where the stages meet. Knows which stage comes next, not how any of them works.

A home folder holds all that a session remembers:

    edge_sdss.db            offers, exemplars, annotations, rounds
    adapters/round-0001/    one PEFT folder a round
    lock                    held by the one process that writes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from edge_sdss import embedding, gate, general, lexicon, rounds, surprise, synthesis
from edge_sdss.config import Config
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError, message
from edge_sdss.rounds import Adapted
from edge_sdss.selection import Buffer, Selector
from edge_sdss.selection.buffer import entry_bytes
from edge_sdss.store import Round as StoredRound
from edge_sdss.store import Store, lock, now
from edge_sdss.tuning import budgeted, outofmemory, trainer
from edge_sdss.types import (
    Annotation,
    Decision,
    Dialogue,
    Example,
    Exemplar,
    Progress,
    no_progress,
)

if TYPE_CHECKING:
    from edge_sdss.lm import LanguageModel
    from edge_sdss.runtime import Engine


class Session:
    """One user's model, buffer and adapters. Use as a context manager: it holds the home's lock.

    The model is loaded when first needed: reviewing, forgetting and rolling back do without it. Tuning within a
    limit of memory or heat, or with weights in other types, is done in a process of its own, for which the model
    is let go and loaded again later; one that was given as `lm`, which must be that of the settings, stays. With a
    bundle's engine as `lm` a session observes and reviews; it cannot tune.
    """

    def __init__(
        self,
        home: Path,
        settings: Config,
        *,
        lm: LanguageModel | Engine | None = None,
        progress: Progress = no_progress,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        """A round tells `on_event` how it goes, see `tuning.course.Conditions` and `tuning.budgeted`.

        Raises InputError where another process holds the home, ConfigError where its file is no store.
        """
        self.home = home
        self.settings = settings
        self.progress = progress
        self.on_event = on_event
        self.unusable: list[str] = []  # dialogues of a stream that the model could not embed, and why
        self._given = cast("LanguageModel | None", lm)  # an engine has what selection and synthesis ask for
        with ExitStack() as stack:
            stack.enter_context(lock(home))
            self.store = Store(home / "edge_sdss.db", settings.store)
            stack.callback(self.store.close)
            self._open = stack.pop_all()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store and gives the home free."""
        self._open.close()

    @cached_property
    def lm(self) -> LanguageModel:
        """The base model, with no adapter attached."""
        if self._given is not None:
            return self._given
        from edge_sdss.lm import LanguageModel

        return LanguageModel.load(self.settings.model, progress=self.progress)

    @cached_property
    def selector(self) -> Selector:
        """The selector, with the buffer as the store holds it."""
        words = lexicon.load(self.settings.selection.lexicons)
        identity, same = self._identity(words)
        buffer = Buffer(self.settings.buffer, self.lm.width)
        offers = self.store.counts.offers
        selector = Selector(self.settings.selection, buffer, words, device=self.lm.device.type, offers=offers)
        selector.forgotten = self.store.forgotten()
        if not same:
            self._embed_anew(selector, identity)
        if not same or self.store.meta("values") != selector.asks:
            self._value_anew(selector.asks)
        kept = self.store.exemplars()
        size = buffer.reserved + sum(entry_bytes(e.dialogue, len(e.vector), e.annotation) for e in kept.values())
        if max(kept, default=-1) >= buffer.bins or size > buffer.max_bytes:
            found = f"bin {max(kept) + 1} of {buffer.bins} is used, {size:,} of {buffer.max_bytes:,} bytes"
            raise BudgetExceeded(message("open the buffer", found, "give at least as much, or forget some dialogues"))
        for slot, exemplar in kept.items():
            buffer.put(slot, exemplar)
        parts = self.store.memory()
        if parts and selector.memory:
            selector.recall(parts)
        elif parts or selector.memory:
            self.store.remember(selector.restart_memory())
        return selector

    # observe

    def observe(self, dialogue: Dialogue, tokens: Any = None, **read: Any) -> Decision:
        """Offers one dialogue to the buffer; what comes of it is stored before it is true in memory.

        `tokens`: its E(T) where the session's model has computed it anyhow, as `embedding.of_answer` gives it; else
        a forward pass is made. Raises InputError where the dialogue cannot be embedded.
        """
        selector = self.selector  # before the forward pass: it may refuse the model
        tokens = embedding.of(self.lm, dialogue, self.settings) if tokens is None else tokens
        decision = selector.decide(dialogue, tokens, self._value(dialogue, selector.asks))
        self.store.record(decision, **read)
        selector.apply(decision)
        return decision

    def observe_all(self, dialogues: Iterable[Dialogue], source: str | None = None) -> Iterator[Decision]:
        """Offers a stream; one with a `source` goes on where it stopped, even where the process was killed.

        A dialogue that cannot be scored is told in `unusable`; the stream goes on.
        Raises InputError where what was read of the source before is no longer what it begins with.
        """
        done, digest = self.store.source(source) if source else (0, "")
        chain = ""
        position = 0
        for position, dialogue in enumerate(dialogues, start=1):
            chain = hashlib.blake2b((chain + dialogue.id).encode(), digest_size=16).hexdigest()
            if position == done and chain != digest:
                break
            if position > done:
                try:
                    yield self.observe(dialogue, source=source, chain=chain, position=position)
                except InputError as error:
                    self.unusable.append(f"{dialogue.source}: {error}")
        else:
            if position >= done:
                return
        found = f"its first {done} dialogues are not those that were offered before"
        raise InputError(message(f"go on with {source}", found, "offer it anew with --again"))

    # review

    def pending(self) -> list[Exemplar]:
        """The kept dialogues about which the user may be asked today, oldest first; none is asked about twice."""
        asked = self.store.asked()
        today = now()[:10]
        left = self.settings.review.max_requests_per_day - sum(time.startswith(today) for time in asked.values())
        waiting = [e for e in self.store.exemplars().values() if e.dialogue.id not in asked]
        return sorted(waiting, key=lambda e: e.seq)[: max(left, 0)]

    def annotate(self, dialogue_id: str, annotation: Annotation) -> None:
        """Writes what the user said of a kept dialogue.

        Raises InputError where it is not kept, or an edit is empty; BudgetExceeded where it does not fit.
        """
        kept = self.store.exemplars()
        slot = _slot_of(kept, dialogue_id)
        if annotation.answer == "edit" and not (annotation.preferred or "").strip():
            raise InputError(message(f"edit {dialogue_id}", "the answer is empty", "give one, or skip"))
        changed = kept | {slot: replace(kept[slot], annotation=annotation)}
        sizes = {s: entry_bytes(e.dialogue, len(e.vector), e.annotation) for s, e in changed.items()}
        budget = self.settings.buffer
        if sizes[slot] > budget.max_entry_bytes or sum(sizes.values()) > budget.max_bytes:
            found = f"it would take {sizes[slot]:,} of a bin's {budget.max_entry_bytes:,} bytes"
            found += f" and the buffer {sum(sizes.values()):,} of {budget.max_bytes:,}"
            raise BudgetExceeded(message(f"annotate {dialogue_id}", found, "shorten the answer"))
        self.store.annotate(dialogue_id, annotation)
        if "selector" in self.__dict__:
            self.selector.buffer.remove(slot)
            self.selector.buffer.put(slot, changed[slot])

    def annotate_from_stream(self) -> int:
        """Answers for the user with what the stream itself holds: its preferred response, or else its response."""
        waiting = [e for e in self.store.exemplars().values() if e.annotation is None]
        for exemplar in waiting:
            d = exemplar.dialogue
            if d.preferred and d.preferred != d.response:
                self.annotate(d.id, Annotation("edit", d.preferred))
            else:
                self.annotate(d.id, Annotation("accept" if d.response else "skip"))
        return len(waiting)

    def forget(self, dialogue_id: str) -> list[int]:
        """Deletes a dialogue everywhere; returns the rounds whose adapters were trained on it.

        Raises InputError where no kept or trained dialogue has this id.
        """
        kept = self.store.exemplars()
        slots = [slot for slot, e in kept.items() if e.dialogue.id == dialogue_id]
        if not slots and not self.store.knows(dialogue_id):
            raise InputError(message(f"forget {dialogue_id}", "no dialogue has this id", "see `edge-sdss status`"))
        stale = self.store.forget(dialogue_id)
        if "selector" in self.__dict__:
            self.selector.forgotten.add(dialogue_id)
            for slot in slots:
                self.selector.buffer.remove(slot)
            if self.selector.memory:
                self.store.remember(self.selector.restart_memory())
        return stale

    # a round

    def adapt(self) -> Adapted:
        """One round: synthesise, tune, judge, activate. A round that was cut short is gone on with.

        Raises BudgetExceeded before anything else where the settings' memory is too little.
        """
        self._refuse_too_little_memory()
        stored = self.store.open_round(self._start())
        tally = self.synthesise()
        tuned = self._tune(stored)
        verdict, before, after = self._judge(stored, tuned)
        self._probe(tuned.adapter)
        trained = [example.dialogue_id for example in self.material()]
        variants = tuple(v for made in self.store.variants().values() for v in made)
        self.store.close_round(stored.number, verdict.accepted, rounds.record(verdict, tally, before, after), trained)
        return Adapted(stored.number, tuned, verdict, tally, before, after, variants)

    @property
    def round_due(self) -> bool:
        """Whether `interval` offers have passed since a round was opened."""
        counts, past = self.store.counts, self.store.rounds()
        last = past[-1].offers if past and past[-1].state != "running" else 0
        return counts.offers // self.settings.tuning.interval > last // self.settings.tuning.interval

    @property
    def round_done(self) -> bool:
        """Whether the newest round is finished and saw every offer so far."""
        past = self.store.rounds()
        return bool(past) and past[-1].state != "running" and past[-1].offers == self.store.counts.offers

    def last_round(self) -> Adapted | None:
        """What the newest finished round did, without its variants, which are not kept; None before the first."""
        finished = [r for r in self.store.rounds() if r.state != "running"]
        if not finished:
            return None
        last = finished[-1]
        return rounds.restored(last.number, trainer.load(self.adapter_folder(last.number)), last.report)

    def examples(self, *, held_out: bool) -> list[Example]:
        """The annotated dialogues as examples: those to train on, or those kept for the gate."""
        found = []
        for exemplar in self.store.exemplars().values():
            example = rounds.example_of(exemplar, self.settings.review.train_on == "all")
            if example and gate.held_out(example.dialogue_id, self.settings.gate) == held_out:
                found.append(example)
        return found

    def material(self) -> list[Example]:
        """The annotated dialogues that the next round is trained on."""
        chosen = self.settings.tuning
        return rounds.replayed(self.examples(held_out=False), self.store.learnt(), chosen.replay, chosen.seed)

    def synthesise(self) -> synthesis.Tally:
        """Writes the variants that are missing; a few exemplars' are stored together as soon as they are made."""
        have = self.store.variants()
        missing = [example for example in self.material() if example.dialogue_id not in have]
        if missing and self.settings.synthesis.variants:
            made = synthesis.synthesise(self.lm, missing, self.settings.synthesis, self.progress)
            for group in made:
                self.store.put_variants(group)
        return synthesis.tally([v for variants in self.store.variants().values() for v in variants])

    def _tune(self, stored: StoredRound) -> trainer.Round:
        originals = self.material()
        variants = self.store.variants()
        written = [rounds.variant_of(e, v) for e in originals for v in variants.get(e.dialogue_id, ()) if not v.dropped]
        if not originals:
            do = "review some dialogues first, or pass --train-on all"
            raise InputError(message("tune the model", "no annotated dialogue to train on", do))
        chosen, learnt = self.settings.tuning, [*originals, *written]
        options: dict[str, Any] = {
            "start": self._adapter(stored.start),
            "replace": True,  # a running round's adapter was never active
            "card": {"round": stored.number, "dialogues": len(originals), "variants": len(written)},
            "progress": self.progress,
        }
        out = self.adapter_folder(stored.number)
        if chosen.memory is None and chosen.max_celsius is None and chosen.weights == "as loaded":
            conditions = trainer.Conditions(on_event=self.on_event)
            return trainer.train(self.lm, learnt, chosen, out, conditions=conditions, **options)
        self._free_model()
        options |= {"budget_bytes": chosen.memory, "on_event": self.on_event}
        return budgeted.train(self.settings.model, learnt, chosen, out, **options)

    def _probe(self, adapter: Path) -> None:
        """Where a bundle is deployed, notes what PEFT computes with an adapter: the bundle's is held against it."""
        if (self.home / "bundles").is_dir():
            from edge_sdss import bundling

            bundling.record(self.lm, adapter)

    def _refuse_too_little_memory(self) -> None:
        chosen = self.settings.tuning
        if chosen.memory is not None:
            budgeted.planned(self.settings.model, chosen, chosen.memory)

    def _free_model(self) -> None:
        """Gives the model's memory to others until it is needed again; one that was given stays where it is."""
        if self._given is None:
            self.__dict__.pop("lm", None)
            outofmemory.free()

    def _judge(self, stored: StoredRound, tuned: trainer.Round) -> tuple[gate.Verdict, float, float]:
        """Personal loss against the adapter it started from, general loss against the base model."""
        personal = self.examples(held_out=True)
        before = self.nll(personal, self._adapter(stored.start))
        after = self.nll(personal, tuned.adapter)
        general_before = self.nll(general.examples(), None)
        general_after = self.nll(general.examples(), tuned.adapter)
        verdict = gate.judge(before, after, general_before, general_after, self.settings.gate)
        return verdict, float(general_before.mean()), float(general_after.mean())

    def nll(self, examples: Sequence[Example], adapter: Path | None) -> Any:
        """The loss of each example with an adapter, [n] float64 nats per token."""
        tokens, batch = self.settings.tuning.max_tokens, self.settings.evaluation.batch_size
        with self.with_adapter(adapter) as lm:
            return lm.nll(examples, max_tokens=tokens, batch_size=batch, progress=self.progress)

    @contextmanager
    def with_adapter(self, adapter: Path | None) -> Iterator[LanguageModel]:
        """Inside, the model answers with an adapter (None: the base model); afterwards it is the base model again."""
        self.lm.attach(adapter)
        try:
            yield self.lm
        finally:
            self.lm.attach(None)

    # adapters

    def adapter_folder(self, number: int) -> Path:
        """Where a round's adapter is."""
        return self.home / "adapters" / f"round-{number:04d}"

    @property
    def active_adapter(self) -> Path | None:
        """The adapter that serves; None for the base model."""
        active = self.store.active_round()
        return self._adapter(active.number if active else None)

    def rollback(self) -> int | None:
        """Makes the round before the active one active again; returns its number, None for the base model.

        Raises InputError where the base model is active already.
        """
        active = self.store.active_round()
        if active is None:
            raise InputError(message("roll back", "the base model is active", "nothing to do"))
        earlier = [r.number for r in self.store.rounds() if r.state == "accepted" and r.number < active.number]
        previous = max(earlier, default=None)
        self.store.activate(previous)
        return previous

    def _start(self) -> int | None:
        """The round to go on from: the active one, unless it was trained on what the user has forgotten."""
        active = self.store.active_round()
        return active.number if active and not active.stale else None

    def _adapter(self, number: int | None) -> Path | None:
        return None if number is None else self.adapter_folder(number)

    def _identity(self, words: lexicon.Lexicon) -> tuple[dict[str, str], bool]:
        """What the scores are comparable under, and whether the home's embeddings are of the same source.

        Raises ConfigError where its scores are of another model or formula: they must not meet in one buffer.
        """
        s = self.settings.selection
        mine = {
            "model": self.lm.fingerprint,
            "eoe": s.eoe,
            "pooling": s.pooling,
            "text": s.text,
            "vectors": self.settings.buffer.vectors,
            "lexicon": words.digest,
            "embeddings": embedding.source(self.lm, self.settings),
        }
        stored = {"embeddings": embedding.BEFORE, **self.store.meta("identity", mine)}
        if changed := [key for key in mine if stored[key] != mine[key] and key != "embeddings"]:
            asked = f"open home {self.home} with another {', '.join(changed)}"
            raise ConfigError(message(asked, "its scores would not compare", "use the old setting or a new --home"))
        same = stored["embeddings"] == mine["embeddings"]
        if same:
            self.store.set_meta("identity", mine)
        return mine, same

    def _embed_anew(self, selector: Selector, identity: dict[str, str]) -> None:
        """Gives all that is kept the scores of this session's embeddings, all at once or, if stopped, none."""
        kept = self.store.exemplars()
        for done, (slot, exemplar) in enumerate(kept.items(), start=1):
            kept[slot] = selector.rescored(exemplar, embedding.of(self.lm, exemplar.dialogue, self.settings))
            self.progress("embedding the buffer anew", done, len(kept))
        self.store.rescore(kept, identity)

    def _value(self, dialogue: Dialogue, kind: str | None) -> float | None:
        return surprise.of(self.lm, dialogue, kind, self.settings) if kind else None

    def _value_anew(self, kind: str | None) -> None:
        """Gives all that is kept the value that the policy asks for, all at once or, if stopped, none."""
        kept = self.store.exemplars() if kind else {}
        values = {}
        for done, (slot, exemplar) in enumerate(kept.items(), start=1):
            values[slot] = self._value(exemplar.dialogue, kind) or 0.0
            self.progress("measuring the buffer", done, len(kept))
        self.store.revalue(values, kind)


def _slot_of(kept: dict[int, Exemplar], dialogue_id: str) -> int:
    for slot, exemplar in kept.items():
        if exemplar.dialogue.id == dialogue_id:
            return slot
    raise InputError(message(f"annotate {dialogue_id}", "it is not in the buffer", "see `edge-sdss status`"))
