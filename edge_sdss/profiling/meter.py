"""Windows over any code: how long it took and what energy it needed.

    with Meter.auto() as meter:
        with meter.window("decode", items=128) as w:
            ...
        print(w.result.seconds, w.result.energy.total_j)

Knows nothing of cases, repetitions or reports. All times are those of the meter's clock, see `Meter.now`;
only `trace` gives them relative to `origin_s`, as the records do.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edge_sdss import sensors as sensing
from edge_sdss.errors import SensorUnavailable
from edge_sdss.profiling import schema
from edge_sdss.profiling.energy import Integral, counter, integrate, over, together
from edge_sdss.profiling.sampler import Sampler
from edge_sdss.profiling.window import Measurement, Window
from edge_sdss.sensors import Channel, Clock, Sensor
from edge_sdss.tree import Tree
from edge_sdss.types import FloatArray

MIN_SAMPLES = 10
"""Fewer power samples say little: of a load that is on half the time they give the mean ± 30 %, one sigma."""

MIN_STEPS = 3
"""A counter must have moved so often: each edge of a window may be off by a step."""

MAX_GAP = 10.0
"""Longest time without a sample, as a multiple of the interval."""

Span = tuple[float, float]


class Meter:
    """Samples sensors while it runs, and measures windows.

    Windows nest, and may be open in several threads and tasks at once. Each reads energy counters just
    before its start and just after its end. Without a power sensor only its time is known, and the energy's
    `reason` says so. The same goes for a meter that was not started, and for a process that was forked from
    the one that started it: a thread does not outlive a fork, so make a new `Meter` there.
    """

    def __init__(
        self,
        sensors: Sequence[Sensor] = (),
        *,
        unavailable: Mapping[str, str] | None = None,
        interval_s: float = 0.1,
        jitter: float = 0.3,
        clock: Clock = time.monotonic,
        seed: int = 0,
    ) -> None:
        """Takes over the sensors and closes them at its end. Raises InputError as `Sampler` does."""
        self.sensors = tuple(sensors)
        self.unavailable = dict(unavailable or {})
        self.now = clock
        self.origin_s = clock()
        self.measurements: list[Measurement] = []
        self.sampler = Sampler(self.sensors, interval_s=interval_s, jitter=jitter, clock=clock, seed=seed)
        self.total_sensor, self.total = sensing.total(self.sensors)
        self._max_gap_s = MAX_GAP * interval_s

    @classmethod
    def auto(
        cls,
        tree: Tree | None = None,
        wanted: Sequence[str] | None = None,
        *,
        interval_s: float = 0.1,
        jitter: float = 0.3,
        clock: Clock = time.monotonic,
        seed: int = 0,
    ) -> Meter:
        """Opens every sensor that works here, or those in `wanted`.

        What runs is this process, also where the tree is another machine's: its memory is always read here.
        Raises SensorUnavailable where one in `wanted` cannot be read.
        """
        found = sensing.discover(tree, clock, wanted)
        opened, unavailable = list(found.sensors), dict(found.unavailable)
        if "process" in unavailable:
            with contextlib.suppress(SensorUnavailable):
                opened += sensing.discover(Tree(), clock, ["process"]).sensors
                del unavailable["process"]
        return cls(
            opened,
            unavailable=unavailable,
            interval_s=interval_s,
            jitter=jitter,
            clock=clock,
            seed=seed,
        )

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts sampling; does nothing where it runs. Raises InputError in a fork."""
        self.sampler.start()

    def close(self) -> None:
        """Ends sampling and closes the sensors; results can still be read. A fork leaves them to its parent."""
        if self.sampler.forked:
            return
        self.sampler.stop()
        for sensor in self.sensors:
            sensor.close()

    def window(self, name: str, items: float | None = None) -> Window:
        """Returns a window to enter with `with`, or to decorate a function with. See `Window`."""
        return Window(self, name, items)

    def energy(
        self,
        spans: Sequence[Span],
        items: float | None = None,
        idle_w: float | None = None,
        per_run: Span | None = None,
    ) -> schema.Energy:
        """Returns the energy of all (start, end) together: the total and each rail.

        `items` were processed in them, `idle_w` is drawn anyway, and `per_run` is the 95 % interval of
        J per item over the runs, where it is known.
        """
        tables = {sensor.name: self._tables(sensor, spans) for sensor in self.sensors if sensor.channels}
        whole = self._total(spans, tables)
        rails = {
            f"{sensor.name}:{channel.name}": self._integral(spans, tables[sensor.name], sensor, [channel])
            for sensor in self.sensors
            for channel in sensor.channels
            if channel.kind in ("power", "energy")
        }
        known = whole.joules is not None
        above = None if whole.joules is None or idle_w is None else whole.joules - idle_w * whole.seconds
        return schema.Energy(
            scope=self.total.scope,
            total_j=whole.joules,
            above_idle_j=above,
            per_item_j=None if whole.joules is None or not items else whole.joules / items,
            per_item_lo=per_run[0] if known and per_run else None,
            per_item_hi=per_run[1] if known and per_run else None,
            mean_w=whole.mean_w,
            peak_w=whole.peak_w,
            rails={
                name: schema.Rail(joules=rail.joules, mean_w=rail.mean_w, peak_w=rail.peak_w)
                for name, rail in rails.items()
            },
            samples=whole.samples,
            largest_gap_s=whole.largest_gap_s,
            reason="" if known else whole.reason,
        )

    def mean_power(self, start_s: float, end_s: float) -> float | None:
        """Returns the mean of the total from start to end, in W; None where it is not known."""
        return self._total([(start_s, end_s)]).mean_w

    def idle(self, seconds: float) -> float | None:
        """Does nothing for so long and returns the mean of the total, in W; None, at once, without a total."""
        if self.total_sensor is None or seconds <= 0:
            return None
        self.sampler.sample_counters()
        start = self.now()
        while (left := start + seconds - self.now()) > 0:
            time.sleep(left)
        end = self.now()
        self.sampler.sample_counters()
        return self.mean_power(start, end)

    def samples(self, sensor: str, channel: str, start_s: float, end_s: float) -> list[float | None]:
        """Returns what a channel read from start to end; empty where there is no such channel."""
        for one in self.sensors:
            names = [found.name for found in one.channels]
            if one.name == sensor and channel in names:
                values = self.sampler.table(sensor, start_s, end_s)[:, 1 + names.index(channel)]
                return [value if math.isfinite(value) else None for value in values.tolist()]
        return []

    def trace(self, max_points: int = 2000) -> tuple[schema.Channel, ...]:
        """Returns every channel's samples. Where there are more than `max_points`, which is at least 2, they
        are thinned to the least and the greatest of each stretch, so that peaks stay.
        """
        found = []
        for sensor in self.sensors:
            table = self.sampler.table(sensor.name) if sensor.channels else np.empty((0, 1))
            for column, channel in enumerate(sensor.channels, start=1):
                values = table[:, column]
                kept = _extremes(values, max_points)
                found.append(
                    schema.Channel(
                        sensor=sensor.name,
                        name=channel.name,
                        kind=channel.kind,
                        unit=sensing.UNITS[channel.kind],
                        times_s=(table[kept, 0] - self.origin_s).tolist(),
                        values=[value if math.isfinite(value) else None for value in values[kept].tolist()],
                    )
                )
        return tuple(found)

    def sampler_info(self) -> schema.Sampler:
        """Returns what the sampling itself did so far."""
        return self.sampler.info()

    def sensors_info(self) -> tuple[schema.SensorInfo, ...]:
        """Returns every sensor: usable, or why not."""
        failed = self.sampler.failed
        opened = [
            schema.SensorInfo(
                name=sensor.name,
                usable=sensor.name not in failed,
                reason=failed.get(sensor.name, ""),
                channels=tuple(channel.name for channel in sensor.channels),
                absent=dict(sensor.absent),
            )
            for sensor in self.sensors
        ]
        others = [schema.SensorInfo(name=name, usable=False, reason=why) for name, why in self.unavailable.items()]
        return (*opened, *others)

    def _tables(self, sensor: Sensor, spans: Sequence[Span]) -> list[FloatArray]:
        margin = self._max_gap_s
        return [self.sampler.table(sensor.name, start - margin, end + margin) for start, end in spans]

    def _total(self, spans: Sequence[Span], tables: Mapping[str, list[FloatArray]] | None = None) -> Integral:
        sensor = self.total_sensor
        if sensor is None:
            return Integral(None, None, None, 0, None, self.total.note or "no power sensor can be read here")
        parts = [channel for channel in sensor.channels if channel.name in self.total.channels]
        rows = self._tables(sensor, spans) if tables is None else tables[sensor.name]
        found = self._integral(spans, rows, sensor, parts)
        if found.joules is not None:
            return found
        if self.sampler.forked:
            return replace(found, reason="this process is a fork of the one that samples: make a new Meter in it")
        if sensor.name in self.sampler.failed:
            return replace(found, reason=f"{sensor.name} {self.sampler.failed[sensor.name]}")
        if not self.sampler.started:
            return replace(found, reason="the meter was not started: measure within `with meter:`")
        return found

    def _integral(
        self, spans: Sequence[Span], tables: Sequence[FloatArray], sensor: Sensor, channels: Sequence[Channel]
    ) -> Integral:
        """The sum of a sensor's channels. Power is summed pass by pass, so that its peak is one of them all."""
        column = {channel.name: number for number, channel in enumerate(sensor.channels, start=1)}
        gap = self._max_gap_s
        windows = list(zip(tables, spans, strict=True))
        parts = []
        if power := [column[channel.name] for channel in channels if channel.kind == "power"]:
            each = [
                integrate(table[:, 0], table[:, power].sum(axis=1), *span, max_gap_s=gap, min_samples=1, edges="hold")
                for table, span in windows
            ]
            parts.append(over(each, min_samples=MIN_SAMPLES))
        for one in (channel for channel in channels if channel.kind == "energy"):
            each = [
                counter(table[:, 0], table[:, column[one.name]], one.wraps_at_j, *span, max_gap_s=gap, min_samples=0)
                for table, span in windows
            ]
            parts.append(over(each, min_samples=MIN_STEPS))
        return together(parts)


def _extremes(values: FloatArray, most: int) -> npt.NDArray[np.intp]:
    """Indices, in order, of at most `most` values: the least and the greatest of each of most / 2 stretches."""
    if values.size <= most:
        return np.arange(values.size)
    stretches = max(1, most // 2)
    length = -(-values.size // stretches)
    padded = np.full(stretches * length, np.nan)
    padded[: values.size] = values
    table = padded.reshape(stretches, length)
    unread = ~np.isfinite(table)
    starts = np.arange(stretches) * length
    least = starts + np.where(unread, np.inf, table).argmin(axis=1)
    greatest = starts + np.where(unread, -np.inf, table).argmax(axis=1)
    kept = np.union1d(least, greatest)
    return kept[kept < values.size]
