"""The gate's rule, stated again as properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdss.config import Gate
from edge_sdss.errors import InputError
from edge_sdss.gate import held_out, judge

pytest.importorskip("scipy")

losses = st.lists(st.floats(0, 10), min_size=1, max_size=5)
change = st.floats(-1, 1).filter(lambda x: abs(x) > 1e-6 and abs(x - 0.05) > 1e-6)


@settings(max_examples=25, deadline=None)
@given(losses, losses, change, change)
def test_accepts_exactly_when_both_means_are_within_their_limits(
    personal: list[float], general: list[float], better: float, forgotten: float
) -> None:
    after = [x + better for x in personal], [x + forgotten for x in general]
    verdict = judge(personal, after[0], general, after[1], Gate(max_forgetting=0.05))
    assert verdict.accepted == (better <= 0 and forgotten <= 0.05)
    assert verdict.accepted == all(check.passed for check in verdict.checks)
    assert verdict.personal is not None
    assert verdict.personal.mean == pytest.approx(better)
    assert verdict.general.mean == pytest.approx(forgotten)


def test_no_change_is_accepted() -> None:
    assert judge([1.5, 2.0], [1.5, 2.0], [3.0], [3.0], Gate()).accepted


def test_the_mean_decides_not_the_single_item() -> None:
    assert judge([1, 1, 1], [2, 0, 0], [1], [1], Gate()).accepted
    assert not judge([1, 1, 1], [0.9, 0.9, 1.3], [1], [1], Gate()).accepted


def test_the_reason_names_what_failed_and_only_that() -> None:
    worse = judge([1.0], [1.2], [1.0], [1.0], Gate()).reason
    assert "personal loss" in worse
    assert "+0.2000" in worse
    assert "general" not in worse
    forgot = judge([1.0], [0.5], [1.0], [1.4], Gate()).reason
    assert "general loss" in forgot
    assert "+0.4000" in forgot
    assert "personal" not in forgot


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_rejects(bad: float) -> None:
    for personal, general in ([0.1, bad], [0.1, 0.1]), ([0.1, 0.1], [bad, 0.1]):
        verdict = judge([1, 1], personal, [1, 1], general, Gate())
        assert not verdict.accepted
        assert "not finite" in verdict.reason


def test_without_personal_items_the_general_set_decides_and_the_reason_says_so() -> None:
    for general, accepted in ([1.0], True), ([1.1], False):
        verdict = judge([], [], [1.0], general, Gate())
        assert verdict.accepted is accepted
        assert verdict.personal is None
        assert "no personal item" in verdict.reason


def test_refuses_items_that_do_not_pair_and_an_empty_general_set() -> None:
    with pytest.raises(InputError):
        judge([1.0], [], [1.0], [1.0], Gate())
    with pytest.raises(InputError, match="general"):
        judge([1.0], [1.0], [], [], Gate())


@settings(deadline=None)
@given(st.text())
def test_a_dialogue_never_changes_sides(name: str) -> None:
    side = held_out(name, Gate(holdout=0.2))
    assert held_out(name, Gate(holdout=0.2, max_forgetting=1)) == side
    assert not side or held_out(name, Gate(holdout=0.5)), "a larger share holds what a smaller one held"
    assert not held_out(name, Gate(holdout=0))


def test_the_share_held_out_is_the_one_asked_for() -> None:
    names = [f"{number:016x}" for number in range(4000)]
    share = np.mean([held_out(name, Gate(holdout=0.2)) for name in names])
    assert share == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 4000))
