"""What samples say: their median with its interval, drift, and the ratio of two series with a verdict.

A series is a list of runs, each a list of samples. Samples of one run share its luck (clocks, memory
layout, neighbours), so a run counts once, by its median, and intervals are Student's t over the runs'
medians, of logarithms where all are positive. The usual percentile bootstrap over runs covers far too
little here: about 75 % instead of 95 % with three runs. What is estimated is the median of a run,
averaged over the runs that there could be under the same conditions; one run alone speaks only of itself.

Knows nothing of what was measured, or of reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import BackendUnavailable, InputError, message
from edge_sdss.profiling.schema import Summary

Runs = Sequence[Sequence[float]]
Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "inconclusive"]
FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
ALPHA = 0.02  # chance of a wrong verdict: at 0.05, five of 100 comparisons of equals would be the mean, not the most
MIN_DIFFERENCE = 0.01  # smaller differences are never called: memory layout alone makes as much
FEW_RUNS = 10  # from here on ranks of the runs' medians serve, without a model of how they scatter
DRIFT_SAMPLES_P, DRIFT_RUNS_P = 0.01, 0.05
_MOST_POINTS = 500


@dataclass(frozen=True, slots=True)
class Ratio:
    """b / a, its 95 % interval, and p of the hypothesis that they differ by at most MIN_DIFFERENCE.

    lo, hi and p are None where the runs are too few. n_a and n_b count runs, or pairs of blocks.
    """

    ratio: float
    lo: float | None
    hi: float | None
    p: float | None
    n_a: int
    n_b: int


def summary(runs: Runs, unit: str, better: Better) -> Summary:
    """Returns the figures of `runs`, which are in the order of measuring; runs may differ in length.

    Median, quantiles, spread and CV are over all samples. The interval is `interval`'s, widened to the
    median over all samples where that lies outside. Raises InputError where there is no sample, or one
    is not finite, and BackendUnavailable without scipy.
    """
    series = _checked(runs)
    data = np.concatenate(series)
    median = float(np.median(data))
    bounds = interval(series)
    lo, hi = (min(bounds[0], median), max(bounds[1], median)) if bounds else (None, None)
    first, third, p95, p99 = np.quantile(data, [0.25, 0.75, 0.95, 0.99])
    mean = float(data.mean())
    return Summary(
        unit=unit,
        better=better,
        n=data.size,
        runs=len(series),
        median=median,
        lo=lo,
        hi=hi,
        p95=float(p95) if data.size >= 20 else None,
        p99=float(p99) if data.size >= 100 else None,
        iqr=max(0.0, float(third - first)),
        cv=float(data.std(ddof=1)) / abs(mean) if data.size > 1 and mean else None,
        drift=drift(series),
    )


def interval(runs: Runs | Sequence[FloatArray]) -> tuple[float, float] | None:
    """Returns the 95 % interval of the median of a run, or None for one run of fewer than 5 samples.

    One run: order statistics of its samples, which are taken to be independent (5 give 93.75 %). Up to 9
    runs: t over the runs' medians. More: order statistics of these. Seen to cover 93-97 % for normal,
    lognormal and exponential samples and a spread between runs from 0 to twice that within.
    """
    series = _checked(runs)
    if len(series) == 1:
        return order_interval(series[0]) if series[0].size >= 5 else None
    medians = _medians(series)
    if medians.size >= FEW_RUNS:
        return order_interval(medians)
    positive = bool((medians > 0).all())
    values = np.log(medians) if positive else medians
    half = _t_quantile(values.size - 1) * float(values.std(ddof=1)) / np.sqrt(values.size)
    lo, hi = float(values.mean()) - half, float(values.mean()) + half
    return (float(np.exp(lo)), float(np.exp(hi))) if positive else (lo, hi)


def order_interval(values: Sequence[float] | FloatArray) -> tuple[float, float]:
    """Returns the 95 % interval of the median of independent `values` [n], whatever their distribution.

    Interpolates between two neighbouring order statistics (Hettmansperger and Sheather, 1986). Below
    six values the interval is their range, which covers less.
    """
    special = _special()
    data = np.sort(np.asarray(values, np.float64))
    depths = np.arange(1, data.size // 2 + 1)
    cover = 1 - 2 * special.bdtr(depths - 1, data.size, 0.5)
    enough = int((cover >= CONFIDENCE).sum())
    if enough == 0:
        return float(data[0]), float(data[-1])
    wide, narrow = cover[enough - 1], cover[enough]
    share = (wide - CONFIDENCE) / (wide - narrow)
    share = (data.size - enough) * share / (enough + (data.size - 2 * enough) * share)
    lo = (1 - share) * data[enough - 1] + share * data[enough]
    hi = (1 - share) * data[-enough] + share * data[-enough - 1]
    return float(lo), float(hi)


def drift(runs: Runs | Sequence[FloatArray]) -> float | None:
    """Returns the change over the whole series as a share of its median, or None where none is significant.

    Two tests have to agree: Mann and Kendall's over all samples, with fewer effective samples where
    neighbours resemble each other, and that of a slope over the runs' medians, so that chance
    differences between runs are no trend. One run is tested alone; two never show a drift. The change
    is Theil and Sen's slope times the length.
    """
    series = _checked(runs)
    data = np.concatenate(series)
    median = float(np.median(data))
    if len(series) == 2 or data.size < 5 or median == 0 or np.ptp(data) == 0:
        return None
    if len(series) > 2 and _slope_p(_medians(series)) >= DRIFT_RUNS_P:
        return None
    stats, values = _scipy("stats"), _thinned(data)
    n = values.size
    change = float(stats.theilslopes(values).slope) * (n - 1)
    likeness = max(0.0, _neighbours(values - change * np.linspace(0, 1, n)))
    z = float(stats.kendalltau(np.arange(n), values).statistic) * 3 * np.sqrt(n * (n - 1) / (4 * n + 10))
    z *= np.sqrt((1 - likeness) / (1 + likeness))
    return change / median if 2 * _special().ndtr(-abs(z)) < DRIFT_SAMPLES_P else None


def ratio(a: Runs, b: Runs) -> Ratio:
    """Returns the ratio b / a of the runs' medians, by Welch's t over their logarithms.

    Its value is that of the geometric means of the runs' medians, so it may differ a little from the
    ratio of the medians over all samples. One run on a side gives no interval: how much runs differ is
    unknown then. Raises InputError where a run's median is not positive.
    """
    first, second = _logs(_medians(_checked(a))), _logs(_medians(_checked(b)))
    change = float(second.mean() - first.mean())
    if min(first.size, second.size) < 2:
        return Ratio(float(np.exp(change)), None, None, None, first.size, second.size)
    squares = [float(side.var(ddof=1)) / side.size for side in (first, second)]
    return _welch(change, squares, [first.size, second.size])


def ratio_of_intervals(
    a: tuple[float, float | None, float | None], b: tuple[float, float | None, float | None], n_a: int, n_b: int
) -> Ratio:
    """Returns the ratio b / a of two figures of which only value, lo and hi and the number of runs are known.

    The intervals are read as those of t with n - 1 degrees of freedom. Raises InputError for a value
    that is not positive.
    """
    first, second = _logs(np.array([a[0]])), _logs(np.array([b[0]]))
    change, squares = float(second[0] - first[0]), []
    for (_, lo, hi), n in ((a, n_a), (b, n_b)):
        if lo is None or hi is None or lo <= 0 or n < 2:
            return Ratio(float(np.exp(change)), None, None, None, n_a, n_b)
        squares.append((float(np.log(hi / lo)) / 2 / _t_quantile(n - 1)) ** 2)
    return _welch(change, squares, [n_a, n_b])


def paired_ratio(a_blocks: Sequence[float], b_blocks: Sequence[float]) -> Ratio:
    """Returns the ratio b / a of blocks measured next to each other: a_blocks[i] with b_blocks[i], [n] each.

    Hodges and Lehmann's median of the pairs' log ratios with Wilcoxon's signed-rank interval: slow drift
    of the machine cancels within pairs, a disturbed block counts for little, and with a random order of
    equals the level holds exactly, whatever the noise. Below 6 pairs there is no interval; a verdict
    takes at least 7. Raises InputError where lengths differ, there is no block or one is not positive.
    """
    if len(a_blocks) != len(b_blocks) or not len(a_blocks):
        found = f"{len(a_blocks)} and {len(b_blocks)} blocks"
        raise InputError(message("compare blocks by pairs", found, "measure as many of each"))
    changes = _logs(np.asarray(b_blocks, np.float64)) - _logs(np.asarray(a_blocks, np.float64))
    n = changes.size
    i, j = np.triu_indices(n)
    walsh = np.sort((changes[i] + changes[j]) / 2)
    centre = float(np.median(walsh))
    if n < 6:
        return Ratio(float(np.exp(centre)), None, None, None, n, n)
    below = _signed_rank(n)  # below[k]: chance that at most k of the averages are on one side of the truth
    rank = int((2 * below <= 1 - CONFIDENCE).sum())
    limit = float(np.log1p(MIN_DIFFERENCE))
    against = int((walsh <= limit).sum() if centre > 0 else (walsh >= -limit).sum())
    lo, hi = np.exp(walsh[[rank - 1, -rank]])
    return Ratio(float(np.exp(centre)), float(lo), float(hi), min(1.0, 2 * float(below[against])), n, n)


def verdict(found: Ratio, better: Better, p: float | None = None) -> Verdict:
    """Returns what b is against a: called where p, by default the ratio's own, is below ALPHA.

    Equals are called different in at most 2 of 100 comparisons, and in fewer the less noise there is.
    """
    p = found.p if p is None else p
    if p is None or p >= ALPHA:
        return "inconclusive"
    return "worse" if (found.ratio > 1) == (better == "lower") else "better"


def holm(ps: Sequence[float]) -> list[float]:
    """Returns the values of p adjusted for their number (Holm, 1979), in the same order."""
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = worst
    return adjusted


def _checked(runs: Runs | Sequence[FloatArray]) -> list[FloatArray]:
    series = [np.asarray(run, np.float64) for run in runs]
    series = [run for run in series if run.size]
    if not series or any(run.ndim != 1 for run in series) or not np.isfinite(np.concatenate(series)).all():
        raise InputError(message("summarise samples", "none, or some that are not finite", "give lists of numbers"))
    return series


def _medians(series: Sequence[FloatArray]) -> FloatArray:
    if len({run.size for run in series}) == 1:
        return np.asarray(np.median(np.stack(series), axis=1), np.float64)  # ten times as fast as one by one
    return np.array([np.median(run) for run in series], np.float64)


def _logs(values: FloatArray) -> FloatArray:
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise InputError(message("take a ratio", "figures that are not positive", "compare times, rates or energies"))
    logs: FloatArray = np.log(values)
    return logs


def _welch(change: float, squares: Sequence[float], sizes: Sequence[int]) -> Ratio:
    error = float(np.sqrt(sum(squares)))
    beyond = abs(change) - float(np.log1p(MIN_DIFFERENCE))
    if error == 0:
        value = float(np.exp(change))
        return Ratio(value, value, value, 0.0 if beyond > 0 else 1.0, *sizes)
    freedom = error**4 / sum(square**2 / (size - 1) for square, size in zip(squares, sizes, strict=True))
    half = _t_quantile(freedom) * error
    p = min(1.0, 2 * float(_special().stdtr(freedom, -beyond / error)))
    lo, value, hi = np.exp([change - half, change, change + half])
    return Ratio(float(value), float(lo), float(hi), p, *sizes)


def _signed_rank(n: int) -> FloatArray:
    chance = np.ones(1)
    for rank in range(1, n + 1):
        chance = (np.append(chance, np.zeros(rank)) + np.append(np.zeros(rank), chance)) / 2
    total: FloatArray = np.cumsum(chance)
    return total


def _slope_p(values: FloatArray) -> float:
    return float(_scipy("stats").linregress(np.arange(values.size), values).pvalue) if np.ptp(values) else 1.0


def _thinned(data: FloatArray) -> FloatArray:
    """At most 500 points: the slope takes all pairs."""
    if data.size <= _MOST_POINTS:
        return data
    return _medians(np.array_split(data, _MOST_POINTS))


def _neighbours(values: FloatArray) -> float:
    """Correlation of the ranks of neighbours."""
    ranks = np.argsort(np.argsort(values)).astype(np.float64)
    ranks -= ranks.mean()
    return float(ranks[1:] @ ranks[:-1] / (ranks @ ranks))


def _t_quantile(freedom: float) -> float:
    return float(_special().stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _special() -> Any:
    return _scipy("special")


def _scipy(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        found = "scipy is not installed"
        raise BackendUnavailable(message("compute an interval", found, "pip install scipy")) from error
