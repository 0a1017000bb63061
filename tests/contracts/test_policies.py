"""What every policy promises, whatever it prefers."""

from __future__ import annotations

import numpy as np
import pytest
from streams import WIDTH, Stream, make_selector

from edge_sdss.selection import policies

ALL = policies.names()


@pytest.fixture(params=ALL)
def policy(request):
    return request.param


def replay(policy, n=300, **buffer):
    selector = make_selector(policy, **buffer)
    decisions = []
    for dialogue, rows in Stream(seed=5).take(n):
        decisions.append(selector.offer(dialogue, rows))
        yield selector, decisions


def test_the_policies_of_the_method_are_there():
    assert {"sdss", "eoe", "dss", "idd", "random", "reservoir", "fifo", "first", "kcenter", "longest"} <= set(ALL)
    assert {"eoe-dss", "eoe-idd", "dss-idd", "dedup-reservoir", "domain-balanced"} <= set(ALL)
    assert {"herding", "facility-location", "perplexity", "ifd"} <= set(ALL)


def test_both_budgets_are_kept_at_every_step(policy):
    for selector, _ in replay(policy, bins=9, max_bytes=9_000):
        assert len(selector.buffer) <= 9
        assert selector.buffer.bytes <= 9_000


def test_room_is_always_used_and_nothing_is_lost(policy):
    for selector, decisions in replay(policy, n=200, bins=12):
        kept = sum(d.action == "kept" for d in decisions)
        evicted = sum(len(d.evicted) for d in decisions)
        assert len(selector.buffer) == kept - evicted
        if len(decisions) <= 12:
            assert kept == len(decisions)


def test_decisions_name_what_left_and_why(policy):
    before: dict[int, str] = {}
    for selector, decisions in replay(policy, bins=7):
        decision = decisions[-1]
        for slot, gone in decision.evicted.items():
            assert before[slot] == gone
        assert decision.reason
        assert (decision.slot is None) == (decision.action == "dropped")
        before = {slot: e.dialogue.id for slot, e in selector.buffer.entries.items()}
        if decision.action == "kept":
            assert before[decision.slot] == decision.dialogue_id


def test_the_same_seed_gives_the_same_buffer_and_a_resumed_stream_too(policy):
    ends = []
    for cut in (None, None, 150):
        selector = make_selector(policy, bins=10)
        stored: dict[str, bytes] = {}
        for i, (dialogue, rows) in enumerate(Stream(seed=2).take(300)):
            if i == cut:  # a new process: entries, their bins, the count of offers, the memory's stored parts survive
                fresh = make_selector(policy, bins=10, offers=selector.offers)
                for slot, exemplar in selector.buffer.entries.items():
                    fresh.buffer.put(slot, exemplar)
                fresh.recall(stored)
                selector = fresh
            stored |= selector.offer(dialogue, rows).remembered
        ends.append({slot: e.dialogue.id for slot, e in selector.buffer.entries.items()})
    assert ends[0] == ends[1] == ends[2]


def test_what_is_remembered_counts_in_the_budget_and_is_bounded(policy):
    selector = make_selector(policy, bins=400, max_bytes=12_000)
    stored: dict[str, bytes] = {}
    for dialogue, rows in Stream(seed=4).take(300):
        stored |= selector.offer(dialogue, rows).remembered
        remembered = sum(map(len, stored.values()))
        assert remembered <= selector.buffer.reserved
        assert selector.buffer.bytes + remembered <= 12_000
    assert bool(stored) == (selector.memory is not None)


def test_deciding_changes_nothing_that_is_remembered(policy):
    selector = make_selector(policy, bins=5)
    *before, (dialogue, rows) = Stream(seed=6).take(40)
    for offered in before:
        selector.offer(*offered)
    first, second = selector.decide(dialogue, rows), selector.decide(dialogue, rows)
    assert first == second


def test_an_identical_dialogue_is_kept_once(policy):
    selector = make_selector(policy, bins=5)
    (dialogue, rows), *_ = Stream(seed=1).take(1)
    assert selector.offer(dialogue, rows).action == "kept"
    assert selector.offer(dialogue, rows).action == "dropped"


def test_what_the_user_forgot_does_not_come_back(policy):
    selector = make_selector(policy, bins=5)
    (dialogue, rows), *_ = Stream(seed=1).take(1)
    selector.forgotten.add(dialogue.id)
    assert selector.offer(dialogue, rows).reason == "the user asked to forget it"


def test_a_dialogue_larger_than_the_buffer_is_dropped_and_harms_nothing(policy):
    selector = make_selector(policy, bins=5, max_bytes=4_000)
    for dialogue, rows in Stream(seed=1, words=6).take(30):
        selector.offer(dialogue, rows)
    before = dict(selector.buffer.entries)
    (dialogue, rows), *_ = Stream(seed=9, words=2_000).take(1)
    assert "larger than a bin" in selector.offer(dialogue, rows).reason
    assert selector.buffer.entries == before


def test_no_entry_is_larger_than_a_bin(policy):
    too_large = 0
    for selector, decisions in replay(policy, n=60, bins=50, max_entry_bytes=180):
        assert all(selector.buffer.size(slot) <= 180 for slot in selector.buffer.entries)
        too_large += "larger than a bin" in decisions[-1].reason
    assert 0 < too_large < 60


def test_embeddings_that_are_not_finite_are_refused(policy):
    from edge_sdss.errors import InputError

    selector = make_selector(policy)
    (dialogue, _), *_ = Stream(seed=1).take(1)
    with pytest.raises(InputError, match="not finite"):
        selector.offer(dialogue, np.full((4, WIDTH), np.nan, np.float32))
