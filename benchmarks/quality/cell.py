"""Runs a cell by the product's own parts: Selector, synthesis, trainer, evaluation. Knows nothing of files of results.

What is kept decides what is learnt: cells that keep the same dialogues with the same seed share one training.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quality import embeddings, sets, streams
from quality.cache import Cache
from quality.protocol import FULL, NONE, Cell, Protocol, digest

from edge_sdss import config, evaluation, files, general, lexicon, rounds, surprise, synthesis
from edge_sdss.experiment import held_out_examples
from edge_sdss.lm import LanguageModel
from edge_sdss.selection import Buffer, Selector
from edge_sdss.tuning import trainer
from edge_sdss.types import Dialogue, Example, Progress, Variant, no_progress


@dataclass(frozen=True)
class Kept:
    """What the buffer held at each round, oldest round first, after how many offers, and what that cost."""

    rounds: Sequence[Sequence[Dialogue]]
    after: Sequence[int]
    offers: int
    admitted: int
    buffer_bytes: int
    seconds: float


class Bench:
    """A model and the sets, loaded when first needed and used by cell after cell."""

    def __init__(self, protocol: Protocol, data: Path | None, cache: Path, progress: Progress = no_progress) -> None:
        self.protocol = protocol
        self.settings = protocol.settings
        self._data = data
        self._cache = Cache(cache)
        self._progress = progress
        self._materials: dict[str, sets.Material] = {}
        self._embeddings: dict[tuple[str, bool], embeddings.Embeddings] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        """The base model."""
        return LanguageModel.load(self.settings.model, progress=self._progress)

    @cached_property
    def lexicon(self) -> lexicon.Lexicon:
        """The lists that score DSS and name the domains of IDD."""
        return lexicon.load(self.settings.selection.lexicons)

    @cached_property
    def topics(self) -> lexicon.Lexicon:
        """The lists that name the topics by which streams are ordered: finer, since one set may be of one domain."""
        return lexicon.categories()

    def material(self, name: str) -> sets.Material:
        """A set, read once."""
        if name not in self._materials:
            self._materials[name] = sets.load(name, self._data, self.protocol)
        return self._materials[name]

    def run(self, cell: Cell) -> dict[str, Any]:
        """Returns the line of a cell: what was kept, what was measured, item by item, and what it took.

        `seconds` are those of the work itself, also where it was found in the cache; `wall_s` is what passed now.
        Raises InputError where the set or the order is unknown.
        """
        began = time.perf_counter()
        material = self.material(cell.set)
        kept = self.keep(cell)
        lessons, made, written_s = self._lessons(cell, kept)
        learnt, reused = self._learn(cell, material.held_out, lessons)
        curve = [[after, nll] for after, nll in zip(kept.after, learnt.pop("curve"), strict=True)]
        seconds = {"select": kept.seconds, "synthesise": written_s, **learnt.pop("seconds")}
        return {
            "cell": asdict(cell),
            "protocol": self.protocol.digest,
            "model": self.lm.name,
            "base": self.lm.fingerprint[:12],
            "items": digest([[e.dialogue_id, e.answer] for e in material.held_out])[:12],
            "offers": kept.offers,
            "kept": sorted(d.id for d in kept.rounds[-1]) if cell.policy != FULL else [],
            "requests": len({d.id for round_ in kept.rounds for d in round_}),
            "admitted": kept.admitted,
            "buffer_bytes": kept.buffer_bytes,
            "examples": len(lessons[-1]),
            "variants": made,
            **learnt,
            "curve": curve,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "wall_s": round(time.perf_counter() - began, 2),
            "reused": reused,
            "load": round(os.getloadavg()[0], 2),
        }

    def keep(self, cell: Cell) -> Kept:
        """Offers the stream to the policy."""
        material = self.material(cell.set)
        if cell.policy == NONE:
            return Kept([[]], [0], 0, 0, 0, 0.0)
        topics = [self.topics.hits(d.text).domain for d in material.stream]
        stream = streams.arrange(cell.order, material.stream, topics, cell.seed)
        if cell.policy == FULL:
            return Kept([stream], [len(stream)], len(stream), len(stream), 0, 0.0)
        found = self._embedded(cell)
        selection = self.settings.selection.model_copy(update={"policy": cell.policy, "seed": cell.seed})
        buffer = Buffer(_budget(cell, len(stream), self.settings.buffer), self.lm.width)
        selector = Selector(selection, buffer, self.lexicon)
        values, each_s = self._valued(stream, selector.asks)
        began, admitted, snapshots, after = time.perf_counter(), 0, [], []
        for number, dialogue in enumerate(stream, start=1):
            decision = selector.offer(dialogue, found.of(dialogue), values.get(dialogue.id))
            admitted += decision.action == "kept"
            if number == len(stream) or (cell.interval and number % cell.interval == 0):
                snapshots.append([exemplar.dialogue for exemplar in buffer.entries.values()])
                after.append(number)
        took = time.perf_counter() - began + (found.seconds + each_s) * len(stream)
        return Kept(snapshots, after, len(stream), admitted, buffer.bytes, took)

    def _embedded(self, cell: Cell) -> embeddings.Embeddings:
        noisy = cell.order == "noisy"
        if (cell.set, noisy) not in self._embeddings:
            dialogues = [*self.material(cell.set).stream, *(streams.chatter() if noisy else ())]
            self._embeddings[cell.set, noisy] = embeddings.load(
                self._cache, self.lm, dialogues, self.settings, self._progress
            )
        return self._embeddings[cell.set, noisy]

    def _valued(self, stream: Sequence[Dialogue], kind: str | None) -> tuple[dict[str, float], float]:
        """What a policy asks for of each dialogue, from the cache or measured now; and the seconds that one took."""
        if kind is None:
            return {}, 0.0
        asked = [self.lm.fingerprint, self.settings.model.model_dump(), kind, sorted({d.id for d in stream})]

        def make(folder: Path) -> None:
            began, values = time.perf_counter(), {}
            for done, dialogue in enumerate(stream, start=1):
                values[dialogue.id] = surprise.of(self.lm, dialogue, kind, self.settings)
                self._progress(f"measuring {kind}", done, len(stream))
            facts = {"values": values, "seconds": (time.perf_counter() - began) / len(stream)}
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

        folder, _ = self._cache.once(f"values/{digest(asked)[:24]}", make)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return facts["values"], facts["seconds"]

    def _lessons(self, cell: Cell, kept: Kept) -> tuple[list[list[Example]], dict[str, int], float]:
        """What each round learns, in an order that depends on the dialogues alone; with the count of variants."""
        lessons, seconds = [], 0.0
        tally = synthesis.Tally(0, 0, {})
        for dialogues in kept.rounds:
            originals = sorted(held_out_examples(dialogues), key=lambda e: e.dialogue_id)
            written: list[Example] = []
            if cell.variants:
                variants, took = self._variants(originals, cell.variants)
                seconds += took
                tally = synthesis.tally([v for made in variants for v in made])
                pairs = zip(originals, variants, strict=True)
                written = [rounds.variant_of(e, v) for e, made in pairs for v in made if not v.dropped]
            lessons.append([*originals, *written])
        return lessons, {"made": tally.made, "kept": tally.kept}, seconds

    def _variants(self, examples: Sequence[Example], count: int) -> tuple[list[list[Variant]], float]:
        """The variants of each example, from the cache or written now; and the seconds that writing them took."""
        chosen = self.settings.synthesis.model_copy(update={"variants": count})
        content = [self.lm.fingerprint, self.settings.model.model_dump(), chosen.model_dump()]
        stores = {e.dialogue_id: _file(self._cache.folder, content, e) for e in examples}
        missing = [e for e in examples if not stores[e.dialogue_id].is_file()]
        began = time.perf_counter()
        for group in synthesis.synthesise(self.lm, missing, chosen, self._progress) if missing else ():
            took, began = (time.perf_counter() - began) / len(group), time.perf_counter()
            for name, made in group.items():
                files.replace(stores[name], json.dumps({"seconds": took, "variants": [asdict(v) for v in made]}))
        read = [json.loads(stores[e.dialogue_id].read_text(encoding="utf-8")) for e in examples]
        return [[Variant(**v) for v in one["variants"]] for one in read], sum(one["seconds"] for one in read)

    def _learn(
        self, cell: Cell, held_out: Sequence[Example], lessons: Sequence[Sequence[Example]]
    ) -> tuple[dict[str, Any], bool]:
        """Trains round after round and measures; or finds that this has been done for the same dialogues."""
        tuning = [self._tuning(cell, lesson) for lesson in lessons] if any(lessons) else []
        seen = [[[[asdict(t) for t in e.messages], e.answer] for e in part] for part in (*lessons, held_out)]
        key = [self.protocol.digest, self.lm.fingerprint, seen, [t.model_dump() for t in tuning]]

        def make(folder: Path) -> None:
            found = self._trained(lessons, tuning, held_out)
            (folder / "outcome.json").write_text(json.dumps(found), encoding="utf-8")

        folder, reused = self._cache.once(f"trained/{digest(key)[:24]}", make)
        return json.loads((folder / "outcome.json").read_text(encoding="utf-8")), reused

    def _tuning(self, cell: Cell, lesson: Sequence[Example]) -> config.Tuning:
        epochs = self.protocol.epochs
        if cell.max_bytes is not None:
            epochs = max(1, round(self.protocol.passes / max(len(lesson), 1)))
        return self.settings.tuning.model_copy(update={"seed": cell.seed, "epochs": epochs})

    def _trained(
        self, lessons: Sequence[Sequence[Example]], tuning: Sequence[config.Tuning], held_out: Sequence[Example]
    ) -> dict[str, Any]:
        adapter, curve, steps, tokens, train_s = None, [], 0, 0, 0.0
        began, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            for number, (lesson, chosen) in enumerate(zip(lessons, tuning, strict=False)):
                out = Path(scratch) / f"round-{number}"
                done = trainer.train(self.lm, lesson, chosen, out, start=adapter, progress=self._progress)
                adapter, steps, tokens = done.adapter, steps + done.steps, tokens + done.tokens
                train_s += done.seconds
                if number < len(lessons) - 1:
                    with self._with(adapter):
                        curve.append(self._measured(held_out, rouge_items=0).nll)
            with self._with(adapter):
                found = self._measured(held_out, self.settings.evaluation.rouge_items)
                forgotten = self._general()
        seconds = {"train": train_s, "evaluate": time.perf_counter() - began - train_s}
        answered = [item for item in found.items if item.rouge1 is not None]
        return {
            "nll": [round(item.nll, 4) for item in found.items],
            "rouge1": [round(item.rouge1 or 0.0, 4) for item in answered],
            "rougeL": [round(item.rougeL or 0.0, 4) for item in answered],
            "length_ratio": found.length_ratio,
            "general": forgotten,
            "curve": [*curve, found.nll],
            "steps": steps,
            "tokens": tokens,
            "seconds": {**seconds, "cpu": time.process_time() - cpu},
        }

    @contextmanager
    def _with(self, adapter: Path | None) -> Iterator[None]:
        """Inside, the model answers with an adapter; None: the base model."""
        self.lm.attach(adapter)
        try:
            yield
        finally:
            self.lm.attach(None)

    def _measured(self, held_out: Sequence[Example], rouge_items: int) -> evaluation.Evaluation:
        chosen = self.settings.evaluation.model_copy(update={"rouge_items": rouge_items})
        limit = self.settings.tuning.max_tokens
        return evaluation.evaluate(self.lm, held_out, chosen, max_tokens=limit, progress=self._progress)

    def _general(self) -> list[float]:
        """The loss on the fixed general set, nats per token: what is forgotten."""
        limit, batch = self.settings.tuning.max_tokens, self.settings.evaluation.batch_size
        asked = general.examples()[: self.protocol.general_items]
        return [round(float(v), 4) for v in self.lm.nll(asked, max_tokens=limit, batch_size=batch)]


def _budget(cell: Cell, offers: int, settings: config.Buffer) -> config.Buffer:
    """Bins alone, or bytes alone."""
    if cell.max_bytes is not None:
        return settings.model_copy(update={"bins": offers, "max_bytes": cell.max_bytes})
    return settings.model_copy(update={"bins": cell.bins, "max_bytes": cell.bins * settings.max_entry_bytes})


def _file(cache: Path, content: list[Any], example: Example) -> Path:
    own = digest([content, [asdict(turn) for turn in example.messages], example.answer])
    return cache / "variants" / own[:2] / f"{own[2:26]}.json"
