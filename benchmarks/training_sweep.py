"""Speed and peaks against the budget, from the least to four times that: see benchmarks/training.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tables
from training_candidates import OURS, Job
from training_memory import child
from training_scale import MIB, Line, Scale, least_that_does, long_texts

from edge_sdss.page import drawing
from edge_sdss.profiling import statistics
from edge_sdss.tuning.fit import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCH = "training-sweep"
SPEED, RSS, TENSORS = "speed", "peak RSS", "peak of live tensors"


@dataclass
class Point:
    """A budget, what the planner chose for it, and what it came to; `seconds` and `tokens` of each counted step."""

    factor: float
    budget_bytes: int
    fit: Fit
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_rss_bytes: int = 0
    peak_tensor_bytes: int = 0

    @property
    def speeds(self) -> list[float]:
        """Tokens/s of each step."""
        return [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]


def sweep(scale: Scale) -> Iterator[Line]:
    """A round at each budget, in order and back again, so that a steady drift cancels."""
    count = scale.sweep_batch * scale.steps
    job = Job(OURS, scale.model, "float32", long_texts(count), scale.sweep_batch, scale.sweep_sequence)
    fit, least = scale.plan(job.settings).least.fit, scale.least_bytes(job.settings)
    trial = replace(job, examples=job.examples[: 2 * scale.sweep_batch])
    above, _ = least_that_does(lambda budget: child(trial, fit, budget), least)
    least = round(above * least)
    budgets = [(factor, round(least * factor)) for factor in scale.factors]
    points = [Point(factor, budget, scale.plan(job.settings, budget).fit) for factor, budget in budgets]
    for index in range(scale.passes):
        for point in points if index % 2 == 0 else reversed(points):
            _run(point, job)
            print(f"{point.factor:.2f}: {point.speeds[-1]:.1f} token/s, {point.fit.words}", flush=True)
    for slower, faster in violations(points):
        print(f"VIOLATION: {faster.factor:.2f} × the least is slower than {slower.factor:.2f}")
    yield from lines(points, scale, above)


def violations(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Pairs of a budget and a larger one that is slower, beyond noise: by paired steps, with Holm's correction."""
    pairs = list(combinations(sorted(points, key=lambda point: point.budget_bytes), 2))
    found = [statistics.paired_ratio(small.seconds, large.seconds) for small, large in pairs]
    known = [(pair, one) for pair, one in zip(pairs, found, strict=True) if one.p is not None]
    ps = statistics.holm([one.p for _, one in known if one.p is not None])
    return [pair for (pair, one), p in zip(known, ps, strict=True) if statistics.verdict(one, "lower", p) == "worse"]


def lines(points: Sequence[Point], scale: Scale, above: float = 1.0) -> Iterator[Line]:
    """Speed and peaks of each budget, and how many pairs are the wrong way round.

    `above` is the least budget's factor over the planner's least.
    """
    shape = {"batch": scale.sweep_batch, "sequence": scale.sweep_sequence, "weights": "float32", "above": above}
    before: Point | None = None
    for point in points:
        chosen = {"budget_mib": point.budget_bytes / MIB, "factor": point.factor, "fit": point.fit.words}
        facts = scale.facts | shape | chosen
        common = {"bench": BENCH, "case": f"{point.factor:.2f} × the least budget", "settings": facts}
        found = statistics.summary([point.speeds], "token/s", "higher")
        bounds = {"value": found.median, "lo": found.lo, "hi": found.hi, "n": found.n}
        if before is not None:
            ratio = statistics.paired_ratio(point.seconds, before.seconds)
            facts = facts | {"ratio_lo": ratio.lo, "ratio_hi": ratio.hi}
            bounds |= {"peer": "the budget below", "ratio": round(ratio.ratio, 4)}
        yield {**common, "settings": facts, "metric": SPEED, "unit": "token/s", **bounds}
        for metric, peak in ((RSS, point.peak_rss_bytes), (TENSORS, point.peak_tensor_bytes)):
            share = {"peer": "the budget", "ratio": round(peak / point.budget_bytes, 4)}
            yield {**common, "metric": metric, "value": peak / MIB, "unit": "MiB", **share}
        before = point
    slower = [f"{large.factor:.2f} after {small.factor:.2f}" for small, large in violations(points)]
    whole = {"bench": BENCH, "case": "all budgets", "settings": scale.facts | shape | {"slower": slower}}
    yield {**whole, "metric": "larger budget surely slower", "value": len(slower), "unit": "pairs", "n": len(points)}


def _run(point: Point, job: Job) -> None:
    told = child(job, point.fit, point.budget_bytes)
    counted = told["round"].losses[1:]
    point.seconds += [step.seconds for step in counted]
    point.tokens += [step.tokens for step in counted]
    point.peak_rss_bytes = max(point.peak_rss_bytes, told["peak_rss_bytes"])
    point.peak_tensor_bytes = max(point.peak_tensor_bytes, told["peak_tensor_bytes"])


# The drawing.

_LIGHT = "--ink:#1a1e23;--muted:#59626c;--grid:#d5dae0;--faint:#b4bcc5;--s0:#0072b2;--s1:#d98a00;--s2:#009e73"
_DARK = "--ink:#e7eaed;--muted:#a1abb5;--grid:#363d46;--faint:#59636e;--s0:#3f9fe0;--s1:#f0b03a;--s2:#1fbf92"
_INCHES = (7.2, 2.9)


def draw(folder: Path, file: Path) -> None:
    """Draws the newest sweep that the results hold. Raises ValueError where there is none."""
    text = drawn(tables.newest(tables.read(folder), BENCH))
    file.write_text(text, encoding="utf-8")


def drawn(rows: Iterable[Mapping[str, Any]]) -> str:
    """An SVG file: speed, and peaks, against the budget, of the device that was measured last."""
    rows = [row for row in rows if "budget_mib" in row["settings"]]
    if not rows:
        raise ValueError(f"no results of {BENCH}; run `python benchmarks/training.py --only sweep`")
    last = max(rows, key=lambda row: row["time"])
    series = {
        metric: sorted(
            ((row["settings"]["budget_mib"], row) for row in rows if row["metric"] == metric and _same(row, last)),
            key=lambda pair: pair[0],
        )
        for metric in (SPEED, RSS, TENSORS)
    }
    speeds = series[SPEED]
    ends = f"from {speeds[0][1]['value']:.0f} to {speeds[-1][1]['value']:.0f} tokens/s"
    alt = f"Left: speed against the budget, {ends} from {speeds[0][0]:.0f} to {speeds[-1][0]:.0f} MiB. "
    alt += "Right: peak RSS and peak of live tensors against the budget, and the budget itself."
    return _file(drawing.svg("training-budget", _INCHES, lambda figure: _axes(figure, series), alt))


def _same(row: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Whether a row is of the same run: `append` stamps all lines of a part with one time."""
    return all(row[name] == last[name] for name in ("device", "time"))


def _axes(figure: Figure, series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]) -> None:
    left, right = figure.subplots(1, 2)
    color = drawing.STAND_IN
    budgets = [budget for budget, _ in series[SPEED]]
    speeds = [row["value"] for _, row in series[SPEED]]
    below = [row["value"] - (row["value"] if row["lo"] is None else row["lo"]) for _, row in series[SPEED]]
    above = [(row["value"] if row["hi"] is None else row["hi"]) - row["value"] for _, row in series[SPEED]]
    dots: Any = {"marker": "o", "markersize": 4, "markeredgewidth": 0, "linewidth": 1.2}
    left.errorbar(budgets, speeds, (below, above), color=color["--s0"], elinewidth=0.9, **dots)
    left.set(xlabel="budget, MiB", ylabel="tokens/s, 95 % interval", ylim=(0, None), xlim=(0, None))
    right.plot([0, budgets[-1]], [0, budgets[-1]], color=color["--muted"], linewidth=0.9, linestyle=(0, (4, 3)))
    for metric, variable in ((RSS, "--s1"), (TENSORS, "--s2")):
        places = [budget for budget, _ in series[metric]]
        right.plot(places, [row["value"] for _, row in series[metric]], color=color[variable], **dots)
    _name(right, (budgets[-1], budgets[-1]), "budget", "--muted")
    for metric, variable in ((RSS, "--s1"), (TENSORS, "--s2")):
        _name(right, (series[metric][-1][0], series[metric][-1][1]["value"]), metric, variable)
    right.set(xlabel="budget, MiB", ylabel="peak, MiB", ylim=(0, None), xlim=(0, None))


def _name(axes: Any, end: tuple[float, float], words: str, variable: str) -> None:
    """A line's name at its end, which spares a legend."""
    place: Any = {"textcoords": "offset points", "ha": "right", "va": "bottom"}
    axes.annotate(words, end, (0, 4), color=drawing.STAND_IN[variable], **place)


def _file(inline: str) -> str:
    """The drawing as a file of its own, with the colours of the page that it is not on."""
    width, height = (round(96 * inches) for inches in _INCHES)
    style = f"<style>:root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}</style>"
    sized = inline.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, sized, count=1) + "\n"
