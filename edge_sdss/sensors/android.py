"""A power trace that was recorded on an Android phone: power rails or the battery, from a CSV of its counters.

Perfetto records both (data source `android.power`; perfetto.dev/docs/data-sources/battery-counters) and its
trace_processor prints them as CSV, time in ns:

    ts,name,value            power.S2M_VDD_CPUCL2_uws is the energy of a rail in µW·s since boot,
                             batt.current_ua, batt.voltage_uv, batt.charge_uah are the battery's
    ts,power_rail_name,value the rails as module android.power_rails has them
    ts,current_ua,voltage_uv the battery in columns, as module android.battery has it; voltage_mv is taken too

Rails are measured behind the battery, so a charger does not disturb them, but which there are differs from phone to
phone: the total is `partial`. On Pixel phones a rail L* is a regulator that a buck converter S* feeds, so it would
count twice and stays out. The battery feeds the whole phone, so its total is `board`, while nothing charges it: what
flows in says nothing about the load, and such readings are None. Android writes discharge as negative, some fuel
gauges as positive; a falling charge counter settles it. Knows nothing of when a profile ran: times are the trace's.
"""

from __future__ import annotations

import csv
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Reading, Total
from edge_sdss.tree import Tree

LIVE = False  # its times are the phone's, so it says nothing of a window on this machine
VARIABLE = "EDGE_SDSS_ANDROID_TRACE"
ASKED = "import a power trace (android)"
QUERY = "select ts, t.name, value from counter c join counter_track t on c.track_id = t.id"
MAKE = (
    "record with Perfetto's data source android.power (battery_poll_ms: 250, collect_power_rails: true, counters "
    f"CHARGE, CURRENT and VOLTAGE), print `{QUERY}` as CSV with trace_processor, and name the file in {VARIABLE}"
)
COLUMNS = ("current_ua", "voltage_uv", "voltage_mv", "charge_uah")
BATTERY = "batt.power"  # no rail has such a name: batt. is what Perfetto begins the battery's counters with
MOST_W = 1000.0  # more than any phone draws: the unit is another than the column says
REGULATOR = re.compile(r"L\d+[MS]?_")

Series = dict[str, dict[float, "float | None"]]
"""Values by time in s, by counter."""


class Android:
    """A recorded trace. `bad_rows` counts the lines that could not be understood."""

    name = "android"

    def __init__(
        self, series: Series, channels: tuple[Channel, ...], total: Total, absent: Mapping[str, str], bad_rows: int
    ) -> None:
        self.channels, self.total, self.absent, self.bad_rows = channels, total, absent, bad_rows
        self._series = series
        self._times = iter(sorted({time for values in series.values() for time in values}))

    def read(self) -> Reading | None:
        """Returns the next recorded reading, None after the last.

        Its time is the phone's, in s since boot. Rails of different meters have different times; None between.
        """
        time = next(self._times, None)
        if time is None:
            return None
        return Reading(time, {channel.name: self._series[channel.name].get(time) for channel in self.channels})

    def close(self) -> None:
        """Ends the trace: nothing more is read."""
        self._times = iter(())


def open(tree: Tree, clock: Clock, *, trace: Path | None = None) -> Android:
    """Reads a trace, by default the one that EDGE_SDSS_ANDROID_TRACE names; tree and clock are not used.

    Raises SensorUnavailable where there is none, or no power in it. Lines that make no sense are left out and counted.
    """
    name = str(trace or os.environ.get(VARIABLE, ""))
    if not name:
        raise SensorUnavailable(message(ASKED, "none is given, and a phone's power cannot be read from here", MAKE))
    try:
        with Path(name).open(encoding="utf-8", errors="replace", newline="") as stream:
            counters, bad = _counters(stream)
    except OSError as error:
        raise SensorUnavailable(message(ASKED, f"{name}: {error.strerror}", MAKE)) from error
    except ValueError as error:
        raise SensorUnavailable(message(ASKED, f"{name}: {error}", MAKE)) from error
    sensor = _sensor(counters, bad)
    if not sensor.channels:
        why = "; ".join(f"{key}: {value}" for key, value in sensor.absent.items()) or "no row"
        raise SensorUnavailable(message(ASKED, f"{name} holds no rail's energy and no battery's power ({why})", MAKE))
    return sensor


def _counters(stream: TextIO) -> tuple[Series, int]:
    """Every rail and battery counter, and the number of lines that make no sense. Raises ValueError without `ts`."""
    lines = _rows(stream)
    header = [cell.strip().lower() for cell in next(lines, None) or []]
    rail = "power_rail_name" in header
    key = "power_rail_name" if rail else "name"
    value = next((column for column in ("value", "energy_since_boot") if column in header), "")
    wide = [] if key in header and value else [column for column in COLUMNS if column in header]
    if "ts" not in header or not (wide or (key in header and value)):
        raise ValueError("the first line does not name the columns ts, name, value or ts, current_ua, voltage_uv")
    series: Series = {}
    bad = 0
    for cells in lines:
        row = dict(zip(header, cells or [], strict=False))
        time = _number(row.get("ts"))
        named = {row.get(key, ""): row.get(value)} if not wide else {f"batt.{name}": row.get(name) for name in wide}
        figures = {name: figure for name, text in named.items() if (figure := _number(text)) is not None}
        if time is None or not figures:
            bad += 1
            continue
        for name, figure in figures.items():
            match = re.fullmatch(r"(?:power\.)?(.+?)(_uws)?", name)
            if match and (match[2] or rail):
                bad += figure < 0
                series.setdefault(match[1], {})[time * 1e-9] = figure * 1e-6 if figure >= 0 else None
            elif name.startswith("batt."):
                series.setdefault(name, {})[time * 1e-9] = figure
    return series, bad


def _rows(stream: TextIO) -> Iterator[list[str] | None]:
    """The lines that are not empty; None for one that is no CSV."""
    rows = csv.reader(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None
        else:
            if row:
                yield row


def _sensor(counters: Series, bad: int) -> Android:
    rails = {name: values for name, values in counters.items() if not name.startswith("batt.")}
    series: Series = {name: values for name, values in rails.items() if len(values) > 1}
    absent = {"rows": f"{bad} could not be understood"} if bad else {}
    absent |= {name: "read only once" for name in rails if name not in series}
    channels = tuple(Channel(name, "energy") for name in sorted(series))
    summed = tuple(channel.name for channel in channels if not REGULATOR.match(channel.name))
    total = Total(note="no total in this trace")
    if summed:
        total = Total("partial", summed, "the rails that this phone meters, without those that others feed")
    power, why = _battery(counters)
    if power:
        series[BATTERY] = power
        channels += (Channel(BATTERY, "power"),)
        total = Total("board", (BATTERY,), f"the whole phone, from its battery; {why}")
    elif why:
        absent[BATTERY] = why
    return Android(series, channels, total, absent, bad)


def _battery(counters: Series) -> tuple[dict[float, float | None], str]:
    """Power in W drawn from the battery by time, and what it rests on, or why there is none."""
    current, charge = _known(counters, "batt.current_ua"), _known(counters, "batt.charge_uah")
    microvolts, millivolts = _known(counters, "batt.voltage_uv"), _known(counters, "batt.voltage_mv")
    voltage = microvolts or {time: value * 1e3 for time, value in millivolts.items()}
    if not current or not voltage:
        seen = ("current", "voltage: record BATTERY_COUNTER_VOLTAGE too") if current else ("voltage", "current")
        return {}, f"{seen[0]} without {seen[1]}" if current or voltage else ""
    falls = len(charge) > 1 and charge[max(charge)] < charge[min(charge)]
    inverted = falls and sum(current.values()) > 0
    power: dict[float, float | None] = {}
    times = sorted(voltage)
    for time in sorted(current):
        volts = voltage[times[max(0, bisect_right(times, time) - 1)]] * 1e-6
        drawn = current[time] * 1e-6 * volts * (1 if inverted else -1)
        power[time] = drawn if 0 <= drawn <= MOST_W else None
    charging = sum(value is None for value in power.values())
    if charging == len(power):
        return {}, "charging all the time, or a unit is wrong: unplug it, and record BATTERY_COUNTER_CHARGE too"
    sign = "this gauge writes discharge as positive" if inverted else "discharge is negative"
    return power, f"{sign}; {charging} of {len(power)} readings are left out, as while charging"


def _known(counters: Series, name: str) -> dict[float, float]:
    return {time: value for time, value in counters.get(name, {}).items() if value is not None}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
