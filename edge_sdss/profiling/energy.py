"""Energy over a window of time, from samples of power or reads of an energy counter.

Pure functions on arrays. Knows nothing of sensors, threads or reports. What cannot be known is None, and
a reason says why; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import InputError, message
from edge_sdss.types import FloatArray

Values = Sequence[float | None] | FloatArray
"""[n]; None and NaN are values that could not be read."""

Edges = Literal["interpolate", "hold"]
"""What the power is between an edge of a window and the first, or last, sample in it."""

_Array = npt.NDArray[np.float64]

MAX_W = 2000.0
"""No counter here counts more than so many W: it tells one wrap from a reset, and from several wraps."""

_STEP_S = 1.0  # counters are updated at least so often; between two close reads one may jump by a whole update


@dataclass(frozen=True)
class Integral:
    """The energy of a window of `seconds`. `joules`, `mean_w` and `peak_w` are None together with a reason.

    `peak_w` is None for a counter in any case. `samples` are the samples within the window, of a counter the
    reads at which it had moved. `largest_gap_s` is the longest time between two samples that count.
    """

    joules: float | None
    mean_w: float | None
    peak_w: float | None
    samples: int
    largest_gap_s: float | None
    reason: str = ""
    seconds: float = 0.0


def integrate(
    times_s: Values,
    watts: Values,
    start_s: float,
    end_s: float,
    *,
    max_gap_s: float,
    min_samples: int,
    edges: Edges = "interpolate",
) -> Integral:
    """Returns the trapezoid over [start_s, end_s], with linear interpolation at its edges.

    Values that could not be read are left out, and the gap that they leave counts. At an edge without a
    sample on its other side, or with one further than `max_gap_s`, the nearest sample in the window holds.
    With `edges="hold"` it always does, and a window needs a sample of its own: right where the load changes
    at the edges, as it does where a program starts and ends something. Interpolation would smear that step
    and lose, on average, a sixth of the interval times the step at each edge.
    The order of the samples does not matter; of several at one time the last one goes on.
    Raises InputError where the lengths differ or the window is no window.
    """
    seconds = _seconds(start_s, end_s)
    times, power = _clean(times_s, watts)
    inside = int(np.count_nonzero((times >= start_s) & (times <= end_s)))
    first, last = _around(times, start_s, end_s)
    times, power = times[first:last], power[first:last]
    if inside:  # what lies too far off is no neighbour
        near_s = -1.0 if edges == "hold" else max_gap_s
        far_before = times[0] < start_s and times[1] - times[0] > near_s
        far_after = times[-1] > end_s and times[-1] - times[-2] > near_s
        keep = slice(int(far_before), times.size - int(far_after))
        times, power = times[keep], power[keep]
    if not times.size:
        return Integral(None, None, None, 0, None, "no sample of power", seconds)
    gap = float(np.diff(times, prepend=min(start_s, times[0]), append=max(end_s, times[-1])).max())
    least = max(1, min_samples) if edges == "hold" else min_samples
    if reason := _doubt(seconds, inside, least, gap, max_gap_s):
        return Integral(None, None, None, inside, gap, reason, seconds)
    within = (times > start_s) & (times < end_s)
    ends = np.interp([start_s, end_s], times, power)  # holds the nearest beyond the first and the last
    x = np.concatenate([[start_s], times[within], [end_s]])
    y = np.concatenate([ends[:1], power[within], ends[1:]])
    joules = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
    return Integral(joules, joules / seconds, float(y.max()), inside, gap, "", seconds)


def counter(
    times_s: Values,
    joules: Values,
    wraps_at_j: float | None,
    start_s: float,
    end_s: float,
    *,
    max_gap_s: float,
    min_samples: int = 1,
    max_w: float = MAX_W,
) -> Integral:
    """Returns what an energy counter counted in [start_s, end_s], linearly interpolated at its edges.

    A counter needs a read at or before the start and one at or after the end, at most `max_gap_s` from the
    next; gaps between them lose nothing. It must have moved at `min_samples` reads, or the window is shorter
    than its steps. One that falls has wrapped if that means at most `max_w`; else it was reset and the
    energy is unknown, as it is where so much time went by that it may have wrapped more than once.
    Raises InputError where the lengths differ or the window is no window.
    """
    seconds = _seconds(start_s, end_s)
    times, counts = _clean(times_s, joules)
    first, last = _around(times, start_s, end_s)
    times, counts = times[first:last], counts[first:last]
    if not times.size or times[0] > start_s or times[-1] < end_s:
        where = "before the start" if not times.size or times[0] > start_s else "after the end"
        return Integral(None, None, None, 0, None, f"no read of the counter {where} of the window", seconds)
    steps, doubt = _steps(np.diff(times), np.diff(counts), wraps_at_j, max_w)
    moved = int(np.count_nonzero(steps))
    gap = float(np.diff(times).max()) if times.size > 1 else 0.0
    edge = max(_edge_gap(times, start_s), _edge_gap(times, end_s))
    if reason := doubt or _doubt(seconds, moved, min_samples, edge, max_gap_s):
        return Integral(None, None, None, moved, gap, reason, seconds)
    at = np.interp([start_s, end_s], times, np.concatenate([[0.0], np.cumsum(steps)]))
    energy = float(at[1] - at[0])
    return Integral(energy, energy / seconds, None, moved, gap, "", seconds)


def over(spans: Sequence[Integral], *, min_samples: int = 0) -> Integral:
    """Returns the sum over windows that follow one another, known where each one is.

    `min_samples` is asked of all together.
    """
    seconds = math.fsum(part.seconds for part in spans)
    samples = sum(part.samples for part in spans)
    gap = max((part.largest_gap_s for part in spans if part.largest_gap_s is not None), default=None)
    known = [part.joules for part in spans if part.joules is not None]
    reason = next((part.reason for part in spans if part.joules is None), "" if spans else "no window")
    if reason := reason or _few(samples, min_samples):
        return Integral(None, None, None, samples, gap, reason, seconds)
    joules = math.fsum(known)
    peaks = [part.peak_w for part in spans if part.peak_w is not None]
    peak = max(peaks) if len(peaks) == len(spans) else None
    return Integral(joules, joules / seconds, peak, samples, gap, "", seconds)


def together(rails: Sequence[Integral]) -> Integral:
    """Returns the sum of rails over the same windows, known where each one is.

    Its peak is that of a single rail, else None: rails need not peak at once. Samples are those of the
    rail that has the fewest.
    """
    if len(rails) == 1:
        return rails[0]
    seconds = rails[0].seconds if rails else 0.0
    samples = min((rail.samples for rail in rails), default=0)
    gap = max((rail.largest_gap_s for rail in rails if rail.largest_gap_s is not None), default=None)
    known = [rail.joules for rail in rails if rail.joules is not None]
    reason = next((rail.reason for rail in rails if rail.joules is None), "" if rails else "no rail")
    if reason:
        return Integral(None, None, None, samples, gap, reason, seconds)
    joules = math.fsum(known)
    return Integral(joules, joules / seconds, None, samples, gap, "", seconds)


def _seconds(start_s: float, end_s: float) -> float:
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s <= end_s):
        raise InputError(message("take the energy of a window", f"from {start_s} s to {end_s} s", "end after start"))
    return end_s - start_s


def _clean(times_s: Values, values: Values) -> tuple[_Array, _Array]:
    """Both as float64 [m], in order of time, without what could not be read."""
    times, read = np.asarray(times_s, np.float64), np.asarray(values, np.float64)
    if times.ndim != 1 or times.shape != read.shape:
        found = f"times of shape {times.shape} and values of shape {read.shape}"
        raise InputError(message("take the energy of a window", found, "give one value for each time"))
    keep = np.isfinite(times) & np.isfinite(read)
    times, read = times[keep], read[keep]
    if (np.diff(times) < 0).any():
        order = np.argsort(times, kind="stable")
        times, read = times[order], read[order]
    return times, read


def _around(times: _Array, start_s: float, end_s: float) -> tuple[int, int]:
    """Slice of the samples in the window and the next one on each side, if there is one."""
    before = int(np.searchsorted(times, start_s, "right")) - 1
    after = int(np.searchsorted(times, end_s, "left"))
    return max(before, 0), after + 1


def _steps(seconds: _Array, rises: _Array, wraps_at_j: float | None, max_w: float) -> tuple[_Array, str]:
    """The joules between reads, and why they are in doubt."""
    steps = rises if wraps_at_j is None else np.where(rises < 0, rises + wraps_at_j, rises)
    if ((steps < 0) | (steps > max_w * np.maximum(seconds, _STEP_S))).any():
        return steps, "the counter was reset within the window"
    if wraps_at_j is not None and (steps + wraps_at_j <= max_w * seconds).any():
        longest = float(seconds.max())
        return (
            steps,
            f"{longest:.3g} s between two reads: the counter may have wrapped at {wraps_at_j:g} J more than once",
        )
    return steps, ""


def _edge_gap(times: _Array, edge_s: float) -> float:
    """Time between the two reads around an edge; 0 where one lies on it."""
    after = int(np.searchsorted(times, edge_s, "left"))
    return 0.0 if times[after] == edge_s else float(times[after] - times[after - 1])


def _doubt(seconds: float, samples: int, least: int, gap_s: float, max_gap_s: float) -> str:
    if seconds == 0:
        return "the window has no length"
    if gap_s > max_gap_s:
        return f"{gap_s:.3g} s without a sample, at most {max_gap_s:.3g} s is allowed"
    return _few(samples, least)


def _few(samples: int, least: int) -> str:
    return f"too short: {samples} samples in it, at least {least} are needed" if samples < least else ""
