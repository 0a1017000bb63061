"""Draws a report's plots as inline SVG whose colours are the page's CSS variables.

So the same drawing fits a light and a dark page. Equal records give equal bytes. Text is kept out of the
drawings where it comes from a user: the page sets the legends. Knows nothing of the page around them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_sdss.page.drawing import MARKERS, SERIES, STAND_IN, svg, whole
from edge_sdss.report.schema import Buffer, Delta, LossPoint, Offer, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EARLIER = "kept before the first offer shown"
MAX_POINTS, MAX_STEPS = 1200, 500


@dataclass(frozen=True)
class Series:
    """How a domain is drawn everywhere: its name, CSS variable and marker."""

    name: str
    variable: str
    marker: str


REST = Series("other", "--rest", "X")


def series(buffer: Buffer) -> list[Series]:
    """Returns one series for each of the eight most frequent domains among kept dialogues, then "other".

    Colour and shape tell them apart, so that nobody depends on colour alone.
    """
    counts = Counter(entry.domain for entry in buffer.entries)
    counts.update(offer.domain for offer in buffer.decisions if offer.action == "kept")
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shown = [Series(name, f"--s{i}", MARKERS[i]) for i, name in enumerate(names[:SERIES])]
    return shown + [REST] * (len(names) > SERIES or EARLIER in occupancy(buffer)[1])


def occupancy(buffer: Buffer) -> tuple[list[int], dict[str, list[int]]]:
    """Replays the offers: returns `seq` at each change, and per domain the dialogues then in the buffer.

    What was evicted or remains without having been offered in `decisions` was there from the start; its
    domain is `EARLIER` where nothing tells it.
    """
    kept = [offer for offer in buffer.decisions if offer.action == "kept"]
    home = {offer.id: offer.domain for offer in kept} | {entry.id: entry.domain for entry in buffer.entries}
    offered = {offer.seq for offer in kept}
    inside = [entry.id for entry in buffer.entries if entry.seq not in offered]
    balance: Counter[str] = Counter()
    for offer in kept:
        for gone in offer.evicted:
            inside += [gone] if balance[gone] == 0 else []
            balance[gone] = max(balance[gone] - 1, 0)
        balance[offer.id] += 1
    first = buffer.decisions[0].seq if buffer.decisions else 0
    counts = Counter(home.get(one, EARLIER) for one in inside)
    steps, history = [first], [dict(counts)]
    for offer in kept:
        counts.subtract(home.get(gone, EARLIER) for gone in offer.evicted)
        counts[offer.domain] += 1
        steps.append(offer.seq)
        history.append(dict(counts))
    steps.append(max(buffer.decisions[-1].seq if buffer.decisions else 0, steps[-1]))
    history.append(dict(counts))
    domains = sorted({name for state in history for name, count in state.items() if count})
    return steps, {name: [state.get(name, 0) for state in history] for name in domains}


def content(buffer: Buffer, shown: Sequence[Series]) -> str:
    """Draws how many dialogues of each domain are in the buffer, over the offers."""
    steps, counts = occupancy(buffer)
    every = -(-len(steps) // MAX_STEPS)
    keep = sorted({*range(0, len(steps), every), len(steps) - 1})
    named = {one.name: one for one in shown}
    rows = {one: [0] * len(keep) for one in shown}
    for name, row in counts.items():
        one = named.get(name, REST)
        rows[one] = [a + row[i] for a, i in zip(rows[one], keep, strict=True)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stackplot(
            [steps[i] for i in keep],
            list(rows.values()),
            colors=[STAND_IN[one.variable] for one in rows],
            step="post",
            edgecolor=STAND_IN["--page"],
            linewidth=0.3,
        )
        axes.axhline(buffer.bins, color=STAND_IN["--muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{buffer.bins} bins",
            (1, buffer.bins),
            (-2, 3),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
        )
        axes.set(xlabel="offer", ylabel="dialogues in the buffer", ylim=(0, buffer.bins * 1.12))
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.grid(visible=False, axis="x")
        whole(axes, x=True, y=True)

    alt = f"Stacked areas: dialogues in the buffer by domain over {buffer.offers} offers."
    return svg("content", (5.2, 2.7), draw, alt)


def planes(buffer: Buffer, shown: Sequence[Series]) -> list[str]:
    """Draws the offers in the planes EOE-DSS, EOE-IDD and DSS-IDD, in this order."""
    offers = thin(buffer.decisions, MAX_POINTS)
    named = {one.name: one for one in shown}
    left = {entry.seq for entry in buffer.entries}
    dropped = [offer for offer in offers if offer.action == "dropped"]
    kept = {one: [o for o in offers if o.action == "kept" and named.get(o.domain, REST) == one] for one in shown}

    def plane(x: str, y: str) -> str:
        def draw(figure: Figure) -> None:
            axes = figure.add_subplot()
            _points(axes, x, y, dropped, "o", "--faint")
            for one, own in kept.items():
                _points(axes, x, y, [o for o in own if o.seq not in left], one.marker, one.variable)
                _points(axes, x, y, [o for o in own if o.seq in left], one.marker, one.variable, ringed=True)
            axes.set(xlabel=x.upper(), ylabel=y.upper())
            axes.margins(0.06)

        alt = f"Scatter plot of {len(offers)} offers, {x.upper()} across and {y.upper()} up."
        return svg(f"{x}-{y}", (3.3, 3.0), draw, alt)

    return [plane("eoe", "dss"), plane("eoe", "idd"), plane("dss", "idd")]


def loss(points: Sequence[LossPoint]) -> str:
    """Draws the training loss over the steps; the line breaks where the loss is not finite."""
    losses = [math.nan if point.loss is None else point.loss for point in points]
    finite = [value for value in losses if math.isfinite(value)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        dots = "o" if len(points) <= 60 else ""
        axes.plot(
            [p.step for p in points],
            losses,
            color=STAND_IN["--s0"],
            linewidth=1.8,
            marker=dots,
            markersize=3.5,
        )
        axes.set(xlabel="step", ylabel="training loss, nats per token")
        axes.set_ylim(0, max(finite, default=0) * 1.08 or 1)
        whole(axes, x=True)

    ends = f" from {finite[0]:.2f} to {finite[-1]:.2f} nats per token" if finite else ""
    return svg("loss", (5.2, 2.5), draw, f"Line: training loss over {len(points)} steps{ends}.")


def differences(name: str, values: Sequence[float], delta: Delta, unit: str, *, lower_is_better: bool) -> str:
    """Draws one bar per held-out dialogue, after minus before, sorted, with the mean and its interval."""
    ordered = sorted(values, reverse=not lower_is_better)
    better = [value < 0 if lower_is_better else value > 0 for value in ordered]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        colors = [STAND_IN["--good" if good else "--bad"] for good in better]
        axes.bar(range(1, len(ordered) + 1), ordered, color=colors, width=0.72)
        if delta.mean is not None and delta.lo is not None and delta.hi is not None:
            axes.axhspan(delta.lo, delta.hi, color=STAND_IN["--ink"], alpha=0.16, linewidth=0)
            axes.axhline(delta.mean, color=STAND_IN["--ink"], linewidth=1.2)
        axes.axhline(0, color=STAND_IN["--muted"], linewidth=1)
        axes.set(xlabel="held-out dialogue, best first", ylabel=f"{name}, after − before{unit}")
        axes.grid(visible=False, axis="x")
        whole(axes, x=True)

    alt = f"Bars: difference of {name} for {len(values)} held-out dialogues, {sum(better)} of them better."
    return svg(f"delta-{name}", (4.6, 3.0), draw, alt)


def _points(
    axes: Axes, x: str, y: str, offers: Sequence[Offer], marker: str, variable: str, *, ringed: bool = False
) -> None:
    style: dict[str, Any] = {"markersize": 3.2, "markeredgewidth": 0, "alpha": 0.75}
    if ringed:
        style = {"markersize": 6, "markeredgewidth": 1.1, "markeredgecolor": STAND_IN["--ink"], "zorder": 3}
    across, up = [getattr(o, x) for o in offers], [getattr(o, y) for o in offers]
    axes.plot(across, up, linestyle="", marker=marker, color=STAND_IN[variable], **style)
