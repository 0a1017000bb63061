"""Pacing on a planted zone whose heat follows a model, with a clock of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import plant

from edge_sdss.errors import SensorUnavailable
from edge_sdss.tree import Tree
from edge_sdss.tuning.pacing import Cool, Unhurried, pace

ZONE = "sys/class/thermal/thermal_zone"


class Machine:
    """Two zones; while it sleeps, the second cools by `cooling_c` a second, down to the room's temperature."""

    def __init__(self, root: Path, cooling_c: float = 2.0, room_c: float = 30.0) -> None:
        self.root, self.cooling_c, self.room_c = root, cooling_c, room_c
        self.now, self.heat_c, self.slept, self.said = 0.0, 40.0, 0.0, []
        plant(root, {f"{ZONE}0/type": "cpu-thermal", f"{ZONE}0/temp": 41000, f"{ZONE}1/type": "gpu-thermal"})
        self.set(40.0)

    def set(self, heat_c: float | None) -> None:
        self.heat_c = heat_c or 0.0
        plant(self.root, {f"{ZONE}1/temp": "none" if heat_c is None else round(heat_c * 1000)})

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds
        self.set(max(self.heat_c - self.cooling_c * seconds, self.room_c))

    def cool(self, limit_c: float = 80.0, **options) -> Cool:
        clock = lambda: self.now  # noqa: E731
        return Cool(limit_c, self.said.append, tree=Tree(self.root), clock=clock, sleep=self.sleep, **options)


def test_a_cool_machine_never_waits(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    cool = machine.cool()
    for heat_c in (40, 60, 75):
        machine.set(heat_c)
        machine.now += 10
        assert cool.before_step() == 0
    assert machine.said == []


def test_a_hot_machine_pauses_until_the_hysteresis_is_left(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    cool = machine.cool()
    machine.set(86.0)
    assert cool.before_step() == 6  # 86 − 6 × 2 = 74 ≤ 75 °C
    assert machine.heat_c == 74
    assert machine.said == [
        "gpu-thermal is at 86 °C, the limit is 80 °C: pausing until 75 °C",
        "gpu-thermal is at 74 °C after a pause of 6 s: going on",
    ]
    assert cool.before_step() == 0


@pytest.mark.parametrize(("heat_c", "duty"), [(75.0, 1.0), (77.5, 0.625), (79.999, 0.25), (76.0, 0.85)])
def test_near_the_limit_the_duty_falls_in_a_straight_line(tmp_path: Path, heat_c: float, duty: float) -> None:
    machine = Machine(tmp_path, cooling_c=0.0)
    cool = machine.cool()
    cool.before_step()
    machine.now += 12.0  # a step
    machine.set(heat_c)
    waited = cool.before_step()
    assert 12.0 / (12.0 + waited) == pytest.approx(duty, rel=1e-3)
    assert len(machine.said) == (duty < 1)


def test_it_says_when_it_changes_and_not_else(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cooling_c=0.0)
    cool = machine.cool()
    for heat_c in (60, 77, 78, 77, 60, 61, 78):
        machine.now += 1
        machine.set(heat_c)
        cool.before_step()
    rest, full = "near the limit of 80 °C: resting between steps", "full speed again"
    assert [line.split(" °C")[0][-2:] for line in machine.said] == ["77", "60", "78"]
    assert [line.endswith(words) for line, words in zip(machine.said, (rest, full, rest), strict=True)] == [True] * 3


def test_a_room_that_is_too_warm_slows_but_never_stops(tmp_path: Path) -> None:
    machine = Machine(tmp_path, room_c=90.0)
    cool = machine.cool(longest_pause_s=60)
    machine.set(95.0)
    cool.before_step()
    assert machine.said[-2].endswith("still hot, going on at 25% of the time")
    machine.now += 10
    assert cool.before_step() == pytest.approx(30)  # a quarter of the time, and no second pause
    machine.room_c = 20.0
    machine.set(70.0)
    cool.before_step()
    machine.set(90.0)
    assert cool.before_step() == pytest.approx(8)  # now it can be cooled


def test_zones_that_go_away_stop_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    cool = machine.cool()
    machine.set(85.0)
    for zone in (0, 1):
        (tmp_path / f"{ZONE}{zone}/temp").write_text("off\n", encoding="utf-8")
    assert cool.before_step() == 0
    machine.set(85.0)
    assert cool.before_step() > 0
    cool.close()


def test_the_choice_of_a_pace(tmp_path: Path) -> None:
    assert pace(None, print, Tree(tmp_path)).before_step() == 0
    assert isinstance(pace(None, print), Unhurried)
    with pytest.raises(SensorUnavailable):
        pace(80.0, print, Tree(tmp_path))
    plant(tmp_path, {"sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": 1000000})
    with pytest.raises(SensorUnavailable, match="no temperature can be read"):
        pace(80.0, print, Tree(tmp_path))
    Machine(tmp_path)
    assert isinstance(pace(80.0, print, Tree(tmp_path)), Cool)
