"""SIGKILL at random moments of real processes: nothing accepted is lost, no half adapter is ever active.

Each child is forked from this process with the model already loaded, so that the moments fall on the
work and not on imports; what it does is what the command line does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import talk

from edge_sdss.lm import LanguageModel
from edge_sdss.session import Session
from edge_sdss.types import Annotation

KILLS = {"observe": 20, "synth": 12, "tune": 18}
OFFERS = 150


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked child must not wait for threads that were not forked with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lm(tiny):
    return LanguageModel.load(talk.settings(tiny).model)


def in_child(work: Callable[[], None], kill_after_s: float | None) -> bool:
    """Forks, works, kills; whether the child came to its end by itself. A child's error fails the test."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(70)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.waitstatus_to_exitcode(status) == 0


def undisturbed_s(work: Callable[[], None]) -> float:
    start = time.monotonic()
    assert in_child(work, None)
    return time.monotonic() - start


def kill_until_done(work, kills: int, seconds: float, check: Callable[[], None]) -> None:
    """Kills at moments drawn over the time that the undisturbed work took, then lets it finish."""
    draws = random.Random(0)
    for _ in range(kills):
        in_child(work, draws.uniform(0, seconds))
        check()
    assert in_child(work, None)
    check()


def opened(home, tiny, lm):
    settings = talk.settings(tiny, synthesis={"variants": 2})
    return Session(home, settings, lm=lm)


def observe(home: Path, tiny, lm, report: Path | None = None) -> None:
    with opened(home, tiny, lm) as session:
        for decision in session.observe_all(talk.dialogues(OFFERS), "stream"):
            if report:
                with report.open("a") as file:
                    file.write(f"{decision.seq}\n")


def prepared(home, tiny, lm) -> None:
    observe(home, tiny, lm)
    with opened(home, tiny, lm) as session:
        session.annotate_from_stream()


def test_observe(tiny, lm, tmp_path):
    seconds = undisturbed_s(lambda: observe(tmp_path / "whole", tiny, lm))
    report = tmp_path / "accepted"
    report.touch()

    def check():
        accepted = [int(line) for line in report.read_text().split()]
        with opened(tmp_path / "killed", tiny, lm) as session:
            offers = session.store.counts.offers
            assert accepted == sorted(set(accepted)), "no offer twice"
            assert max(accepted, default=0) <= offers, "what was accepted is stored"
            assert [d.seq for d in session.store.decisions()] == list(range(1, offers + 1)), "none is left out"

    # Kills early on, so that each run gets a little further.
    kill_until_done(lambda: observe(tmp_path / "killed", tiny, lm, report), KILLS["observe"], seconds / 6, check)
    with opened(tmp_path / "whole", tiny, lm) as whole, opened(tmp_path / "killed", tiny, lm) as killed:
        assert killed.store.exemplars() == whole.store.exemplars()
        assert killed.store.counts == whole.store.counts
        assert list(killed.store.decisions()) == list(whole.store.decisions())
        assert killed.selector.buffer.idd.tolist() == whole.selector.buffer.idd.tolist()


@pytest.mark.parametrize("statement", range(1, 10))
def test_an_offer_killed_between_two_statements_is_whole_or_absent(tiny, lm, tmp_path, statement):
    """The narrow gaps that random moments seldom hit: before each statement of an offer that evicts."""
    stream = talk.dialogues(40)
    with opened(tmp_path, tiny, lm) as session:
        made = list(session.observe_all(stream[:20], "stream"))
        assert len(session.selector.buffer) == 8
        before = (session.store.exemplars(), session.store.counts, session.store.source("stream"))

    def offer():
        with Session(tmp_path, talk.settings(tiny, selection={"policy": "fifo"}), lm=lm) as session:
            _ = session.selector
            left = [statement]

            def kill(sql: str) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            session.store._db.set_trace_callback(kill)
            session.observe(stream[30], source="stream", chain="c", position=99)

    ended = in_child(offer, None)
    with opened(tmp_path, tiny, lm) as session:
        after = (session.store.exemplars(), session.store.counts, session.store.source("stream"))
        assert (after == before) != ended
        assert session.store.counts.offers == len(made) + ended
        assert len(session.store.exemplars()) == 8


def test_synth(tiny, lm, tmp_path):
    prepared(tmp_path / "whole", tiny, lm)
    prepared(tmp_path / "killed", tiny, lm)

    def synth(home):
        with opened(home, tiny, lm) as session:
            session.synthesise()

    seconds = undisturbed_s(lambda: synth(tmp_path / "whole"))
    seen: dict = {}

    def check():
        with opened(tmp_path / "killed", tiny, lm) as session:
            variants = session.store.variants()
            assert all(variants[key] == made for key, made in seen.items()), "what was written stays"
            assert all(len(made) == 2 for made in variants.values()), "an exemplar's variants come together"
            seen.update(variants)

    kill_until_done(lambda: synth(tmp_path / "killed"), KILLS["synth"], seconds / 2, check)
    with opened(tmp_path / "whole", tiny, lm) as whole, opened(tmp_path / "killed", tiny, lm) as killed:
        assert killed.store.variants() == whole.store.variants() != {}


def test_tune(tiny, lm, tmp_path):
    prepared(tmp_path / "whole", tiny, lm)
    prepared(tmp_path / "killed", tiny, lm)

    def tune(home):
        with opened(home, tiny, lm) as session:
            if not session.round_done:
                session.adapt()

    seconds = undisturbed_s(lambda: tune(tmp_path / "whole"))

    def check():
        with opened(tmp_path / "killed", tiny, lm) as session:
            active = session.active_adapter
            if active is not None:
                lm.attach(active)
                lm.attach(None)
            assert len(session.store.rounds()) <= 1

    kill_until_done(lambda: tune(tmp_path / "killed"), KILLS["tune"], seconds, check)
    with opened(tmp_path / "whole", tiny, lm) as whole, opened(tmp_path / "killed", tiny, lm) as killed:
        assert killed.store.exemplars() == whole.store.exemplars()
        weights = [s.active_adapter / "adapter_model.safetensors" for s in (whole, killed)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        leftovers = [p.name for p in (tmp_path / "killed" / "adapters").iterdir()]
        assert leftovers == ["round-0001"]


def test_a_kill_between_annotations_keeps_the_ones_given(tiny, lm, tmp_path):
    observe(tmp_path, tiny, lm)

    def annotate():
        with opened(tmp_path, tiny, lm) as session:
            session.annotate(session.pending()[0].dialogue.id, Annotation("accept"))
            os.kill(os.getpid(), signal.SIGKILL)

    for given in range(1, 4):
        in_child(annotate, None)
        with opened(tmp_path, tiny, lm) as session:
            assert session.store.answers() == {"accept": given}
