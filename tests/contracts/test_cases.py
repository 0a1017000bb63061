"""What every case of `profile` promises, whatever it measures."""

from __future__ import annotations

import ast
import inspect

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import talk

from edge_sdss import cases
from edge_sdss.errors import InputError
from edge_sdss.lm import LanguageModel


@pytest.fixture(scope="module")
def subject(tiny):
    settings = talk.settings(tiny, profile={"prompt_tokens": 32, "new_tokens": 8})
    ticks = iter(range(1_000_000))
    subject = cases.Subject(settings, lm=LanguageModel.load(settings.model), clock=lambda: float(next(ticks)))
    yield subject
    subject.close()
    assert not subject.folder.exists()


@pytest.fixture(params=cases.names())
def workload(request, subject):
    return cases.workloads([request.param], subject)[0]


def test_the_cases_of_the_product_are_there():
    wanted = ("load", "embed", "select", "offer", "prefill", "decode", "synth", "train-step", "round")
    assert cases.names()[: len(wanted)] == wanted


def test_a_repetition_counts_what_it_did(workload):
    with workload.open() as repeat:
        first, second = repeat(), repeat()
    for done in (first, second):
        assert done.items > 0
        assert done.seconds is None or done.seconds > 0
        assert all(times and min(times) > 0 for times in done.times_s.values())
    assert first.items == second.items
    assert first.times_s.keys() == second.times_s.keys()


def test_a_case_can_be_opened_again(workload, subject):
    for _ in range(2):
        with workload.open() as repeat:
            repeat()
    assert subject.lm.adapter is None
    assert not any(weight.requires_grad for weight in subject.lm.model.parameters())


def test_it_says_what_it_does(workload):
    assert workload.about.endswith(".")
    assert len(workload.about) < 160
    assert workload.item == workload.item.strip().lower()
    assert workload.primary in ("time", "rate")


def test_a_case_reads_no_clock_of_its_own(workload):
    """So that a test, and a recording, can give it another."""
    source = inspect.getsource(cases.module(workload.name))
    imported = {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    assert "time" not in imported


def test_decode_leaves_the_prefill_out(subject):
    with cases.workloads(["decode"], subject)[0].open() as repeat:
        done = repeat()
    assert done.items == 7
    assert done.seconds == 7  # of 8 ticks, the first one belongs to the first token
    assert len(done.times_s["inter_token"]) == 7
    assert done.times_s["ttft"] == [1]


def test_prompts_have_the_length_asked_for(subject):
    for tokens in (1, 32, 500):
        assert len(subject.prompt(tokens)) == tokens
    with pytest.raises(InputError, match="context"):
        subject.prompt(subject.lm.context)


def test_an_unknown_case_names_the_known_ones(subject):
    with pytest.raises(InputError, match="decode"):
        cases.workloads(["sing"], subject)
