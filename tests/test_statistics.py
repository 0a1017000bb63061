"""Intervals against coverage on known distributions, and the degenerate cases one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdss.errors import InputError
from edge_sdss.statistics import mean_interval, paired_interval
from edge_sdss.types import Interval

pytest.importorskip("scipy")

finite = st.floats(-100, 100, allow_subnormal=False)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_covers_the_true_mean_about_as_often_as_it_says(draw: str) -> None:
    generator = np.random.default_rng(1)
    truth = 0.0 if draw == "normal" else 1.0
    samples = [getattr(generator, draw)(size=40) for _ in range(150)]
    hits = sum(found.lo <= truth <= found.hi for found in map(mean_interval, samples))
    assert 0.86 <= hits / len(samples) <= 0.99


def test_is_near_the_normal_interval_on_normal_data() -> None:
    data = np.random.default_rng(2).normal(3, 2, 400)
    found = mean_interval(data)
    half = 1.96 * data.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(data.mean())
    assert found.lo == pytest.approx(data.mean() - half, abs=0.1 * half)
    assert found.hi == pytest.approx(data.mean() + half, abs=0.1 * half)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=8))
def test_holds_the_mean_and_is_finite(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    found = paired_interval(before, after)
    assert found.n == len(pairs)
    assert found.mean == pytest.approx(np.mean(after) - np.mean(before), abs=1e-9)
    assert found.lo - 1e-9 <= found.mean <= found.hi + 1e-9


def test_pairing_removes_what_items_have_in_common() -> None:
    level = np.random.default_rng(3).normal(0, 50, 30)
    noise = np.random.default_rng(4).normal(0, 0.1, 30)
    found = paired_interval(level, level + 1 + noise)
    assert found.hi - found.lo < 0.2


def test_same_seed_same_interval_and_more_confidence_is_wider() -> None:
    data = [0.1, 0.4, -0.2, 0.9, 0.3]
    assert mean_interval(data, seed=5) == mean_interval(data, seed=5)
    narrow, wide = mean_interval(data, confidence=0.5), mean_interval(data, confidence=0.99)
    assert wide.lo < narrow.lo < narrow.hi < wide.hi


def test_degenerate_cases_are_defined() -> None:
    assert mean_interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)
    assert mean_interval([2.0]) == Interval(2.0, 2.0, 2.0, 1)
    assert math.isnan(mean_interval([1.0, math.inf]).mean)
    tiny = mean_interval([1e-200, 2e-200, 5e-200])  # the cubes that BCa needs underflow
    assert 1e-200 <= tiny.lo < tiny.mean < tiny.hi <= 5e-200
    lopsided = mean_interval([0.0] * 30 + [1.0])
    assert 0 <= lopsided.lo <= lopsided.mean <= lopsided.hi <= 1


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="2 before and 1 after"):
        paired_interval([1, 2], [1])
    with pytest.raises(InputError, match="at least one"):
        mean_interval([])
