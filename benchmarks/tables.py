"""Write the tables of the README and of docs/measured.md from the results. Knows nothing of how a figure was measured.

A block `<!-- table:NAME -->` ... `<!-- /table -->` holds the newest line of each case, metric and device
of the benchmark NAME: one row each, or, of a benchmark in WIDE, one row a case with these metrics side by
side; `<!-- table:NAME all -->` is always of the first form. `table:study` and `table:confirmation` are what
the study of selection found. `python benchmarks/tables.py` rewrites the blocks; `--check` only says whether they
differ.
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

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md")
BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+)(?P<all> all)? -->\n).*?(?P<end><!-- /table -->)", re.S)
WIDE = {
    "loop": (
        "held-out NLL before", "held-out NLL after", "change of held-out NLL", "change of ROUGE-1",
        "change of general NLL", "whole run",
    ),
    "npu": (
        "prefill: argmax agreement with float32", "prefill: change of NLL", "decode: argmax agreement with float32",
        "greedy: answers of 32 tokens equal to float32's", "adapter of r = 8: error of its effect",
        "context binary of prefill",
    ),
    "inference": (
        "decode", "decode, r = 8 active", "prefill of 512", "size", "held-out NLL", "change of NLL", "KL to float32",
    ),
    "training-sweep": ("speed", "peak RSS", "peak of live tensors", "larger budget surely slower"),
    "training": (
        "peak of live tensors / M*", "peak RSS / (M* + runtime), since loaded",
        "peak RSS / (M* + runtime), whole life", "least budget that did / the planner's least",
    ),
}  # fmt: skip
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


def wide(rows: Iterable[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """The rows as a Markdown table with a row for each case and device, and a column for each of these metrics."""
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["metric"] in metrics:
            cases.setdefault((row["case"], _device(row)), {})[row["metric"]] = row
    lines = [["Case", *metrics, "Device", "Commit"], ["---"] * (len(metrics) + 3)]
    for (case, device), found in cases.items():
        commits = dict.fromkeys(row["commit"] for row in found.values())
        cells = [_cell(found[metric]) if metric in found else "" for metric in metrics]
        lines.append([_escaped(case), *cells, device, ", ".join(commits)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def rewrite(text: str, lines: list[dict[str, Any]], study: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text with each of its blocks filled. Raises ValueError for a block without results."""

    def fill(match: re.Match[str]) -> str:
        if study and match["name"] in ("study", "confirmation"):
            made = report.summary(study) if match["name"] == "study" else report.confirmation(study)
            return match[1] + made + match["end"]
        rows = newest(lines, match["name"])
        if not rows:
            known = ", ".join(sorted({line["bench"] for line in lines})) or "none at all"
            raise ValueError(f"table:{match['name']} has no results; there are {known}")
        name = match["name"]
        short = name in WIDE and not match["all"]
        return match[1] + (wide(rows, WIDE[name]) if short else table(rows)) + match["end"]

    return BLOCK.sub(fill, text)


def number(value: float | None) -> str:
    """Four significant digits, thousands separated, no exponent from 0.0001 up; empty for None."""
    if value is None:
        return ""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    peer = f"{row['peer']} (× {number(row['ratio'])})" if row["peer"] else ""
    cells = [
        row["case"],
        row["metric"],
        _value(row),
        _interval(row),
        number(row["n"]),
        peer,
        _device(row),
        row["commit"],
    ]
    return [_escaped(cell) for cell in cells]


def _device(row: Mapping[str, Any]) -> str:
    return str(row["device"]) + (" (emulated)" if row["emulated"] else "")


def _cell(row: Mapping[str, Any]) -> str:
    """Value, interval and ratio in one cell; which peer the ratio is of, the text around the table says."""
    interval = f" ({_interval(row)})" if row["lo"] is not None else ""
    ratio = f", × {number(row['ratio'])}" if row["peer"] else ""
    return _escaped(_value(row) + interval + ratio)


def _value(row: Mapping[str, Any]) -> str:
    return f"{number(row['value'])} {row['unit'] if row['unit'] != '1' else ''}".strip()


def _interval(row: Mapping[str, Any]) -> str:
    return f"{number(row['lo'])} to {number(row['hi'])}" if row["lo"] is not None else ""


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def main(arguments: list[str], pages: Sequence[Path] = PAGES, folder: Path = results.FOLDER) -> int:
    """Returns the exit status: 1 where a check finds a table that is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table differs")
    check = parser.parse_args(arguments).check
    lines, study, differ = read(folder), report.all_lines(folder / "quality"), False
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = rewrite(old, lines, study)
        if check and new != old:
            print(f"{page.name}: tables differ from the results; run `python benchmarks/tables.py`")
            differ = True
        elif not check:
            page.write_text(new, encoding="utf-8")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
