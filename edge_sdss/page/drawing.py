"""Turns matplotlib's drawings into inline SVG whose colours are the page's CSS variables.

So the same drawing fits a light and a dark page. Equal calls give equal bytes. Knows nothing of what is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edge_sdss.errors import BackendUnavailable, message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Colours that tell series apart: the variables --s0 to --s7; what is beyond them shares --rest."""
MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">")

# Matplotlib wants colours, the page has variables: each variable has a stand-in that nobody else uses.
STAND_IN = {
    f"--{name}": f"#0a0b{number:02x}"
    for number, name in enumerate(
        ["ink", "muted", "grid", "page", "faint", "good", "bad", "rest", *(f"s{i}" for i in range(SERIES))]
    )
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": STAND_IN["--muted"],
    "axes.labelcolor": STAND_IN["--muted"],
    "axes.edgecolor": STAND_IN["--grid"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": STAND_IN["--grid"],
    "grid.linewidth": 0.6,
    "xtick.color": STAND_IN["--grid"],
    "ytick.color": STAND_IN["--grid"],
    "xtick.labelcolor": STAND_IN["--muted"],
    "ytick.labelcolor": STAND_IN["--muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(name: str, inches: tuple[float, float], draw: Callable[[Figure], None], alt: str) -> str:
    """Returns what `draw` puts on a figure of `inches`, with `alt` as its text for those who do not see it.

    `name` is unique on the page: ids are the same in every run and differ between the drawings.
    Raises BackendUnavailable where matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        found = "matplotlib is not installed"
        raise BackendUnavailable(message("draw the report", found, "pip install 'edge_sdss[train]'")) from error
    text = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue(), alt)


def whole(axes: Axes, *, x: bool = False, y: bool = False) -> None:
    """Puts an axis' marks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in [axes.xaxis] * x + [axes.yaxis] * y:
        axis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))


def name_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Writes each name beside its point, where it covers no other name or point if there is such a place."""
    figure.canvas.draw()  # only now are the places of the points known
    scale = figure.dpi / 72
    places = {name: tuple(axes.transData.transform((x, y)) / scale) for name, x, y in points}
    frame = axes.get_window_extent()
    taken = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in places.values()]
    for name, x, y in points:
        text = "".join(letter for letter in name if letter.isprintable())[:24]
        width, (px, py) = 4.9 * len(text), places[name]
        best, least = ((6.0, -3.0), "left"), math.inf
        for (dx, dy), side in _SIDES:
            start = px + dx - {"left": 0.0, "center": width / 2, "right": width}[side]
            box = (start, py + dy - 1, start + width, py + dy + 8)
            outside = box[0] < frame.x0 / scale or box[2] > frame.x1 / scale
            cost = sum(_overlap(box, other) for other in taken) + 1e3 * outside
            if cost < least:
                best, least, chosen = ((dx, dy), side), cost, box
        taken.append(chosen)
        axes.annotate(text, (x, y), best[0], textcoords="offset points", ha=best[1])


def _inline(svg: str, alt: str) -> str:
    """Cuts a file down to what a page needs, and puts the variables in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for variable, color in STAND_IN.items():
        svg = svg.replace(color, f"var({variable})")
    svg = re.sub(r"<svg[^>]*?viewBox=(\"[^\"]*\")[^>]*>", rf"<svg viewBox=\1 {_NAMESPACES} LABEL>", svg, count=1)
    svg = svg.replace("LABEL", f'role="img" aria-label="{html.escape(alt)}"', 1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


_NAMESPACES = 'xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg"'
_SIDES = (
    ((6.0, -3.0), "left"), ((-6.0, -3.0), "right"), ((0.0, 6.0), "center"), ((0.0, -12.0), "center"),
    ((6.0, 6.0), "left"), ((-6.0, 6.0), "right"), ((6.0, -12.0), "left"), ((-6.0, -12.0), "right"),
    ((0.0, 15.0), "center"), ((0.0, -22.0), "center"),
)  # fmt: skip
