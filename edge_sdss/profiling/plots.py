"""Draws a profile: sensors over time with the cases shaded, and each case's samples.

A drawing that has no data is None; the page says why. Knows nothing of the page around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from edge_sdss.page.drawing import MARKERS, SERIES, STAND_IN, name_points, svg, whole
from edge_sdss.page.formats import figures, prefixed, quantity
from edge_sdss.profiling.schema import Case, Channel, Report, Summary
from edge_sdss.sensors import UNITS, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDE = (5.2, 2.5)
HALF = (4.4, 2.5)
MAX_LINES, MAX_POINTS, MAX_DOTS, MAX_STEPS = 8, 600, 60, 400
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (1, 1.5), (6, 1.5, 1, 1.5))


@dataclass(frozen=True)
class Look:
    """How a case is drawn everywhere: its number from 1, name, CSS variable and marker."""

    number: int
    name: str
    variable: str
    marker: str


@dataclass(frozen=True)
class Line:
    """A channel in a drawing: its name, CSS variable, dashes (in widths of the line) and points."""

    name: str
    variable: str
    dashes: tuple[float, ...]
    times_s: Sequence[float]
    values: Sequence[float | None]


def looks(cases: Sequence[Case]) -> list[Look]:
    """Returns each case's look; after the eighth, colours are no more different and the number tells."""
    variables = [f"--s{i}" for i in range(SERIES)]
    return [
        Look(i + 1, case.test, variables[i] if i < SERIES else "--rest", MARKERS[i % len(MARKERS)])
        for i, case in enumerate(cases)
    ]


def lines(report: Report, kind: Kind) -> list[Line]:
    """Returns the channels of a kind that were ever read, at most eight, those with the largest values first.

    An energy counter is a line of power: the joules between two readings over the time between them.
    """
    found = [(c, *_points(c)) for c in report.trace if c.kind == kind or (kind == "power" and c.kind == "energy")]
    found = [one for one in found if sum(value is not None for value in one[2]) > 1]
    found.sort(key=lambda one: -max(value for value in one[2] if value is not None))
    sensors = {channel.sensor for channel, _, _ in found}
    return [
        Line(
            f"{channel.sensor} {channel.name}" if len(sensors) > 1 else channel.name,
            f"--s{i}",
            DASHES[i % len(DASHES)],
            times,
            values,
        )
        for i, (channel, times, values) in enumerate(found[:MAX_LINES])
    ]


def over_time(report: Report, kind: Kind, shown: Sequence[Line]) -> str | None:
    """Draws channels over the profile; behind power, its mean total in each run and while idle."""
    if not shown:
        return None
    finite = [value for line in shown for value in line.values if value is not None]
    divisor, unit = prefixed(max(map(abs, finite)), UNITS[kind])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for line in shown:
            values = [math.nan if value is None else value / divisor for value in line.values]
            pairs = _thinned(line.times_s, values)
            width = 1.1 if len(shown) < 4 else 0.9
            style: Any = (0, line.dashes) if line.dashes else "-"
            axes.plot(*zip(*pairs, strict=True), color=STAND_IN[line.variable], linewidth=width, linestyle=style)
        if kind == "power":
            _totals(axes, report, divisor)
        axes.set(xlabel="s since the start", ylabel=unit, xlim=(0, _end(report)))
        if kind != "temperature":
            axes.set_ylim(bottom=0)
        axes.grid(visible=False, axis="x")
        _phases(axes, report)

    names = ", ".join(line.name for line in shown)
    ends = f"from {quantity(min(finite), UNITS[kind])} to {quantity(max(finite), UNITS[kind])}"
    return svg(f"time-{kind}", WIDE, draw, f"Lines over {report.duration_s:.0f} s: {kind} of {names}, {ends}.")


def ecdf(case: Case, number: int) -> str | None:
    """Draws the share of samples up to each value, all together and of each run."""
    metric, found = latency(case)
    runs = [sorted(run.samples[metric]) for run in case.runs if run.samples.get(metric)]
    data = sorted(value for run in runs for value in run)
    if len(data) < 2:
        return None
    divisor, unit = prefixed(found.median, found.unit)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for run in runs if len(runs) > 1 else ():
            axes.plot(*_steps(run, divisor), color=STAND_IN["--faint"], linewidth=0.8, drawstyle="steps-post")
        axes.plot(*_steps(data, divisor), color=STAND_IN["--s0"], linewidth=1.8, drawstyle="steps-post")
        _mark(axes, f"median {figures(found.median / divisor)}", found.median / divisor, "right", "-")
        if found.p95 is not None:
            _mark(axes, f"p95 {figures(found.p95 / divisor)}", found.p95 / divisor, "left", (0, (4, 2)))
        axes.set(xlabel=f"{label(metric)}, {unit}", ylabel="share of samples", ylim=(0, 1.02))

    marks = f"median {quantity(found.median, found.unit)}"
    marks += f", p95 {quantity(found.p95, found.unit)}" if found.p95 is not None else ""
    alt = f"Steps: share of {len(data)} samples of {label(metric)} of {case.test} up to each value; {marks}."
    return svg(f"ecdf-{number}", HALF, draw, alt)


def strip(case: Case, number: int) -> str | None:
    """Draws the samples run by run, in the order in which they were measured, with each run's median."""
    metric, found = latency(case)
    runs = [run.samples[metric] for run in sorted(case.runs, key=lambda run: run.order) if run.samples.get(metric)]
    if sum(map(len, runs)) < 2:
        return None
    divisor, unit = prefixed(found.median, found.unit)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, values in enumerate(runs, 1):
            kept = [values[j * len(values) // min(len(values), MAX_DOTS)] for j in range(min(len(values), MAX_DOTS))]
            across = [i + 0.6 * ((j + 0.5) / len(kept) - 0.5) for j in range(len(kept))]
            up = [value / divisor for value in kept]
            dot: Any = {"linestyle": "", "marker": "o", "markersize": 3, "markeredgewidth": 0, "alpha": 0.7}
            axes.plot(across, up, color=STAND_IN["--s0"], **dot)
            middle = median(values) / divisor
            axes.plot([i - 0.36, i + 0.36], [middle, middle], color=STAND_IN["--ink"], linewidth=1.4)
        axes.set(xlabel="run, samples in order", ylabel=f"{label(metric)}, {unit}", xlim=(0.5, len(runs) + 0.5))
        axes.margins(y=0.1)
        axes.grid(visible=False, axis="x")
        whole(axes, x=True)

    return svg(f"strip-{number}", HALF, draw, f"Dots: samples of {label(metric)} of {case.test} in {len(runs)} runs.")


def drift(report: Report, shown: Sequence[Look]) -> str | None:
    """Draws each run's median against its case's, over the time of the profile."""
    series = []
    for case, look in zip(report.cases, shown, strict=True):
        metric, found = latency(case)
        runs = [run for run in case.runs if run.samples.get(metric)]
        if len(runs) > 1 and found.median:
            middles = [(run.start_s + run.end_s) / 2 for run in runs]
            changes = [100 * (median(run.samples[metric]) / found.median - 1) for run in runs]
            series.append((look, sorted(zip(middles, changes, strict=True))))
    if not series:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axhline(0, color=STAND_IN["--muted"], linewidth=0.9)
        for look, points in series:
            dot: Any = {"marker": look.marker, "markersize": 4, "markeredgewidth": 0, "linewidth": 0.9}
            axes.plot(*zip(*points, strict=True), color=STAND_IN[look.variable], **dot)
        axes.set(xlabel="s since the start", ylabel="run's median against the case's, %")
        axes.set_xlim(0, _end(report))

    return svg("drift", WIDE, draw, f"Lines: the medians of the runs of {len(series)} cases over time.")


def energy_latency(report: Report, shown: Sequence[Look]) -> str | None:
    """Draws J per item over s per item, both logarithmic, a point for each case whose energy is known."""
    points = []
    for case, look in zip(report.cases, shown, strict=True):
        seconds, joules = seconds_per_item(case), case.energy.per_item_j
        if seconds and joules is not None and joules > 0:
            points.append((look, seconds, joules))
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for look, seconds, joules in points:
            axes.plot(seconds, joules, look.marker, color=STAND_IN[look.variable], markersize=6, markeredgewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="time per item", ylabel="energy per item")
        axes.margins(0.16)
        _decades(axes.xaxis, "s")
        _decades(axes.yaxis, "J")
        name_points(figure, axes, [(look.name, seconds, joules) for look, seconds, joules in points])

    return svg("energy-latency", WIDE, draw, f"Points: energy against time per item of {len(points)} cases.")


def latency(case: Case) -> tuple[str, Summary]:
    """Returns the metric whose samples are drawn: the primary one if it is a time, else the time per item."""
    name = "time" if case.metrics[case.primary].unit != "s" and "time" in case.metrics else case.primary
    return name, case.metrics[name]


def seconds_per_item(case: Case) -> float | None:
    """Returns the median time per item; None where neither a time nor a rate was measured."""
    if "time" in case.metrics:
        return case.metrics["time"].median
    rate = case.metrics.get("rate")
    return 1 / rate.median if rate and rate.median > 0 else None


def label(metric: str) -> str:
    """Returns a metric's name in words."""
    return {"time": "time per item", "rate": "rate", "ttft": "time to first token"}.get(
        metric, metric.replace("_", " ")
    )


def _points(channel: Channel) -> tuple[Sequence[float], Sequence[float | None]]:
    if channel.kind != "energy":
        return channel.times_s, channel.values
    known = [(time, value) for time, value in zip(channel.times_s, channel.values, strict=True) if value is not None]
    steps = [(t1, (j1 - j0) / (t1 - t0) if j1 >= j0 and t1 > t0 else None) for (t0, j0), (t1, j1) in pairwise(known)]
    return [time for time, _ in steps], [power for _, power in steps]


def _thinned(times: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Keeps the least and the greatest value of each stretch, so that peaks stay, and its gaps."""
    every = -(-2 * len(values) // MAX_POINTS)
    if every < 2:
        return list(zip(times, values, strict=True))
    keep: set[int] = set()
    for first in range(0, len(values), every):
        stretch = range(first, min(first + every, len(values)))
        finite = [i for i in stretch if math.isfinite(values[i])]
        keep |= {i for i in stretch if not math.isfinite(values[i])}
        keep |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
    return [(times[i], values[i]) for i in sorted(keep)]


def _end(report: Report) -> float:
    """The profile's duration, or what lies after it in a record that contradicts itself."""
    return max([report.duration_s, 1e-9, *(run.end_s for case in report.cases for run in case.runs)])


def _steps(ordered: Sequence[float], divisor: float) -> tuple[list[float], list[float]]:
    n = len(ordered)
    ranks = sorted({round(i * (n - 1) / (MAX_STEPS - 1)) for i in range(MAX_STEPS)}) if n > MAX_STEPS else range(n)
    return [ordered[0] / divisor, *(ordered[i] / divisor for i in ranks)], [0, *((i + 1) / n for i in ranks)]


def _mark(axes: Axes, text: str, value: float, side: str, style: Any) -> None:
    """A vertical line with its text above the axes, to the side given, so that two texts never meet."""
    axes.axvline(value, color=STAND_IN["--ink"], linewidth=0.9, linestyle=style)
    place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
    axes.annotate(text, (value, 1.0), (-3 if side == "right" else 3, 3), color=STAND_IN["--ink"], **place)


def _decades(axis: Axis, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value, unit, 1)))
    axis.set_minor_locator(NullLocator())


def _totals(axes: Axes, report: Report, divisor: float) -> None:
    for case in report.cases:
        if case.energy.mean_w is not None:
            starts, ends = [run.start_s for run in case.runs], [run.end_s for run in case.runs]
            axes.hlines(
                [case.energy.mean_w / divisor] * len(starts), starts, ends, color=STAND_IN["--ink"], linewidth=1.8
            )
    if report.idle and report.idle.before_w is not None:
        axes.axhline(report.idle.before_w / divisor, color=STAND_IN["--muted"], linewidth=0.9, linestyle=(0, (4, 3)))


def _phases(axes: Axes, report: Report) -> None:
    """Shades each run in its case's colour, with the case's number above where there is room."""
    narrowest = 0.022 * _end(report)
    for case, look in zip(report.cases, looks(report.cases), strict=True):
        for run in case.runs:
            axes.axvspan(run.start_s, run.end_s, color=STAND_IN[look.variable], alpha=0.16, linewidth=0)
            if run.end_s - run.start_s >= narrowest:
                place: Any = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 7}
                axes.annotate(str(look.number), ((run.start_s + run.end_s) / 2, 1.01), **place)
