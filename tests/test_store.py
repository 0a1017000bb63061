"""The store: every offer is whole or absent, what is reopened equals what was closed, forgotten text is gone."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
from streams import Stream, make_selector

from edge_sdss import config
from edge_sdss.errors import ConfigError, InputError
from edge_sdss.store import Store, lock
from edge_sdss.types import Annotation, Turn, Variant


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "edge_sdss.db", config.Store())
    yield opened
    opened.close()


def reopened(tmp_path, **settings):
    return Store(tmp_path / "edge_sdss.db", config.Store(**settings))


def fill(store, n=40, policy="random", **buffer):
    selector = make_selector(policy, **{"bins": 6, **buffer})
    for dialogue, rows in Stream(seed=1).take(n):
        dialogue = replace(dialogue, context=(Turn("user", "hé"),), preferred="yes", conversation="c", time="t")
        decision = selector.decide(dialogue, rows)
        store.record(decision, source="file", chain=f"chain{decision.seq}", position=decision.seq)
        selector.apply(decision)
    return selector


def test_the_store_holds_what_the_buffer_holds(store, tmp_path):
    selector = fill(store)
    assert reopened(tmp_path).exemplars() == selector.buffer.entries


def test_counts_positions_and_decisions_survive(store, tmp_path):
    fill(store, n=40)
    again = reopened(tmp_path)
    assert again.counts.offers == 40
    assert again.counts.kept - again.counts.evicted == 6
    assert again.source("file") == (40, "chain40")
    assert again.source("other") == (0, "")
    decisions = list(again.decisions())
    assert [d.seq for d in decisions] == list(range(1, 41))
    assert sum(len(d.evicted) for d in decisions) == again.counts.evicted


def test_the_log_of_offers_is_bounded_and_the_counts_are_not(tmp_path):
    store = reopened(tmp_path, offer_log=10)
    fill(store, n=35)
    assert [d.seq for d in store.decisions()] == list(range(26, 36))
    assert store.counts.offers == 35


@pytest.mark.parametrize("statement", range(5))
def test_an_offer_that_fails_half_way_leaves_nothing(store, tmp_path, statement, monkeypatch):
    selector = fill(store, n=20, policy="fifo")
    before = (store.exemplars(), store.counts, store.source("file"))
    (dialogue, rows), *_ = Stream(seed=77).take(1)
    decision = selector.decide(dialogue, rows)
    assert decision.evicted

    class Failing:
        def __init__(self, db):
            self.db, self.left = db, statement

        def execute(self, sql, *args):
            if sql.split()[0] in ("INSERT", "DELETE", "UPDATE"):
                self.left -= 1
                if self.left < 0:
                    raise sqlite3.OperationalError("disk full")
            return self.db.execute(sql, *args)

    real = store._db
    monkeypatch.setattr(store, "_db", Failing(real))
    with pytest.raises(sqlite3.OperationalError):
        store.record(decision, source="file", chain="x", position=21)
    monkeypatch.setattr(store, "_db", real)
    assert (store.exemplars(), store.counts, store.source("file")) == before
    again = reopened(tmp_path)
    assert (again.exemplars(), again.counts, again.source("file")) == before


def test_annotations_come_back_with_their_exemplar_and_leave_with_it(store):
    selector = fill(store, n=6, policy="fifo")
    first, second = (selector.buffer.entries[slot].dialogue.id for slot in (0, 1))
    store.annotate(first, Annotation("edit", "wanted"))
    store.annotate(second, Annotation("accept"))
    found = {e.dialogue.id: e.annotation for e in store.exemplars().values()}
    assert found[first] == Annotation("edit", "wanted")
    assert found[second] == Annotation("accept")
    assert store.answers() == {"edit": 1, "accept": 1}
    more, rows = next(Stream(seed=8).take(1))
    decision = selector.decide(more, rows)
    assert first in decision.evicted.values()
    store.record(decision)
    assert first in store.asked()
    assert store._db.execute(
        "SELECT answer, preferred FROM annotations WHERE dialogue_id = ?", (first,)
    ).fetchone() == (
        "edit",
        None,
    )


def test_forgetting_deletes_text_from_the_file_and_marks_all_rounds_that_go_back_to_it(store, tmp_path):
    selector = fill(store, n=6)
    secret = next(iter(selector.buffer.entries.values())).dialogue
    store.annotate(secret.id, Annotation("edit", "my PIN is 4711"))
    store.put_variants({secret.id: [Variant(secret.id, "variant of it, 4711", "r", 0.7)]})
    for trained, start in [(["other"], None), ([secret.id], 1), (["other"], 2), (["other"], 1)]:
        number = store.open_round(start).number
        store.close_round(number, True, {}, trained)
    store.put_variants({secret.id: [Variant(secret.id, "variant of it, 4711", "r", 0.7)]})
    assert store.knows(secret.id)
    assert store.forget(secret.id) == [2, 3]
    assert [r.stale for r in store.rounds()] == [False, True, True, False]
    assert not store.knows(secret.id)
    assert store.forgotten() == {secret.id}
    assert secret.id not in {e.dialogue.id for e in store.exemplars().values()}
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"4711" not in content
        assert secret.prompt.encode() not in content


def test_a_running_round_is_gone_on_with_and_a_closed_one_is_not(store):
    first = store.open_round(None)
    assert store.open_round(None) == first
    store.put_variants({"x": [Variant("x", "p", "r", 0.6, "copy")]})
    store.close_round(first.number, False, {"a": 1}, ["x"])
    assert store.active_round() is None
    assert store.variants() == {}
    second = store.open_round(None)
    assert second.number == first.number + 1
    store.close_round(second.number, True, {}, [])
    assert store.active_round().number == second.number
    assert [r.state for r in store.rounds()] == ["rejected", "accepted"]
    store.activate(None)
    assert store.active_round() is None


def test_a_home_has_one_writer(tmp_path):
    with lock(tmp_path):
        code = "import sys, pathlib; from edge_sdss.store import lock\nwith lock(pathlib.Path(sys.argv[1])): pass"
        found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert "is using it" in found.stderr
        with pytest.raises(InputError, match="is using it"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "edge_sdss.db").write_bytes(b"certainly not a database" * 100)
    with pytest.raises(ConfigError, match=r"edge_sdss\.db"):
        reopened(tmp_path)


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path):
    store = Store(tmp_path / "edge_sdss.db", config.Store())
    selector = fill(store)
    store.close()
    db = sqlite3.connect(tmp_path / "edge_sdss.db")
    db.execute("ALTER TABLE exemplars DROP COLUMN value")
    db.execute("DROP TABLE memory")
    db.execute("PRAGMA user_version = 1")
    db.close()
    for _ in range(2):
        again = reopened(tmp_path)
        assert again.exemplars() == selector.buffer.entries
        assert again.memory() == {}
        again.close()


def test_what_a_policy_asked_for_is_stored(store, tmp_path):
    selector = fill(store, policy="perplexity")
    found = reopened(tmp_path).exemplars()
    assert found == selector.buffer.entries
    assert len({e.value for e in found.values()}) > 1


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    reopened(tmp_path).close()
    db = sqlite3.connect(tmp_path / "edge_sdss.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="99"):
        reopened(tmp_path)
