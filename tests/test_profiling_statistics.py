"""Intervals against coverage, verdicts against planted differences, drift against trends, timing on a made-up clock."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdss.errors import InputError
from edge_sdss.profiling import statistics
from edge_sdss.profiling.versus import SAMPLE_S, versus, versus_many

pytest.importorskip("scipy")

Array = npt.NDArray[np.float64]
FLOOR = 5.0


def draw(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, float]:
    """Samples of standard deviation 1, and the median of their distribution in closed form."""
    if kind == "normal":
        return 20 + rng.standard_normal(shape), 20.0
    if kind == "lognormal":  # sigma 0.5, moved up so that a spread between runs leaves it positive
        scale = 1 / math.sqrt(math.expm1(0.25) * math.exp(0.25))
        return 20 + scale * rng.lognormal(0, 0.5, shape), 20 + scale
    return FLOOR + 15 + rng.exponential(1, shape), FLOOR + 15 + math.log(2)


GRID = [
    (kind, runs, samples, between)
    for kind in ("normal", "lognormal", "exponential")
    for runs, samples in itertools.product((1, 3, 5, 10), (5, 20, 100))
    for between in ((0.0,) if runs == 1 else (0.0, 0.5, 2.0))
    if (runs, samples) != (1, 5)  # five samples: the range, 93.75 %, see below
]


@pytest.mark.parametrize("kind", ["normal", "lognormal", "exponential"])
def test_interval_covers_the_median_in_93_to_97_of_100(kind: str) -> None:
    trials, outside = 1500, {}
    for cell in (cell for cell in GRID if cell[0] == kind):
        _, runs, samples, between = cell
        rng = np.random.default_rng([runs, samples, int(2 * between), len(kind)])
        data, truth = draw(kind, rng, (trials, runs, samples))
        data = data + between * rng.standard_normal((trials, runs, 1))
        medians = np.median(data, axis=-1, keepdims=True) if runs > 1 else data  # all that the interval looks at
        found = [statistics.interval(one) for one in medians]
        share = np.mean([lo <= truth <= hi for lo, hi in found])
        if not 0.93 <= share <= 0.97:
            outside[cell] = share
    assert not outside


def test_interval_looks_at_the_medians_of_runs_alone() -> None:
    for runs in (2, 5, 12):
        data = np.random.default_rng(runs).lognormal(size=(runs, 9))
        assert statistics.interval(data) == statistics.interval(np.median(data, axis=1, keepdims=True))


def test_percentile_bootstrap_over_three_runs_would_not_pass() -> None:
    rng, hits, trials = np.random.default_rng(7), 0, 300
    for _ in range(trials):
        data = 20 + rng.standard_normal((3, 20)) + 2 * rng.standard_normal((3, 1))
        runs = rng.integers(0, 3, (200, 3))
        picks = rng.integers(0, 20, (200, 3, 20))
        medians = np.median(data[runs[:, :, None], picks].reshape(200, -1), axis=1)
        lo, hi = np.quantile(medians, [0.025, 0.975])
        hits += lo <= 20 <= hi
    assert hits / trials < 0.85


def test_interval_of_one_run_against_tables_of_the_binomial() -> None:
    assert statistics.interval([[3, 1, 5, 2, 4]]) == (1, 5)
    assert statistics.interval([[3, 1, 5, 2]]) is None
    # n = 20: ranks 6 and 15 cover 95.86 %, 7 and 14 cover 88.47 %; the interval lies between them
    lo, hi = statistics.order_interval(np.arange(1.0, 21))
    assert 6 < lo < 6.5
    assert lo + hi == pytest.approx(21)


def test_interval_of_few_runs_is_students() -> None:
    logs = np.array([0.1, 0.3, 0.2])
    found = statistics.interval([[math.exp(value)] for value in logs])
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t, two degrees of freedom, from a table
    assert found == pytest.approx((math.exp(0.2 - half), math.exp(0.2 + half)), rel=1e-6)
    negative = statistics.interval([[-1.0], [0.0], [1.0]])
    assert negative == pytest.approx((-4.302653 / math.sqrt(3), 4.302653 / math.sqrt(3)), rel=1e-6)


def test_summary_of_known_samples() -> None:
    found = statistics.summary([[1, 2, 3], [4, 5, 6, 7, 8, 9]], "s", "lower")
    assert (found.n, found.runs, found.median, found.iqr) == (9, 2, 5, 4)
    assert found.cv == pytest.approx(math.sqrt(7.5) / 5)
    assert (found.p95, found.p99, found.unit, found.better) == (None, None, "s", "lower")
    many = statistics.summary([list(range(101))], "s", "lower")
    assert (many.p95, many.p99) == (95, 99)


def test_summary_of_degenerate_samples() -> None:
    one = statistics.summary([[2.0]], "s", "lower")
    assert (one.median, one.lo, one.hi, one.cv, one.drift) == (2, None, None, None, None)
    same = statistics.summary([[2.0] * 10] * 3, "s", "lower")
    assert (same.lo, same.hi, same.iqr, same.cv) == pytest.approx((2, 2, 0, 0))
    for wrong in ([], [[]], [[1.0, math.nan]], [[math.inf]]):
        with pytest.raises(InputError):
            statistics.summary(wrong, "s", "lower")


times = st.floats(1e-6, 1e3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(times, min_size=1, max_size=8), min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_summary_follows_the_unit_and_holds_its_median(runs: list[list[float]], scale: float) -> None:
    found = statistics.summary(runs, "s", "lower")
    scaled = statistics.summary([[scale * value for value in run] for run in runs], "s", "lower")
    shuffled = statistics.summary([run[::-1] for run in runs], "s", "lower")
    for name in ("median", "lo", "hi", "iqr", "cv"):
        value, factor = getattr(found, name), 1 if name == "cv" else scale
        if value is None:
            assert getattr(scaled, name) is None
        else:
            assert getattr(scaled, name) == pytest.approx(factor * value, rel=1e-6, abs=1e-9 * factor)
            assert getattr(shuffled, name) == pytest.approx(value, rel=1e-9)
    assert found.lo is None or found.lo <= found.median <= found.hi


def series(rng: np.random.Generator, runs: int = 5, samples: int = 20, run_sd: float = 0.02) -> Array:
    """The ordinary noise: 2 % between runs, 5 % within."""
    level = np.exp(run_sd * rng.standard_normal((runs, 1)))
    return level * (1 + 0.05 * rng.standard_normal((runs, samples)))


def calls(planted: float, trials: int, run_sd: float = 0.02) -> dict[str, float]:
    """Share of each verdict among comparisons of two series, the second slower by `planted`."""
    rng, counts = np.random.default_rng(11), dict.fromkeys(("better", "worse", "inconclusive"), 0.0)
    for _ in range(trials):
        found = statistics.ratio(series(rng, run_sd=run_sd), planted * series(rng, run_sd=run_sd))
        counts[statistics.verdict(found, "lower")] += 1 / trials
    return counts


@pytest.mark.parametrize("run_sd", [0.0, 0.02, 0.3])
def test_equals_are_rarely_called_different_whatever_the_noise(run_sd: float) -> None:
    assert calls(1.0, 1000, run_sd)["inconclusive"] >= 0.97


def test_a_tenth_slower_is_found_and_never_called_better() -> None:
    found = calls(1.1, 500)
    assert found["worse"] >= 0.95
    assert found["better"] == 0


def test_a_difference_below_the_least_is_not_called_however_sure() -> None:
    exact = [[1.0] * 5] * 5
    assert statistics.verdict(statistics.ratio(exact, [[1.009] * 5] * 5), "lower") == "inconclusive"
    assert statistics.verdict(statistics.ratio(exact, [[1.011] * 5] * 5), "lower") == "worse"
    noisy = np.exp(1e-4 * np.random.default_rng(16).standard_normal((2, 5, 1)))
    assert statistics.verdict(statistics.ratio(noisy[0], 1.009 * noisy[1]), "lower") == "inconclusive"
    assert statistics.verdict(statistics.ratio(noisy[0], 1.011 * noisy[1]), "lower") == "worse"


def test_interval_of_the_ratio_covers() -> None:
    rng, hits, trials = np.random.default_rng(12), 0, 1500
    for _ in range(trials):
        found = statistics.ratio(series(rng), 1.3 * series(rng, run_sd=0.08))
        hits += found.lo <= 1.3 <= found.hi
    assert 0.93 <= hits / trials <= 0.97  # Welch's, with unequal scatter on the sides


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(times, min_size=1, max_size=5), min_size=1, max_size=6),
    st.lists(st.lists(times, min_size=1, max_size=5), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
)
def test_swapping_the_sides_inverts_the_ratio(a: list[list[float]], b: list[list[float]], scale: float) -> None:
    found, swapped = statistics.ratio(a, b), statistics.ratio(b, a)
    scaled = statistics.ratio([[scale * x for x in run] for run in a], [[scale * x for x in run] for run in b])
    assert swapped.ratio == pytest.approx(1 / found.ratio, rel=1e-9)
    assert scaled.ratio == pytest.approx(found.ratio, rel=1e-6)
    if found.lo is None or found.hi is None:
        assert min(len(a), len(b)) == 1
        return
    assert found.lo <= found.ratio <= found.hi
    assert swapped.p == pytest.approx(found.p, rel=1e-6)
    if found.lo > 1e-100 and found.hi < 1e100:
        assert (swapped.lo, swapped.hi) == pytest.approx((1 / found.hi, 1 / found.lo), rel=1e-6)
    opposite = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}
    assert statistics.verdict(swapped, "lower") == opposite[statistics.verdict(found, "lower")]
    assert statistics.verdict(found, "higher") == opposite[statistics.verdict(found, "lower")]


def test_ratio_refuses_what_has_no_logarithm() -> None:
    for b in ([[0.0]], [[-1.0]]):
        with pytest.raises(InputError):
            statistics.ratio([[1.0]], b)


def test_ratio_of_intervals_agrees_with_the_one_of_samples() -> None:
    rng = np.random.default_rng(13)
    a, b = series(rng, samples=1), 1.2 * series(rng, samples=1)
    sides = [(float(np.exp(np.log(side).mean())), *statistics.interval(side)) for side in (a, b)]
    found, expected = statistics.ratio_of_intervals(sides[0], sides[1], 5, 5), statistics.ratio(a, b)
    got = (found.ratio, found.lo, found.hi, found.p)
    assert got == pytest.approx((expected.ratio, expected.lo, expected.hi, expected.p), rel=1e-6)
    assert statistics.ratio_of_intervals((1, None, None), (2, 1, 3), 5, 5).p is None


def test_pairs_cancel_the_drift_that_blinds_the_unpaired_ratio() -> None:
    rng = np.random.default_rng(14)
    level = np.exp(np.linspace(0, 1, 20))  # the machine gets slower by a factor of 2.7
    a, b = level * np.exp(0.01 * rng.standard_normal(20)), 1.1 * level * np.exp(0.01 * rng.standard_normal(20))
    paired = statistics.paired_ratio(a, b)
    assert paired.ratio == pytest.approx(1.1, rel=0.01)
    assert paired.hi - paired.lo < 0.02
    unpaired = statistics.ratio([[x] for x in a], [[x] for x in b])
    assert statistics.verdict(paired, "lower") == "worse"
    assert statistics.verdict(unpaired, "lower") == "inconclusive"


@pytest.mark.parametrize("n", [7, 10, 30])
def test_pairs_hold_their_level_under_wild_noise(n: int) -> None:
    rng, hits, called, trials = np.random.default_rng(n), 0, 0, 1000
    for noise in rng.standard_cauchy((trials, n)):
        found = statistics.paired_ratio(np.ones(n), np.exp(np.clip(0.1 * noise, -20, 20)))
        hits += found.lo <= 1 <= found.hi
        called += statistics.verdict(found, "lower") != "inconclusive"
    assert 0.93 <= hits / trials <= 0.97
    assert called / trials <= 0.03


def test_pairs_against_all_signs() -> None:
    """Wilcoxon's level by enumeration: the p of a shift is the share of sign patterns as extreme."""
    changes = np.array([0.9, 0.31, 0.42, 0.63, 0.24, 0.75, -0.16, 0.58])
    ranks = np.argsort(np.argsort(np.abs(changes - math.log1p(statistics.MIN_DIFFERENCE)))) + 1
    observed = ranks[changes < 0].sum()
    low = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=8)
    ]
    expected = 2 * np.mean([total <= observed for total in low])
    found = statistics.paired_ratio(np.ones(8), np.exp(changes))
    assert found.p == pytest.approx(expected)
    assert statistics.paired_ratio([1] * 5, [2] * 5).lo is None


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def drifts(make: Callable[[np.random.Generator], Array], trials: int = 150) -> float:
    rng = np.random.default_rng(15)
    return float(np.mean([statistics.drift(make(rng)) is not None for _ in range(trials)]))


def test_drift_is_found_in_a_trend_with_its_size() -> None:
    trend = 1 + 0.2 * np.linspace(-0.5, 0.5, 100).reshape(5, 20)
    assert drifts(lambda rng: trend * series(rng, run_sd=0)) >= 0.95
    sizes = [statistics.drift(trend * series(np.random.default_rng(i), run_sd=0)) for i in range(20)]
    assert np.median([size for size in sizes if size is not None]) == pytest.approx(0.2, abs=0.03)
    falling = [statistics.drift(trend[::-1, ::-1] * series(np.random.default_rng(i), run_sd=0)) for i in range(5)]
    assert all(size is None or size < -0.1 for size in falling)
    assert drifts(lambda rng: trend.reshape(1, 100) * series(rng, 1, 100)) >= 0.95


def test_drift_is_rare_in_noise_of_any_kind() -> None:
    def alike(rng: np.random.Generator) -> Array:
        noise = rng.standard_normal(300)
        for index in range(1, 300):
            noise[index] += 0.6 * noise[index - 1]
        return 1 + 0.05 * noise[200:].reshape(1, 100)

    assert drifts(lambda rng: series(rng, run_sd=0)) <= 0.05
    assert drifts(lambda rng: series(rng, 1, 100)) <= 0.05
    assert drifts(lambda rng: series(rng, run_sd=0.1)) <= 0.06  # a trend of five levels by chance, p = 0.05
    assert drifts(alike) <= 0.05
    assert statistics.drift([[1.0] * 20, [2.0] * 20]) is None  # two levels are no trend


class Machine:
    """A clock, and functions that take its time; `slope` is how much slower all gets per second."""

    def __init__(self, slope: float = 0.0, noise: float = 0.0) -> None:
        self.now, self.slope, self.noise, self.order = 0.0, slope, noise, list[str]()
        self.rng, self.collecting = np.random.default_rng(3), set[bool]()

    def clock(self) -> float:
        return self.now

    def function(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.collecting.add(gc.isenabled())
            self.order.append(name)
            self.now += seconds * (1 + self.slope * self.now) * math.exp(self.noise * self.rng.standard_normal())

        return run


def blocks_of(order: list[str]) -> Iterator[tuple[str, int]]:
    for name, group in itertools.groupby(order):
        yield name, len(list(group))


def test_versus_cancels_a_steady_slow_down_of_the_machine() -> None:
    machine = Machine(slope=0.5)
    found = versus(machine.function("ours", 0.012), machine.function("peer", 0.01), clock=machine.clock, blocks=20)
    assert machine.now > 4  # all takes three times as long in the end
    assert found.ratio == pytest.approx(1.2, rel=0.005)
    assert found.lo <= 1.2 <= found.hi
    assert (found.verdict, found.n, found.ours.runs, found.ours.unit) == ("worse", 20, 20, "s")


def test_versus_alternates_in_rounds_that_mirror_each_other() -> None:
    machine = Machine()
    functions = {name: machine.function(name, 0.01) for name in ("a", "b", "c")}
    found = versus_many(functions, blocks=8, min_block_s=0.045, clock=machine.clock)
    assert list(found) == ["b", "c"]
    timed = "".join(machine.order)[-8 * 3 * 5 :]
    rounds = [[timed[15 * index + 5 * k] for k in range(3)] for index in range(8)]
    assert all(timed[5 * k : 5 * k + 5] == timed[5 * k] * 5 for k in range(24))
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert all(rounds[index + 1] == rounds[index][::-1] for index in range(0, 8, 2))
    assert len({tuple(one) for one in rounds}) > 2


@pytest.mark.parametrize("seconds", [1e-6, 3e-4, 0.007, 0.3])
def test_versus_calibrates_samples_and_blocks(seconds: float) -> None:
    machine = Machine()
    found = versus(
        machine.function("o", seconds), machine.function("p", seconds), clock=machine.clock, blocks=7, min_block_s=0.02
    )
    assert found.ours.median == pytest.approx(seconds, rel=1e-6)
    assert found.verdict == "inconclusive"
    samples = found.ours.n / 7
    calls = max(1, round(SAMPLE_S / seconds))
    assert samples == pytest.approx(max(1, 0.02 / (calls * seconds)), abs=1)


def test_versus_is_not_blind_and_not_wild_on_a_noisy_machine() -> None:
    outcomes = []
    for seed in range(40):
        machine = Machine(noise=0.05)
        machine.rng = np.random.default_rng(seed)
        pair = [machine.function("x", seconds) for seconds in (0.01 * (1.1 if seed % 2 else 1), 0.01)]
        outcomes.append(versus(*pair, clock=machine.clock, blocks=10, seed=seed).verdict)
    assert outcomes[::2].count("inconclusive") >= 19
    assert outcomes[1::2].count("worse") >= 19


def test_versus_keeps_garbage_collection_out_and_restores_it() -> None:
    machine = Machine()
    work = machine.function("x", 0.01)
    versus(work, work, clock=machine.clock, blocks=7, min_block_s=0.01)
    assert gc.isenabled()
    assert machine.collecting == {True, False}  # the first call, which is not timed, may collect

    def broken() -> None:
        if machine.now > 0.5:
            raise KeyError
        work()

    with pytest.raises(KeyError):
        versus(work, broken, clock=machine.clock)
    assert gc.isenabled()


def test_versus_refuses_what_cannot_be_judged() -> None:
    with pytest.raises(InputError, match="7 blocks"):
        versus(int, int, blocks=6)
    with pytest.raises(InputError):
        versus_many({"one": int})
    with pytest.raises(InputError, match="no time"):
        versus(int, int, clock=lambda: 0.0)
