"""Windows, the sampling thread and the meter, on an injected clock and invented sensors."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edge_sdss.errors import InputError, SensorUnavailable
from edge_sdss.profiling import Meter
from edge_sdss.profiling import meter as module
from edge_sdss.profiling.sampler import Sampler
from edge_sdss.sensors import Channel, Kind, Reading, Total
from edge_sdss.tree import Tree


class Time:
    """A clock that goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Fake:
    """A sensor whose channels are functions of time; None, NaN, exceptions and all."""

    clock: Callable[[], float]
    values: Mapping[str, Callable[[float], Any]]
    kind: Kind = "power"
    scope: str = "module"
    name: str = "fake"
    wraps_at_j: float | None = None
    summed: tuple[str, ...] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    closed: int = 0
    reads: int = 0

    def __post_init__(self) -> None:
        self.channels = tuple(Channel(name, self.kind, self.wraps_at_j) for name in self.values)
        self.total = Total(self.scope, tuple(self.values) if self.summed is None else self.summed)  # type: ignore[arg-type]

    def read(self) -> Reading | None:
        self.reads += 1
        now = self.clock()
        return Reading(now, {name: value(now) for name, value in self.values.items()})

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """With it, `run` stands for the thread, which is not started."""
    monkeypatch.setattr(Sampler, "start", lambda self: setattr(self, "started", True) or self.sample())
    return Time()


def run(meter: Meter, clock: Time, seconds: float) -> None:
    """What the thread does, for so long."""
    end = clock.now + seconds
    while (wait := meter.sampler.next_wait_s()) < end - clock.now:
        clock.now += wait
        meter.sampler.sample()
    clock.now = end


# Energy of windows


def test_a_window_knows_its_time_and_energy(clock: Time) -> None:
    sensor = Fake(clock, {"VDD_IN": lambda t: 9.0, "VDD_SOC": lambda t: 2.0}, summed=("VDD_IN",))
    with Meter([sensor], clock=clock) as meter:
        run(meter, clock, 1)
        with meter.window("decode", items=60) as w:
            run(meter, clock, 3)
        run(meter, clock, 1)
    assert (w.result.name, w.result.items, w.result.error) == ("decode", 60, False)
    assert (w.start_s, w.end_s, w.result.seconds) == (1001, 1004, 3)
    found = w.result.energy
    assert (found.scope, found.reason) == ("module", "")
    assert (found.total_j, found.per_item_j) == (pytest.approx(27), pytest.approx(27 / 60))
    assert (found.mean_w, found.peak_w) == (pytest.approx(9), 9)
    assert found.above_idle_j is None
    assert found.rails["fake:VDD_SOC"].joules == pytest.approx(6)
    assert set(found.rails) == {"fake:VDD_IN", "fake:VDD_SOC"}
    assert 23 <= found.samples <= 43
    assert found.largest_gap_s is not None
    assert found.largest_gap_s <= 0.13
    assert meter.measurements == [w.result]
    assert sensor.closed == 1
    assert meter.energy([(1001, 1004)], 60) == found  # still, when it is closed


def test_burst_between_idles(clock: Time) -> None:
    """15 W within the window, 5 W around it: what is read beyond its edges must not leak in."""
    level = [5.0]
    with Meter([Fake(clock, {"VDD_IN": lambda t: level[0]})], clock=clock) as meter:
        run(meter, clock, 1)
        with meter.window("burst") as w:
            level[0] = 15.0
            run(meter, clock, 2)
        level[0] = 5.0
        run(meter, clock, 1)
        assert w.result.energy.total_j == pytest.approx(30)
        assert meter.energy([(w.start_s, w.end_s)], idle_w=5.0).above_idle_j == pytest.approx(20)
        assert meter.mean_power(1000.2, 1000.9) is None  # 7 samples or so
        assert meter.mean_power(w.start_s, w.end_s) == pytest.approx(15)


# 10 000 s of 5/15 W in step with the interval: n = 10⁵ samples worth a third of that, as in test_energy; the
# standard error of the mean is 0.5 √(3/10⁵) = 0.27 %.
@pytest.mark.parametrize(("jitter", "right"), [(0.3, True), (0.0, False)])
def test_only_jittered_sampling_finds_a_load_in_step_with_it(clock: Time, jitter: float, right: bool) -> None:
    sensor = Fake(clock, {"VDD_IN": lambda t: 15.0 if (t + 0.03) % 0.1 < 0.05 else 5.0})
    with Meter([sensor], clock=clock, jitter=jitter) as meter, meter.window("square") as w:
        run(meter, clock, 10_000)
    assert w.result.energy.total_j is not None
    assert (abs(w.result.energy.total_j / 100_000 - 1) < 0.01) is right


def test_waits_are_uniform_around_the_interval() -> None:
    sampler = Sampler([], interval_s=0.1, jitter=0.3)
    waits = np.array([sampler.next_wait_s() for _ in range(5000)])
    assert 0.07 <= waits.min() < 0.0702
    assert 0.1298 < waits.max() <= 0.13
    assert waits.mean() == pytest.approx(0.1, abs=4 * 0.0173 / np.sqrt(5000))
    assert waits.std() == pytest.approx(0.06 / np.sqrt(12), rel=0.05)


def test_counters_are_read_at_the_edges(clock: Time) -> None:
    """RAPL's counters, one of which wraps in the window. The thread comes late: a counter loses nothing by that."""
    wrap = 262143.328850
    sensor = Fake(
        clock,
        {"package-0": lambda t: (wrap - 50 + 30 * (t - 1000)) % wrap, "package-1": lambda t: 10 * t},
        "energy",
        wraps_at_j=wrap,
    )
    with Meter([sensor], clock=clock) as meter:
        run(meter, clock, 0.57)
        with meter.window("step") as w:
            run(meter, clock, 0.4)
            clock.now += 0.7
            run(meter, clock, 0.4)
    found = w.result.energy
    assert found.total_j == pytest.approx(60)
    assert found.rails["fake:package-0"].joules == pytest.approx(45)
    assert (found.peak_w, found.reason) == (None, "")
    with meter.window("still") as w:
        pass
    assert w.result.energy.total_j is None


def test_power_is_not_read_at_the_edges(clock: Time) -> None:
    sensor = Fake(clock, {"VDD_IN": lambda t: 5.0})
    with Meter([sensor], clock=clock) as meter:
        reads = sensor.reads
        with meter.window("w"):
            pass
        assert sensor.reads == reads


def test_total_of_several_rails_is_summed_pass_by_pass(clock: Time) -> None:
    """Rails that take turns: each peaks at 8 W, their sum never above 10 W."""
    sensor = Fake(clock, {"A": lambda t: 8.0 if t % 2 < 1 else 2.0, "B": lambda t: 2.0 if t % 2 < 1 else 8.0})
    with Meter([sensor], clock=clock) as meter, meter.window("w") as w:
        run(meter, clock, 10)
    assert (w.result.energy.total_j, w.result.energy.peak_w) == (pytest.approx(100), 10)
    assert w.result.energy.rails["fake:A"].peak_w == 8


def test_a_missing_rail_makes_the_total_unknown_and_not_smaller(clock: Time) -> None:
    sensor = Fake(clock, {"A": lambda t: 8.0, "B": lambda t: None})
    with Meter([sensor], clock=clock) as meter, meter.window("w", items=3) as w:
        run(meter, clock, 3)
    found = w.result.energy
    assert (found.total_j, found.per_item_j, found.mean_w, found.peak_w) == (None, None, None, None)
    assert found.reason == "no sample of power"
    assert found.rails["fake:A"].joules == pytest.approx(24)
    assert found.rails["fake:B"].joules is None


def test_several_spans(clock: Time) -> None:
    with Meter([Fake(clock, {"P": lambda t: t - 1000})], clock=clock) as meter:
        run(meter, clock, 10)
    found = meter.energy([(1001, 1002), (1005, 1007)], items=5, idle_w=1, per_run=(2.5, 3.0))
    assert found.total_j == pytest.approx(1.5 + 12, rel=0.01)
    assert found.above_idle_j == pytest.approx(13.5 - 3, rel=0.01)
    assert (found.per_item_j, found.per_item_lo, found.per_item_hi) == (pytest.approx(2.7, rel=0.01), 2.5, 3)
    assert found.peak_w == pytest.approx(7, abs=0.2)
    assert found.mean_w == pytest.approx(4.5, rel=0.01)
    none = meter.energy([], items=5, per_run=(2.5, 3.0))
    assert (none.total_j, none.per_item_lo, none.reason) == (None, None, "no window")


def test_gap_in_the_sampling(clock: Time) -> None:
    with Meter([Fake(clock, {"P": lambda t: 5.0})], clock=clock) as meter, meter.window("w") as w:
        run(meter, clock, 3)
        clock.now += 1.5
        run(meter, clock, 3)
    assert w.result.energy.total_j is None
    assert "without a sample, at most 1 s" in w.result.energy.reason
    assert meter.sampler_info().largest_gap_s is not None
    assert 1.5 < meter.sampler_info().largest_gap_s < 1.8


def test_without_a_power_sensor(clock: Time) -> None:
    sensor = Fake(clock, {"soc": lambda t: 45.0}, "temperature", "none", summed=())
    for sensors in ([], [sensor]):
        with Meter(sensors, clock=clock) as meter, meter.window("w", items=2) as w:
            run(meter, clock, 3)
        assert w.result.seconds == 3
        assert w.result.energy.total_j is None
        assert w.result.energy.reason == "no power sensor can be read here"
        assert w.result.energy.rails == {}
        assert meter.idle(5) is None
        assert meter.mean_power(1000, 1003) is None


def test_a_meter_that_was_not_started_says_so(clock: Time) -> None:
    meter = Meter([Fake(clock, {"P": lambda t: 5.0})], clock=clock)
    with meter.window("w") as w:
        clock.now += 5
    assert w.result.energy.total_j is None
    assert "not started" in w.result.energy.reason


def test_idle_power(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter([Fake(clock, {"P": lambda t: 4.0})], clock=clock)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: run(meter, clock, min(seconds, 1.1)))
    with meter:
        assert meter.idle(5) == pytest.approx(4)
        assert clock.now == pytest.approx(1005)
        assert meter.idle(0.3) is None
        assert meter.idle(0) is None


# Sensors that misbehave


def test_a_sensor_that_raises_is_switched_off_and_the_others_go_on(clock: Time) -> None:
    def broken(t: float) -> float:
        if t > 1001:
            raise OSError(5, "Input/output error")
        return 1.0

    bad, good = Fake(clock, {"P": broken}, name="bad", scope="board"), Fake(clock, {"Q": lambda t: 3.0}, name="good")
    with Meter([bad, good], clock=clock) as meter, meter.window("w") as w:
        run(meter, clock, 4)
    found = w.result.energy
    assert (found.scope, found.total_j) == ("board", None)  # never a sensor of another scope in its stead
    assert found.reason == "bad switched off: OSError: [Errno 5] Input/output error"
    assert found.rails["good:Q"].joules == pytest.approx(12)
    states = {info.name: (info.usable, info.reason) for info in meter.sensors_info()}
    assert states["good"] == (True, "")
    assert states["bad"] == (False, "switched off: OSError: [Errno 5] Input/output error")
    reads = bad.reads
    meter.sampler.sample()
    assert bad.reads == reads


@pytest.mark.parametrize("value", ["4 W", object()])
def test_a_value_that_is_no_number_switches_the_sensor_off(clock: Time, value: object) -> None:
    with Meter([Fake(clock, {"A": lambda t: 1.0, "B": lambda t: value})], clock=clock) as meter:
        run(meter, clock, 1)
    assert "switched off" in meter.sampler.failed["fake"]
    assert meter.sampler.table("fake").shape == (0, 3)


def test_nothing_new_missing_channels_and_old_readings(clock: Time) -> None:
    answers: Iterator[Reading | None] = iter(
        [Reading(1, {"A": 1.0}), None, Reading(3, {"A": None, "B": 2.0, "C": 9.0}), Reading(2, {"A": 7.0}), None]
    )
    sensor = Fake(clock, {"A": lambda t: 0, "B": lambda t: 0})
    sensor.read = lambda: next(answers)  # type: ignore[method-assign]
    sampler = Sampler([sensor], interval_s=0.1, jitter=0, clock=clock)
    for _ in range(5):
        sampler.sample()
    np.testing.assert_array_equal(sampler.table("fake"), [[1, 1, np.nan], [3, np.nan, 2]])
    assert sampler.failed == {}
    assert sampler.info().passes == 5


def test_names_and_settings_are_checked(clock: Time) -> None:
    same = [Fake(clock, {"A": lambda t: 0.0}), Fake(clock, {"B": lambda t: 0.0})]
    with pytest.raises(InputError, match="one name twice"):
        Meter(same, clock=clock)
    for settings in ({"interval_s": 0.0}, {"jitter": 1.0}, {"jitter": -0.1}):
        with pytest.raises(InputError, match="give an interval above 0"):
            Meter([], **settings)


def test_storage_is_bounded_and_keeps_the_newest_whole(clock: Time) -> None:
    """Past the limit every second row of the older half goes: energy stays near, and counters lose nothing."""
    power, counted = Fake(clock, {"P": lambda t: t - 1000}), Fake(clock, {"E": lambda t: t}, "energy", name="counter")
    sampler = Sampler([power, counted], interval_s=0.1, jitter=0.0, clock=clock, keep=1000)
    for _ in range(5000):
        clock.now += 0.1
        sampler.sample()
    table = sampler.table("fake")
    assert 700 < len(table) <= 1000
    assert (np.diff(table[:, 0]) > 0).all()
    assert table[0, 0] == pytest.approx(1000.1)
    np.testing.assert_allclose(table[-500:, 0], 1500 - 0.1 * np.arange(499, -1, -1))
    np.testing.assert_allclose(table[:, 1], table[:, 0] - 1000)
    area = np.sum(np.diff(table[:, 0]) * (table[1:, 1] + table[:-1, 1]) / 2)
    assert area == pytest.approx(500**2 / 2, rel=1e-6)


# Windows


def test_windows_nest_and_end_with_exceptions(clock: Time) -> None:
    meter = Meter([], clock=clock)
    with suppress(ZeroDivisionError), meter.window("outer") as outer:
        clock.now += 1
        with meter.window("inner") as inner:
            clock.now += 2
            inner.items = 7
            raise ZeroDivisionError
    assert [(m.name, m.seconds, m.items, m.error) for m in meter.measurements] == [
        ("inner", 2, 7, True), ("outer", 3, None, True),
    ]  # fmt: skip
    assert outer.result.start_s == 1000


def test_a_window_is_read_after_its_end_and_not_entered_twice(clock: Time) -> None:
    meter = Meter([], clock=clock)
    window = meter.window("w")
    with pytest.raises(InputError, match="it has not ended"):
        window.result  # noqa: B018
    with window, pytest.raises(InputError, match="it is open"), window:
        pass
    with window:
        clock.now += 1
    assert [m.seconds for m in meter.measurements] == [0, 1]


def test_decorated_function_is_measured_call_by_call(clock: Time) -> None:
    meter = Meter([], clock=clock)

    @meter.window("f", items=2)
    def fall(n: int, *, step: float = 1.0) -> int:
        """Falls."""
        clock.now += step
        return n * fall(n - 1, step=step) if n > 1 else 1

    assert (fall(3, step=0.5), fall.__name__, fall.__doc__) == (6, "fall", "Falls.")
    assert [(m.seconds, m.items) for m in meter.measurements] == [(0.5, 2), (1.0, 2), (1.5, 2)]


def test_decorated_coroutine_is_measured_until_awaited(clock: Time) -> None:
    meter = Meter([], clock=clock)
    turn: list[asyncio.Event] = []

    @meter.window("f")
    async def work(seconds: float) -> float:
        clock.now += seconds
        turn[0].set()
        await asyncio.sleep(0)
        clock.now += seconds
        return seconds

    async def main() -> list[float]:
        turn.append(asyncio.Event())
        made = work(5.0)
        clock.now += 100  # making it is not awaiting it
        return await asyncio.gather(made, work(1.0))

    assert asyncio.iscoroutinefunction(work)
    assert asyncio.run(main()) == [5, 1]
    assert [(m.start_s, m.seconds) for m in meter.measurements] == [(1100, 11), (1105, 7)]  # they overlap


def test_decorated_generator_is_measured_from_first_step_to_end(clock: Time) -> None:
    meter = Meter([], clock=clock)
    seen = []

    @meter.window("g")
    def count() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            seen.append((yield number))
        return "done"

    steps = count()
    clock.now += 100
    assert next(steps) == 0
    clock.now += 10
    assert steps.send("a") == 1
    assert (next(steps), next(steps, "end")) == (2, "end")
    assert seen == ["a", None, None]
    early = count()
    next(early)
    early.close()
    broken = count()
    next(broken)
    with pytest.raises(KeyError):
        broken.throw(KeyError())
    assert [(m.seconds, m.error) for m in meter.measurements] == [(13, False), (1, False), (1, True)]


def test_decorated_asynchronous_generator(clock: Time) -> None:
    meter = Meter([], clock=clock)
    seen: list[object] = []

    @meter.window("g")
    async def count() -> AsyncIterator[int]:
        try:
            for number in range(3):
                clock.now += 1
                try:
                    seen.append((yield number))
                except KeyError:
                    seen.append("KeyError")
        finally:
            seen.append("closed")

    async def main() -> None:
        assert [number async for number in count()] == [0, 1, 2]
        steps = count()
        assert await steps.asend(None) == 0
        assert await steps.asend("a") == 1
        assert await steps.athrow(KeyError()) == 2
        await steps.aclose()
        broken = count()
        await broken.asend(None)
        with pytest.raises(ValueError, match="mine"):
            await broken.athrow(ValueError("mine"))

    asyncio.run(main())
    assert seen == [None, None, None, "closed", "a", "KeyError", "closed", "closed"]
    assert [(m.seconds, m.error) for m in meter.measurements] == [(3, False), (3, False), (1, True)]


def test_windows_in_several_threads(clock: Time) -> None:
    meter = Meter([Fake(clock, {"E": lambda t: t}, "energy")], clock=clock)
    barrier = threading.Barrier(8)

    @meter.window("w")
    def work() -> None:
        barrier.wait(10)

    threads = [threading.Thread(target=lambda: [work() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(meter.measurements) == 400
    assert len(meter.sampler.table("fake")) == 800


# What the report takes


def test_trace_keeps_peaks_and_unread_values(clock: Time) -> None:
    def spiky(t: float) -> float | None:
        return None if t > 1400 else 99.0 if 1123.3 <= t < 1123.45 else -3.0 if 1200.3 <= t < 1200.45 else 5.0

    sensors = [
        Fake(clock, {"P": spiky, "Q": lambda t: 1.0}),
        Fake(clock, {"T": lambda t: 40.0}, "temperature", name="t"),
    ]
    sensors[1].total = Total()
    with Meter(sensors, clock=clock) as meter:
        run(meter, clock, 500)
    whole, thin = meter.trace(10**6), meter.trace(100)
    assert [(c.sensor, c.name, c.kind, c.unit) for c in thin] == [
        ("fake", "P", "power", "W"), ("fake", "Q", "power", "W"), ("t", "T", "temperature", "°C"),
    ]  # fmt: skip
    assert len(whole[0].values) == len(meter.sampler.table("fake")) > 4000
    for channel, every in zip(thin, whole, strict=True):
        assert 40 <= len(channel.values) == len(channel.times_s) <= 100
        assert channel.times_s == sorted(set(channel.times_s))
        assert {*zip(channel.times_s, channel.values, strict=True)} <= {*zip(every.times_s, every.values, strict=True)}
    assert 0 <= whole[0].times_s[0] < whole[0].times_s[-1] <= 500
    assert {99.0, -3.0, 5.0, None} == set(thin[0].values)
    assert thin[0].values[-1] is None


def test_info(clock: Time) -> None:
    sensor = Fake(clock, {"P": lambda t: 1.0}, absent={"NC": "not connected"})
    empty = Fake(clock, {}, name="null", scope="none")
    with Meter([sensor, empty], unavailable={"nvml": "no library"}, clock=clock, interval_s=0.2, jitter=0.1) as meter:
        run(meter, clock, 10)
    info = meter.sampler_info()
    assert (info.interval_s, info.jitter) == (0.2, 0.1)
    assert info.passes == sensor.reads == len(meter.sampler.table("fake"))
    assert info.busy_s > 0
    assert info.share == pytest.approx(info.busy_s / 10, rel=0.05)
    assert [(s.name, s.usable, s.reason, s.channels, s.absent) for s in meter.sensors_info()] == [
        ("fake", True, "", ("P",), {"NC": "not connected"}),
        ("null", True, "", (), {}),
        ("nvml", False, "no library", (), {}),
    ]
    assert meter.trace()[0].times_s[0] == 0


def test_auto_opens_what_works(tmp_path: Any, clock: Time) -> None:
    with Meter.auto(Tree(tmp_path), clock=clock) as meter:
        assert {info.name for info in meter.sensors_info()} >= {"null", "ina3221", "rapl"}
        assert {info.name for info in meter.sensors_info() if not info.usable} == set(meter.unavailable)
        assert all(info.usable or info.reason for info in meter.sensors_info())
    with pytest.raises(SensorUnavailable):
        Meter.auto(Tree(tmp_path), ["rapl"], clock=clock)


# The thread itself


def test_live_thread() -> None:
    """5 ms instead of 0.1 s; what is checked is order and count, not time."""
    sensor = Fake(time.monotonic, {"P": lambda t: 6.0})
    meter = Meter([sensor], interval_s=0.005)
    with meter:
        meter.start()  # a second time: nothing
        assert sum(t.name == "edge-sdss sampler" for t in threading.enumerate()) == 1
        with meter.window("w") as w:
            deadline = time.monotonic() + 20
            while len(meter.sampler.table("fake", w.start_s)) < 2 * module.MIN_SAMPLES and time.monotonic() < deadline:
                time.sleep(0.01)
    assert not any(t.name == "edge-sdss sampler" for t in threading.enumerate())
    meter.close()
    assert sensor.closed == 2  # sensors may be closed twice
    assert len(meter.sampler.table("fake")) >= 2 * module.MIN_SAMPLES
    table = meter.sampler.table("fake")
    assert (np.diff(table[:, 0]) >= 0.0035 - 1e-4).all()  # never sooner than the shortest wait
    assert meter.sampler_info().busy_s > 0
    reads = sensor.reads
    time.sleep(0.03)
    assert sensor.reads == reads
    meter.sampler.start()
    assert sensor.reads > reads
    meter.sampler.stop()
    assert (
        w.result.energy.total_j == pytest.approx(6 * w.result.seconds) or "without a sample" in w.result.energy.reason
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_windows_in_a_fork_know_their_time_and_say_why_no_energy() -> None:
    sensor = Fake(time.monotonic, {"P": lambda t: 6.0, "E": lambda t: 6.0 * t}, "energy")
    read, write = os.pipe()
    with Meter([sensor], interval_s=0.005) as meter:
        meter.sampler._lock.acquire()  # as the thread may hold it at that very moment
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # rather than hang on the lock
            try:
                with meter.window("w") as w:
                    pass
                meter.trace()
                meter.close()
                found = [w.result.energy.reason, str(w.result.energy.total_j), str(sensor.closed)]
                try:
                    meter.start()
                except InputError as error:
                    found.append(str(error))
                os.write(write, "|".join(found).encode())
            finally:
                os._exit(0)
        meter.sampler._lock.release()
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            reason, joules, closed, error = pipe.read().decode().split("|")
        os.waitpid(child, 0)
    assert reason == "this process is a fork of the one that samples: make a new Meter in it"
    assert (joules, closed) == ("None", "0")
    assert "make a new Meter" in error
