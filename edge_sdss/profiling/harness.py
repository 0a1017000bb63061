"""Runs workloads again and again, in random order, and turns what they took into records.

Knows nothing of what a workload does; whoever makes one says what it counts. The clock is the meter's.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_sdss import config
from edge_sdss.errors import InputError, message
from edge_sdss.profiling import schema, state, statistics
from edge_sdss.profiling.memory import Watch, release
from edge_sdss.profiling.meter import Meter
from edge_sdss.tree import Tree
from edge_sdss.types import Progress, no_progress

_IDLE_DRIFT = 0.05


@dataclass(frozen=True)
class Repetition:
    """What one repetition did: `items` processed, and finer times that it took itself, by metric, in s.

    `seconds` is set where the time that counts for `time` and `rate` is not the whole repetition's.
    """

    items: float
    times_s: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Workload:
    """Something that can be measured. `open` prepares it and gives the callable that does one repetition."""

    name: str
    test: str
    about: str
    item: str
    open: Callable[[], AbstractContextManager[Callable[[], Repetition]]]
    primary: str = "time"
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: int | None = None  # at most; a long workload has fewer
    repetitions: int | None = None


@dataclass
class _Measured:
    """What has been measured of a workload so far."""

    runs: list[schema.Run] = field(default_factory=list)
    memory: list[schema.Memory] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """The cases in the order given, and why others have none."""

    cases: tuple[schema.Case, ...]
    failed: dict[str, str]
    idle: schema.Idle | None


def measure(
    workloads: Sequence[Workload],
    plan: config.Profile,
    meter: Meter,
    *,
    tree: Tree | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Measures each workload in `plan.runs` runs; a run of each, in random order, then the next of each.

    So a slow spell of the machine falls on all of them. A workload that raises is left out from then on and
    named in `failed`, with its error; the others go on. Ctrl-C ends the measuring; what is whole is kept.
    """
    tree = tree or Tree()
    generator = random.Random(plan.seed)
    measured = {workload.name: _Measured() for workload in workloads}
    failed: dict[str, str] = {}
    idle_before = meter.idle(plan.idle_s)
    blocks = [(run, workload) for run in range(plan.runs) for workload in _shuffled(workloads, generator)]
    blocks = [(run, workload) for run, workload in blocks if run < (workload.runs or plan.runs)]
    try:
        for order, (_, workload) in enumerate(blocks):
            progress(f"profiling {workload.name}", order, len(blocks))
            if workload.name in failed:
                continue
            found = measured[workload.name]
            found.warnings += _cooled(plan, meter, tree)
            try:
                _block(workload, plan, meter, order, found)
            except Exception as error:
                failed[workload.name] = f"{type(error).__name__}: {error}"
        progress("profiling", len(blocks), len(blocks))
    except KeyboardInterrupt:
        for workload in workloads:
            failed.setdefault(workload.name, "stopped with Ctrl-C") if not measured[workload.name].runs else None
    idle = _idle(idle_before, meter.idle(plan.idle_s))
    cases = [_case(w, measured[w.name], meter, idle) for w in workloads if measured[w.name].runs]
    return Outcome(tuple(cases), failed, idle)


def _shuffled(workloads: Sequence[Workload], generator: random.Random) -> list[Workload]:
    return generator.sample(list(workloads), len(workloads))


def _block(workload: Workload, plan: config.Profile, meter: Meter, order: int, found: _Measured) -> None:
    """One run: opened, warmed up, then repeated until the run has its share of repetitions and of seconds."""
    runs = min(workload.runs or plan.runs, plan.runs)
    least = -(-(workload.repetitions or plan.repetitions) // runs)
    samples: dict[str, list[float]] = {}
    items = 0.0
    with workload.open() as repeat:
        for _ in range(0 if workload.repetitions == 1 else plan.warmups):
            repeat()
        release()
        start = meter.now()
        watch = Watch(available=lambda: meter.samples("process", "available", start, meter.now()))
        with watch, _without_collector(), meter.window(workload.name) as window:
            start = meter.now()
            while len(samples.get("time", ())) < least or meter.now() - start < plan.seconds / runs:
                items += _repeat(repeat, meter, samples)
    begin, end = window.start_s - meter.origin_s, window.end_s - meter.origin_s
    peak = watch.result.peak_rss_bytes
    run = schema.Run(order=order, start_s=begin, end_s=end, items=items, samples=samples, peak_rss_bytes=peak)
    found.runs.append(run)
    found.memory.append(watch.result)


def _repeat(repeat: Callable[[], Repetition], meter: Meter, samples: dict[str, list[float]]) -> float:
    """One repetition, added to the samples; returns the items that it processed."""
    start = meter.now()
    done = repeat()
    seconds = meter.now() - start if done.seconds is None else done.seconds
    if done.items <= 0 or seconds <= 0:
        found = f"{done.items} items in {seconds} s"
        raise InputError(message("measure a repetition", found, "let it process something, by a clock that runs"))
    samples.setdefault("time", []).append(seconds / done.items)
    samples.setdefault("rate", []).append(done.items / seconds)
    for name, times in done.times_s.items():
        samples.setdefault(name, []).extend(times)
    return done.items


@contextmanager
def _without_collector() -> Iterator[None]:
    """A collection in the middle of a repetition is no part of it; as `timeit` does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _case(workload: Workload, found: _Measured, meter: Meter, idle: schema.Idle | None) -> schema.Case:
    names = {name: None for run in found.runs for name in run.samples}
    metrics = {}
    for name in names:
        unit, better = _unit(name, workload.item)
        metrics[name] = statistics.summary([run.samples.get(name, []) for run in found.runs], unit, better)
    drift = metrics[workload.primary].drift
    warnings = list(dict.fromkeys(found.warnings))
    if drift is not None:
        warnings.append(f"{workload.primary} drifted by {drift:+.0%} over the repetitions")
    return schema.Case(
        name=workload.name,
        test=workload.test,
        about=workload.about,
        item=workload.item,
        primary=workload.primary,
        settings=dict(workload.settings),
        metrics=metrics,
        runs=tuple(found.runs),
        energy=_energy(found.runs, meter, idle),
        memory=_memory(found.memory),
        warnings=tuple(warnings),
    )


def _unit(metric: str, item: str) -> tuple[str, Literal["lower", "higher"]]:
    return (f"{item}/s", "higher") if metric == "rate" else ("s", "lower")


def _energy(runs: Sequence[schema.Run], meter: Meter, idle: schema.Idle | None) -> schema.Energy:
    """All runs together, with the interval of J per item over the runs."""
    spans = [(run.start_s + meter.origin_s, run.end_s + meter.origin_s) for run in runs]
    found = meter.energy(spans, sum(run.items for run in runs), _idle_w(idle))
    each = [meter.energy([span], run.items) for span, run in zip(spans, runs, strict=True)]
    per_item = [[one.per_item_j] for one in each if one.per_item_j is not None]
    if found.per_item_j is None or len(per_item) < len(runs):
        return found
    interval = statistics.summary(per_item, "J", "lower")
    return found.model_copy(update={"per_item_lo": interval.lo, "per_item_hi": interval.hi})


def _idle(before: float | None, after: float | None) -> schema.Idle | None:
    if before is None and after is None:
        return None
    drift = (after - before) / before if before and after is not None else None
    return schema.Idle(before_w=before, after_w=after, drift=drift, flagged=abs(drift or 0) > _IDLE_DRIFT)


def _idle_w(idle: schema.Idle | None) -> float | None:
    known = [watts for watts in (idle.before_w, idle.after_w) if watts is not None] if idle else []
    return sum(known) / len(known) if known else None


def _memory(found: Sequence[schema.Memory]) -> schema.Memory:
    """The greatest of each figure over the runs."""
    greatest: dict[str, Any] = {}
    for name in schema.Memory.model_fields.keys() - {"note"}:
        known = [value for one in found if (value := getattr(one, name)) is not None]
        greatest[name] = max(known, default=None)
    return schema.Memory(**greatest, note=next((one.note for one in found if one.note), ""))


def _cooled(plan: config.Profile, meter: Meter, tree: Tree) -> list[str]:
    """Waits until no thermal zone is hotter than asked; a warning where that takes too long."""
    if plan.cool_c is None:
        return []
    start = meter.now()
    while (hottest := max(state.capture(tree).temperatures_c.values(), default=-math.inf)) > plan.cool_c:
        if meter.now() - start > plan.cool_timeout_s:
            return [f"still at {hottest:.0f} °C after {plan.cool_timeout_s:.0f} s of waiting for {plan.cool_c:.0f} °C"]
        time.sleep(1)
    return []
