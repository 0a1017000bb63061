"""Temperatures and clocks on trees written after NVIDIA's developer guide and the kernel's documentation."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import plant

from edge_sdss.errors import SensorUnavailable
from edge_sdss.sensors import Sensor, Total, discover, thermal
from edge_sdss.tree import Tree

ZONES = {
    "cpu-thermal": 51687,
    "gpu-thermal": 48500,
    "cv0-thermal": -256000,
    "cv1-thermal": -256000,
    "cv2-thermal": -256000,
    "soc0-thermal": 49562,
    "soc1-thermal": 49031,
    "soc2-thermal": 48343,
    "tj-thermal": 51687,
}
POLICY = "sys/devices/system/cpu/cpufreq/policy"
GPU = "sys/class/devfreq/17000000.gpu/cur_freq"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc/rate"


def orin() -> dict[str, object]:
    files: dict[str, object] = {GPU: 306000000, "sys/class/devfreq/15340000.vic/cur_freq": 115200000}
    for number, (name, held) in enumerate(ZONES.items()):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = name
        files[f"sys/class/thermal/thermal_zone{number}/temp"] = held
    for number, kilohertz in ((0, 1510400), (4, 729600), (8, 1984000)):
        files[f"{POLICY}{number}/scaling_cur_freq"] = kilohertz
    return files


@pytest.fixture
def opened() -> Iterator[list[Sensor]]:
    sensors: list[Sensor] = []
    yield sensors
    for sensor in sensors:
        sensor.close()


def open_at(tree: Tree, opened: list[Sensor], now: float = 7.0) -> thermal.Thermal:
    sensor = thermal.open(tree, lambda: now)
    opened.append(sensor)
    return sensor


def test_an_orin_gives_what_its_files_hold(tmp_path: Path, opened: list[Sensor]) -> None:
    sensor = open_at(plant(tmp_path, orin()), opened)
    reading = sensor.read()
    assert reading.time_s == 7.0
    assert reading.values == pytest.approx(
        {name: held / 1000 for name, held in ZONES.items() if held > 0}
        | {"policy0": 1.5104e9, "policy4": 0.7296e9, "policy8": 1.984e9, "17000000.gpu": 306e6}
    )
    assert [channel.name for channel in sensor.channels] == list(reading.values)
    assert {c.kind for c in sensor.channels if "thermal" in c.name} == {"temperature"}
    assert {c.kind for c in sensor.channels if "thermal" not in c.name} == {"frequency"}
    assert sensor.total == Total(note=sensor.total.note)
    assert sensor.absent == {f"cv{n}-thermal": "off: it reports -256 °C" for n in range(3)}


def test_a_pass_sees_new_values(tmp_path: Path, opened: list[Sensor]) -> None:
    sensor = open_at(plant(tmp_path, orin()), opened)
    sensor.read()
    plant(tmp_path, {"sys/class/thermal/thermal_zone0/temp": 60125, GPU: 0})
    values = sensor.read().values
    assert values["cpu-thermal"] == pytest.approx(60.125)
    assert values["17000000.gpu"] == 0.0  # a clock that is gated says 0: that is no failure


def test_a_zone_without_power_is_absent_and_a_sleeping_gpu_wakes_up(tmp_path: Path, opened: list[Sensor]) -> None:
    zone = "sys/class/thermal/thermal_zone{}/temp"
    tree = plant(tmp_path, orin() | {zone.format(1): -256000})
    tree.faults[zone.format(2)] = "EAGAIN"
    tree.faults[zone.format(5)] = "EIO"
    tree.faults[zone.format(6)] = "EACCES"
    sensor = open_at(tree, opened)
    assert sensor.read().values["gpu-thermal"] is None
    assert "EAGAIN" in sensor.absent["cv0-thermal"]
    assert sensor.absent["soc0-thermal"] == f"cannot be read: {os.strerror(errno.EIO)}"
    assert sensor.absent["soc1-thermal"] == "no permission to read it"
    plant(tmp_path, {zone.format(1): 47250})
    assert sensor.read().values["gpu-thermal"] == pytest.approx(47.25)


def test_a_core_that_goes_and_comes_back(tmp_path: Path, opened: list[Sensor], monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = open_at(plant(tmp_path, orin()), opened)
    real, gone = os.pread, os.stat(tmp_path / f"{POLICY}4/scaling_cur_freq").st_ino

    def pread(number: int, size: int, offset: int) -> bytes:
        if os.fstat(number).st_ino == gone:
            raise OSError(errno.ENODEV, "No such device")
        return real(number, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    values = sensor.read().values
    assert values["policy4"] is None
    assert values["policy0"] == pytest.approx(1.5104e9)
    (tmp_path / f"{POLICY}4/scaling_cur_freq").rename(tmp_path / "gone")  # the file that was open stays dead
    plant(tmp_path, {f"{POLICY}4/scaling_cur_freq": 1113600})
    assert sensor.read().values["policy4"] == pytest.approx(1.1136e9)


@pytest.mark.parametrize("held", ["", "n/a", "nan", "1e3", "999999", "-70000", "9" * 30, "9" * 5000, "\0"])
def test_nonsense_is_absent(tmp_path: Path, opened: list[Sensor], held: str) -> None:
    tree = plant(tmp_path, orin() | {"sys/class/thermal/thermal_zone0/temp": held})
    sensor = open_at(tree, opened)
    assert "cpu-thermal" not in sensor.read().values
    assert sensor.absent["cpu-thermal"].startswith("no temperature")


def test_what_the_pmic_shows_at_all_times_is_no_temperature(tmp_path: Path, opened: list[Sensor]) -> None:
    files = {"sys/class/thermal/thermal_zone0/type": "PMIC-Die", "sys/class/thermal/thermal_zone0/temp": 100000}
    others = {"sys/class/thermal/thermal_zone1/type": "CPU-therm", "sys/class/thermal/thermal_zone1/temp": 34000}
    sensor = open_at(plant(tmp_path, files | others), opened)
    assert sensor.read().values == {"CPU-therm": pytest.approx(34.0)}
    assert "PMIC-Die" in sensor.absent


def test_the_gpus_of_thor_and_its_memory(tmp_path: Path, opened: list[Sensor]) -> None:
    names = {"gpu-gpc-0": 1575000000, "gpu-nvd-0": 1692000000, "bwmgr": 4266000000, "17000000.ga10b": 1, "vic": 2}
    sensor = open_at(plant(tmp_path, {f"sys/class/devfreq/{n}/cur_freq": hz for n, hz in names.items()}), opened)
    assert sensor.read().values == {name: float(hertz) for name, hertz in names.items() if name != "vic"}


def test_the_memory_clock_of_the_firmware_is_for_root(tmp_path: Path, opened: list[Sensor]) -> None:
    tree = plant(tmp_path, orin() | {EMC: 3199000000})
    assert open_at(tree, opened).read().values["emc"] == 3.199e9
    tree.faults[EMC] = "EACCES"
    sensor = open_at(tree, opened)
    assert "emc" not in sensor.read().values
    assert sensor.absent["emc"] == "root only"


def test_x86_takes_the_processors_own_sensor_where_there_is_but_acpi(tmp_path: Path, opened: list[Sensor]) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/type": "acpitz",
        "sys/class/thermal/thermal_zone0/temp": 27800,
        "sys/class/thermal/thermal_zone1/type": "acpitz",
        "sys/class/thermal/thermal_zone1/temp": 29800,
        "sys/class/hwmon/hwmon2/name": "k10temp",
        "sys/class/hwmon/hwmon2/temp1_label": "Tctl",
        "sys/class/hwmon/hwmon2/temp1_input": 44125,
        "sys/class/hwmon/hwmon2/temp3_input": 41000,
        "sys/class/hwmon/hwmon3/name": "nvme",
        "sys/class/hwmon/hwmon3/temp1_input": 35850,
    }
    sensor = open_at(plant(tmp_path, files), opened)
    assert sensor.read().values == pytest.approx(
        {"acpitz": 27.8, "acpitz 2": 29.8, "k10temp Tctl": 44.125, "k10temp temp3": 41.0}
    )
    zone = "sys/class/thermal/thermal_zone2"
    sensor = open_at(plant(tmp_path, {f"{zone}/type": "x86_pkg_temp", f"{zone}/temp": 40000}), opened)
    assert set(sensor.read().values) == {"acpitz", "acpitz 2", "x86_pkg_temp"}


def test_where_there_is_nothing_the_reason_says_so(tmp_path: Path) -> None:
    with pytest.raises(SensorUnavailable, match="no thermal zone, cpufreq policy or devfreq"):
        thermal.open(Tree(tmp_path), lambda: 0.0)
    dead = {"sys/class/thermal/thermal_zone0/type": "cpu-thermal", "sys/class/thermal/thermal_zone0/temp": -256000}
    with pytest.raises(SensorUnavailable, match="cpu-thermal: off: it reports -256 °C"):
        thermal.open(plant(tmp_path, dead), lambda: 0.0)


def test_it_is_found_by_name_and_closes_its_files(tmp_path: Path) -> None:
    tree = plant(tmp_path, orin())
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sensor = discover(tree, wanted=["thermal"]).sensors[0]
    sensor.close()
    sensor.close()
    reading = sensor.read()
    assert reading is not None
    assert set(reading.values.values()) == {None}
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@given(st.binary(max_size=40), st.sampled_from(["temperature", "frequency"]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_whatever_a_file_holds_is_a_plausible_value_or_none(raw: bytes, kind: str, scale: float) -> None:
    found = thermal.value(thermal.Source("x", kind, "x", scale), raw)  # type: ignore[arg-type]
    if found is not None:
        assert (-60 < found < 150) if kind == "temperature" else (0 <= found < 1e11)
        assert found == pytest.approx(int(raw) * scale)
