"""A profile as a table in llama-bench's columns, and what must be said beside it. Knows nothing of files or HTML."""

from __future__ import annotations

import re
import statistics

from edge_sdss.page import formats
from edge_sdss.page.formats import NONE, num, plural, quantity
from edge_sdss.profiling.schema import Case, Report, Summary

COLUMNS = ("model", "size", "params", "backend", "test", "t/s", "95 % interval", "J/tok", "W", "peak MiB")
WHOLE = {
    "board": "the whole board",
    "module": "the module without its carrier board",
    "gpu": "the GPU alone",
    "cpu-package": "the processor's package alone",
    "partial": "some rails, not all of the machine",
}
EMULATED = "Emulated: the figures stand for the machine that emulates, not for a device."
REPLAYED = "Replayed: power, temperatures and clocks come from a recording; no figure here is a device's."


def render(report: Report) -> str:
    """Returns the Markdown text: the table, what it is of, and the warnings."""
    columns, rows = table(report)
    ruler = ["---" if name in COLUMNS[:5] else "---:" for name in columns]
    lines = [_row(columns), _row(ruler), *(_row([_escaped(cell) for cell in row]) for row in rows)]
    warnings = [f"- {case.test}: {warning}" for case in report.cases for warning in case.warnings]
    warnings += [f"- {note}" for note in report.notes]
    warnings += [f"- {name} failed: {problem}" for name, problem in report.failed.items()]
    parts = [f"# Profile of {_escaped(report.device.model)}", "\n".join(lines), _escaped(footnote(report))]
    parts += ["## Warnings and notes", "\n".join(map(_escaped, warnings))] if warnings else []
    return "\n\n".join(parts) + "\n"


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and a row for each case, as plain text."""
    model = report.model
    first = [NONE] * 4
    if model:
        first = [model.name, quantity(model.bytes, "bytes"), f"{model.parameters / 1e6:.2f} M", model.backend]
    return list(COLUMNS), [[*first, case.test, *_figures(case)] for case in report.cases]


def figures(report: Report) -> tuple[list[str], list[list[str]]]:
    """Returns the table without the model's columns, which are the same in every row, for a narrow screen."""
    return list(COLUMNS[4:]), [[case.test, *_figures(case)] for case in report.cases]


def title(report: Report) -> str:
    """Returns what the table is of: the model, and where it ran."""
    model = report.model
    return f"{model.name}, {model.dtype}, {model.backend}" if model else report.device.model


def footnote(report: Report) -> str:
    """Returns what the table does not say: the device, its power mode, of what the energy is, what is not real."""
    device, mode = report.device, report.before.power_mode
    locked = {True: "clocks locked", False: "clocks not locked", None: ""}[report.before.clocks_locked]
    facts = [f"power mode {mode}" if mode else "power mode unknown", *([locked] if locked else [])]
    parts = [f"{device.model}, {', '.join(facts)}.", energy(report), *caveats(report)]
    return " ".join([*parts, "Median ± standard deviation; t/s and J/tok are of tokens where no other item is named."])


def energy(report: Report) -> str:
    """Returns the one sentence on energy: of what it is, or why there is none."""
    note = report.total_note.strip().rstrip(".")
    if report.total_scope == "none":
        return f"No energy: {note or 'no power sensor was read'}."
    return f"Energy is that of {WHOLE[report.total_scope]}{f' ({note})' if note else ''}."


def caveats(report: Report) -> list[str]:
    """Returns why the figures are not a device's; empty where they are."""
    return [EMULATED] * report.device.emulated + [REPLAYED] * report.device.replayed


def speed(case: Case) -> tuple[str, Summary]:
    """Returns the metric that the table shows, and its name: the rate, else what a comparison looks at."""
    name = "rate" if "rate" in case.metrics else case.primary
    return name, case.metrics[name]


def rate_unit(case: Case, found: Summary) -> str:
    """Returns the unit in words: offers/s for offer/s."""
    return f"{plural(case.item)}/s" if found.unit == f"{case.item}/s" else found.unit


def spread(case: Case, metric: str) -> float | None:
    """Returns the standard deviation of all samples; None of a single one."""
    values = [value for run in case.runs for value in run.samples.get(metric, ())]
    return statistics.stdev(values) if len(values) > 1 else None


def _figures(case: Case) -> list[str]:
    metric, found = speed(case)
    unit = rate_unit(case, found)
    shown, sd = formats.figures(found.median), spread(case, metric)
    decimals = len(shown.partition(".")[2])
    middle = shown if sd is None else f"{shown} ± {sd:,.{decimals}f}"
    known = found.lo is not None and found.hi is not None
    interval = f"{found.lo:,.{decimals}f} to {found.hi:,.{decimals}f}" if known else NONE
    tokens = case.item == "token"
    joules = formats.figures(case.energy.per_item_j)
    if case.energy.per_item_j is not None and not tokens:
        joules = f"{joules} J/{case.item}"
    peak = case.memory.peak_rss_bytes
    return [
        middle if tokens and unit == "tokens/s" else f"{middle} {unit}",
        interval,
        joules,
        num(case.energy.mean_w, 1),
        NONE if peak is None else f"{peak / 2**20:,.0f}",
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """One line in which nothing is markup, of Markdown or of HTML."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line)
