"""The harness with a clock of its own: what is repeated, in which order, and what becomes of the figures."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from edge_sdss import config
from edge_sdss.profiling import harness
from edge_sdss.profiling.harness import Repetition, Workload
from edge_sdss.profiling.meter import Meter
from edge_sdss.sensors import Channel, Reading, Total
from edge_sdss.tree import Tree


class Clock:
    """Time passes only where a workload, or a pause, lets it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.meter: Meter | None = None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Time goes on in steps of the sampler's, and the sensors are read at each."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.05, end)
            if self.meter is not None:
                self.meter.sampler.sample()


class Power:
    """A rail that draws what the workload at work draws."""

    name = "fake"
    channels = (Channel("VDD_IN", "power"),)
    total = Total("module", ("VDD_IN",), "a rail of a test")

    def __init__(self, clock: Clock) -> None:
        self.clock, self.watts, self.absent = clock, 4.0, {}

    def read(self) -> Reading:
        return Reading(self.clock.now, {"VDD_IN": self.watts})

    def close(self) -> None:
        pass


class Bench:
    """Workloads on a clock, and the order in which they were run."""

    def __init__(self, power: bool = False) -> None:
        self.clock = Clock()
        self.rail = Power(self.clock)
        self.meter = Meter([self.rail] if power else [], interval_s=0.1, clock=self.clock)
        self.clock.meter = self.meter
        self.order: list[str] = []

    def workload(self, name: str, seconds: float, watts: float = 4.0, fails_at: int | None = None, **kw) -> Workload:
        done = Counter()

        @contextmanager
        def open() -> Iterator[Callable[[], Repetition]]:
            self.order.append(name)

            def repeat() -> Repetition:
                done[name] += 1
                if done[name] == fails_at:
                    raise RuntimeError("planted")
                self.rail.watts = watts
                self.clock.sleep(seconds)
                self.rail.watts = 4.0
                return Repetition(2, {"half": [seconds / 2, seconds / 2]})

            yield repeat

        return Workload(name, f"{name}1", f"Does {name}.", "thing", open, **kw)

    def run(self, workloads: list[Workload], **plan) -> harness.Outcome:
        settings = config.Profile(**{"runs": 3, "repetitions": 6, "seconds": 0, "warmups": 1, "idle_s": 0, **plan})
        return harness.measure(workloads, settings, self.meter, tree=Tree(Path("/nowhere")))


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_figures_are_those_of_the_clock():
    bench = Bench()
    [case] = bench.run([bench.workload("a", 0.5)]).cases
    assert case.metrics["time"].median == pytest.approx(0.25)
    assert case.metrics["rate"].median == pytest.approx(4)
    assert (case.metrics["time"].unit, case.metrics["rate"].unit) == ("s", "thing/s")
    assert (case.metrics["time"].better, case.metrics["rate"].better) == ("lower", "higher")
    assert case.metrics["half"].n == 12
    assert [len(run.samples["time"]) for run in case.runs] == [2, 2, 2]
    assert sum(run.items for run in case.runs) == 12
    assert all(run.end_s - run.start_s == pytest.approx(1.0) for run in case.runs)
    assert case.energy.total_j is None
    assert "no power sensor" in case.energy.reason


def test_both_minima_are_kept():
    bench = Bench()
    [many] = bench.run([bench.workload("quick", 0.01)], seconds=3, repetitions=6).cases
    assert sum(len(run.samples["time"]) for run in many.runs) == pytest.approx(300, abs=3)
    bench = Bench()
    [few] = bench.run([bench.workload("slow", 9.0)], seconds=3, repetitions=7).cases
    assert sum(len(run.samples["time"]) for run in few.runs) == 9  # 7 in three runs, rounded up


def test_runs_take_turns_in_an_order_that_the_seed_gives():
    orders = {}
    for seed in (0, 0, 1, 2, 3):
        bench = Bench()
        bench.run([bench.workload(name, 0.1) for name in "abc"], runs=4, seed=seed)
        assert all(sorted(bench.order[i : i + 3]) == list("abc") for i in range(0, 12, 3))
        orders.setdefault(seed, bench.order)
        assert orders[seed] == bench.order
    assert len({tuple(order) for order in orders.values()}) > 1


def test_a_long_workload_has_fewer_runs():
    bench = Bench()
    long, short = bench.run([bench.workload("long", 60, runs=2, repetitions=1), bench.workload("short", 0.1)]).cases
    assert [len(case.runs) for case in (long, short)] == [2, 3]
    assert all(len(run.samples["time"]) == 1 for run in long.runs)


def test_a_workload_that_fails_costs_nobody_else():
    bench = Bench()
    found = bench.run([bench.workload("bad", 0.1, fails_at=1), bench.workload("good", 0.1)])
    assert [case.name for case in found.cases] == ["good"]
    assert found.failed == {"bad": "RuntimeError: planted"}
    assert bench.order.count("bad") == 1


def test_what_was_whole_before_a_failure_is_kept():
    bench = Bench()
    found = bench.run([bench.workload("bad", 0.1, fails_at=5)])
    assert [len(case.runs) for case in found.cases] == [1]
    assert "bad" in found.failed


def test_ctrl_c_keeps_what_is_whole():
    bench = Bench()
    good = bench.workload("good", 0.1)

    @contextmanager
    def stopped() -> Iterator[Callable[[], Repetition]]:
        raise KeyboardInterrupt
        yield

    found = bench.run([good, Workload("stop", "stop", "Stops.", "thing", stopped)], seed=3)
    assert "stop" in found.failed
    assert {case.name for case in found.cases} <= {"good"}


def test_energy_is_that_of_the_runs_alone():
    bench = Bench(power=True)
    heavy, light = bench.run([bench.workload("heavy", 2.0, 10.0), bench.workload("light", 2.0, 6.0)]).cases
    for case, watts in ((heavy, 10.0), (light, 6.0)):
        assert case.energy.scope == "module"
        assert case.energy.mean_w == pytest.approx(watts, rel=0.02)
        assert case.energy.total_j == pytest.approx(watts * 12, rel=0.02)
        assert case.energy.per_item_j == pytest.approx(watts, rel=0.02)
        assert case.energy.per_item_lo <= case.energy.per_item_j <= case.energy.per_item_hi


def test_what_the_machine_draws_anyway_is_taken_off(monkeypatch):
    bench = Bench(power=True)
    monkeypatch.setattr("time.sleep", bench.clock.sleep)
    found = bench.run([bench.workload("a", 2.0, 10.0)], idle_s=5)
    assert found.idle.before_w == pytest.approx(4.0)
    assert not found.idle.flagged
    assert found.cases[0].energy.above_idle_j == pytest.approx(6.0 * 12, rel=0.03)


def test_a_drift_is_a_warning():
    bench = Bench()
    noise = random.Random(0)
    slower = iter((0.1 + 0.002 * i) * noise.uniform(0.98, 1.02) for i in range(1000))

    @contextmanager
    def open() -> Iterator[Callable[[], Repetition]]:
        def repeat() -> Repetition:
            bench.clock.sleep(next(slower))
            return Repetition(1)

        yield repeat

    [case] = bench.run([Workload("hot", "hot", "Gets hot.", "thing", open)], runs=5, repetitions=60).cases
    assert any("drifted by +" in warning for warning in case.warnings)


def test_waits_until_it_is_cool(tmp_path, monkeypatch):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    bench = Bench()
    heat = iter([80, 70, 60, 49, 49, 49, 49, 49])

    def cool(seconds: float = 0) -> None:
        bench.clock.now += seconds
        (zone / "temp").write_text(f"{next(heat) * 1000}\n")

    cool()
    monkeypatch.setattr("time.sleep", cool)
    settings = config.Profile(runs=1, repetitions=1, seconds=0, idle_s=0, cool_c=50, cool_timeout_s=10)
    harness.measure([bench.workload("a", 0.1)], settings, bench.meter, tree=Tree(tmp_path, faults={}))
    assert (zone / "temp").read_text() == "49000\n"
    heat = iter([90] * 50)
    cool()
    [case] = harness.measure([bench.workload("a", 0.1)], settings, bench.meter, tree=Tree(tmp_path, faults={})).cases
    assert "still at 90 °C" in case.warnings[0]


def test_a_repetition_that_does_nothing_is_refused():
    bench = Bench()

    @contextmanager
    def open() -> Iterator[Callable[[], Repetition]]:
        yield lambda: Repetition(0)

    found = bench.run([Workload("idle", "idle", "Idles.", "thing", open)])
    assert "0 items" in found.failed["idle"]
