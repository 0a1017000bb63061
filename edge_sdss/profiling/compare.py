"""Compares two reports of profiles, figure by figure, or says why they cannot be compared.

A case's primary metric is judged at the level of `statistics.ALPHA`; its other figures share that level
(Holm), so equals are called different in at most 2 of 100 primary metrics, and at most 4 of 100 cases have
any wrong call. Cases are separate questions: with many of them, expect wrong calls in proportion. What
outlasts a whole report, such as another program's load, is in no interval: where a machine was busy a
warning says so, and for small differences `versus` is the better way. Knows nothing of files or of how
figures were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from edge_sdss.errors import InputError, message
from edge_sdss.page.formats import figures, quantity
from edge_sdss.profiling import statistics
from edge_sdss.profiling.schema import Case, Record, Report, State

ENERGY, MEMORY = "energy per item", "peak memory"
_BUSY = 0.5


class Row(Record):
    """One figure of one case in both reports."""

    case: str
    test: str = Field(description="what exactly, in report a")
    metric: str
    primary: bool = Field(description="whether it is the case's primary metric")
    unit: str
    better: Literal["lower", "higher"]
    a: float = Field(description="median in report a, in the unit")
    b: float
    ratio: float | None = Field(default=None, description="b / a of the runs' medians; None where incomparable or 0")
    lo: float | None = Field(default=None, description="95 % interval of the ratio; None where the runs are too few")
    hi: float | None = None
    p: float | None = Field(
        default=None, description="of a difference of at most min_difference, adjusted for the case's figures"
    )
    verdict: Literal["better", "worse", "inconclusive", "incomparable"]
    beyond: bool = Field(default=False, description="worse by surely more than max_regress")
    reasons: tuple[str, ...] = Field(default=(), description="why it is incomparable, or has no interval")


class Side(Record):
    """Which report it is."""

    created: str
    command: str
    device: str
    model: str | None


class Comparison(Record):
    """What report b is against report a. Rows are in the order of report a."""

    schema_version: Literal["1"] = "1"
    kind: Literal["comparison"] = "comparison"
    a: Side
    b: Side
    max_regress: float | None
    alpha: float = Field(description="chance of calling equals different, per primary metric")
    min_difference: float = Field(description="differences up to this share are never called")
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Figure:
    """One figure of a case: its value, its interval over `runs`, and the runs' samples where they are kept."""

    unit: str
    better: statistics.Better
    value: float
    lo: float | None
    hi: float | None
    runs: int
    samples: Sequence[Sequence[float]] = ()


def compare(a: Report, b: Report, *, max_regress: float | None = None) -> Comparison:
    """Compares what both reports hold: every metric, the energy per item and the peak memory of every case.

    `max_regress` is a share, such as 0.05; a figure is beyond it where it is called worse and the whole
    95 % interval of the ratio is. A rate's limit is that of its inverse, 1 / 1.05. A figure without runs,
    such as peak memory, has a ratio and no verdict. Raises InputError for a limit that is negative or
    not finite, and BackendUnavailable without scipy.
    """
    if max_regress is not None and not (math.isfinite(max_regress) and max_regress >= 0):
        raise InputError(message("limit a regression", f"{max_regress}", "give a share of at least 0, such as 0.05"))
    reasons = (*_changed_mode("a", a), *_changed_mode("b", b), *_different(_conditions(a), _conditions(b)))
    scopes = _different({"scope of the energy": a.total_scope}, {"scope of the energy": b.total_scope})
    pairs = [(case, other) for case in a.cases if (other := _counterpart(case, b))]
    return Comparison(
        a=_side(a),
        b=_side(b),
        max_regress=max_regress,
        alpha=statistics.ALPHA,
        min_difference=statistics.MIN_DIFFERENCE,
        rows=tuple(row for pair in pairs for row in _rows(*pair, reasons, scopes, max_regress)),
        warnings=tuple(_warnings(a, b, pairs)),
    )


def exit_code(comparison: Comparison) -> int:
    """Returns 1 where a figure is worse by surely more than the limit, else 2 where any is incomparable, else 0.

    Without a single row nothing could be compared, which is 2.
    """
    if any(row.beyond for row in comparison.rows):
        return 1
    return 2 if not comparison.rows or any(row.verdict == "incomparable" for row in comparison.rows) else 0


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the comparison, as text for a console or Markdown."""
    columns = ["test", "metric", "a", "b", "b / a", "95 % interval", "verdict"]
    rows = []
    for row in comparison.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        bounds = "" if row.lo is None or row.hi is None else f"{row.lo:.3f} to {row.hi:.3f}"
        verdict = f"{row.verdict}, beyond {comparison.max_regress:.3g}" if row.beyond else row.verdict
        rows.append([row.test, row.metric, _quantity(row.a, row), _quantity(row.b, row), ratio, bounds, verdict])
    return columns, rows


def why(comparison: Comparison) -> list[str]:
    """Returns the reasons and warnings, each once, with the tests that it holds for."""
    tests: dict[str, dict[str, None]] = {}
    for row in comparison.rows:
        for reason in row.reasons:
            tests.setdefault(reason, {})[row.test] = None
    return [*(f"{', '.join(named)}: {reason}" for reason, named in tests.items()), *comparison.warnings]


def _quantity(value: float, row: Row) -> str:
    return quantity(value, row.unit) if row.unit in ("s", "bytes") else f"{figures(value)} {row.unit}"


def _rows(a: Case, b: Case, reasons: Sequence[str], scopes: Sequence[str], max_regress: float | None) -> Iterator[Row]:
    before, after = _figures(a), _figures(b)
    reasons = (*reasons, *_different(_case_conditions(a), _case_conditions(b)))
    shared = [metric for metric in before if metric in after]
    why = {
        metric: (
            *reasons,
            *_different(_meaning(before[metric]), _meaning(after[metric])),
            *(scopes if metric == ENERGY else ()),
        )
        for metric in shared
    }
    ratios = {metric: _ratio(before[metric], after[metric]) for metric in shared if not why[metric]}
    ps = _adjusted({metric: found.p for metric, found in ratios.items() if found and found.p is not None}, a.primary)
    for metric in shared:
        figure = before[metric]
        judged = {"verdict": "incomparable", "reasons": why[metric]}
        if not why[metric]:
            judged = _judged(ratios[metric], figure.better, ps.get(metric), max_regress)
        facts = {"unit": figure.unit, "better": figure.better, "a": figure.value, "b": after[metric].value}
        yield Row(case=a.name, test=a.test, metric=metric, primary=metric == a.primary, **facts, **judged)


def _judged(
    found: statistics.Ratio | None, better: statistics.Better, p: float | None, max_regress: float | None
) -> dict[str, Any]:
    """The fields of a row that rest on the ratio; p is adjusted."""
    if not found:
        return {"verdict": "inconclusive", "reasons": ("a figure is not above 0",)}
    verdict = statistics.verdict(found, better, p) if p is not None else "inconclusive"
    beyond = False
    if verdict == "worse" and max_regress is not None and found.lo is not None and found.hi is not None:
        beyond = found.lo > 1 + max_regress if better == "lower" else found.hi < 1 / (1 + max_regress)
    return {
        "ratio": found.ratio,
        "lo": found.lo,
        "hi": found.hi,
        "p": p,
        "verdict": verdict,
        "beyond": beyond,
        "reasons": () if p is not None else ("no interval: one run says nothing of how runs differ",),
    }


def _adjusted(ps: Mapping[str, float], primary: str) -> dict[str, float]:
    """The primary metric's p stays; the others' are adjusted for their number."""
    others = [metric for metric in ps if metric != primary]
    adjusted = dict(zip(others, statistics.holm([ps[metric] for metric in others]), strict=True))
    return adjusted | {metric: p for metric, p in ps.items() if metric == primary}


def _ratio(a: _Figure, b: _Figure) -> statistics.Ratio | None:
    """None where a figure is not above 0, of which there is no ratio."""
    try:
        if a.samples and b.samples:
            return statistics.ratio(a.samples, b.samples)
        return statistics.ratio_of_intervals((a.value, a.lo, a.hi), (b.value, b.lo, b.hi), a.runs, b.runs)
    except InputError:
        return None


def _figures(case: Case) -> dict[str, _Figure]:
    """Every metric in the case's order, then the energy per item and the peak memory where they are known.

    Time and rate are one figure, the other way round: only the one that is primary is compared.
    """
    found: dict[str, _Figure] = {}
    mirrored = {"time": "rate", "rate": "time"}.get(case.primary)
    for name, metric in case.metrics.items():
        if name != mirrored:
            samples = [run.samples[name] for run in case.runs if run.samples.get(name)]
            figure = _Figure(metric.unit, metric.better, metric.median, metric.lo, metric.hi, metric.runs, samples)
            found[name] = figure
    energy, peaks = case.energy, [[float(run.peak_rss_bytes)] for run in case.runs if run.peak_rss_bytes]
    if energy.per_item_j is not None:
        bounds = (energy.per_item_lo, energy.per_item_hi)
        found[ENERGY] = _Figure(f"J/{case.item}", "lower", energy.per_item_j, *bounds, len(case.runs))
    if peaks:
        found[MEMORY] = _Figure("bytes", "lower", median(peak for [peak] in peaks), None, None, len(peaks), peaks)
    return found


def _counterpart(case: Case, report: Report) -> Case | None:
    """The case of the same name, and of the same test where there are several."""
    named = [other for other in report.cases if other.name == case.name]
    return next((other for other in named if other.test == case.test), named[0] if named else None)


def _conditions(report: Report) -> dict[str, Any]:
    """What must be the same for any figure to be comparable."""
    device, model = report.device, report.model
    return {
        "device": device.name,
        "emulated": device.emulated,
        "emulated device": device.profile if device.emulated else None,
        "replayed": device.replayed,
        "power mode": report.before.power_mode,
        "model sha256": model.sha256[:12] if model else None,
        "dtype": model.dtype if model else None,
        "backend": model.backend if model else None,
    }


def _case_conditions(case: Case) -> dict[str, Any]:
    settings = {f"setting {name}": value for name, value in case.settings.items()}
    return {"test": case.test, "item": case.item, **settings}


def _meaning(figure: _Figure) -> dict[str, Any]:
    return {"unit": figure.unit, "direction": figure.better}


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, ...]:
    names = dict.fromkeys([*a, *b])
    return tuple(f"{name}: {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name))


def _changed_mode(side: str, report: Report) -> tuple[str, ...]:
    before, after = report.before.power_mode, report.after.power_mode
    return (f"power mode of {side} changed from {before} to {after} while measuring",) if before != after else ()


def _warnings(a: Report, b: Report, pairs: Sequence[tuple[Case, Case]]) -> Iterator[str]:
    """What does not forbid the comparison, but may explain a difference."""
    yield from (f"clocks: {text}" for text in _different(_clocks(a.before), _clocks(b.before)))
    for side, report, other in (("a", a, b), ("b", b, a)):
        names = {case.name for case in other.cases}
        for case in report.cases:
            if case.name not in names:
                yield f"case {case.name} is in {side} alone" + (
                    "; it failed in the other" * (case.name in other.failed)
                )
        if throttled := (*report.before.throttled, *report.after.throttled):
            yield f"{side} was throttled: {', '.join(dict.fromkeys(throttled))}"
        if (load := report.before.load_1min or 0) > _BUSY * report.device.cores:
            yield f"{side} was measured on a busy machine: load {load:.1f} on {report.device.cores} cores at the start"
    for before, after in pairs:
        for side, case in (("a", before), ("b", after)):
            yield from (f"{case.name} in {side}: {text}" for text in case.warnings)


def _clocks(state: State) -> dict[str, Any]:
    return {"locked": state.clocks_locked, "governors": sorted(set(state.governors.values()))}


def _side(report: Report) -> Side:
    return Side(
        created=report.created,
        command=report.command,
        device=report.device.name,
        model=report.model.name if report.model else None,
    )
