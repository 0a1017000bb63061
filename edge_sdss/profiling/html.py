"""Turns a profile into one HTML page that needs nothing else: no script, no other file, no network.

Knows nothing of how the figures came about. Every text of the report is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_sdss import page
from edge_sdss.page.formats import NONE, count, duration, figures, flat, quantity, share
from edge_sdss.profiling import markdown, plots
from edge_sdss.profiling.schema import Case, Report, State, Summary
from edge_sdss.sensors import Kind

KINDS: tuple[Kind, ...] = ("power", "temperature", "frequency", "memory")
T = TypeVar("T")
LOCKED = {True: "locked", False: "not locked", None: "not known"}


@dataclass(frozen=True)
class View:
    """A case as the page shows it."""

    case: Case
    look: plots.Look
    rate: str
    interval: str
    seconds: str
    settings: list[tuple[str, str]]


def headline(report: Report) -> str:
    """Returns what was measured, and the one sentence on energy."""
    n, model = len(report.cases), report.model
    cases = f"{n} case{'' if n == 1 else 's'}{f' of {model.name}' if model else ''}"
    failed = f"; {len(report.failed)} failed" if report.failed else ""
    return f"{cases} on {report.device.model}, in {duration(report.duration_s)}{failed}. {markdown.energy(report)}"


def render(report: Report) -> str:
    """Returns the page. Raises BackendUnavailable where jinja2 or matplotlib is missing."""
    looks = plots.looks(report.cases)
    lines = {kind: plots.lines(report, kind) for kind in KINDS}
    drawings: dict[str, str | None] = {kind: plots.over_time(report, kind, lines[kind]) for kind in KINDS}
    drawings |= {"drift": plots.drift(report, looks), "energy_latency": plots.energy_latency(report, looks)}
    for case, look in zip(report.cases, looks, strict=True):
        drawings[f"ecdf_{look.number}"] = plots.ecdf(case, look.number)
        drawings[f"strip_{look.number}"] = plots.strip(case, look.number)
    drawn = {name: drawing for name, drawing in drawings.items() if drawing is not None}
    return page.render(
        "profiling/template.html.j2",
        drawn,
        title=f"Profile of {report.device.model}",
        r=report,
        headline=headline(report),
        caveats=markdown.caveats(report),
        views=[_view(case, look) for case, look in zip(report.cases, looks, strict=True)],
        looks=looks,
        lines=lines,
        missing={kind: _missing(report, kind) for kind in KINDS},
        channels={kind: sum(c.kind == kind for c in report.trace) for kind in KINDS},
        tiles=list(_tiles(report)),
        states=list(_states(report.before, report.after)),
        settings=list(flat(report.settings)),
        environment=list(flat(report.environment, "not known")),
        unit=markdown.rate_unit,
        label=plots.label,
        whole=markdown.WHOLE,
    )


def _view(case: Case, look: plots.Look) -> View:
    _, found = markdown.speed(case)
    unit = markdown.rate_unit(case, found)
    rate = quantity(found.median, "s") if unit == "s" else f"{figures(found.median)} {unit}"
    seconds = quantity(plots.seconds_per_item(case), "s")
    return View(case, look, rate, _interval(found), seconds, list(flat(case.settings, "none")))


def _interval(found: Summary) -> str:
    if found.lo is None or found.hi is None:
        return NONE
    return " to ".join(quantity(bound, "s") if found.unit == "s" else figures(bound) for bound in (found.lo, found.hi))


def _missing(report: Report, kind: str) -> str:
    """Why there is no drawing, in one sentence."""
    if kind == "power":
        none = report.total_note.strip().rstrip(".") or "no power sensor was read"
        return f"No power over time: {none if report.total_scope == 'none' else 'it was read less than twice'}."
    words = {"temperature": "temperature", "frequency": "clock", "memory": "memory"}[kind]
    source = "process" if kind == "memory" else "thermal"
    reasons = [s.reason.strip().rstrip(".") for s in report.sensors if s.name == source and not s.usable and s.reason]
    return f"No {words} over time: {reasons[0] if reasons else 'no sensor gave it more than once'}."


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """(what, figure, what else there is to say) of the profile as a whole."""
    runs = sum(len(case.runs) for case in report.cases)
    yield (
        "Cases measured",
        str(len(report.cases)),
        f"{duration(report.duration_s)}, {runs} run{'' if runs == 1 else 's'}",
    )
    peaks = [case.memory.peak_rss_bytes for case in report.cases if case.memory.peak_rss_bytes is not None]
    if peaks:
        whole = report.device.memory_bytes
        of = f"{share(max(peaks), whole)} of the machine's" if whole else "of the process"
        yield "Greatest peak memory", quantity(max(peaks), "bytes"), of
    powers = [case.energy.mean_w for case in report.cases if case.energy.mean_w is not None]
    if powers:
        idle = report.idle.before_w if report.idle else None
        span = f"{figures(min(powers))} to {figures(max(powers))} W" if len(powers) > 1 else quantity(powers[0], "W")
        yield "Mean power of a case", span, f"idle {quantity(idle, 'W')}" if idle is not None else "idle not known"
    else:
        yield "Energy", "not known", "nothing is estimated in its place"
    heat = [v for c in report.trace if c.kind == "temperature" for v in c.values if v is not None]
    heat += [*report.before.temperatures_c.values(), *report.after.temperatures_c.values()]
    if heat:
        alarms = len(report.after.throttled)
        at_end = f"{alarms or 'no'} throttle alarm{'' if alarms == 1 else 's'} at the end"
        yield "Hottest", f"{max(heat):.1f} °C", at_end
    yield "Power mode", report.before.power_mode or "not known", f"clocks {LOCKED[report.before.clocks_locked]}"
    yield "Sampling costs", share(report.sampler.share), f"of one core, {report.sampler.passes:,} passes"


def _states(before: State, after: State) -> Iterator[tuple[str, str, str]]:
    """(what, before, after) of what a result depends on."""
    yield "Power mode", before.power_mode or "not known", after.power_mode or "not known"
    yield "Clocks", LOCKED[before.clocks_locked], LOCKED[after.clocks_locked]
    yield from _pairs("Governor", before.governors, after.governors, str)
    yield from _pairs("Clock", before.clocks_hz, after.clocks_hz, lambda value: quantity(value, "Hz"))
    yield from _pairs("Temperature", before.temperatures_c, after.temperatures_c, lambda value: f"{value:.1f} °C")
    yield from _pairs("Fan", before.fan, after.fan, lambda value: share(value))
    yield "Throttle alarms", "; ".join(before.throttled) or "none seen", "; ".join(after.throttled) or "none seen"
    yield from _pairs("Throttling events", before.throttle_counts, after.throttle_counts, count)
    yield "Memory available", quantity(before.available_bytes, "bytes"), quantity(after.available_bytes, "bytes")
    yield "Load, 1 min", figures(before.load_1min), figures(after.load_1min)


def _pairs(
    what: str, before: Mapping[str, T], after: Mapping[str, T], text: Callable[[T], str]
) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*before, *after]):
        first, last = (text(state[name]) if name in state else NONE for state in (before, after))
        yield f"{what} {name}", first, last
