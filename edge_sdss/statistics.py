"""Intervals of means over items. Knows nothing of what the items are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import InputError, message
from edge_sdss.types import FloatArray, Interval

Values = Sequence[float] | FloatArray

_RESAMPLES = 4999


def paired_interval(before: Values, after: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Returns the mean of after - before over paired items, with its bootstrap interval.

    Items are resampled, so the interval speaks of other items of the same kind. See `mean_interval`.
    Raises InputError where the lengths differ or there is no item.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape:
        found = f"{first.size} before and {second.size} after"
        raise InputError(message("compare paired items", found, "measure the same items twice"))
    return mean_interval(second - first, seed=seed, confidence=confidence)


def mean_interval(values: Values, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Returns the mean of `values` [n] with its bootstrap interval.

    The method is BCa (Efron, 1987), or the plain percentile one where BCa is not defined (too few
    distinct values). Equal values, and a single one, give an interval of no width: read it with `n`. A
    value that is not finite gives NaN throughout.
    Raises InputError where there is no value.
    """
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or data.size == 0:
        raise InputError(message("take a mean", f"values of shape {data.shape}", "give a list of at least one"))
    if not np.isfinite(data).all():
        return Interval(np.nan, np.nan, np.nan, data.size)
    mean = float(data.mean())
    if np.ptp(data) == 0:
        return Interval(mean, mean, mean, data.size)
    lo, hi = _bootstrap(data, seed, confidence)
    return Interval(mean, lo, hi, data.size)


def _bootstrap(data: npt.NDArray[np.float64], seed: int, confidence: float) -> tuple[float, float]:
    import warnings

    from scipy.stats import bootstrap

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns, and returns NaN, where BCa is degenerate
            found = bootstrap(
                (data,),
                np.mean,
                n_resamples=_RESAMPLES,
                confidence_level=confidence,
                method=method,
                batch=max(1, 2_000_000 // data.size),
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return float(found.low), float(found.high)
