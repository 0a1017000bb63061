"""Writes and reads a report's two files. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from edge_sdss.errors import InputError, message
from edge_sdss.report.html import render
from edge_sdss.report.schema import RunReport


def write(report: RunReport, folder: Path) -> None:
    """Writes `folder`/report.json and `folder`/report.html; a reader sees the old file or the new.

    Raises InputError where a file cannot be written, and BackendUnavailable where the page's libraries are
    missing; report.json is then already there.
    """
    text = json.dumps(report.model_dump(mode="json"), ensure_ascii=False, allow_nan=False, indent=1)
    _replace(folder / "report.json", text + "\n")
    _replace(folder / "report.html", render(report))


def load(path: Path) -> RunReport:
    """Reads a report.json. Raises InputError, which names the first key that is wrong."""
    asked = f"read the report {path}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise InputError(message(asked, error.strerror or "unreadable", "give a run's report.json")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(message(asked, f"no valid JSON, {error}", "give a run's report.json")) from error
    return _validated(value, asked)


def _validated(value: Any, asked: str) -> RunReport:
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != "1":
        found = f"schema_version {version!r}" if version is not None else "no schema_version"
        raise InputError(message(asked, f"{found}, not '1'", "give a report.json that this version wrote"))
    try:
        return RunReport.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(message(asked, f"{key}: {first['msg']}", "write the report anew")) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        found = error.strerror or "failed"
        raise InputError(message(f"write {path}", found, "free space or choose another --out")) from error
    finally:
        partial.unlink(missing_ok=True)
