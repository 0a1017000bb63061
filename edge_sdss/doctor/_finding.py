"""What probes have in common: a finding, and words for it. Knows nothing of what is looked at."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any, Literal

from edge_sdss.errors import EdgeSdssError

Status = Literal["ok", "warn", "missing", "n.a."]
Finding = tuple[str, Status, str, str]
"""Name, status, what was found, what to do."""

LEAST_FREE_BYTES = 2 << 30
TRAIN = "run `pip install 'edge_sdss[train]'`"


def line(error: BaseException) -> str:
    """An exception on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def parts(error: EdgeSdssError) -> tuple[str, str]:
    """What was found and what to do, from the message of an error."""
    _, _, rest = str(error).partition(": ")
    found, _, do = rest.partition("; ")
    return (found, do.removesuffix(".")) if do else (str(error), "")


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def imported(name: str) -> Any:
    """The module, or the exception that its import raised: a missing libcuda is an OSError."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def gib(size: int) -> str:
    """A size in words."""
    return f"{size / 2**30:.1f} GiB"
