"""A power trace of a bench instrument or a phone's logging tool: a CSV of time and power, or of current and voltage.

The first line names the columns with their units, as such tools write them:

    Time (s), Power (mW)                 or  time_ms,current_ma,voltage_v
    Time (ms),Main Avg Current (mA),Main Avg Voltage (V)

A quantity is known by its word (time, power, current, voltage), its unit by what stands in brackets or behind the last
underscore; without a unit nothing is guessed. Of several columns of one quantity those called main, total or battery
are taken, else none. What the instrument meters is the whole phone, so the total is `board`. Power that flows in is no
load and is None, as is what cannot be read. Knows nothing of what ran meanwhile: times are the trace's.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Reading, Total
from edge_sdss.tree import Tree

LIVE = False  # its times are the instrument's, so it says nothing of a window on this machine
VARIABLE = "EDGE_SDSS_POWER_LOG"
ASKED = "import a power trace (powerlog)"
MAKE = (
    "export a CSV whose first line names time with power, or with current and voltage, each with its unit, such as "
    f"`Time (s),Power (mW)`, and name the file in {VARIABLE}"
)
CHANNEL = "supply.power"
MOST_W = 1000.0  # more than any phone draws: the unit is another than the column says

_UNITS = {
    "time": {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "power": {"w": 1.0, "mw": 1e-3, "uw": 1e-6, "µw": 1e-6},
    "current": {"a": 1.0, "ma": 1e-3, "ua": 1e-6, "µa": 1e-6},
    "voltage": {"v": 1.0, "mv": 1e-3, "uv": 1e-6, "µv": 1e-6},
}
_WORDS = {"timestamp": "time", "ts": "time", "volt": "voltage"}
_PREFERRED = ("main", "total", "battery")


@dataclass(frozen=True)
class _Column:
    """Where a quantity stands, and what one of its unit is in SI."""

    index: int
    factor: float


class PowerLog:
    """A recorded trace, row by row. `bad_rows` counts the lines that could not be understood."""

    name = "powerlog"

    def __init__(self, rows: Sequence[tuple[float, float | None]], note: str, bad_rows: int) -> None:
        self.channels: tuple[Channel, ...] = (Channel(CHANNEL, "power"),)
        self.total = Total("board", (CHANNEL,), note)
        self.absent: Mapping[str, str] = {"rows": f"{bad_rows} could not be understood"} if bad_rows else {}
        self.bad_rows = bad_rows
        self._rows = iter(rows)

    def read(self) -> Reading | None:
        """Returns the next recorded reading, None after the last; its time is the trace's, in s."""
        row = next(self._rows, None)
        return None if row is None else Reading(row[0], {CHANNEL: row[1]})

    def close(self) -> None:
        """Ends the trace: nothing more is read."""
        self._rows = iter(())


def open(tree: Tree, clock: Clock, *, trace: Path | None = None) -> PowerLog:
    """Reads a trace, by default the one that EDGE_SDSS_POWER_LOG names; tree and clock are not used.

    Raises SensorUnavailable where there is none, or no power in it. Lines that make no sense are left out and counted.
    """
    name = str(trace or os.environ.get(VARIABLE, ""))
    if not name:
        raise SensorUnavailable(message(ASKED, "none is given, and no instrument can be read from here", MAKE))
    try:
        with Path(name).open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            rows, note, bad = _read(csv.reader(line.replace("\0", "") for line in stream))
    except OSError as error:
        raise SensorUnavailable(message(ASKED, f"{name}: {error.strerror}", MAKE)) from error
    except (ValueError, csv.Error) as error:
        raise SensorUnavailable(message(ASKED, f"{name}: {error}", MAKE)) from error
    if all(watts is None for _, watts in rows):
        why = "it holds no row" if not rows else "charging all the time, or a unit is wrong"
        raise SensorUnavailable(message(ASKED, f"{name}: {why}", MAKE))
    return PowerLog(rows, note, bad)


def _read(lines: Iterator[list[str]]) -> tuple[list[tuple[float, float | None]], str, int]:
    """Time and power of every line, what the power rests on, and how many lines make no sense."""
    found = _columns(next(lines, []))
    time = found["time"]
    both = (found["power"],) if "power" in found else (found["current"], found["voltage"])
    rows: list[tuple[float, float | None]] = []
    bad = 0
    for cells in lines:
        at, factors = _number(cells, time), [_number(cells, column) for column in both]
        if at is None or (rows and at < rows[-1][0]):
            bad += bool(cells)
            continue
        watts = None if None in factors else math.prod(value for value in factors if value is not None)
        if watts is None:
            bad += 1
        rows.append((at, watts if watts is not None and 0 <= watts <= MOST_W else None))
    lost = sum(watts is None for _, watts in rows)
    what = "power as it was logged" if "power" in found else "current times voltage"
    return rows, f"the whole phone, {what}; {lost} of {len(rows)} readings are left out", bad


def _columns(header: Sequence[str]) -> dict[str, _Column]:
    """The columns that are used, by quantity. Raises ValueError where some lack, or there are several."""
    named: dict[str, list[tuple[str, _Column]]] = {}
    for index, cell in enumerate(header):
        words = [word for word in re.split(r"[^a-zµ]+", cell.lower()) if word]
        quantity = next((_WORDS.get(word, word) for word in words if _WORDS.get(word, word) in _UNITS), None)
        if quantity is None:
            continue
        unit = words[-1]
        if unit in _UNITS[quantity]:
            named.setdefault(quantity, []).append((cell.strip(), _Column(index, _UNITS[quantity][unit])))
    found = {quantity: column for quantity, columns in named.items() if (column := _one(columns)) is not None}
    if "time" not in found or not ("power" in found or {"current", "voltage"} <= set(found)):
        several = [cell for quantity, columns in named.items() if quantity not in found for cell, _ in columns]
        why = f"which one of {', '.join(several)} it is, is not said" if several else f"it names {', '.join(header)!r}"
        raise ValueError(f"the first line does not tell time and power with their units: {why}")
    return found


def _one(columns: Sequence[tuple[str, _Column]]) -> _Column | None:
    for word in _PREFERRED:
        preferred = [column for name, column in columns if word in name.lower()]
        if len(preferred) == 1:
            return preferred[0]
    return columns[0][1] if len(columns) == 1 else None


def _number(cells: Sequence[str], column: _Column) -> float | None:
    try:
        value = float(cells[column.index])
    except (ValueError, IndexError):
        return None
    return value * column.factor if math.isfinite(value) else None
