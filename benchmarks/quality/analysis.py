"""What the results say: differences from the baseline with intervals, and which of them are more than luck.

Two things vary: the run (stream and seeds) and the held-out item. Both are resampled, in pairs with the baseline's
same run and same item. Knows nothing of files or drawings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from quality.protocol import FULL, NONE

Line = Mapping[str, Any]
Values = npt.NDArray[np.float64]
Metric = str
LOWER_IS_BETTER = {"nll": True, "rouge1": False}

_RESAMPLES = 2000
_BATCH = 500


@dataclass(frozen=True)
class Contrast:
    """policy - baseline: the mean, its 95 % interval, the two-sided p, over `runs` pairs of runs and `items` items."""

    mean: float
    lo: float
    hi: float
    p: float
    runs: int
    items: int


def run_of(line: Line) -> tuple[str, int]:
    """What two policies have in common where they saw the same stream with the same seed."""
    return line["cell"]["order"], line["cell"]["seed"]


def differences(ours: Sequence[Line], base: Sequence[Line], metric: Metric) -> Values | None:
    """policy - baseline, [runs, items], for the runs that both have; None without one.

    The base model and the whole stream have no order: they are held against each of the baseline's runs. Raises
    ValueError where the held-out items are not the same.
    """
    by_run = {run_of(line): line for line in ours}
    rows = []
    for other in base:
        fixed = ours and ours[0]["cell"]["policy"] in (NONE, FULL)
        own = ours[0] if fixed else by_run.get(run_of(other))
        if own is None:
            continue
        if own["items"] != other["items"]:
            raise ValueError(f"{own['cell']} and {other['cell']} were measured on other items")
        rows.append(np.subtract(own[metric], other[metric]))
    return np.array(rows) if rows else None


def contrast(tables: Sequence[Values], seed: int = 0) -> Contrast:
    """The mean difference over some sets, each [runs, items], every set counting the same.

    Runs and items are drawn with replacement, each on its own (the pigeonhole bootstrap, Owen 2007), which gives the
    standard error. Six runs say little of how much runs differ: interval and p are Student's, with Satterthwaite's
    degrees of freedom. A single run says nothing of other runs: its interval is of items alone.
    """
    from scipy.stats import t

    draws = np.random.default_rng(seed)
    mean = float(np.mean([table.mean() for table in tables]))
    error = math.sqrt(sum(_variance(table, draws) for table in tables)) / len(tables)
    runs, items = min(len(table) for table in tables), sum(table.shape[1] for table in tables)
    if error == 0:
        return Contrast(mean, mean, mean, 1.0 if mean == 0 else 0.0, runs, items)
    freedom = _freedom(tables)
    half = float(t.ppf(0.975, freedom)) * error
    return Contrast(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, freedom)), runs, items)


def _variance(table: Values, draws: np.random.Generator) -> float:
    """Of the mean, by resampling; a resample of n runs varies by (n - 1) / n too little, which is made good."""
    runs, items = table.shape
    found = []
    for start in range(0, _RESAMPLES, _BATCH):
        count = min(_BATCH, _RESAMPLES - start)
        by_run = draws.multinomial(runs, np.full(runs, 1 / runs), size=count) / runs
        by_item = draws.multinomial(items, np.full(items, 1 / items), size=count) / items
        found.append(((by_run @ table) * by_item).sum(axis=1))
    return float(np.concatenate(found).var()) * (runs / (runs - 1) if runs > 1 else 1.0)


def _freedom(tables: Sequence[Values]) -> float:
    """Satterthwaite's degrees of freedom of the sum of what runs and what items contribute to the variance."""
    parts = [(table.mean(axis=1 - axis), n) for table in tables for axis, n in enumerate(table.shape) if n > 1]
    shares = [(float(means.var(ddof=1)) / n, n - 1) for means, n in parts]
    total = sum(share for share, _ in shares)
    return total**2 / sum(share**2 / n for share, n in shares) if total else 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Each p adjusted for all of them (Holm, 1979), in the order given."""
    order = np.argsort(ps)
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def verdict(found: Contrast, adjusted: float, metric: Metric) -> str:
    """better, worse or tie. A tie is what is not shown to be different; of a single run nothing is said."""
    if found.runs < 2:
        return "one run"
    if adjusted >= 0.05:
        return "tie"
    return "better" if (found.mean < 0) == LOWER_IS_BETTER[metric] else "worse"


def grouped(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """The lines by a key, in the order in which each key first comes."""
    found: dict[Any, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def mean(lines: Sequence[Line], metric: Metric) -> float:
    """The mean over runs of the mean over items."""
    return float(np.mean([np.mean(line[metric]) for line in lines]))
