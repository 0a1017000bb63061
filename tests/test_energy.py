"""Energy against closed forms: on the exact samples, on jittered ones, and where nothing can be known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_sdss.errors import InputError
from edge_sdss.profiling.energy import Edges, Integral, counter, integrate, over, together

Array = npt.NDArray[np.float64]
RAPL_WRAP_J = 262143.328850
KEYWORDS = {"max_gap_s": 1.0, "min_samples": 2}


def jittered(seconds: float, seed: int = 1, interval: float = 0.1, jitter: float = 0.3) -> Array:
    """Sampling times from just before 0 to just after `seconds`."""
    steps = interval * (1 + jitter * np.random.default_rng(seed).uniform(-1, 1, int(1.1 * seconds / interval) + 20))
    times = np.cumsum(steps) - 3 * interval
    return times[: np.searchsorted(times, seconds) + 2]


def square(period: float) -> Callable[[Array], Array]:
    return lambda t: np.where((t / period) % 1 < 0.5, 15.0, 5.0)


# Closed forms


@pytest.mark.parametrize("edges", ["interpolate", "hold"])
def test_constant(edges: Edges) -> None:
    times = jittered(20)
    found = integrate(times, np.full(times.size, 7.0), 0.033, 19.77, **KEYWORDS, edges=edges)
    assert found.joules == pytest.approx(7 * (19.77 - 0.033))
    assert (found.mean_w, found.peak_w) == (pytest.approx(7), 7)
    assert found.samples == np.count_nonzero((times > 0.033) & (times < 19.77))
    assert found.reason == ""


def test_ramp_is_exact_as_edges_are_interpolated() -> None:
    times = jittered(2)
    found = integrate(times, 3 + 4 * times, 0.05, 1.95, **KEYWORDS)
    assert found.joules == pytest.approx(3 * 1.9 + 2 * (1.95**2 - 0.05**2), rel=1e-12)
    assert found.peak_w == pytest.approx(3 + 4 * 1.95)


def test_edges_between_two_samples_and_on_them() -> None:
    assert integrate([0, 1], [0, 10], 0.25, 0.5, max_gap_s=1, min_samples=0).joules == pytest.approx(0.9375)
    assert integrate([0, 1, 2], [0, 10, 0], 0, 2, max_gap_s=1, min_samples=3).joules == pytest.approx(10)


@pytest.mark.parametrize("seconds", [10.0, 12.3])
def test_sine(seconds: float) -> None:
    """10 + 5 sin(2π t / 2 s), 20 samples a period: the trapezoid's own error is about (2π/20)²/12 of the swing."""
    times = jittered(seconds)
    truth = 10 * seconds + 5 / math.pi * (1 - math.cos(math.pi * seconds))
    found = integrate(times, 10 + 5 * np.sin(math.pi * times), 0, seconds, **KEYWORDS)
    assert found.joules == pytest.approx(truth, rel=0.01)


# The standard error of n independent samples of 5/15 W is 5 W/√n, 0.5/√n of the mean. At a period equal to the
# interval successive phases correlate by sin(0.6π)/(0.6π) = 0.50, which makes n samples worth about n/3, and for
# a period of half the interval by 0.16. With n = 10⁵ the standard error is at most 0.5 √(3/10⁵) = 0.27 % of the
# mean, so that 1 % is 3.6 of them. Periods that are long against the interval are far better.
@pytest.mark.parametrize("period", [0.05, 0.07, 0.1, 0.13, 0.2, 0.5, 3.0])
def test_square_wave_with_jittered_sampling(period: float) -> None:
    seconds = 3.0 * round(10_000 / 3 / period) * period
    times = jittered(seconds, seed=3)
    found = integrate(times, square(period)(times), 0, seconds, **KEYWORDS)
    assert found.joules == pytest.approx(10 * seconds, rel=0.01)
    assert found.peak_w == 15


@pytest.mark.parametrize("period", [0.05, 0.1])
def test_fixed_interval_aliases_where_the_jittered_one_does_not(period: float) -> None:
    """Samples in step with the load find it always on or always off: 50 % wrong."""
    times = np.arange(-0.08, 1000.2, 0.1)
    found = integrate(times, square(period)(times), 0, 1000, **KEYWORDS)
    assert found.mean_w == pytest.approx(15, rel=0.01) or found.mean_w == pytest.approx(5, rel=0.01)


def test_jitter_around_a_fixed_grid_would_not_do() -> None:
    """The phase must wander: ±30 % around a grid in step with the load leaves a bias of more than 10 %."""
    grid = np.arange(0.025, 10_000, 0.1)
    times = grid + 0.03 * np.random.default_rng(0).uniform(-1, 1, grid.size)
    found = integrate(times, square(0.1)(times), 1, 9_999, **KEYWORDS)
    assert found.mean_w is not None
    assert abs(found.mean_w - 10) > 1


def test_noise_averages_out() -> None:
    """5 W of noise on 10 W, n = 10⁵: the standard error is 0.16 %, with the trapezoid's weights as well."""
    times = jittered(10_000)
    power = 10 + np.random.default_rng(4).normal(0, 5, times.size)
    assert integrate(times, power, 0, 10_000, **KEYWORDS).joules == pytest.approx(100_000, rel=0.01)


def test_a_burst_between_idles_needs_its_own_samples_at_the_edges() -> None:
    """15 W from start to end, 5 W around: held edges are exact, interpolated ones lose h/6 · 10 W at each."""
    lost = []
    for seed in range(300):
        times = jittered(4, seed)
        power = np.where((times >= 1) & (times <= 3), 15.0, 5.0)
        assert integrate(times, power, 1, 3, **KEYWORDS, edges="hold").joules == pytest.approx(30)
        between = integrate(times, power, 1, 3, **KEYWORDS).joules
        assert between is not None
        lost.append(30 - between)
    assert np.mean(lost) == pytest.approx(2 * 0.1 / 6 * 10, rel=0.1)  # 0.33 J of 30 J: more than 1 %


def test_a_window_between_two_samples_has_none_to_hold() -> None:
    keywords = {"max_gap_s": 1.0, "min_samples": 0}
    assert integrate([0, 0.1], [5, 5], 0.02, 0.06, **keywords).joules == pytest.approx(0.2)
    found = integrate([0, 0.1], [5, 5], 0.02, 0.06, **keywords, edges="hold")
    assert (found.joules, found.reason) == (None, "too short: 0 samples in it, at least 1 are needed")


# Gaps and bounds


def test_gap_below_the_bound_is_bridged_and_one_above_is_not() -> None:
    times = np.array([0, 0.1, 0.2, 1.1, 1.2, 1.3])
    assert integrate(times, np.full(6, 4.0), 0, 1.3, max_gap_s=1.0, min_samples=2).joules == pytest.approx(5.2)
    found = integrate(times, np.full(6, 4.0), 0, 1.3, max_gap_s=0.8, min_samples=2)
    assert (found.joules, found.mean_w, found.peak_w) == (None, None, None)
    assert found.largest_gap_s == pytest.approx(0.9)
    assert "0.9 s without a sample" in found.reason


def test_a_gap_across_the_edge_holds_the_sample_within() -> None:
    """The sample before the start is 5 s old: the first one within counts from the start."""
    times, power = [-5, 0.1, 0.2, 0.3, 0.4], [1.0, 10.0, 10.0, 10.0, 10.0]
    found = integrate(times, power, 0, 0.4, max_gap_s=0.5, min_samples=2)
    assert found.joules == pytest.approx(4)
    assert found.largest_gap_s == pytest.approx(0.1)
    assert integrate([-5, 5], [1, 1], 0, 0.1, max_gap_s=0.5, min_samples=0).joules is None


@pytest.mark.parametrize(("start", "end"), [(-0.4, 1.0), (0.0, 1.4)])
def test_no_sample_beyond_the_edge(start: float, end: float) -> None:
    times = np.linspace(0, 1, 11)
    assert integrate(times, times * 0 + 3, start, end, max_gap_s=0.5, min_samples=2).joules == pytest.approx(4.2)
    assert integrate(times, times * 0 + 3, start, end, max_gap_s=0.3, min_samples=2).joules is None


def test_unread_values_are_a_gap_and_never_0() -> None:
    times = [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    power = [6.0, 6.0, None, math.nan, 6.0, 6.0]
    found = integrate(times, power, 0, 0.5, max_gap_s=0.31, min_samples=4)
    assert (found.joules, found.samples) == (pytest.approx(3), 4)
    assert found.largest_gap_s == pytest.approx(0.3)
    assert integrate(times, power, 0, 0.5, max_gap_s=0.29, min_samples=4).joules is None


def test_too_few_samples() -> None:
    found = integrate([0, 0.5, 1], [1, 1, 1], 0, 1, max_gap_s=1, min_samples=4)
    assert found.joules is None
    assert found.reason == "too short: 3 samples in it, at least 4 are needed"


@pytest.mark.parametrize("values", [[], [None, None], [math.nan, math.inf]])
@pytest.mark.parametrize("edges", ["interpolate", "hold"])
def test_nothing_read(values: list[float | None], edges: Edges) -> None:
    found = integrate(list(range(len(values))), values, 0, 1, max_gap_s=9, min_samples=0, edges=edges)
    assert found == Integral(None, None, None, 0, None, "no sample of power", 1.0)
    assert counter(list(range(len(values))), values, None, 0, 1, max_gap_s=9).reason


def test_one_sample() -> None:
    assert integrate([0.5], [8], 0, 1, max_gap_s=1, min_samples=1).joules == pytest.approx(8)
    assert integrate([0.5], [8], 0, 1, max_gap_s=0.4, min_samples=1).joules is None
    assert (
        counter([0.5], [8], None, 0, 1, max_gap_s=1).reason == "no read of the counter before the start of the window"
    )


def test_unsorted_and_equal_times() -> None:
    times, power = np.array([0, 0.1, 0.2, 0.3, 0.3, 0.4]), np.array([1, 2, 3, 4, 8, 9.0])
    order = [5, 0, 3, 2, 4, 1]  # 4 W before 8 W, as they came
    sorted_, mixed = (integrate(t, p, 0, 0.4, **KEYWORDS) for t, p in ((times, power), (times[order], power[order])))
    assert sorted_ == mixed
    assert sorted_.joules == pytest.approx(0.15 + 0.25 + 0.35 + 0.85)
    many, steps = np.repeat(np.arange(20) / 10, 2), np.tile([1.0, 3.0], 20)  # each time a step from 1 W to 3 W
    backwards = np.arange(40).reshape(20, 2)[::-1].ravel()
    for rows in ((many, steps), (many[backwards], steps[backwards])):  # between the steps a fall from 3 W to 1 W
        assert integrate(*rows, 0.05, 1.85, **KEYWORDS).joules == pytest.approx(3.6)
        assert integrate(*rows, 0.1, 0.15, max_gap_s=1, min_samples=0).joules == pytest.approx(0.125)
    left, right = (integrate(times, power, *span, **KEYWORDS).joules for span in ((0, 0.3), (0.3, 0.4)))
    assert (left, right) == (pytest.approx(0.75), pytest.approx(0.85))


def test_no_window() -> None:
    assert integrate([0, 1], [1, 1], 0.5, 0.5, max_gap_s=1, min_samples=0).reason == "the window has no length"
    for start, end in ((1, 0), (0, math.nan), (-math.inf, 0)):
        with pytest.raises(InputError, match="end after start"):
            integrate([0, 1], [1, 1], start, end, max_gap_s=1, min_samples=0)
    with pytest.raises(InputError, match="one value for each time"):
        integrate([0, 1], [1], 0, 1, max_gap_s=1, min_samples=0)


# Properties

series = st.lists(
    st.tuples(st.integers(1, 150), st.one_of(st.none(), *[st.floats(0, 60, allow_subnormal=False)] * 3)),
    min_size=3,
    max_size=30,
).map(lambda rows: (np.cumsum([step for step, _ in rows]) / 1000, [watts for _, watts in rows]))
moments = st.lists(st.integers(-100, 2000), min_size=3, max_size=3, unique=True).map(
    lambda xs: sorted(x / 1000 for x in xs)
)


@settings(max_examples=300, deadline=None)
@given(series, moments)
def test_adjacent_windows_add_up(rows: tuple[Array, list[float | None]], edges: list[float]) -> None:
    a, b, c = edges
    first, second, whole = (integrate(*rows, *span, max_gap_s=0.9, min_samples=0) for span in ((a, b), (b, c), (a, c)))
    if first.joules is None or second.joules is None or whole.joules is None:
        return  # a gap, or nothing near
    assert over([first, second]).joules == pytest.approx(whole.joules, rel=1e-9, abs=1e-9)
    assert max(first.peak_w, second.peak_w) == pytest.approx(whole.peak_w)


@settings(max_examples=150, deadline=None)
@given(series, moments, st.sampled_from(["interpolate", "hold"]), st.integers(-4096, 4096), st.floats(0.1, 10))
def test_shift_in_time_changes_nothing_and_power_scales(
    rows: tuple[Array, list[float | None]], edges: list[float], mode: Edges, shift: int, scale: float
) -> None:
    times, watts = np.round(rows[0] * 1024) / 1024, rows[1]  # binary fractions: sums with whole numbers are exact
    start, end = (round(edge * 1024) / 1024 for edge in (edges[0], edges[2]))
    keywords = {"max_gap_s": 0.4, "min_samples": 1, "edges": mode}
    here = integrate(times, watts, start, end, **keywords)
    there = integrate(times + shift, watts, start + shift, end + shift, **keywords)
    more = integrate(times, [None if w is None else w * scale for w in watts], start, end, **keywords)
    for other, factor in ((there, 1), (more, scale)):
        assert (other.samples, other.largest_gap_s, other.reason) == (here.samples, here.largest_gap_s, here.reason)
        if here.joules is not None:
            assert other.joules == pytest.approx(here.joules * factor, rel=1e-9, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(series, moments, st.sampled_from(["interpolate", "hold"]))
def test_unknown_has_a_reason_and_known_lies_between_the_extremes(
    rows: tuple[Array, list[float | None]], edges: list[float], mode: Edges
) -> None:
    times, watts = rows
    start, _, end = edges
    found = integrate(times, watts, start, end, max_gap_s=0.4, min_samples=2, edges=mode)
    assert (found.joules is None) == bool(found.reason)
    read = [w for w in watts if w is not None]
    if found.joules is None:
        assert (found.mean_w, found.peak_w) == (None, None)
    else:
        assert min(read) - 1e-9 <= found.mean_w <= found.peak_w + 1e-9 <= max(read) + 2e-9
        without = [(t, w) for t, w in zip(times, watts, strict=True) if w is not None]
        assert integrate(*zip(*without, strict=True), start, end, max_gap_s=0.4, min_samples=2, edges=mode) == found


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(1, 1.9), st.floats(2, 3), st.floats(0, 0.999))
def test_counter_windows_add_up(a: float, b: float, c: float, level: float) -> None:
    times = jittered(3.5)
    counts = (50 * level + 20 * times + np.sin(5 * times)) % 50
    parts = [counter(times, counts, 50, *span, max_gap_s=1, max_w=100) for span in ((a, b), (b, c), (a, c))]
    assume(all(part.joules is not None for part in parts))
    assert over(parts[:2]).joules == pytest.approx(parts[2].joules, rel=1e-9)
    assert parts[2].joules == pytest.approx(20 * (c - a) + math.sin(5 * c) - math.sin(5 * a), rel=0.01, abs=0.02)


# Counters


@pytest.mark.parametrize(("wrap", "start_j"), [(RAPL_WRAP_J, RAPL_WRAP_J - 25), (7.5, 0.0), (7.5, 7.4), (None, 1e9)])
def test_counter_with_wraps(wrap: float | None, start_j: float) -> None:
    """40 W for 10 s: none, one or 53 wraps, none of which may lose a joule. Reads are exact, edges between them."""
    times = jittered(10)
    counts = start_j + 40 * (times - times[0])
    found = counter(times, counts if wrap is None else counts % wrap, wrap, 0.02, 9.91, max_gap_s=0.5, max_w=50)
    assert found.joules == pytest.approx(40 * 9.89, rel=1e-6)
    assert found.mean_w == pytest.approx(40, rel=1e-6)
    assert (found.peak_w, found.reason) == (None, "")


def test_counter_with_steps() -> None:
    """A counter that is updated every 0.1 s: two edges are each off by at most a step, 4 J of 800 J."""
    times = jittered(20)
    counts = 40 * np.floor(times / 0.1) * 0.1
    assert counter(times, counts, None, 0.02, 19.95, max_gap_s=0.5).joules == pytest.approx(40 * 19.93, rel=0.01)


def test_counter_that_did_not_move_is_unknown_and_not_0() -> None:
    found = counter([0, 0.1, 0.2], [5, 5, 5], None, 0, 0.2, max_gap_s=1)
    assert (found.joules, found.reason) == (None, "too short: 0 samples in it, at least 1 are needed")


def test_counter_reset() -> None:
    times = np.linspace(0, 1, 11)
    counts = np.where(times < 0.45, 9000 + 10 * times, 10 * times)
    for wrap in (None, RAPL_WRAP_J):  # a wrap would mean 253 kJ in 0.1 s
        found = counter(times, counts, wrap, 0, 1, max_gap_s=1)
        assert (found.joules, found.reason) == (None, "the counter was reset within the window")
        assert counter(times, counts, wrap, 0.5, 1, max_gap_s=1).joules == pytest.approx(5)
    assert counter([0, 0.1, 0.2], [5, 1e7, 1e7 + 1], None, 0, 0.2, max_gap_s=1).joules is None


def test_one_wrap_or_several() -> None:
    """In 140 s at up to 2 kW RAPL may have wrapped twice, in 100 s it cannot have."""
    for seconds, known in ((100, True), (140, False)):
        found = counter([0, 1, seconds, seconds + 1], [0, 10, 20, 30], RAPL_WRAP_J, 0, seconds + 1, max_gap_s=1)
        assert (found.joules is not None) is known
        assert known or "more than once" in found.reason


def test_a_gap_between_reads_costs_a_counter_nothing_but_one_at_the_edge_does() -> None:
    times, counts = [0, 0.1, 5, 5.1], [0, 1, 50, 51]
    found = counter(times, counts, None, 0, 5.1, max_gap_s=1)
    assert (found.joules, found.largest_gap_s) == (51, pytest.approx(4.9))
    assert "4.9 s without a sample" in counter(times, counts, None, 2, 5.1, max_gap_s=1).reason
    assert "after the end" in counter(times, counts, None, 0, 5.2, max_gap_s=1).reason
    assert "before the start" in counter(times, counts, None, -0.1, 5, max_gap_s=1).reason


# Sums


def test_several_windows() -> None:
    a, b = Integral(4, 2, 5, 6, 0.1, "", 2), Integral(6, 6, 3, 3, 0.2, "", 1)
    assert over([a, b], min_samples=9) == Integral(10, pytest.approx(10 / 3), 5, 9, 0.2, "", 3)
    assert over([a, b], min_samples=10).reason == "too short: 9 samples in it, at least 10 are needed"
    unknown = Integral(None, None, None, 0, None, "why", 1)
    assert over([a, unknown]) == Integral(None, None, None, 6, 0.1, "why", 3)
    assert over([]).reason
    assert over([]).joules is None


def test_several_rails() -> None:
    a, b = Integral(4, 2, 5, 6, 0.1, "", 2), Integral(6, 3, 3, 5, 0.2, "", 2)
    assert together([a]) == a
    assert together([a, b]) == Integral(10, 5, None, 5, 0.2, "", 2)
    assert together([a, Integral(None, None, None, 0, None, "why", 2)]).reason == "why"
    assert together([]).joules is None
    assert together([]).reason
