"""The scores, the buffer and the paper's rule, against definitions written another way."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import LEXICON, WIDTH, Stream, make_selector

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.selection import Buffer, Selector, policies
from edge_sdss.selection.buffer import entry_bytes
from edge_sdss.selection.vectors import Codec
from edge_sdss.types import Annotation, Dialogue, Exemplar, Turn


def idd_by_hand(buffer, slot):
    """Mean of 1 - cos to the other entries of its domain, pair by pair; 1 where there is none."""
    vectors = dict(zip(buffer.used.tolist(), buffer.vectors.astype(np.float64), strict=True))
    domain = buffer.entries[slot].domain
    others = [vectors[s] for s, e in buffer.entries.items() if s != slot and e.domain == domain]
    pairs = [1 - vectors[slot] @ v / np.linalg.norm(vectors[slot]) / np.linalg.norm(v) for v in others]
    return min(max(float(np.mean(pairs)), 0), 1) if pairs else 1.0


@pytest.mark.parametrize("vectors", ["int8", "float16", "float32"])
@pytest.mark.parametrize("policy", ["sdss", "random"])
def test_stored_idd_is_current_after_every_offer(policy, vectors):
    selector = make_selector(policy, bins=8, vectors=vectors)
    for dialogue, rows in Stream(seed=3).take(120):
        selector.offer(dialogue, rows)
        for slot in selector.buffer.entries:
            assert selector.buffer.idd[slot] == pytest.approx(idd_by_hand(selector.buffer, slot), abs=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), bins=st.integers(1, 9), max_bytes=st.integers(300, 6_000))
def test_an_evicted_entry_was_strictly_lower_on_all_three(seed, bins, max_bytes):
    selector = make_selector(bins=bins, max_bytes=max_bytes, seed=seed)
    for dialogue, rows in Stream(seed).take(60):
        decision = selector.decide(dialogue, rows)
        buffer = selector.buffer
        for slot in decision.evicted:
            assert buffer.eoe[slot] < decision.scores.eoe
            assert buffer.dss[slot] < decision.scores.dss
            assert idd_by_hand(buffer, slot) < decision.scores.idd + 1e-9
        lower = [
            s
            for s in buffer.entries
            if buffer.eoe[s] < decision.scores.eoe
            and buffer.dss[s] < decision.scores.dss
            and buffer.idd[s] < decision.scores.idd
        ]
        need = entry_bytes(dialogue, buffer.codec.row_bytes)
        if decision.action == "dropped" and need <= max_bytes:
            freed = sum(buffer.size(s) for s in lower)
            assert not lower or buffer.bytes - freed + need > max_bytes
        for score in (decision.scores.eoe, decision.scores.dss, decision.scores.idd):
            assert 0 <= score <= 1
        selector.apply(decision)
        assert len(buffer) <= bins
        assert buffer.bytes <= max_bytes


def test_which_candidate_is_replaced_is_drawn_evenly():
    """Four equally low entries, one higher offer, many seeds: each goes about a quarter of the time."""
    gone: Counter[int] = Counter()
    for seed in range(400):
        selector = make_selector(bins=4, seed=seed)
        for i in range(4):
            selector.buffer.put(i, exemplar(i, eoe=0.1, dss=0.0, domain="animals"))
        selector.offers = 4
        selector.buffer.idd[:] = 0.0
        rows = np.random.default_rng(seed).normal(size=(9, WIDTH)).astype(np.float32)
        decision = selector.decide(Dialogue("cat dog cat", "dog"), rows)
        gone[decision.slot] += 1
    assert set(gone) == {0, 1, 2, 3}
    assert min(gone.values()) > 60


def exemplar(i, *, eoe, dss, domain, seq=None, words=3):
    vector = np.random.default_rng(i).normal(size=WIDTH).astype(np.float32)
    code, _ = Codec("int8", WIDTH).encode(vector / np.linalg.norm(vector))
    return Exemplar(Dialogue(f"p{i}", f"r{i}"), code.tobytes(), domain, eoe, dss, words, i if seq is None else seq)


def test_a_new_domain_can_come_in_and_general_is_a_domain():
    selector = make_selector(bins=4)
    rows = np.random.default_rng(0).normal(size=(5, WIDTH)).astype(np.float32)
    first = selector.offer(Dialogue("a of the", "to it"), rows)
    assert (first.domain, first.scores.idd) == ("general", 1.0)
    second = selector.offer(Dialogue("the cat", "a dog"), rows)
    assert (second.domain, second.scores.idd) == ("animals", 1.0)
    third = selector.offer(Dialogue("the dog", "a cat"), rows)
    assert third.scores.idd == pytest.approx(0, abs=1e-6)


def test_dss_and_domain_by_hand():
    found = LEXICON.hits("My CAT and my Guinea Pig share soup; the guinea fowl does not.")
    assert found.words == 13
    assert found.counts == (2, 1, 0)
    assert found.domain == "animals"
    assert found.dss == pytest.approx((2 + 1 + 0) / (3 * 13))
    assert LEXICON.hits("").dss == 0
    assert LEXICON.hits("nothing here").domain == "general"


@given(st.text(max_size=200), st.text(max_size=200))
def test_dss_ignores_case_and_counts_add_up(a, b):
    together = LEXICON.hits(f"{a} . {b}")
    parts = [LEXICON.hits(a), LEXICON.hits(b)]
    if "guinea" not in a.casefold():
        assert together.counts == tuple(map(sum, zip(*(p.counts for p in parts), strict=True)))
    assert 0 <= together.dss <= 1
    assert LEXICON.hits(a.casefold()).counts == parts[0].counts


def test_lexicons_from_a_folder(tmp_path):
    from edge_sdss import lexicon

    (tmp_path / "pets.txt").write_text("# names\nMiso\nguinea pig\n", encoding="utf-8")
    found = lexicon.load(tmp_path)
    assert found.hits("miso met a Guinea Pig").counts == (2,)
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'empty'"):
        lexicon.load(tmp_path)
    with pytest.raises(ConfigError, match=r"no .txt file"):
        lexicon.load(tmp_path / "nowhere")


def test_categories_are_the_default_lists_ungrouped():
    from edge_sdss import lexicon

    fine, coarse = lexicon.categories(), lexicon.load()
    assert set(fine.domains) == {name for names in lexicon.DOMAINS.values() for name in names}
    for word in ("headache", "pizza", "laptop"):
        assert fine.hits(word).domain in lexicon.DOMAINS[coarse.hits(word).domain]


def test_the_default_lexicon_reads_every_line_and_lower_cases():
    from edge_sdss import lexicon

    found = lexicon.load()
    assert found.domains == tuple(lexicon.DOMAINS)
    assert found.hits("My KITTEN saw the vet").domain == "animals"
    assert found.hits("compile the programming code").domain == "technology"


@pytest.mark.parametrize("width", [1, 31, 32, 40, 576])
@pytest.mark.parametrize(("kind", "error"), [("int8", 6e-3), ("float16", 1e-3), ("float32", 3e-7)])
def test_codec_round_trip(kind, error, width):
    codec = Codec(kind, width)
    draws = np.random.default_rng(width)
    for _ in range(20):
        vector = draws.normal(size=width).astype(np.float32)
        vector[0] *= 40  # a massive activation
        vector /= np.linalg.norm(vector)
        code, stored = codec.encode(vector)
        assert code.nbytes == codec.row_bytes
        back = codec.decode(code[None])[0]
        assert np.array_equal(stored, back)
        assert np.linalg.norm(back) == pytest.approx(1, abs=1e-6)
        assert np.abs(back - vector).max() < error
    assert not codec.decode(codec.encode(np.zeros(width, np.float32))[0][None]).any()


def test_int8_keeps_the_ranking_of_float32():
    """Rank correlation of cosines under one massive dimension; the bound that ADR 0003 states."""
    draws = np.random.default_rng(0)
    vectors = draws.normal(size=(200, 576)).astype(np.float32)
    vectors[:, 7] += 60
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codec = Codec("int8", 576)
    stored = codec.decode(np.stack([codec.encode(v)[0] for v in vectors]))
    for probe in range(5):
        exact, kept = (m @ m[probe] for m in (vectors, stored))
        ranks = [np.argsort(np.argsort(x)) for x in (exact, kept)]
        assert np.corrcoef(*ranks)[0, 1] > 0.98


def test_entry_bytes_count_everything():
    dialogue = Dialogue("é", "abc", (Turn("user", "xy"),), preferred="four")
    assert entry_bytes(dialogue, 10) == 2 + 3 + 2 + 4 + 10 + 56
    assert entry_bytes(dialogue, 10, Annotation("edit", "seven77")) == 2 + 3 + 2 + 7 + 10 + 56


def test_the_bytes_of_the_buffer_are_the_sum_of_its_entries():
    selector = make_selector("random", bins=20, max_bytes=7_000)
    for dialogue, rows in Stream(seed=4).take(100):
        selector.offer(dialogue, rows)
        sizes = [entry_bytes(e.dialogue, len(e.vector), e.annotation) for e in selector.buffer.entries.values()]
        assert selector.buffer.bytes == sum(sizes)


def replaceable(policy, buffer, **candidate):
    from edge_sdss.selection.selector import Candidate
    from edge_sdss.types import Scores

    facts = {"seq": 9, "scores": Scores(0.5, 0.5, 0.5), "domain": "animals", "words": 5, "seed": 0}
    vector = np.eye(1, WIDTH, dtype=np.float32)[0]
    return list(policies.load(policy).replaceable(Candidate(**{**facts, "vector": vector, **candidate}), buffer))


def filled(*entries):
    buffer = Buffer(config.Buffer(bins=len(entries)), WIDTH)
    for slot, entry in enumerate(entries):
        buffer.put(slot, entry)
    return buffer


def test_fifo_takes_the_oldest_first():
    buffer = filled(*(exemplar(i, eoe=0.5, dss=0, domain="food", seq=s) for i, s in enumerate([5, 2, 8])))
    assert replaceable("fifo", buffer) == [1, 0, 2]


def test_longest_takes_the_shortest_first_and_only_shorter_ones():
    buffer = filled(*(exemplar(i, eoe=0.5, dss=0, domain="food", words=w) for i, w in enumerate([4, 2, 5, 9])))
    assert replaceable("longest", buffer, words=5) == [1, 0]


@pytest.mark.parametrize("policy", ["perplexity", "ifd"])
def test_the_lowest_values_leave_first_and_a_missing_one_is_refused(policy):
    buffer = filled(*(replace(exemplar(i, eoe=0.5, dss=0, domain="food"), value=v) for i, v in enumerate([4, 2, 5, 9])))
    assert replaceable(policy, buffer, value=5.0) == [1, 0]
    selector = Selector(config.Selection(policy=policy), Buffer(config.Buffer(), WIDTH), LEXICON)
    with pytest.raises(InputError, match=policy):
        selector.decide(Dialogue("a", "b"), np.ones((2, WIDTH), np.float32))


def test_single_score_ablations_look_at_one_score():
    buffer = filled(exemplar(0, eoe=0.4, dss=0.9, domain="food"), exemplar(1, eoe=0.9, dss=0.4, domain="work"))
    assert replaceable("eoe", buffer) == [0]
    assert replaceable("dss", buffer) == [1]
    assert replaceable("idd", buffer) == []
    assert replaceable("sdss", buffer) == []


def test_reservoir_keeps_every_offer_with_equal_probability():
    """Chi-square-like bound: inclusion counts of 200 offers into 20 bins over 300 seeds are all near 30."""
    counts: dict[int, int] = defaultdict(int)
    for seed in range(300):
        used = list(range(1, 21))
        buffer = filled(*(exemplar(i, eoe=0.5, dss=0, domain="food") for i in range(20)))
        for seq in range(21, 201):
            slots = replaceable("reservoir", buffer, seq=seq, seed=seed)
            if slots:
                used[slots[0]] = seq
        for seq in used:
            counts[seq] += 1
    early, late = (np.mean([counts[s] for s in span]) for span in (range(1, 101), range(101, 201)))
    assert 27 < early < 33
    assert 27 < late < 33
    assert min(counts.values()) > 10


def test_kcenter_swaps_a_member_of_the_closest_pair_for_a_farther_offer():
    from edge_sdss.selection.selector import Candidate  # noqa: F401

    axes = np.eye(WIDTH, dtype=np.float32)
    near = axes[0] + 0.1 * axes[1]
    vectors = [axes[0], near / np.linalg.norm(near), axes[2]]
    buffer = Buffer(config.Buffer(bins=3, vectors="float32"), WIDTH)
    for i, v in enumerate(vectors):
        buffer.put(i, Exemplar(Dialogue(f"p{i}", "r"), v.tobytes(), "food", 0.5, 0.1, 3, i))
    assert set(replaceable("kcenter", buffer, vector=axes[5])) == {0, 1}
    assert replaceable("kcenter", buffer, vector=vectors[1]) == []


def test_an_unknown_policy_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"choose one of .*dss, .*eoe, .*sdss"):
        policies.load("nonsense")


@pytest.mark.parametrize("pair", ["eoe-dss", "eoe-idd", "dss-idd"])
def test_a_pair_looks_at_both_of_its_scores_and_not_at_the_third(pair):
    looks = pair.split("-")
    selector, evicted = make_selector(pair, bins=8), 0
    for dialogue, rows in Stream(seed=11).take(150):
        decision, buffer = selector.decide(dialogue, rows), selector.buffer
        now = {"eoe": buffer.eoe, "dss": buffer.dss, "idd": buffer.idd}
        lower = {s for s in buffer.entries if all(now[n][s] < getattr(decision.scores, n) for n in looks)}
        assert set(decision.evicted) <= lower
        assert (decision.action == "kept") == (bool(lower) or len(buffer) < 8)
        evicted += len(decision.evicted)
        selector.apply(decision)
    assert evicted > 0


def test_domains_stay_of_equal_size_where_the_stream_is_lopsided():
    draws = np.random.default_rng(0)
    words = {"cat": 300, "soup": 60, "hammer": 30}  # one word a domain
    order = draws.permutation([word for word, n in words.items() for _ in range(n)])
    selector = make_selector("domain-balanced", bins=12)
    for i, word in enumerate(order):
        selector.offer(Dialogue(f"{word} {i}", "yes"), draws.normal(size=(5, WIDTH)).astype(np.float32))
    sizes = Counter(e.domain for e in selector.buffer.entries.values())
    assert sizes == {"animals": 4, "food": 4, "work": 4}


def test_domain_balanced_is_a_reservoir_where_there_is_one_domain():
    draws, kept = np.random.default_rng(1), Counter()
    rows = [draws.normal(size=(3, WIDTH)).astype(np.float32) for _ in range(40)]
    for seed in range(120):
        selector = make_selector("domain-balanced", bins=10, seed=seed)
        for i, tokens in enumerate(rows):
            selector.offer(Dialogue(f"cat {i}", "yes"), tokens)
        kept.update(e.seq for e in selector.buffer.entries.values())
    halves = [sum(kept[i] for i in part) / 120 for part in (range(1, 21), range(21, 41))]
    assert halves == pytest.approx([5, 5], abs=0.6)


def test_near_duplicates_stay_out_of_a_full_reservoir_and_leave_first():
    draws = np.random.default_rng(2)
    base = draws.normal(size=(12, 1, WIDTH))
    selector, seen = make_selector("dedup-reservoir", bins=12), 0
    for i in range(600):
        subject = 0 if i < 6 else i % 12  # the buffer fills with six near-duplicates
        rows = base[subject] + 0.01 * draws.normal(size=(4, WIDTH))
        before = selector.buffer.vectors @ _unit(rows.mean(0)) if len(selector.buffer) else np.zeros(1)
        decision = selector.offer(Dialogue(f"{i}", "yes"), rows.astype(np.float32))
        if len(selector.buffer) == 12 and decision.evicted:
            seen += 1
            assert before.max() < 0.97
    alike = selector.buffer.vectors @ selector.buffer.vectors.T
    assert seen > 0
    assert (alike >= 0.97).sum() == 12  # each is near itself alone


def test_kcenter_is_facility_location_over_what_is_kept_and_the_offer():
    """An entry may go where the sum of similarities to the nearest kept one rises, the most gain first."""
    selector, swaps = make_selector("kcenter", bins=6, vectors="float32"), 0
    for dialogue, rows in Stream(seed=4).take(120):
        kept, offer = selector.buffer.vectors.astype(np.float64), _unit(rows.astype(np.float64).mean(0))
        full = len(kept) == 6
        decision = selector.decide(dialogue, rows)
        if full:
            every = np.vstack([kept, offer])
            covered = [(every @ np.delete(every, i, axis=0).T).max(axis=1).sum() for i in range(7)]
            gains = np.array(covered[:6]) - covered[6]  # entry i out and the offer in, against the offer out
            assert (decision.action == "kept") == bool(gains.max() > 1e-6) or abs(gains.max()) < 1e-6
            if decision.evicted:
                swaps += 1
                (slot,) = decision.evicted
                assert gains[selector.buffer.used.tolist().index(slot)] == pytest.approx(gains.max(), abs=1e-6)
        selector.apply(decision)
    assert swaps > 3


def _unit(vector):
    return vector / np.linalg.norm(vector)
