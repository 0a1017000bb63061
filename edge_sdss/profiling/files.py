"""Writes a profile's files and reads it back. Knows nothing of what is in them.

report.json   everything; its keys are those of `schema.Report`
samples.csv   case, test, run, metric, unit, index, value: every raw sample, a line each
trace.csv     sensor, channel, kind, unit, time_s, value: every sensor over the whole profile
report.md     the table
report.html   the page
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from edge_sdss.errors import InputError, message
from edge_sdss.files import read_record, replace
from edge_sdss.profiling import html, markdown
from edge_sdss.profiling.schema import Report

SAMPLES = ("case", "test", "run", "metric", "unit", "index", "value")
TRACE = ("sensor", "channel", "kind", "unit", "time_s", "value")

_NUMBER = r"(?:-?\d[\d.eE+-]*|null)"
_NUMBERS = re.compile(rf"\[\n\s*{_NUMBER}(?:,\n\s*{_NUMBER})*\n\s*\]")


def write(report: Report, folder: Path) -> None:
    """Writes the five files into `folder`; a reader sees each old file or the new one.

    Raises InputError where a file cannot be written, and BackendUnavailable where the page's libraries are
    missing; the other four files are then already there.
    """
    replace(folder / "report.json", _json(report))
    replace(folder / "samples.csv", _csv(SAMPLES, _samples(report)))
    replace(folder / "trace.csv", _csv(TRACE, _trace(report)))
    replace(folder / "report.md", markdown.render(report))
    replace(folder / "report.html", html.render(report))


def load(path: Path) -> Report:
    """Reads a profile's report.json, or a folder's. Raises InputError, which names the first key that is wrong."""
    file = path / "report.json" if path.is_dir() else path
    name = "a profile's report.json or its folder"
    report = read_record(file, Report, name)
    for problem in _contradictions(report):
        raise InputError(message(f"read {file}", problem, f"give {name}, or write it anew"))
    return report


def _json(report: Report) -> str:
    """Lists of numbers stand on one line each: in a JSON text only its own line breaks are not escaped."""
    value = to_jsonable_python(report, inf_nan_mode="null")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1)
    return _NUMBERS.sub(lambda found: "".join(found[0].split()).replace(",", ", "), text) + "\n"


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    return text.getvalue()


def _samples(report: Report) -> Iterator[tuple[Any, ...]]:
    for case in report.cases:
        for run in case.runs:
            for metric, values in run.samples.items():
                unit = case.metrics[metric].unit
                for index, value in enumerate(values):
                    yield case.name, case.test, run.order, metric, unit, index, value


def _trace(report: Report) -> Iterator[tuple[Any, ...]]:
    for channel in report.trace:
        for time_s, value in zip(channel.times_s, channel.values, strict=True):
            yield channel.sensor, channel.name, channel.kind, channel.unit, time_s, value


def _contradictions(report: Report) -> Iterator[str]:
    """What the keys' types alone do not tell."""
    for i, case in enumerate(report.cases):
        if case.primary not in case.metrics:
            yield f"cases.{i}.primary: no metric {case.primary!r}"
        for j, run in enumerate(case.runs):
            yield from (
                f"cases.{i}.runs.{j}.samples: no metric {name!r}" for name in run.samples if name not in case.metrics
            )
    for i, channel in enumerate(report.trace):
        if len(channel.values) != len(channel.times_s):
            yield f"trace.{i}.values: {len(channel.values)} values at {len(channel.times_s)} times"
