"""Write the README's tables from the results. Knows nothing of how a figure was measured.

A block `<!-- table:NAME -->` ... `<!-- /table -->` holds the newest line of each case, metric and device
of the benchmark NAME; `table:study` is what the study of selection found. `python benchmarks/tables.py` rewrites the
blocks; `--check` only says whether they differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import results
from quality import report

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.S)
COLUMNS = ("Case", "Metric", "Value", "95 % interval", "n", "Compared with", "Device", "Commit")


def read(folder: Path) -> list[dict[str, Any]]:
    """All result lines of all devices, the files in the order of their names."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def newest(lines: Iterable[Mapping[str, Any]], bench: str) -> list[Mapping[str, Any]]:
    """The newest line per (case, metric, device), in the order in which each first appeared."""
    rows: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for line in lines:
        key = (line["case"], line["metric"], line["device"])
        if line["bench"] == bench and (key not in rows or line["time"] >= rows[key]["time"]):
            rows[key] = line
    return list(rows.values())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [_cells(row) for row in rows]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def rewrite(text: str, lines: list[dict[str, Any]], study: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text with each of its blocks filled. Raises ValueError for a block without results."""

    def fill(match: re.Match[str]) -> str:
        if match["name"] == "study" and study:
            return match[1] + report.summary(study) + match[3]
        rows = newest(lines, match["name"])
        if not rows:
            known = ", ".join(sorted({line["bench"] for line in lines})) or "none at all"
            raise ValueError(f"table:{match['name']} has no results; there are {known}")
        return match[1] + table(rows) + match[3]

    return BLOCK.sub(fill, text)


def number(value: float | None) -> str:
    """Four significant digits, thousands separated, no exponent from 0.0001 up; empty for None."""
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    interval = f"{number(row['lo'])} to {number(row['hi'])}" if row["lo"] is not None else ""
    peer = f"{row['peer']} (× {number(row['ratio'])})" if row["peer"] else ""
    device = row["device"] + (" (emulated)" if row["emulated"] else "")
    value = f"{number(row['value'])} {row['unit'] if row['unit'] != '1' else ''}".strip()
    cells = [row["case"], row["metric"], value, interval, number(row["n"]), peer, device, row["commit"]]
    return [cell.replace("|", "\\|") for cell in cells]


def main(arguments: list[str], readme: Path = README, folder: Path = results.FOLDER) -> int:
    """Returns the exit status: 1 where a check finds a table that is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table differs")
    check = parser.parse_args(arguments).check
    old = readme.read_text(encoding="utf-8")
    new = rewrite(old, read(folder), report.all_lines(folder / "quality"))
    if check:
        if new != old:
            print(f"{readme.name}: tables differ from the results; run `python benchmarks/tables.py`")
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
