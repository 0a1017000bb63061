"""Draws the study: learning curves, buffer sizes, and every policy's difference from the baseline.

A drawing without data is left out. Knows nothing of files of results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from quality.analysis import Line, contrast, differences, grouped, mean
from quality.protocol import BASELINE, FULL, MAIN_ORDERS, NONE

from edge_sdss.page import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES, _ROW_INCHES = (7.2, 3.2), 0.42
_LIGHT = "--ink:#1a1a1a;--muted:#555;--grid:#ddd;--page:#fff;--faint:#eee;--good:#2a7;--bad:#c33;--rest:#888;"
_LIGHT += "--s0:#2563eb;--s1:#d97706;--s2:#059669;--s3:#dc2626;--s4:#7c3aed;--s5:#0891b2;--s6:#be185d;--s7:#4d7c0f;"
_DARK = "--ink:#eee;--muted:#aaa;--grid:#444;--page:#111;--faint:#222;--good:#4c9;--bad:#f66;--rest:#999;"
_DARK += "--s0:#60a5fa;--s1:#fbbf24;--s2:#34d399;--s3:#f87171;--s4:#a78bfa;--s5:#22d3ee;--s6:#f472b6;--s7:#a3e635;"

Drawings = dict[str, tuple[str, str]]


def every(lines: Sequence[Line]) -> Drawings:
    """SVG files with their alternative texts, by name: those for which there are results."""
    found: Drawings = {}
    for name, draw in {"differences": _differences, "sizes": _sizes, "curves": _curves}.items():
        made = draw(lines)
        if made is not None:
            paint, alt = made
            found[name] = (_file(drawing.svg(f"study-{name}", _INCHES, paint, alt)), alt)
    return found


Made = tuple[Callable[["Figure"], None], str] | None


def _plain(line: Line) -> bool:
    cell = line["cell"]
    return not cell["variants"] and cell["interval"] is None and cell["max_bytes"] is None


def _differences(lines: Sequence[Line]) -> Made:
    """Every policy at 32 bins against the baseline, each set with its interval."""
    own = [
        line for line in lines if _plain(line) and line["cell"]["bins"] == 32 and line["cell"]["order"] in MAIN_ORDERS
    ]
    points: dict[str, list[tuple[str, Any]]] = {}
    for name, of_set in grouped(own, lambda line: line["cell"]["set"]).items():
        policies = grouped(of_set, lambda line: line["cell"]["policy"])
        for policy, ours in policies.items():
            if policy in (BASELINE, NONE, FULL) or BASELINE not in policies:
                continue
            table = differences(ours, policies[BASELINE], "nll")
            if table is not None:
                points.setdefault(policy, []).append((name, contrast([table])))
    if not points:
        return None
    sets = list(dict.fromkeys(name for own in points.values() for name, _ in own))

    def paint(figure: Figure) -> None:
        figure.set_size_inches(_INCHES[0], max(_INCHES[1], 1 + _ROW_INCHES * len(points)))
        axes = figure.subplots()
        axes.axvline(0, color=drawing.STAND_IN["--muted"], linewidth=0.9)
        for row, (_, found) in enumerate(points.items()):
            for name, c in found:
                number = sets.index(name)
                y = row + 0.8 * ((number + 0.5) / len(sets) - 0.5)
                look: Any = {"color": drawing.STAND_IN[f"--s{number % drawing.SERIES}"], "markersize": 4}
                first = row == min(r for r, own in enumerate(points.values()) if name in dict(own))
                axes.errorbar(
                    c.mean, y, xerr=[[c.mean - c.lo], [c.hi - c.mean]], fmt=drawing.MARKERS[number % 8],
                    elinewidth=1, label=name if first else None, **look,
                )  # fmt: skip
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        axes.set(xlabel=f"NLL − {BASELINE}, nats per token, 95 % interval (left is better)")
        figure.legend(frameon=False, ncols=6, loc="outside upper center")

    return paint, f"NLL of each policy at 32 bins minus that of {BASELINE}, with 95 % intervals, set by set"


def _sizes(lines: Sequence[Line]) -> Made:
    """NLL against the number of bins, on the set that has most sizes."""
    own = [line for line in lines if _plain(line) and line["cell"]["order"] == "shuffled"]
    by_set = grouped(own, lambda line: line["cell"]["set"])
    sizes = {name: {line["cell"]["bins"] for line in of_set} for name, of_set in by_set.items()}
    if not sizes or max(len(bins) for bins in sizes.values()) < 2:
        return None
    name = max(sizes, key=lambda key: len(sizes[key]))
    series = {}
    for policy, ours in grouped(by_set[name], lambda line: line["cell"]["policy"]).items():
        at = {bins: mean(of_size, "nll") for bins, of_size in grouped(ours, lambda line: line["cell"]["bins"]).items()}
        if len(at) > 1:
            series[policy] = sorted(at.items())
    return _lines(series, "bins", f"NLL on {name}", log=True), f"NLL on {name} against the size of the buffer in bins"


def _curves(lines: Sequence[Line]) -> Made:
    """NLL after each round, on the first set that has rounds."""
    own = [line for line in lines if line["cell"]["interval"] is not None]
    if not own:
        return None
    name = own[0]["cell"]["set"]
    series = {}
    for policy, ours in grouped(own, lambda line: line["cell"]["policy"]).items():
        curves = np.array([line["curve"] for line in ours if line["cell"]["set"] == name])
        if len(curves):
            series[policy] = [(float(x), float(y)) for x, y in curves.mean(axis=0)]
    return _lines(series, "offers", f"NLL on {name}"), f"NLL on {name} after each round of training"


def _lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, *, log: bool = False
) -> Callable[[Figure], None]:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(series.items()):
            color = drawing.STAND_IN[f"--s{number % drawing.SERIES}"]
            marker = drawing.MARKERS[number % len(drawing.MARKERS)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1.2, label=name)
        if log:
            axes.set_xscale("log", base=2)
            places = sorted({place for points in series.values() for place, _ in points})
            axes.set_xticks(places, [str(place) for place in places])
        axes.set(xlabel=x, ylabel=f"{y}, nats per token")
        axes.legend(frameon=False)

    return paint


def _file(inline: str) -> str:
    """The drawing as a file of its own, with the colours of the page that it is not on."""
    points = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', inline)
    assert points is not None
    width, height = (round(float(size) * 96 / 72) for size in points.groups())
    style = f"<style>:root{{{_LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}</style>"
    sized = inline.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + style, sized, count=1) + "\n"
