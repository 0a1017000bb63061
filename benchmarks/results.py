"""Where benchmarks put their figures: one JSON object a line, appended to results/<device>.jsonl.

Knows nothing of what is measured.
"""

from __future__ import annotations

import fcntl
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_sdss import device
from edge_sdss.profiling.versus import Versus

FOLDER = Path(__file__).resolve().parent / "results"
REQUIRED = ("bench", "case", "metric", "value", "unit")
OPTIONAL = {"lo": None, "hi": None, "n": 1, "peer": None, "ratio": None, "settings": {}, "emulated": False}
NUMBERS = ("value", "lo", "hi", "ratio")


def append(lines: Iterable[Mapping[str, Any]], folder: Path = FOLDER, made_at: str | None = None) -> Path:
    """Appends the lines, all or none, and returns the file.

    A line has bench, case, metric, value and unit, and where they are known lo, hi (95 % interval), n,
    peer (name of what it is compared with), ratio (ours / peer, measured in the same run), settings and
    emulated. Commit, device and time are filled in; `made_at` is the commit where that is not the one here.
    Raises ValueError for a line that does not fit.
    """
    stamp = {
        "commit": made_at or commit(),
        "device": device.slug(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    made = {"emulated": device.emulated() is not None}
    text = "".join(json.dumps(validated({**made, **line}) | stamp, allow_nan=False) + "\n" for line in lines)
    file = folder / f"{stamp['device']}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed
        stream.write(text)
    return file


def timed(bench: str, case: str, metric: str, found: Versus, peer: str, **settings: Any) -> dict[str, Any]:
    """A line from the harness's ABBA runs: seconds a call with their 95 % interval, and the ratio to the peer."""
    ours = found.ours
    scale, unit = next((s, u) for s, u in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")) if ours.median * s < 1e3 or s == 1.0)
    bounds = {name: None if value is None else value * scale for name, value in (("lo", ours.lo), ("hi", ours.hi))}
    ratio = {"ratio_lo": round(found.lo, 4), "ratio_hi": round(found.hi, 4), "blocks": found.n}
    return {
        "bench": bench,
        "case": case,
        "metric": metric,
        "value": ours.median * scale,
        "unit": unit,
        **bounds,
        "n": ours.n,
        "peer": peer,
        "ratio": round(found.ratio, 4),
        "settings": {**settings, **ratio},
    }


def validated(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with every optional field set. Raises ValueError for a missing, unknown or wrong field."""
    if missing := [name for name in REQUIRED if line.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} missing in {line}")
    if unknown := sorted(line.keys() - {*REQUIRED, *OPTIONAL}):
        raise ValueError(f"unknown {', '.join(unknown)} in {line}")
    whole = {**OPTIONAL, **line}
    for name in NUMBERS:
        value = whole[name]
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{name} = {value!r} is no finite number in {line}")
    for lo, hi in (("lo", "value"), ("value", "hi"), ("lo", "hi")):
        if whole[lo] is not None and whole[hi] is not None and whole[lo] > whole[hi]:
            raise ValueError(f"{lo} > {hi} in {line}")
    if (whole["peer"] is None) != (whole["ratio"] is None):
        raise ValueError(f"peer and ratio go together in {line}")
    return whole


def commit() -> str:
    """The short hash of HEAD, with -dirty where tracked files other than results are changed."""
    here = FOLDER.parent
    try:
        head = _git(here, "rev-parse", "--short", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
