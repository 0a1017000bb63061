"""Writes and reads a report's two files. Knows nothing of what is in them."""

from __future__ import annotations

import json
from pathlib import Path

from edge_sdss.files import read_record, replace
from edge_sdss.report.html import render
from edge_sdss.report.schema import RunReport


def write(report: RunReport, folder: Path) -> None:
    """Writes `folder`/report.json and `folder`/report.html; a reader sees the old file or the new.

    Raises InputError where a file cannot be written, and BackendUnavailable where the page's libraries are
    missing; report.json is then already there.
    """
    text = json.dumps(report.model_dump(mode="json"), ensure_ascii=False, allow_nan=False, indent=1)
    replace(folder / "report.json", text + "\n")
    replace(folder / "report.html", render(report))


def load(path: Path) -> RunReport:
    """Reads a report.json. Raises InputError, which names the first key that is wrong."""
    return read_record(path, RunReport, "a run's report.json")
