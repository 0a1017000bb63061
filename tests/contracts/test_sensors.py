"""What every sensor promises, on every machine that can be written down and on what is left when one breaks."""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import boards
import hosts
import pytest

from edge_sdss import sensors
from edge_sdss.errors import SensorUnavailable
from edge_sdss.sensors import android, powerlog
from edge_sdss.tree import Tree

LEAST_W, MOST_W = -1.0, 1000.0  # an idle rail's offset may read a little below 0


class Clock:
    """Counts up by 0.1 s a look."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        self.now += 0.1
        return self.now


def everything(root: Path) -> None:
    """A laptop with a process in a cgroup and thermal zones of its own."""
    hosts.powercap(root, hosts.LAPTOP)
    boards.put(root, "sys/fs/cgroup/s/memory.current", 4096)
    hosts.proc(root, "0::/s", hosts.V2_MOUNT)
    boards.put(root, "sys/class/thermal/thermal_zone0/type", "x86_pkg_temp")
    boards.put(root, "sys/class/thermal/thermal_zone0/temp", 45000)


MACHINES: dict[str, Callable[[Path], object]] = {
    "empty": lambda root: None,
    "laptop": everything,
    "server": lambda root: hosts.powercap(root, hosts.SERVER),
    "threadripper": lambda root: hosts.powercap(root, hosts.THREADRIPPER, "AuthenticAMD"),
    "container": lambda root: hosts.proc(root, "4:memory:/docker/abc", hosts.CONTAINER_MOUNT),
    **{name: (lambda root, board=board: boards.write(root, board)) for name, board in boards.BOARDS.items()},
}
OPENERS: dict[str, tuple[str, Callable[[Path], dict[str, object]]]] = {
    **{name: (name, lambda folder: {}) for name in sensors.names()},
    "nvml gpus": ("nvml", lambda folder: {"library": hosts.Nvml(hosts.gpu(), hosts.gpu(PowerUsage=None))}),
    "nvml jetson": ("nvml", lambda folder: {"library": hosts.Nvml(hosts.ORIN)}),
    "nvml without driver": ("nvml", lambda folder: {"library": hosts.Nvml(start=hosts.NVMLError_LibraryNotFound())}),
    "android rails": ("android", lambda folder: {"trace": file(folder, hosts.RAILS)}),
    "android battery": ("android", lambda folder: {"trace": file(folder, hosts.BATTERY)}),
    "powerlog power": ("powerlog", lambda folder: {"trace": file(folder, "Time (ms),Power (mW)\n0,900\n5,-1\n9,x\n")}),
    "powerlog junk": ("powerlog", lambda folder: {"trace": file(folder, "Time (ms),Power\n0,900\n")}),
    "android junk": ("android", lambda folder: {"trace": file(folder, "ts,name,value\n1,power.x_uws,y\n")}),
}
# Those that are given what they read need no machine.
PAIRS = [(name, key) for name in MACHINES for key in OPENERS if name == "empty" or key in sensors.names()]


def file(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.csv").write_text(text)
    return folder / "trace.csv"


def machine(folder: Path, name: str, **faults: str) -> Tree:
    """A tree that counts as recorded, so that nothing of this machine is read."""
    folder.mkdir(parents=True, exist_ok=True)
    MACHINES[name](folder)
    board = boards.BOARDS.get(name)
    lines = {"tegrastats": [(0.1 * n, board.line) for n in range(3)]} if board else {}
    return Tree(folder, faults=faults, lines=lines)


def paths(root: Path) -> list[str]:
    """Every path of a file, those through links too, as a sensor may take any."""
    found = {str(p.relative_to(root)) for pattern in ("*/" * n + "*" for n in range(12)) for p in root.glob(pattern)}
    return sorted(path for path in found if (root / path).is_file())


def attempt(key: str, tree: Tree, folder: Path):
    """The sensor, or None where it said in full why there is none. Any other error fails the test."""
    name, arguments = OPENERS[key]
    try:
        sensor = sensors.load(name).open(tree, Clock(), **arguments(folder / "arguments"))
    except SensorUnavailable as error:
        refusal = str(error)
    else:
        assert sensor.name == name
        return sensor
    asked, _, rest = refusal.partition(": ")
    found, _, do = rest.rpartition("; ")
    assert asked, refusal
    assert found, refusal
    assert do.rstrip("."), refusal
    assert "\n" not in refusal
    return None


def check(sensor, passes: int = 3) -> None:
    """Reads and holds every reading against what the sensor says of itself."""
    kinds = {channel.name: channel.kind for channel in sensor.channels}
    assert len(kinds) == len(sensor.channels), "a channel's name twice"
    assert set(sensor.total.channels) <= set(kinds)
    assert len(set(sensor.total.channels)) == len(sensor.total.channels)
    assert bool(sensor.total.channels) == (sensor.total.scope != "none")
    assert {kinds[name] for name in sensor.total.channels} <= {"power", "energy"}
    assert sensor.total.note
    assert not set(sensor.absent) & set(kinds)
    assert all(sensor.absent.values())
    last = -math.inf
    for reading in itertools.islice(iter(sensor.read, "never"), passes):
        if reading is None:
            continue
        assert set(reading.values) == set(kinds)
        assert reading.time_s >= last
        last = reading.time_s
        for name, value in reading.values.items():
            if value is None:
                continue
            assert type(value) in (float, int)
            assert math.isfinite(value), name
            assert kinds[name] != "power" or LEAST_W <= value <= MOST_W, name
            assert kinds[name] not in ("energy", "frequency", "memory", "load") or value >= 0, name
    for channel in sensor.channels:
        assert channel.wraps_at_j is None or (channel.kind == "energy" and 0 < channel.wraps_at_j < math.inf)


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    monkeypatch.delenv(android.VARIABLE, raising=False)
    monkeypatch.delenv(powerlog.VARIABLE, raising=False)


def test_the_sensors_of_the_design_are_there():
    assert {"android", "null", "nvml", "process", "rapl"} <= set(sensors.names())


@pytest.mark.parametrize(("name", "opener"), PAIRS)
def test_it_opens_or_says_why_and_outlives_its_files(tmp_path, name, opener):
    sensor = attempt(opener, machine(tmp_path / "root", name), tmp_path)
    if sensor:
        check(sensor)
        shutil.rmtree(tmp_path / "root")
        check(sensor)
        sensor.close()
        sensor.close()


@pytest.mark.parametrize("opener", sensors.names())
@pytest.mark.parametrize("fault", ["EIO", "EACCES", "ENODATA", "ENXIO"])
def test_files_that_fail_are_none(tmp_path, opener, fault):
    for name in ("laptop", "threadripper", "orin-nano-8gb-jp6", "agx-xavier-jp4"):
        folder = tmp_path / name
        tree = machine(folder / "root", name)
        sensor = attempt(opener, tree, folder)
        tree.faults |= dict.fromkeys(paths(folder / "root"), fault)
        if sensor:
            check(sensor)
            sensor.close()
        if sensor := attempt(opener, tree, folder):  # opened when nothing can be read
            check(sensor)
            sensor.close()


JUNK = (
    "",
    "\n\n",
    "nan",
    "-1",
    "inf",
    "0",
    "-273150",
    "9" * 25,
    "9" * 400,
    "1e308",
    "a b c",
    "\0\0",
    "\ud7ff",
    "1 " * 5000,
)


@pytest.mark.parametrize("opener", sensors.names())
@pytest.mark.parametrize("seed", range(4))
def test_junk_is_none(tmp_path, opener, seed):
    """Some files hold junk before it is opened, all after; the kernel never does this, a bad recording may."""
    random_ = random.Random(seed)
    for name in ("laptop", "server", "thor-jp7", "tx2-jp4"):
        folder = tmp_path / name
        tree = machine(folder / "root", name)
        files = [path for path in (folder / "root").rglob("*") if path.is_file() and not path.is_symlink()]
        for path in random_.sample(files, len(files) // 3):
            path.write_text(random_.choice(JUNK), encoding="utf-8")
        tree.lines = {command: [(t, random_.choice(JUNK)) for t, _ in rows] for command, rows in tree.lines.items()}
        sensor = attempt(opener, tree, folder)
        for path in files:
            path.write_text(random_.choice(JUNK), encoding="utf-8")
        if sensor:
            check(sensor)
            sensor.close()


@pytest.mark.parametrize("name", MACHINES)
def test_totals_of_sensors_never_add_up(tmp_path, name):
    found = sensors.discover(machine(tmp_path / "root", name), Clock())
    assert not set(found.unavailable) & {sensor.name for sensor in found.sensors}
    assert {"null"} <= {sensor.name for sensor in found.sensors}
    for size in range(len(found.sensors) + 1):
        for some in itertools.combinations(found.sensors, size):
            best, total = sensors.total(some)
            able = [sensor for sensor in some if sensor.total.scope != "none"]
            if not able:
                assert (best, total.scope, total.channels) == (None, "none", ())
                continue
            assert best in able
            assert total is best.total
            widest = min(sensors.SCOPES.index(sensor.total.scope) for sensor in able)
            assert total.scope == sensors.SCOPES[widest]
    for sensor in found.sensors:
        sensor.close()


def test_a_laptop_has_what_it_has(tmp_path):
    tree = machine(tmp_path / "root", "laptop")
    found = sensors.discover(tree, Clock())
    assert {"null", "process", "rapl", "thermal"} & set(sensors.names()) == {sensor.name for sensor in found.sensors}
    assert [sensor.name for sensor in sensors.discover(tree, Clock(), ["rapl", "null"]).sensors] == ["rapl", "null"]
    with pytest.raises(SensorUnavailable, match="no such sensor"):
        sensors.load("wattmeter")
