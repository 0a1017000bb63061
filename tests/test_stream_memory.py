"""What a policy remembers of the stream: exact, uniform, bounded; and what policies do with it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from streams import WIDTH, Stream, make_selector

from edge_sdss import config
from edge_sdss.errors import BudgetExceeded
from edge_sdss.selection.memory import SAMPLE, Memory
from edge_sdss.selection.vectors import Codec
from edge_sdss.store import Store


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def coded(codec, vectors):
    return [codec.encode(v)[0] for v in unit(vectors).astype(np.float32)]


def test_the_mean_is_of_all_vectors_and_the_sample_of_some_of_them():
    codec = Codec("float32", 7)
    vectors = unit(np.random.default_rng(0).normal(size=(500, 7))).astype(np.float32)
    memory, draws = Memory(codec), np.random.default_rng(1)
    for code in coded(codec, vectors):
        memory.update(memory.after(code, draws))
    assert memory.mean == pytest.approx(vectors.mean(axis=0, dtype=np.float64), abs=1e-6)
    rows = {tuple(np.round(v, 4)) for v in vectors}
    sample = {tuple(np.round(v, 4)) for v in memory.sample}
    assert len(sample) == SAMPLE
    assert sample <= rows


def test_each_vector_is_as_likely_in_the_sample_as_any_other():
    codec, n, runs = Codec("float32", 1), 256, 200
    seen = Counter()
    for run in range(runs):
        memory, draws = Memory(codec), np.random.default_rng(run)
        memory._codec = codec
        for number in range(n):
            memory.update(memory.after(np.float32([number + 1]).view(np.uint8), draws))
        seen.update(np.frombuffer(memory._rows.tobytes(), np.float32).astype(int).tolist())
    quarters = [sum(seen[i + 1] for i in range(q * n // 4, (q + 1) * n // 4)) for q in range(4)]
    expected = runs * SAMPLE / 4
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in quarters)


def test_herding_takes_the_exchange_that_brings_the_mean_nearest():
    selector, swaps, total, seen = make_selector("herding", bins=6, vectors="float32"), 0, np.zeros(WIDTH), 0
    for dialogue, rows in Stream(seed=4).take(120):
        vector, kept = unit(rows.astype(np.float64).mean(0)), selector.buffer.vectors.astype(np.float64)
        decision = selector.decide(dialogue, rows)
        if len(kept) == 6:
            target = total / seen
            now = np.linalg.norm(kept.mean(0) - target)
            then = [np.linalg.norm(np.vstack([np.delete(kept, i, 0), vector]).mean(0) - target) for i in range(6)]
            assert (decision.action == "kept") == (min(then) < now) or abs(min(then) - now) < 1e-7
            if decision.evicted:
                swaps += 1
                (slot,) = decision.evicted
                assert then[selector.buffer.used.tolist().index(slot)] == pytest.approx(min(then), abs=1e-7)
        total, seen = total + vector, seen + 1
        selector.apply(decision)
    assert swaps > 3


def test_facility_location_takes_the_exchange_that_stands_for_most_of_the_sample():
    selector, swaps = make_selector("facility-location", bins=6, vectors="float32"), 0
    for dialogue, rows in Stream(seed=4).take(150):
        vector, kept = unit(rows.astype(np.float64).mean(0)), selector.buffer.vectors.astype(np.float64)
        memory = selector.memory
        sample, mean = memory.sample.astype(np.float64), memory.mean.copy()
        decision = selector.decide(dialogue, rows)
        if len(kept) == 6:
            about = unit(sample - mean)

            def value(rows, about=about, mean=mean):
                return np.mean([max(float(unit(r - mean) @ s) for r in rows) for s in about])

            now = value(kept)
            then = [value([*np.delete(kept, i, 0), vector]) for i in range(6)]
            assert (decision.action == "kept") == (max(then) > now + 1e-9) or abs(max(then) - now) < 1e-6
            if decision.evicted:
                swaps += 1
                (slot,) = decision.evicted
                assert then[selector.buffer.used.tolist().index(slot)] == pytest.approx(max(then), abs=1e-6)
        selector.apply(decision)
    assert swaps > 3


def offered_around(seed: int, n: int, rare: float):
    """Dialogues whose vectors lie around one direction, and a share of them anywhere."""
    draws = np.random.default_rng(seed)
    for dialogue, _ in Stream(seed=seed).take(n):
        strange = draws.random() < rare
        vector = draws.normal(0, 1, WIDTH) if strange else 3 * np.eye(WIDTH)[0] + 0.3 * draws.normal(0, 1, WIDTH)
        yield dialogue, np.tile(vector.astype(np.float32), (3, 1)), strange


def test_prototypical_keeps_nothing_rare_and_all_parts_of_the_stream_alike():
    quarters, n, strange_kept, offers_rare = np.zeros(4), 240, 0, 0
    for run in range(40):
        selector, place, strange = make_selector("prototypical", bins=8, seed=run), {}, set()
        for number, (dialogue, rows, rare) in enumerate(offered_around(run, n, 0.3)):
            place[dialogue.id] = number
            strange |= {dialogue.id} if rare else set()
            selector.offer(dialogue, rows)
        kept = [exemplar.dialogue.id for exemplar in selector.buffer.entries.values()]
        strange_kept, offers_rare = strange_kept + len(strange & set(kept)), offers_rare + len(strange)
        np.add.at(quarters, [4 * place[name] // n for name in kept], 1)
    assert offers_rare > 40 * 50
    assert strange_kept == 0
    assert np.abs(quarters - 80).max() < 5 * np.sqrt(80)  # a reservoir's; "the first" would have 320, 0, 0, 0


def test_one_offer_stores_its_decision_and_what_is_remembered_together(tmp_path, monkeypatch):
    selector, store = make_selector("herding", bins=4), Store(tmp_path / "db", config.Store())
    for dialogue, rows in Stream(seed=1).take(20):
        decision = selector.decide(dialogue, rows)
        store.record(decision)
        selector.apply(decision)
    before, offers = store.memory(), store.counts.offers
    again = make_selector("herding", bins=4)
    again.recall(before)
    assert again.memory.count == 20
    assert (again.memory.mean == selector.memory.mean).all()
    assert (again.memory.sample == selector.memory.sample).all()

    dialogue, rows = next(iter(Stream(seed=2).take(1)))
    monkeypatch.setattr(store, "set_meta", lambda *_: 1 / 0)  # the last statement of the transaction
    with pytest.raises(ZeroDivisionError):
        store.record(selector.decide(dialogue, rows))
    assert store.memory() == before
    assert store.counts.offers == offers


def test_starting_anew_remembers_what_is_kept_and_nothing_else():
    selector = make_selector("herding", bins=5, vectors="float32")
    for dialogue, rows in Stream(seed=1).take(50):
        selector.offer(dialogue, rows)
    parts = selector.restart_memory()
    assert selector.memory.count == 5
    assert selector.memory.mean == pytest.approx(selector.buffer.vectors.mean(axis=0), abs=1e-6)
    again = make_selector("herding", bins=5, vectors="float32")
    again.recall(parts)
    assert (again.memory.mean == selector.memory.mean).all()


def test_the_forgotten_leave_nothing():
    selector = make_selector("herding", bins=5)
    (first, rows), *_ = Stream(seed=1).take(1)
    selector.forgotten.add(first.id)
    assert selector.decide(first, rows).remembered == {}


def test_a_budget_that_the_memory_alone_would_take_is_refused():
    with pytest.raises(BudgetExceeded, match="herding"):
        make_selector("herding", bins=5, max_bytes=2_000)
