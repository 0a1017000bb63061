"""The stages together, with a tiny model: what a user does over days, and what must never happen."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import numpy as np
import talk

from edge_sdss import gate, general
from edge_sdss.errors import BudgetExceeded, ConfigError, InputError
from edge_sdss.lm import LanguageModel
from edge_sdss.session import Session
from edge_sdss.types import Annotation, Example


@pytest.fixture(scope="module")
def lm(tiny):
    return LanguageModel.load(talk.settings(tiny).model)


@pytest.fixture
def opened(tiny, lm, tmp_path):
    sessions = []

    def open_session(home="home", **sections):
        for session in sessions:
            session.close()
        sessions.append(Session(tmp_path / home, talk.settings(tiny, **sections), lm=lm))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()


def observed(session, n=40, source=None):
    return list(session.observe_all(talk.dialogues(n), source))


def kept(session):
    return {slot: e.dialogue.id for slot, e in session.store.exemplars().items()}


def test_a_stopped_stream_goes_on_and_ends_with_the_same_buffer(opened):
    whole = opened("whole")
    observed(whole, 60, "file")
    wanted = kept(whole)
    first = opened("parts")
    stream = first.observe_all(talk.dialogues(60), "file")
    for _ in range(23):
        next(stream)
    second = opened("parts")
    rest = observed(second, 60, "file")
    assert [d.seq for d in rest] == list(range(24, 61))
    assert kept(second) == wanted
    assert second.selector.buffer.idd.tolist() == whole.selector.buffer.idd.tolist()
    assert observed(opened("parts"), 60, "file") == []


def test_what_a_policy_remembers_goes_on_too_and_begins_anew_after_forgetting(opened):
    chosen = {"selection": {"policy": "facility-location"}, "buffer": {"bins": 6}}
    whole = opened("whole", **chosen)
    observed(whole, 60, "file")
    wanted = kept(whole)
    stream = opened("parts", **chosen).observe_all(talk.dialogues(60), "file")
    for _ in range(23):
        next(stream)
    parts = opened("parts", **chosen)
    observed(parts, 60, "file")
    assert kept(parts) == wanted
    assert parts.selector.memory.count == 60

    gone = next(iter(parts.store.exemplars().values())).dialogue.id
    parts.forget(gone)
    assert parts.selector.memory.count == 5
    without_model = opened("parts", **chosen)
    without_model.forget(next(iter(without_model.store.exemplars().values())).dialogue.id)
    assert without_model.store.memory() == {}
    assert opened("parts", **chosen).selector.memory.count == 4


def test_a_memory_that_no_longer_fits_beside_what_is_kept_is_refused(opened):
    session = opened(buffer={"bins": 40})
    observed(session, 40)
    tight = {"bins": 40, "max_bytes": session.selector.buffer.bytes + 100}
    opened(buffer=tight).selector  # noqa: B018
    with pytest.raises(BudgetExceeded, match="open the buffer"):
        opened(buffer=tight, selection={"policy": "herding"}).selector  # noqa: B018


def test_what_is_kept_is_measured_when_a_policy_asks_for_it(opened, lm):
    session = opened(buffer={"bins": 6})
    observed(session, 8)
    assert {e.value for e in session.store.exemplars().values()} == {0.0}
    for kind in ("perplexity", "ifd"):
        asking = opened(buffer={"bins": 6}, selection={"policy": kind})
        offered = observed(asking, 12)[-1]
        assert asking.selector.asks == kind
        for e in asking.store.exemplars().values():
            loss = lm.nll([Example(e.dialogue.messages, e.dialogue.response)], max_tokens=512, batch_size=1)[0]
            wanted = np.exp(loss) if kind == "perplexity" else loss / lm.text_nll(e.dialogue.response)
            assert e.value == pytest.approx(wanted, rel=1e-5)
        assert offered.seq == asking.store.counts.offers


def test_a_file_that_grew_is_read_on_and_one_that_changed_is_refused(opened):
    session = opened()
    observed(session, 10, "file")
    assert len(observed(session, 14, "file")) == 4
    with pytest.raises(InputError, match="--again"):
        list(session.observe_all(talk.dialogues(14, seed=9), "file"))
    with pytest.raises(InputError, match="--again"):
        observed(session, 5, "file")
    assert session.store.counts.offers == 14


def test_scores_of_another_model_or_formula_are_not_mixed(opened):
    observed(opened(), 5)
    with pytest.raises(ConfigError, match="another eoe"):
        observed(opened(selection={"eoe": "token"}), 5)
    with pytest.raises(ConfigError, match="another vectors"):
        observed(opened(buffer={"vectors": "float32"}), 5)


def test_a_smaller_buffer_than_what_is_kept_is_refused(opened):
    observed(opened(), 20)
    with pytest.raises(BudgetExceeded, match="bin 8 of 4"):
        _ = opened(buffer={"bins": 4}).selector
    assert len(opened(buffer={"bins": 9}).selector.buffer) == 8


def test_the_user_is_asked_about_kept_dialogues_only_few_a_day_and_none_twice(opened):
    session = opened(review={"max_requests_per_day": 3})
    observed(session)
    pending = session.pending()
    assert len(pending) == 3
    assert {e.dialogue.id for e in pending} <= set(kept(session).values())
    assert [e.seq for e in pending] == sorted(e.seq for e in pending)
    session.annotate(pending[0].dialogue.id, Annotation("skip"))
    later = session.pending()
    assert len(later) == 2
    assert pending[0].dialogue.id not in {e.dialogue.id for e in later}


def test_annotations_count_against_the_byte_budget(opened):
    session = opened(buffer={"max_bytes": 3_000})
    observed(session)
    target = session.pending()[0].dialogue.id
    with pytest.raises(BudgetExceeded, match="shorten"):
        session.annotate(target, Annotation("edit", "x" * 3_000))
    with pytest.raises(BudgetExceeded, match="of a bin's 22,528 bytes"):
        opened(buffer={"max_bytes": 10**6}).annotate(target, Annotation("edit", "x" * 30_000))
    session = opened(buffer={"max_bytes": 3_000})
    before = session.selector.buffer.bytes
    wanted = session.pending()[0].dialogue.preferred
    session.annotate(target, Annotation("edit", wanted + "12345"))
    assert session.selector.buffer.bytes == before + 5
    with pytest.raises(InputError, match="empty"):
        session.annotate(target, Annotation("edit", "  "))
    with pytest.raises(InputError, match="not in the buffer"):
        session.annotate("0" * 16, Annotation("accept"))


def test_only_what_the_user_approved_is_trained_on(opened):
    session = opened()
    observed(session)
    a, b, c = [e.dialogue for e in session.pending()][:3]
    session.annotate(a.id, Annotation("accept"))
    session.annotate(b.id, Annotation("edit", "wanted"))
    session.annotate(c.id, Annotation("skip"))
    both = session.examples(held_out=False) + session.examples(held_out=True)
    assert {(e.dialogue_id, e.answer) for e in both} == {(a.id, a.response), (b.id, "wanted")}
    for example in session.examples(held_out=True):
        assert gate.held_out(example.dialogue_id, session.settings.gate)
    everything = opened(review={"train_on": "all"})
    both = everything.examples(held_out=False) + everything.examples(held_out=True)
    assert {e.dialogue_id for e in both} == set(kept(everything).values()) - {c.id}


def adapted(session):
    observed(session)
    session.annotate_from_stream()
    return session.adapt()


def test_a_round_trains_on_originals_and_variants_and_becomes_active(opened):
    session = opened()
    done = adapted(session)
    originals = len(session.examples(held_out=False))
    assert done.tuned.examples == originals + done.synthesised.kept
    assert done.synthesised.made == originals
    assert done.verdict.accepted
    assert session.active_adapter == done.tuned.adapter
    assert session.store.variants() == {}
    assert session.last_round().verdict == done.verdict
    assert session.last_round().tuned == done.tuned


def test_nothing_held_out_for_the_gate_is_trained_on(opened, monkeypatch):
    session = opened(gate={"holdout": 0.5, "max_forgetting": 100.0})
    seen = []
    from edge_sdss.tuning import trainer

    real = trainer.train
    monkeypatch.setattr(
        trainer, "train", lambda lm, examples, *a, **k: seen.extend(examples) or real(lm, examples, *a, **k)
    )
    adapted(session)
    held = {e.dialogue_id for e in session.examples(held_out=True)}
    assert held
    assert not held & {e.dialogue_id for e in seen}


@pytest.mark.parametrize("worse", ["personal", "general"])
def test_a_rejected_round_leaves_the_adapter_before_active(opened, monkeypatch, worse):
    session = opened(gate={"max_forgetting": 0.05, "holdout": 0.5})
    monkeypatch.setattr(session, "nll", lambda examples, adapter: np.ones(len(examples)))
    first = adapted(session)
    set_in_question = general.examples() if worse == "general" else session.examples(held_out=True)

    def losses(examples, adapter):
        new = adapter == session.adapter_folder(2)
        return np.ones(len(examples)) + (0.06 if new and tuple(examples) == tuple(set_in_question) else 0)

    monkeypatch.setattr(session, "nll", losses)
    second = session.adapt()
    assert not second.verdict.accepted
    assert f"{worse} loss" in second.verdict.reason
    assert session.active_adapter == first.tuned.adapter
    assert second.tuned.adapter.exists()


def test_rounds_go_on_from_the_active_adapter_and_roll_back_one_by_one(opened):
    session = opened()
    first, second = adapted(session), session.adapt()
    assert session.store.rounds()[1].start == first.number
    assert session.rollback() == first.number
    assert session.active_adapter == first.tuned.adapter
    assert session.rollback() is None
    assert session.active_adapter is None
    with pytest.raises(InputError, match="base model is active"):
        session.rollback()
    assert second.tuned.adapter.exists()


def test_after_forgetting_the_next_round_starts_from_the_base_model(opened):
    session = opened()
    first = adapted(session)
    gone = session.examples(held_out=False)[0].dialogue_id
    assert session.forget(gone) == [first.number]
    assert session.store.active_round().stale
    assert gone not in kept(session).values()
    assert gone not in session.selector.buffer
    second = session.adapt()
    assert session.store.rounds()[-1].start is None
    assert second.tuned.examples < first.tuned.examples
    with pytest.raises(InputError, match="no dialogue has this id"):
        session.forget("0" * 16)


def test_a_forgotten_dialogue_is_not_kept_again(opened):
    session = opened(buffer={"bins": 100})
    observed(session, 10)
    gone = session.store.exemplars()[3].dialogue
    session.forget(gone.id)
    assert session.observe(gone).reason == "the user asked to forget it"
    again = opened(buffer={"bins": 100})
    assert again.observe(gone).reason == "the user asked to forget it"


def test_a_round_without_approved_dialogues_says_what_to_do(opened):
    session = opened()
    observed(session)
    with pytest.raises(InputError, match="review some dialogues first"):
        session.adapt()


def test_a_round_interrupted_after_training_takes_in_what_changed_since(opened, monkeypatch):
    session = opened()
    observed(session)
    session.annotate_from_stream()
    monkeypatch.setattr(gate, "judge", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.adapt()
    monkeypatch.undo()
    assert session.active_adapter is None
    gone = session.examples(held_out=False)[0].dialogue_id
    session.forget(gone)
    done = session.adapt()
    assert done.number == 1
    assert done.tuned.examples == len(session.examples(held_out=False)) + done.synthesised.kept
    assert gone not in {v.dialogue_id for v in done.variants}


def test_a_round_is_due_every_interval_offers(opened):
    session = opened(tuning={"interval": 20})
    observed(session, 19)
    assert not session.round_due
    observed(session, 20, "more")
    assert session.round_due
    session.annotate_from_stream()
    session.adapt()
    assert not session.round_due
    assert session.round_done


def test_reviewing_and_forgetting_load_no_model(tiny, opened, tmp_path):
    observed(opened("light"), 10)
    opened("other")
    with Session(tmp_path / "light", talk.settings(tiny)) as session:
        pending = session.pending()
        session.annotate(pending[0].dialogue.id, Annotation("accept"))
        session.forget(pending[1].dialogue.id)
        assert "lm" not in session.__dict__
