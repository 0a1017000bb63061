"""The energy of a power trace that was recorded on a phone, over its whole length or a part of it.

Knows nothing of what ran on the phone; whoever recorded the trace does.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from edge_sdss.errors import InputError, SensorUnavailable, message
from edge_sdss.profiling import schema
from edge_sdss.profiling.meter import Meter
from edge_sdss.sensors import Reading, Sensor, android, powerlog
from edge_sdss.tree import Tree

_RATE_HZ = 4.0  # of Perfetto's power counters, at most; a gap of ten intervals is too long


def energy(
    trace: Path, *, start_s: float = 0.0, end_s: float = math.inf, items: float | None = None
) -> tuple[schema.Energy, float]:
    """Returns the energy between two times, counted from the trace's beginning, and the seconds between them.

    Perfetto's CSV, or that of any tool that names its columns with their units: see `sensors.android` and
    `sensors.powerlog`. Raises SensorUnavailable where the file holds no power, InputError where the times lie outside
    of it.
    """
    sensor = _opened(trace)
    readings = list(iter(sensor.read, None))
    first, last = readings[0].time_s, readings[-1].time_s
    start, end = first + start_s, min(first + end_s, last)
    if not first <= start < end:
        found = f"it lasts {last - first:.1f} s"
        raise InputError(message(f"take {start_s:g} to {end_s:g} s of {trace}", found, "choose times within it"))
    meter = Meter([_Played(sensor, readings)], interval_s=1 / _RATE_HZ)
    for _ in readings:
        meter.sampler.sample()
    return meter.energy([(start, end)], items), end - start


def _opened(trace: Path) -> Sensor:
    try:
        return android.open(Tree(), lambda: 0.0, trace=trace)
    except SensorUnavailable as first:
        try:
            return powerlog.open(Tree(), lambda: 0.0, trace=trace)
        except SensorUnavailable as second:
            with contextlib.suppress(OSError), trace.open(encoding="utf-8", errors="replace") as stream:
                if "ts" not in stream.readline().lower().split(","):
                    raise second from None
            raise first from None


class _Played:
    """The readings of a sensor, one after the other."""

    def __init__(self, sensor: Sensor, readings: list[Reading]) -> None:
        self.name, self.channels, self.total, self.absent = sensor.name, sensor.channels, sensor.total, sensor.absent
        self._readings = iter(readings)

    def read(self) -> Reading | None:
        return next(self._readings, None)

    def close(self) -> None:
        """Nothing is open."""
