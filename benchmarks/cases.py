"""What each case of `edge-sdss profile` costs here, with the default model.

    python benchmarks/cases.py                                profiles every case and appends
    python benchmarks/cases.py --report OUT/report.json       appends a profile that was made by hand

A line for each case's time per item, rate, J per item and peak memory. A power that no sensor tells has no line;
the settings of every line say the scope of the total, `none` where there is no power sensor.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results

from edge_sdss.profiling import files, schema


def lines(report: schema.Report) -> Iterator[dict[str, Any]]:
    """The figures of a profile as lines of results."""
    if report.device.replayed:
        sys.exit("cases: a replayed profile holds no figures of this machine; profile the machine itself")
    for case in report.cases:
        facts = {"total_scope": case.energy.scope, **case.settings}
        if report.model:
            facts |= {"model": report.model.name, "dtype": report.model.dtype, "backend": report.model.backend}
        common = {"bench": "profile", "case": case.test, "settings": facts, "emulated": report.device.emulated}
        mirrored = {"time": "rate", "rate": "time"}.get(case.primary)  # the same figure the other way round
        for name, found in case.metrics.items():
            if name == mirrored:
                continue
            scale, unit = _scale(found)
            interval = {"lo": _times(found.lo, scale), "hi": _times(found.hi, scale), "n": found.n}
            metric = f"time per {case.item}" if name == "time" else name.replace("_", " ")
            yield {**common, "metric": metric, "value": found.median * scale, "unit": unit, **interval}
        if case.energy.per_item_j is not None:
            interval = {"lo": case.energy.per_item_lo, "hi": case.energy.per_item_hi, "n": len(case.runs)}
            yield {**common, "metric": "energy", "value": case.energy.per_item_j, "unit": f"J/{case.item}", **interval}
        if case.memory.peak_rss_bytes is not None:
            peak = case.memory.peak_rss_bytes / 2**20
            yield {**common, "metric": "peak RSS", "value": peak, "unit": "MiB", "n": len(case.runs)}


def _scale(found: schema.Summary) -> tuple[float, str]:
    if found.unit != "s":
        return 1.0, found.unit
    return next((k, unit) for k, unit in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")) if found.median * k < 1e3 or k == 1.0)


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def main() -> None:
    """Profiles, or reads a profile, and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="report.json of a finished profile")
    given = parser.parse_args()
    if given.report is not None:
        report = files.load(given.report)
    else:
        with tempfile.TemporaryDirectory() as folder:
            code = subprocess.run(
                [sys.executable, "-m", "edge_sdss", "profile", "--out", folder], check=False
            ).returncode
            if code:
                sys.exit(f"cases: edge-sdss profile ended with code {code}")
            report = files.load(Path(folder))
    made_at = report.environment.get("commit")
    print(f"appended to {results.append(lines(report), made_at=made_at).name}")


if __name__ == "__main__":
    main()
