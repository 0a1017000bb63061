"""sensors.powerlog and its import: energy by hand, units, what is not known, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdss.errors import InputError, SensorUnavailable
from edge_sdss.profiling import imported
from edge_sdss.sensors import powerlog
from edge_sdss.tree import Tree


def traced(tmp_path: Path, text: str) -> powerlog.PowerLog:
    file = tmp_path / "trace.csv"
    file.write_text(text, encoding="utf-8")
    return powerlog.open(Tree(tmp_path), lambda: 0.0, trace=file)


def rows(sensor: powerlog.PowerLog) -> list[tuple[float, float | None]]:
    return [(reading.time_s, reading.values["supply.power"]) for reading in iter(sensor.read, None)]


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("Time (s),Power (mW)", "1.5,3000"),
        ("time_ms,power_w", "1500,3"),
        ("Timestamp [us],Avg Power [uW]", "1500000,3000000"),
        ("ts_ns;,power_W,temperature_C", "1500000000,3,40"),
        ("Time (ms),Main Avg Current (mA),Main Avg Voltage (V)", "1500,750,4"),
        ("Time(ms),USB(mA),Main Current(mA),USB Current(mA),Main Voltage(V),USB Voltage(V)", "1500,9,750,0,4,5"),
        ("time_s,voltage_mv,current_ua", "1.5,4000,750000"),
        ("time_s,cpu power (mW),total power (mW)", "1.5,1000,3000"),
        ("\ufeffTime (s),Power (mW)", "1.5,3000"),
    ],
)
def test_quantities_and_units_are_known_by_their_names(tmp_path: Path, head: str, row: str) -> None:
    sensor = traced(tmp_path, f"{head}\n{row}\n")
    assert rows(sensor) == [(pytest.approx(1.5), pytest.approx(3.0))]
    assert (sensor.total.scope, sensor.bad_rows) == ("board", 0)


def test_what_is_not_known_is_none_and_never_0(tmp_path: Path) -> None:
    sensor = traced(tmp_path, "time_s,power_w\n0,1\n1,\n2,-4\n3,nan\n4,5000\n5,2\n\nx,1\n4,1\n")
    assert rows(sensor) == [(0, 1.0), (1, None), (2, None), (3, None), (4, None), (5, 2.0)]
    assert "4 of 6 readings are left out" in sensor.total.note
    assert sensor.bad_rows == 4  # without a figure: 2; without a time, or back in time: 2
    assert sensor.absent


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "does not tell time and power"),
        ("time_s,power\n1,2\n", "does not tell"),  # of what unit?
        ("time,power_w\n1,2\n", "does not tell"),
        ("time_s,current_ma\n1,2\n", "does not tell"),
        ("time_s,cpu power (W),gpu power (W)\n1,2,3\n", "which one of cpu power (W), gpu power (W)"),
        ("time_s,power_w\n", "no row"),
        ("time_s,power_w\n1,-2\n2,-2\n", "charging all the time"),
        ("time_s,power_mw\n1,5e9\n", "a unit is wrong"),
    ],
)
def test_a_trace_without_power_says_why(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(SensorUnavailable) as refused:
        traced(tmp_path, text)
    assert word in str(refused.value)
    assert "Time (s),Power (mW)" in str(refused.value)


def test_the_variable_names_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(powerlog.VARIABLE, raising=False)
    with pytest.raises(SensorUnavailable, match=powerlog.VARIABLE):
        powerlog.open(Tree(tmp_path), lambda: 0.0)
    (tmp_path / "t.csv").write_text("time_s,power_w\n0,1\n")
    monkeypatch.setenv(powerlog.VARIABLE, str(tmp_path / "t.csv"))
    assert len(rows(powerlog.open(Tree(tmp_path), lambda: 0.0))) == 1


def test_the_energy_of_a_part_is_the_area_below_it(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    steps = range(101)  # 10 s at 10 Hz: 1 W rising to 3 W, from a clock that began at 100 s
    file.write_text("Time (ms),Power (mW)\n" + "".join(f"{100_000 + 100 * i},{1000 + 20 * i}\n" for i in steps))
    energy, seconds = imported.energy(file)
    assert (seconds, energy.total_j) == (pytest.approx(10), pytest.approx(20, rel=1e-3))
    energy, seconds = imported.energy(file, start_s=5, end_s=7.5, items=50)
    assert (seconds, energy.total_j) == (pytest.approx(2.5), pytest.approx(2.5 * 2.25, rel=0.02))
    assert energy.per_item_j == pytest.approx(2.5 * 2.25 / 50, rel=0.02)
    with pytest.raises(InputError, match=r"it lasts 10\.0 s"):
        imported.energy(file, start_s=20)


def test_a_hole_in_the_trace_leaves_the_energy_unknown(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("time_s,power_w\n" + "".join(f"{i / 10},{'' if 10 < i < 90 else 2}\n" for i in range(101)))
    energy, _ = imported.energy(file)
    assert energy.total_j is None
    assert energy.reason


def test_a_file_that_is_neither_kind_says_what_its_kind_lacks(tmp_path: Path) -> None:
    for text, word in (("ts,name,value\n", "no row"), ("time_s,power\n1,2\n", "with their units")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(SensorUnavailable, match=word):
            imported.energy(tmp_path / "t.csv")
