"""Idle, charging, cool on planted trees: what counts as whose, and what cannot be told is never a yes."""

from __future__ import annotations

from pathlib import Path

import pytest
from trees import plant

from edge_sdss import moment
from edge_sdss.config import Adapt
from edge_sdss.errors import InputError, SensorUnavailable
from edge_sdss.moment import Charging, Idle
from edge_sdss.tree import Tree

SUPPLY = "sys/class/power_supply"
ZONE = "sys/class/thermal/thermal_zone"


class Machine:
    """Four cores at 100 ticks a second; we are process 50, whose child is 51, 60 is another's."""

    def __init__(self, root: Path) -> None:
        self.tree = Tree(root)
        self.idle = self.busy = 0
        self.used = {50: 0, 51: 0, 60: 0}
        self.gone = 0
        self.write()

    def pass_s(self, seconds: float, **used: float) -> None:
        """`p50=1.5`: process 50 used so many seconds; `gone`: of children of ours that were waited for."""
        for name, share in used.items():
            ticks = round(share * 100)
            if name == "gone":
                self.gone += ticks
            else:
                self.used[int(name[1:])] += ticks
            self.busy += ticks
        self.idle += round(seconds * 400) - round(sum(used.values()) * 100)
        self.write()

    def write(self) -> None:
        names = {50: "(a) b (c)", 51: "python", 60: "movie"}
        parents = {50: 1, 51: 50, 60: 1}
        files: dict[str, object] = {"proc/stat": f"cpu  {self.busy} 0 0 {self.idle} 0 0 0 0 0 0\ncpu0 1 2 3 4"}
        for pid, ticks in self.used.items():
            waited = self.gone if pid == 50 else 0
            files[f"proc/{pid}/stat"] = (
                f"{pid} ({names[pid]}) S {parents[pid]} 1 1 0 -1 4194304 1 0 0 0 {ticks} 0 {waited} 0 20 0 1 0"
            )
        plant(self.tree.root, files)


def test_our_own_work_and_our_childrens_does_not_make_the_machine_busy(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    idle = Idle(machine.tree, 0.2, pid=50)
    assert not idle.look().holds, "nothing is known before time has passed"
    machine.pass_s(10, p50=10, p51=20, gone=5)
    assert idle.look() == (True, "others use 0% of the processor")
    machine.pass_s(10, p50=10, p60=10)
    assert idle.look() == (False, "others use 25% of the processor")
    assert not idle.look().holds, "within the same tick the answer stays"
    machine.pass_s(10, p60=4)
    assert idle.look() == (True, "others use 10% of the processor")


def test_a_child_that_vanished_never_makes_others_share_negative(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.pass_s(10, p51=30)
    idle = Idle(machine.tree, 0.2, pid=50)
    (tmp_path / "proc/51/stat").unlink()
    machine.used.pop(51)
    machine.pass_s(10, p60=20)
    assert idle.look() == (False, "others use 50% of the processor")


def test_where_the_processor_cannot_be_seen_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(SensorUnavailable, match=r"no /proc/stat; leave idle out of --when"):
        Idle(Tree(tmp_path), 0.2)
    machine = Machine(tmp_path)
    idle = Idle(machine.tree, 0.2, pid=50)
    plant(tmp_path, {"proc/stat": "nonsense"})
    assert idle.look() == (False, "idle: /proc/stat cannot be read")
    machine.pass_s(10)
    assert not idle.look().holds
    machine.pass_s(10)
    assert idle.look().holds


@pytest.mark.parametrize(
    ("supplies", "holds"),
    [
        ({}, True),
        ({"BAT0": {"type": "Battery", "status": "Discharging"}, "AC": {"type": "Mains", "online": 0}}, False),
        ({"BAT0": {"type": "Battery", "status": "Charging"}, "AC": {"type": "Mains", "online": 1}}, True),
        ({"BAT0": {"type": "Battery", "status": "Full"}, "AC": {"type": "Mains", "online": 0}}, False),
        ({"BAT0": {"type": "Battery", "status": "Not charging"}, "usb": {"type": "USB", "online": 1}}, True),
        ({"BAT0": {"type": "Battery", "status": "Full"}}, True),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, False),
        ({"BAT0": {"type": "Battery"}}, False),
        ({"mouse": {"type": "Battery", "status": "Discharging", "scope": "Device"}}, True),
    ],
)
def test_charging(tmp_path: Path, supplies: dict[str, dict[str, object]], holds: bool) -> None:
    plant(tmp_path, {f"{SUPPLY}/{name}/{key}": text for name, held in supplies.items() for key, text in held.items()})
    assert Charging(Tree(tmp_path)).look().holds is holds


def test_cool_is_of_the_hottest_zone_and_never_without_one(tmp_path: Path) -> None:
    with pytest.raises(SensorUnavailable, match="no temperature can be read; leave cool out"):
        moment.open(["cool"], Adapt(), Tree(tmp_path))
    plant(tmp_path, {f"{ZONE}{i}/{k}": v for i in (0, 1) for k, v in (("type", f"zone-{i}"), ("temp", 40_000))})
    cool = moment.open(["cool"], Adapt(cool_c=60), Tree(tmp_path))["cool"]
    assert cool.look().holds
    plant(tmp_path, {f"{ZONE}1/temp": 60_000})
    assert cool.look() == (False, "zone-1 is at 60 °C")
    plant(tmp_path, {f"{ZONE}0/temp": "none", f"{ZONE}1/temp": "none"})
    assert cool.look() == (False, "no temperature can be read now")


def test_names_are_read_in_their_own_order() -> None:
    assert moment.names(" cool, idle") == ("idle", "cool")
    for text in ("", "idle,warm"):
        with pytest.raises(InputError, match="choose from idle,charging,cool"):
            moment.names(text)
