"""The Jetson sensors, on every board that can be written down, and on what goes wrong there."""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import boards
import pytest
from boards import BOARDS
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import sensors
from edge_sdss.errors import SensorUnavailable
from edge_sdss.sensors import _rails, ina3221, tegrastats
from edge_sdss.tree import Tree

FIXTURES = Path(__file__).parent / "fixtures" / "boards"
CHIP = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
MIB = 2.0**20


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def nano(tmp_path) -> Path:
    return boards.write(tmp_path / "nano", BOARDS["orin-nano-8gb-jp6"])


def opened(root: Path, **faults: str) -> ina3221.Ina3221:
    return ina3221.open(Tree(root, faults=faults or None), Clock())


def watts(sensor) -> float:
    reading = sensor.read()
    return math.fsum(reading.values[name] for name in sensor.total.channels)


# Totals


@pytest.mark.parametrize("name", BOARDS)
def test_total_of_every_board(tmp_path, name):
    board = BOARDS[name]
    sensor = opened(boards.write(tmp_path, board))
    assert (sensor.total.scope, sensor.total.channels) == (board.scope, board.rails)
    assert watts(sensor) == pytest.approx(board.watts, rel=1e-9)
    labels = [channel[0] for chip in board.chips.values() for channel in chip if channel and channel[0] != "NC"]
    assert sorted(channel.name for channel in sensor.channels) == sorted(labels + ["VIN"] * (board.vin_uw is not None))
    assert all(channel.kind == "power" for channel in sensor.channels)
    assert sensor.read().time_s == 1000.0


@pytest.mark.parametrize("name", BOARDS)
def test_tegrastats_totals_the_same_rails_and_one_sensor_is_picked(tmp_path, name):
    board = BOARDS[name]
    tree = Tree(boards.write(tmp_path, board), lines={"tegrastats": [(0.0, board.line)]})
    found = sensors.discover(tree, Clock(), ["ina3221", "tegrastats"])
    assert [sensor.total for sensor in found.sensors] == [found.sensors[0].total] * 2
    best, total = sensors.total(found.sensors)
    assert best is found.sensors[0]
    assert total.scope == board.scope


def test_kept_fixtures_replay():
    expected = {"orin-nano-8gb-jp6": ("module", 5.901056), "thor-jp7": ("board", 16.802)}
    assert {folder.name for folder in FIXTURES.iterdir() if folder.is_dir()} == set(expected) == set(boards.KEPT)
    for name, (scope, power) in expected.items():
        tree = Tree.of(FIXTURES / name)
        sensor = ina3221.open(tree, Clock())
        assert (sensor.total.scope, watts(sensor)) == (scope, pytest.approx(power))
        assert tegrastats.open(tree, Clock()).total == sensor.total


CONTAINS = {
    "VIN": {"*"},
    "VDD_IN": {"*"},
    "POM_5V_IN": {"*"},
    "VIN_SYS_5V0": {"VDDQ_VDD2_1V8AO"},
}
LABELS = sorted({rail for family in _rails._FAMILIES for rail in family.rails} | {"VDDQ_VDD2_1V8AO", "NC", "ODD"})


@given(st.lists(st.sampled_from(LABELS), max_size=12))
def test_no_rail_is_added_to_one_that_feeds_it(labels):
    total = _rails.total(labels)
    assert len(set(total.channels)) == len(total.channels)
    assert set(total.channels) <= set(labels)
    assert total.note
    assert (total.scope == "none") == (not total.channels)
    for rail in total.channels:
        inside = set(total.channels) - {rail} if CONTAINS.get(rail) == {"*"} else CONTAINS.get(rail, set())
        assert not inside & set(total.channels)


@pytest.mark.parametrize("name", [name for name, board in BOARDS.items() if len(board.rails) > 1])
def test_total_without_one_of_its_rails_is_partial(name):
    rails = BOARDS[name].rails
    for gone in rails:
        total = _rails.total(rail for rail in rails if rail != gone)
        assert total.scope == "partial"
        assert gone in total.note
        assert gone not in total.channels


def test_rails_without_known_meaning_are_not_added():
    total = _rails.total(["VDD_A", "VDD_B"])
    assert (total.scope, total.channels) == ("none", ())
    assert "not known" in total.note


# Where the files are


def test_chip_is_read_once_though_sysfs_shows_it_twice(nano):
    assert len(opened(nano).channels) == 3
    shutil.rmtree(nano / "sys/bus")
    assert watts(opened(nano)) == pytest.approx(5.901056)
    assert not opened(nano).absent


def test_chip_is_found_by_its_driver_alone(nano):
    shutil.rmtree(nano / "sys/class/hwmon")
    assert watts(opened(nano)) == pytest.approx(5.901056)


def test_second_rail_of_a_name_is_left_out_and_told(nano):
    for file in ("in1_label", "in1_input", "curr1_input", "name"):
        source = nano / "sys/class/hwmon/hwmon1" / file
        boards.put(nano, f"sys/class/hwmon/hwmon30/{file}", source.read_text().strip())
    sensor = opened(nano)
    assert watts(sensor) == pytest.approx(5.901056)
    assert "VDD_IN" in sensor.absent["hwmon30 channel 1"]


def test_iio_devices_by_another_name_and_without_power(tmp_path):
    root = boards.write(tmp_path, BOARDS["nano-jp4"])
    device = next(root.glob("sys/devices/**/iio:device0"))
    (device.parent / "iio_device").unlink()
    device.rename(device.parent / "iio_device")
    assert watts(opened(root)) == pytest.approx(2.545)
    (device.parent / "iio_device" / "in_power0_input").unlink()
    assert watts(opened(root)) == pytest.approx(2.545)


def test_several_inputs_without_label_are_not_taken_for_the_board(tmp_path):
    root = boards.write(tmp_path, BOARDS["thor-without-vin-jp7"])
    for number in (40, 41):
        boards.put(root, f"sys/class/hwmon/hwmon{number}/name", "ina238")
        boards.put(root, f"sys/class/hwmon/hwmon{number}/power1_input", 5_000_000)
    sensor = opened(root)
    assert sensor.total.scope == "partial"
    assert sensor.read().values["ina238 hwmon41"] == 5.0
    shutil.rmtree(root / "sys/class/hwmon/hwmon41")
    assert opened(root).total.channels == ("VIN",)


def test_channels_without_rail_are_absent_with_a_reason(nano):
    boards.put(nano, f"{CHIP}/in2_label", "NC")
    boards.put(nano, f"{CHIP}/in3_label", "  ")
    sensor = opened(nano)
    assert [channel.name for channel in sensor.channels] == ["VDD_IN"]
    assert sensor.absent == {"hwmon1 channel 2": "not connected (NC)", "hwmon1 channel 3": "has no label"}


def test_sum_of_shunts_is_no_rail(nano):
    assert not any("sum" in channel.name for channel in opened(nano).channels)
    assert not any("sum" in place for place in opened(nano).absent)


# What cannot be read


def test_rail_that_fails_for_a_while_is_none_for_that_while(nano):
    tree = Tree(nano, faults={})
    sensor = ina3221.open(tree, Clock())
    tree.faults[f"{CHIP}/curr2_input"] = "EIO"
    values = sensor.read().values
    assert values["VDD_CPU_GPU_CV"] is None
    assert values["VDD_IN"] == pytest.approx(5.901056)
    tree.faults.clear()
    assert sensor.read().values["VDD_CPU_GPU_CV"] == pytest.approx(1.036672)


def test_rail_that_fails_at_first_recovers(nano):
    tree = Tree(nano, faults={f"{CHIP}/in1_input": "EIO"})
    sensor = ina3221.open(tree, Clock())
    assert sensor.total.channels == ("VDD_IN",)
    assert sensor.read().values["VDD_IN"] is None
    tree.faults.clear()
    assert sensor.read().values["VDD_IN"] == pytest.approx(5.901056)


def test_rail_that_may_not_be_read_makes_the_total_partial(tmp_path):
    root = boards.write(tmp_path, BOARDS["agx-orin-64gb-jp5"])
    chip = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    sensor = opened(root, **{f"{chip}/curr2_input": "EACCES"})
    assert "EACCES" in sensor.absent["VDD_CPU_CV"]
    assert (sensor.total.scope, sensor.total.channels) == ("partial", ("VDD_GPU_SOC", "VIN_SYS_5V0"))
    assert "VDD_CPU_CV" in sensor.total.note
    assert "VDD_CPU_CV" not in sensor.read().values


@pytest.mark.parametrize(
    ("fault", "way_out"), [("EACCES", "sudo"), ("EPERM", "udev"), ("EIO", "dmesg"), ("ENODATA", "tegrastats")]
)
def test_no_rail_at_all_is_unavailable_with_reason_and_way_out(nano, fault, way_out):
    faults = {f"{CHIP}/in{k}_input": fault for k in (1, 2, 3)}
    with pytest.raises(SensorUnavailable, match=fault) as error:
        opened(nano, **faults)
    assert way_out in str(error.value)


def test_no_chip_at_all_is_unavailable(tmp_path):
    with pytest.raises(SensorUnavailable, match="no INA3221"):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["", "garbage", "4984 mV", "nan", "inf", "1e400", "-5", "99999999999", "\x00\x00"])
def test_text_that_is_no_voltage_is_no_power(nano, text):
    boards.put(nano, f"{CHIP}/in2_input", text)
    sensor = opened(nano)
    assert sensor.absent["VDD_CPU_GPU_CV"]
    boards.put(nano, f"{CHIP}/in1_input", text)
    assert sensor.read().values["VDD_IN"] is None


def test_small_negative_power_is_an_offset_and_a_large_one_nonsense(nano):
    sensor = opened(nano)
    boards.put(nano, f"{CHIP}/curr1_input", -8)
    assert sensor.read().values["VDD_IN"] == pytest.approx(-0.039872)
    boards.put(nano, f"{CHIP}/curr1_input", -800)
    assert sensor.read().values["VDD_IN"] is None


def test_missing_current_is_absent(nano):
    (nano / CHIP / "curr1_input").unlink()
    sensor = opened(nano)
    assert "ENOENT" in sensor.absent["VDD_IN"]
    assert (sensor.total.scope, sensor.total.channels) == ("partial", ("VDD_CPU_GPU_CV", "VDD_SOC"))


# Lines of tegrastats

FORMS = [
    ("RAM 2448/7772MB (lfb 1x4MB) SWAP 3/3886MB (cached 0MB)", {"RAM used": 2448 * MIB, "SWAP used": 3 * MIB}),
    ("RAM 1923/3964MB (lfb 2x2MB) IRAM 0/252kB(lfb 252kB)", {"RAM used": 1923 * MIB}),
    ("CPU [5%@1190,off]", {"CPU0 load": 0.05, "CPU0 clock": 1.19e9, "CPU1 load": None, "CPU1 clock": None}),
    ("cpu [17%,100%]@408", {"CPU0 load": 0.17, "CPU0 clock": 408e6, "CPU1 load": 1.0, "CPU1 clock": 408e6}),
    ("EMC_FREQ 7%@2133", {"EMC load": 0.07, "EMC clock": 2.133e9}),
    ("EMC 1%@408 APE 25 GR3D 3%@76", {"EMC load": 0.01, "EMC clock": 408e6, "APE clock": 25e6,
                                      "GR3D load": 0.03, "GR3D clock": 76e6}),
    ("EMC_FREQ 0% GR3D_FREQ 99%", {"EMC load": 0.0, "EMC clock": None, "GR3D load": 0.99, "GR3D clock": None}),
    ("GR3D_FREQ 62%@612", {"GR3D load": 0.62, "GR3D clock": 612e6}),
    ("GR3D_FREQ 26%@[306]", {"GR3D load": 0.26, "GR3D clock": 306e6}),
    ("GR3D_FREQ 12%@[0,1300]", {"GR3D load": 0.12, "GR3D clock": 1.3e9}),
    ("GR3D_FREQ @[314,314,314]", {"GR3D clock": 314e6}),
    ("VIC_FREQ 115 MSENC 115 VIC off", {"VIC clock": 115e6, "MSENC clock": 115e6}),
    ("NVENC 79%@166 NVDEC off NVDLA0_FREQ @1600 PVA0_FREQ off",
     {"NVENC load": 0.79, "NVENC clock": 166e6, "NVDEC clock": None, "NVDLA0 clock": 1.6e9, "PVA0 clock": None}),
    ("MTS fg 1% bg 2%", {}),
    ("cpu@45.5C tj@47C/49C Tboard@38C", {"cpu temperature": 45.5, "tj temperature": 47.0, "tboard temperature": 38.0}),
    ("gpu@-256C CV0@-256C PMIC@100C", {"gpu temperature": None, "cv0 temperature": None}),
    ("VDD_IN 4654mW/4600mW VDD_SOC 1586mW", {"VDD_IN": 4.654, "VDD_SOC": 1.586}),
    ("POM_5V_IN 2930/3405 POM_5V_GPU 0/0", {"POM_5V_IN": 2.93, "POM_5V_GPU": 0.0}),
    ("VDD_GPU 0mW/0mW/0mW VIN_SYS_5V0 3918mW/3952mW/4019mW", {"VDD_GPU": 0.0, "VIN_SYS_5V0": 3.918}),
    ("VDD_GPU -392mW/-392mW", {"VDD_GPU": -0.392}),
    ("NC 0mW/0mW GPU 467/467 SYS5V 2768mW/2768mW", {"GPU": 0.467, "SYS5V": 2.768}),
    ("10-23-2024 12:33:44 RAM 1/2MB", {"RAM used": MIB}),
    ("RAM 9/2MB CPU [250%@1] cpu@9999C VDD_IN 99999999mW/1mW",
     {"RAM used": None, "CPU0 load": None, "CPU0 clock": 1e6, "cpu temperature": None, "VDD_IN": None}),
    ("tegrastats: command failed", {}),
    ("", {}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), FORMS, ids=[line[:40] for line, _ in FORMS])
def test_forms(line, expected):
    assert tegrastats.parse(line) == pytest.approx(expected)


def test_kinds_follow_from_names():
    kinds = {name: tegrastats.kind(name) for line, _ in FORMS for name in tegrastats.parse(line)}
    assert kinds["VDD_IN"] == kinds["GPU"] == "power"
    assert kinds["CPU0 load"] == "load"
    assert kinds["CPU0 clock"] == "frequency"
    assert kinds["tj temperature"] == "temperature"
    assert kinds["RAM used"] == "memory"


LIMITS = {
    "power": (-1.0, 1000.0), "load": (0.0, 1.0), "frequency": (0.0, 1e10), "temperature": (-55.0, 200.0),
    "memory": (0.0, 2.0**42),
}  # fmt: skip
GARBAGE = "0123456789%@/[](),.-:mMWCkB_ \t\n\r\0offGR3D_FREQVDDRAMé٣\ud83d"


def sound(line: str) -> None:
    for name, value in tegrastats.parse(line).items():
        low, high = LIMITS[tegrastats.kind(name)]
        assert value is None or (isinstance(value, float) and low <= value <= high), (name, value, line)


def mutated(rng: random.Random, lines: list[str]) -> str:
    line = list(rng.choice(lines))
    for _ in range(rng.randint(1, 6)):
        at, to = sorted(rng.randrange(len(line) + 1) for _ in range(2))
        what = rng.randrange(5)
        if what == 0:
            line[at:to] = []
        elif what == 1:
            line[at:at] = rng.choices(GARBAGE, k=rng.randint(1, 8))
        elif what == 2:
            line[at : at + 1] = rng.choice(GARBAGE)
        elif what == 3:
            line[at:at] = line[at : min(to, at + 40)]
        else:
            line[at:at] = "9" * rng.choice((1, 5, 400))
    return "".join(line)


def test_100_000_fuzzed_lines():
    rng = random.Random(3)
    # The cores make a line long and tell nothing new: fewer of them keep the test short.
    lines = [board.line.replace(",off,off,off,off", "") for board in BOARDS.values()] + [line for line, _ in FORMS]
    for number in range(100_000):
        if number % 4:
            sound(mutated(rng, lines))
        else:
            sound(rng.randbytes(rng.randrange(80)).decode("utf-8", "replace"))


@given(st.text(max_size=200) | st.lists(st.sampled_from(BOARDS["thor-jp7"].line.split()), max_size=20).map(" ".join))
def test_any_text_is_parsed(line):
    sound(line)


def test_endless_line_is_parsed():
    sound("CPU [" + "1%@2," * 1_000_000)
    sound("9" * 1_000_000)
    sound("RAM " * 100_000)


# Recorded lines


def test_recorded_lines_come_at_their_pace_and_once():
    clock = Clock()
    line = "RAM {}/4000MB (lfb 1x4MB) VDD_IN {}mW/1mW"
    lines = [(50.0 + k, line.format(k, 1000 * k)) for k in range(4)]
    sensor = tegrastats.open(Tree(lines={"tegrastats": lines}), clock)
    first = sensor.read()
    assert (first.time_s, first.values["VDD_IN"]) == (1000.0, 0.0)
    assert sensor.read() is None
    clock.now += 2.5
    reading = sensor.read()
    assert (reading.time_s, reading.values["VDD_IN"], reading.values["RAM used"]) == (1002.0, 2.0, 2 * MIB)
    clock.now += 100
    assert sensor.read().values["VDD_IN"] == 3.0
    assert sensor.read() is None
    sensor.close()
    sensor.close()


def test_channel_that_a_line_lacks_is_none_and_a_foreign_line_is_no_reading():
    lines = [(0.0, "RAM 1/2MB VDD_IN 5mW/5mW"), (1.0, "RAM 1/2MB"), (2.0, "ERROR 13")]
    clock = Clock()
    sensor = tegrastats.open(Tree(lines={"tegrastats": lines}), clock)
    clock.now += 1
    assert sensor.read().values == {"RAM used": MIB, "VDD_IN": None}
    clock.now += 1
    assert sensor.read() is None


def test_recording_without_usable_lines_is_unavailable():
    with pytest.raises(SensorUnavailable, match="holds no lines"):
        tegrastats.open(Tree(faults={}), Clock())
    with pytest.raises(SensorUnavailable, match="can be understood"):
        tegrastats.open(Tree(lines={"tegrastats": [(0.0, "nothing")]}), Clock())


# A running tegrastats


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a tegrastats of one's own on PATH; its process id is written to the file that is returned."""
    if os.name != "posix":
        pytest.skip("starts a script")

    def make(body: str) -> Path:
        file, pid = tmp_path / "bin" / "tegrastats", tmp_path / "pid"
        file.parent.mkdir(exist_ok=True)
        start = f"#!{sys.executable} -IS\nimport os, sys, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        file.write_text(start + body, encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(tegrastats, "FIRST_LINE_S", 30.0)  # of a machine that has much else to do
        return pid

    return make


TALKS = f"""
assert sys.argv[1:] == ["--interval", "100"], sys.argv
while True:
    print({BOARDS["orin-nano-8gb-jp6"].line!r}, flush=True)
    time.sleep(0.02)
"""


def gone(pid: Path) -> bool:
    """Whether the process has ended and its parent has taken note: a zombie is still found by kill."""
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def until(condition, limit_s: float = 10.0):
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return found


def test_running_program_is_read_and_ended(program):
    pid = program(TALKS)
    before = time.monotonic()
    sensor = tegrastats.open(Tree())
    reading = until(sensor.read)
    assert before < reading.time_s < time.monotonic()
    assert reading.values["VDD_IN"] == 5.901
    assert reading.values["CPU3 clock"] is None
    assert until(sensor.read).time_s > reading.time_s
    assert not gone(pid)
    sensor.close()
    assert gone(pid)
    sensor.close()


def test_program_that_ignores_being_asked_is_killed(program):
    pid = program("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + TALKS)
    tegrastats.open(Tree()).close()
    assert gone(pid)


def test_program_that_dies_is_unavailable_with_what_it_said(program):
    pid = program("print('cannot open /dev/x: Permission denied', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(SensorUnavailable, match="ended with 3: cannot open /dev/x: Permission denied"):
        tegrastats.open(Tree())
    assert gone(pid)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "while True: sys.stdout.buffer.write(os.urandom(50)); sys.stdout.flush(); time.sleep(0.001)",
        "while True: print('tegrastats: not supported', flush=True); time.sleep(0.01)",
    ],
    ids=["silent", "noise", "excuses"],
)
def test_program_without_lines_is_unavailable(program, monkeypatch, body):
    pid = program(body)
    monkeypatch.setattr(tegrastats, "FIRST_LINE_S", 0.5)
    with pytest.raises(SensorUnavailable, match="nothing of use within"):
        tegrastats.open(Tree())
    assert until(lambda: not pid.exists() or gone(pid))


def test_program_that_dies_later_tells_nothing_new_and_leaves_no_zombie(program):
    pid = program(
        f"print({BOARDS['nano-jp4'].line!r}, flush=True)\nprint('RAM 1/2MB POM_5V_IN 2/2', end='', flush=True)"
    )
    sensor = tegrastats.open(Tree())
    assert until(sensor.read).values["POM_5V_IN"] == 2.545
    assert until(lambda: gone(pid))
    assert sensor.read() is None
    sensor.close()


def test_program_ends_with_the_interpreter(program, tmp_path):
    import subprocess

    pid = program(TALKS)
    code = "from edge_sdss.sensors import tegrastats; from edge_sdss.tree import Tree; s = tegrastats.open(Tree())"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert gone(pid)


def test_no_program_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SensorUnavailable, match="no such program"):
        tegrastats.open(Tree())


def test_file_that_is_no_program_is_unavailable(program):
    pid = program("")
    (pid.parent / "bin" / "tegrastats").write_text("\x00\x01")
    with pytest.raises(SensorUnavailable, match="read tegrastats"):
        tegrastats.open(Tree())
