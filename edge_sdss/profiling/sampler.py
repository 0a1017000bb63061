"""Reads sensors at jittered times in a thread of its own, and keeps what they said.

Knows nothing of windows, energy or reports.
"""

from __future__ import annotations

import os
import random
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import InputError, message
from edge_sdss.profiling import schema
from edge_sdss.sensors import Clock, Sensor

KEEP = 360_000
"""Passes that are kept whole: 10 h at 10 Hz. Then every second one of the older half goes, again and again."""

_JOIN_S = 10.0


class _Series:
    """Rows of time and channels of one sensor, 8 bytes a figure; NaN where one could not be read.

    All in one array, so that a row is there or not, whatever interrupts the program.
    """

    def __init__(self, sensor: Sensor, keep: int) -> None:
        self.sensor = sensor
        self.names = [channel.name for channel in sensor.channels]
        self.keep = keep
        self.width = 1 + len(self.names)
        self.rows = array("d")

    def read(self) -> None:
        """Appends what is new. A reading that is older than the last one is left out."""
        reading = self.sensor.read()
        if reading is None:
            return
        values = [reading.values.get(name) for name in self.names]
        row = array("d", [reading.time_s, *(float("nan") if value is None else value for value in values)])
        if len(self.rows) and not row[0] >= self.rows[-self.width]:
            return
        self.rows.extend(row)
        if len(self.rows) > self.keep * self.width:
            table = np.array(self.rows).reshape(-1, self.width)
            half = len(table) // 2
            self.rows = array("d", np.concatenate([table[:half:2], table[half:]]).tobytes())

    def table(self, start_s: float, end_s: float) -> npt.NDArray[np.float64]:
        """Copy of the rows with start_s <= time <= end_s, [n, 1 + channels]."""
        passes = range(len(self.rows) // self.width)
        first = bisect_left(passes, start_s, key=self._time)
        last = bisect_right(passes, end_s, key=self._time)
        return np.array(self.rows[first * self.width : last * self.width], np.float64).reshape(-1, self.width)

    def _time(self, index: int) -> float:
        return self.rows[index * self.width]


class Sampler:
    """Reads all sensors in one pass, then waits `interval_s` ± a random share of it up to `jitter`.

    Why random: a load that repeats itself in step with a fixed interval is always met in the same phase, so
    that any power between its least and its greatest comes out (aliasing). Each wait is drawn anew and
    counts from the last pass, so the phase wanders; passes that only tremble around a fixed grid would keep
    most of the error.

    A sensor whose `read` raises is switched off, with the reason in `failed`; the others go on. After a
    fork the child has no such thread: there `forked` is true, nothing is read and no table holds anything.
    """

    def __init__(
        self,
        sensors: Sequence[Sensor],
        *,
        interval_s: float,
        jitter: float,
        clock: Clock = time.monotonic,
        seed: int = 0,
        keep: int = KEEP,
    ) -> None:
        """Raises InputError for an interval or a jitter that cannot be, and for two sensors of one name."""
        if not interval_s > 0 or not 0 <= jitter < 1:
            found = f"interval {interval_s} s, jitter {jitter}"
            raise InputError(
                message("sample sensors", found, "give an interval above 0 and a jitter from 0 to below 1")
            )
        names = [sensor.name for sensor in sensors]
        if len(set(names)) < len(names):
            raise InputError(message("sample sensors", f"one name twice in {', '.join(names)}", "give each its own"))
        self.interval_s, self.jitter = interval_s, jitter
        self.failed: dict[str, str] = {}
        self.started = False
        self._clock = clock
        self._random = random.Random(seed)
        self._series = {sensor.name: _Series(sensor, keep) for sensor in sensors if sensor.channels}
        self._counters = [s for s in self._series.values() if any(c.kind == "energy" for c in s.sensor.channels)]
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid: int | None = None
        self._passes, self._busy_s = 0, 0.0
        self._first_s = self._last_s = self._largest_gap_s = None  # type: float | None

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that started the thread."""
        return self._pid is not None and self._pid != os.getpid()

    def start(self) -> None:
        """Takes a sample and starts the thread; does nothing where it runs. Raises InputError in a fork."""
        if self.forked:
            found = "this process is a fork of the one that started it"
            raise InputError(message("start the sampler", found, "make a new Meter here"))
        if self._thread is not None:
            return
        self.started = True
        self._pid = os.getpid()
        if not self._series:
            return
        self.sample()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="edge-sdss sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for it; what was read stays. Does nothing where none runs, or in a fork."""
        if self._thread is None or self.forked:
            return
        self._stopping.set()
        self._thread.join(_JOIN_S)  # a read that hangs in a driver must not hang the program
        self._thread = None

    def sample(self) -> None:
        """One pass over all sensors, now and in this thread."""
        if not self.forked:
            self._pass(list(self._series.values()), time.thread_time())

    def sample_counters(self) -> None:
        """One pass over the sensors with an energy counter, now and in this thread: for the edges of a window.

        Power is not read there: what it is just before a start says little of what it is just after.
        """
        if self._counters and not self.forked:
            self._pass(self._counters, time.thread_time(), whole=False)

    def next_wait_s(self) -> float:
        """Draws the time until the next pass."""
        return self.interval_s * (1 + self.jitter * self._random.uniform(-1, 1))

    def table(
        self, sensor: str, start_s: float = -float("inf"), end_s: float = float("inf")
    ) -> npt.NDArray[np.float64]:
        """Returns a sensor's rows [n, 1 + channels] of time and values, NaN where one could not be read."""
        if self.forked:
            return np.empty((0, self._series[sensor].width))
        with self._lock:
            return self._series[sensor].table(start_s, end_s)

    def info(self) -> schema.Sampler:
        """What it did so far. Processor time is that of the thread and of the passes at edges of windows."""
        elapsed = (self._last_s or 0.0) - (self._first_s or 0.0)
        return schema.Sampler(
            interval_s=self.interval_s,
            jitter=self.jitter,
            passes=self._passes,
            busy_s=self._busy_s,
            share=self._busy_s / elapsed if elapsed > 0 else 0.0,
            largest_gap_s=self._largest_gap_s,
        )

    def _run(self) -> None:
        began = 0.0  # of this thread's own processor time
        while not self._stopping.wait(self.next_wait_s()):
            began = self._pass(list(self._series.values()), began)

    def _pass(self, series: Sequence[_Series], began_s: float, *, whole: bool = True) -> float:
        """Returns the thread's processor time at its end, up to which it has been counted."""
        with self._lock:
            if whole:
                self._count(self._clock())
            for one in series:
                if one.sensor.name in self.failed:
                    continue
                try:
                    one.read()
                except Exception as error:  # against the contract; one bad sensor must not cost the others
                    self.failed[one.sensor.name] = f"switched off: {type(error).__name__}: {error}"
            ended = time.thread_time()
            self._busy_s += ended - began_s
        return ended

    def _count(self, now_s: float) -> None:
        if self._last_s is None:
            self._first_s = now_s
        else:
            self._largest_gap_s = max(now_s - self._last_s, self._largest_gap_s or 0.0)
        self._last_s = now_s
        self._passes += 1
