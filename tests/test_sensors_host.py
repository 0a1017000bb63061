"""The sensors of hosts that are no Jetson: rapl, nvml, process, android, null. What each is told, and what it says."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import hosts
import pytest
from boards import put
from hosts import gpu
from hypothesis import given
from hypothesis import strategies as st

from edge_sdss import sensors
from edge_sdss.errors import SensorUnavailable
from edge_sdss.sensors import android, null, nvml, process, rapl
from edge_sdss.tree import Tree

POWERCAP = "sys/class/powercap"


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(opener, *args, **kwargs) -> str:
    with pytest.raises(SensorUnavailable) as caught:
        opener(*args, **kwargs)
    return str(caught.value)


# rapl


def zones(root, found=hosts.LAPTOP, *, vendor="GenuineIntel", **faults):
    return rapl.open(Tree(hosts.powercap(root, found, vendor), faults=faults), Clock())


def test_a_laptop_counts_its_package_alone(tmp_path):
    sensor = zones(tmp_path)
    values = sensor.read().values
    assert values == pytest.approx({
        "package-0": 60_293.987, "package-0/core": 20_000, "package-0/uncore": 1_000, "package-0/dram": 5_000,
        "psys": 150_000,
    })  # fmt: skip
    assert (sensor.total.scope, sensor.total.channels) == ("cpu-package", ("package-0",))
    assert "psys" in sensor.total.note
    assert set(sensor.absent) == {"intel-rapl-mmio:0"}
    assert {channel.kind for channel in sensor.channels} == {"energy"}
    assert [channel.wraps_at_j for channel in sensor.channels] == pytest.approx([262_143.32885] * 5)


def test_a_server_counts_all_packages_and_no_memory(tmp_path):
    sensor = zones(tmp_path, hosts.SERVER)
    values = sensor.read().values
    assert sum(values[name] for name in sensor.total.channels) == pytest.approx(12)
    assert set(values) - set(sensor.total.channels) == {"package-0/dram", "package-1/dram"}
    wraps = {channel.name: channel.wraps_at_j for channel in sensor.channels}
    assert wraps["package-0/dram"] == pytest.approx(65_712.999613)


def test_dies_that_mirror_the_package_count_once(tmp_path):
    sensor = zones(tmp_path, hosts.THREADRIPPER, vendor="AuthenticAMD")
    assert (sensor.total.scope, sensor.total.channels) == ("cpu-package", ("package-0-die-0",))
    assert list(sensor.read().values.values()) == [pytest.approx(68.0)]
    assert "whole package" in sensor.absent["package-0-die-1"]
    assert "one core" in sensor.absent["package-0-die-0/core"]


def test_dies_of_intel_have_counters_of_their_own(tmp_path):
    assert zones(tmp_path, hosts.THREADRIPPER).total.channels == ("package-0-die-0", "package-0-die-1")


def test_ten_packages_in_order(tmp_path):
    found = {f"intel-rapl:{n}": (f"package-{n}", n * 1_000_000, 10**9) for n in range(11)}
    assert zones(tmp_path, found).total.channels == tuple(f"package-{n}" for n in range(11))


@pytest.mark.parametrize("junk", ["", "nan", "-5", "inf", "9" * 400, "energy", "\0"])
def test_a_counter_that_is_none_is_none(tmp_path, junk):
    sensor = zones(tmp_path)
    put(tmp_path, f"{POWERCAP}/intel-rapl:0/energy_uj", junk)
    values = sensor.read().values
    assert values["package-0"] is None
    assert values["psys"] == 150_000


@pytest.mark.parametrize("junk", ["", "0", "text"])
def test_an_unknown_range_is_none(tmp_path, junk):
    hosts.powercap(tmp_path, hosts.LAPTOP)
    put(tmp_path, f"{POWERCAP}/intel-rapl:0/max_energy_range_uj", junk)
    sensor = rapl.open(Tree(tmp_path, faults={}), Clock())
    assert [c.wraps_at_j for c in sensor.channels if c.name == "package-0"] == [None]


def test_a_package_that_fails_makes_the_total_partial(tmp_path):
    sensor = zones(tmp_path, hosts.SERVER, **{f"{POWERCAP}/intel-rapl:0/energy_uj": "EIO"})
    assert (sensor.total.scope, sensor.total.channels) == ("partial", ("package-0",))
    assert "package-1" in sensor.total.note
    assert sensor.absent["package-1"] == os.strerror(5)


def test_a_package_without_a_name_makes_the_total_partial(tmp_path):
    sensor = zones(tmp_path, hosts.SERVER, **{f"{POWERCAP}/intel-rapl:0/name": "EIO"})
    assert (sensor.total.scope, sensor.total.channels) == ("partial", ("package-0",))


def test_psys_alone_is_no_total(tmp_path):
    sensor = zones(tmp_path, {"intel-rapl:0": ("psys", 5_000_000, 10**9)})
    assert (sensor.total.scope, sensor.total.channels) == ("none", ())
    assert sensor.read().values == {"psys": 5.0}


def test_two_zones_of_one_name_stay_apart(tmp_path):
    sensor = zones(tmp_path, {f"intel-rapl:{n}": ("psys", n + 1, 10**9) for n in range(2)})
    assert len({channel.name for channel in sensor.channels}) == 2


def test_root_only_names_the_reason_and_the_way_out(tmp_path):
    hosts.powercap(tmp_path, hosts.LAPTOP)
    faults = {f"{POWERCAP}/{zone}/energy_uj": "EACCES" for zone in hosts.LAPTOP}
    text = refusal(rapl.open, Tree(tmp_path, faults=faults), Clock())
    for word in ("intel-rapl:0/energy_uj", "CVE-2020-8694", "udev", "setcap", "as root"):
        assert word in text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_root_only_names_the_mode(tmp_path):
    hosts.powercap(tmp_path, hosts.LAPTOP)
    for file in tmp_path.glob("sys/devices/**/energy_uj"):
        file.chmod(0o000)
    assert "mode 0000" in refusal(rapl.open, Tree(tmp_path), Clock())


def test_the_mode_is_that_of_the_file(tmp_path, monkeypatch):
    hosts.powercap(tmp_path, hosts.LAPTOP)
    for file in tmp_path.glob("sys/devices/**/energy_uj"):
        file.chmod(0o400)
    whole = Tree.text

    def text(tree, path):
        if path.endswith("energy_uj"):
            raise PermissionError(13, "Permission denied", path)
        return whole(tree, path)

    monkeypatch.setattr(Tree, "text", text)
    assert "mode 0400" in refusal(rapl.open, Tree(tmp_path), Clock())


def test_no_powercap_is_usual_in_virtual_machines(tmp_path):
    assert "no powercap in sysfs, usual in virtual machines" in refusal(rapl.open, Tree(tmp_path), Clock())


def test_hidden_powercap_is_usual_in_containers(tmp_path):
    hosts.powercap(tmp_path, hosts.LAPTOP)
    shutil.rmtree(tmp_path / "sys/devices")  # as container runtimes do: the links stay and lead nowhere
    assert "container" in refusal(rapl.open, Tree(tmp_path), Clock())


# nvml


def graphics(*gpus, **kwargs):
    library = hosts.Nvml(*gpus, **kwargs)
    return nvml.open(Tree(), Clock(), library=library), library


def test_a_gpu_tells_energy_and_more_in_si_units():
    sensor, _ = graphics(gpu())
    assert sensor.read().values == pytest.approx({
        "gpu0/energy": 1234.567, "gpu0/temperature": 41, "gpu0/frequency": 1.41e9, "gpu0/load": 0.37,
        "gpu0/memory": 2 * 2**30,
    })  # fmt: skip
    assert (sensor.total.scope, sensor.total.channels) == ("gpu", ("gpu0/energy",))


def test_all_gpus_add_up():
    sensor, _ = graphics(gpu(), gpu(TotalEnergyConsumption=1000))
    assert sensor.total.channels == ("gpu0/energy", "gpu1/energy")
    values = sensor.read().values
    assert sum(values[name] for name in sensor.total.channels) == pytest.approx(1235.567)


def test_an_old_gpu_tells_its_power():
    sensor, _ = graphics(gpu(TotalEnergyConsumption=None))
    assert sensor.read().values["gpu0/power"] == 71.5
    assert (sensor.total.scope, sensor.total.channels) == ("gpu", ("gpu0/power",))


def test_a_total_is_of_one_kind_and_of_all_gpus_where_one_is_old():
    sensor, _ = graphics(gpu(), gpu(TotalEnergyConsumption=None))
    assert (sensor.total.scope, sensor.total.channels) == ("gpu", ("gpu0/power", "gpu1/power"))
    assert not [channel for channel in sensor.channels if channel.kind == "energy"]


@pytest.mark.parametrize("second", [gpu(TotalEnergyConsumption=None, PowerUsage=None), {"Handle": hosts.NVMLError()}])
def test_a_gpu_without_power_makes_the_total_partial(second):
    sensor, _ = graphics(gpu(), second)
    assert (sensor.total.scope, sensor.total.channels) == ("partial", ("gpu0/energy",))
    assert "gpu1" in sensor.total.note
    assert any(name.startswith("gpu1") for name in sensor.absent)


def test_what_one_gpu_refuses_is_absent():
    sensor, _ = graphics(gpu(UtilizationRates=None))
    assert sensor.absent == {"gpu0/load": "Not Supported"}


def test_a_jetson_is_sent_to_its_own_sensors():
    text = refusal(graphics, hosts.ORIN)
    assert "Orin (nvgpu)" in text
    assert "ina3221 or tegrastats" in text


@pytest.mark.parametrize(
    ("error", "word"),
    [(hosts.NVMLError_LibraryNotFound(), "driver"), (hosts.NVMLError_NoPermission(), "/dev/nvidia")],
)
def test_what_does_not_start_says_how(error, word):
    text = refusal(graphics, start=error)
    assert str(error) in text
    assert word in text


def test_no_gpu_is_unavailable():
    assert "no GPU" in refusal(graphics)


def test_a_refusal_ends_what_it_started():
    library = hosts.Nvml(hosts.ORIN)
    refusal(nvml.open, Tree(), Clock(), library=library)
    assert (library.started, library.ended) == (1, 1)


def test_a_lost_gpu_is_none():
    sensor, library = graphics(gpu(), gpu())
    for question in library.gpus[1]:
        library.gpus[1][question] = hosts.NVMLError_GpuIsLost()
    values = sensor.read().values
    assert {name for name, value in values.items() if value is None} == {n for n in values if n.startswith("gpu1")}


def test_closing_twice_ends_nvml_once():
    sensor, library = graphics(gpu())
    sensor.close()
    sensor.close()
    assert (library.started, library.ended) == (1, 1)


def test_files_of_another_machine_hold_no_gpu(tmp_path):
    for tree in (Tree(tmp_path), Tree(faults={})):
        assert "not this machine" in refusal(nvml.open, tree, Clock())


def test_without_its_package_nvml_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "nvidia-ml-py" in refusal(nvml.open, Tree(), Clock())


# process


def running(root, clock=None, **faults):
    return process.open(Tree(root, faults=faults), clock or Clock())


def test_memory_in_bytes(tmp_path):
    put(tmp_path, "sys/fs/cgroup/user.slice/memory.current", 123456)
    sensor = running(hosts.proc(tmp_path, "0::/user.slice", hosts.V2_MOUNT))
    assert sensor.read().values == {
        "rss": 10 * 2**20, "swap": 2**20, "available": 4 * 2**30, "cgroup": 123456, "cpu": None,
    }  # fmt: skip
    assert sensor.total.scope == "none"
    assert sensor.absent == {}


def test_load_is_the_share_of_one_core_since_the_last_read(tmp_path):
    clock = Clock()
    sensor = running(hosts.proc(tmp_path, user=150, system=50), clock)
    sensor.read()
    hosts.proc(tmp_path, user=250, system=70)
    clock.now += 0.8
    assert sensor.read().values["cpu"] == pytest.approx(1.5)
    assert sensor.read().values["cpu"] is None  # no time has passed
    hosts.proc(tmp_path, user=0, system=0)
    clock.now += 1
    assert sensor.read().values["cpu"] is None  # it cannot fall


@pytest.mark.parametrize(
    ("group", "mount", "file"),
    [
        ("0::/", hosts.V2_MOUNT, "sys/fs/cgroup/memory.current"),
        ("0::/a.slice/b c.scope", hosts.V2_MOUNT, "sys/fs/cgroup/a.slice/b c.scope/memory.current"),
        ("4:cpu,memory:/jobs/7", hosts.V1_MOUNT, "sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes"),
        ("4:memory:/docker/abc", hosts.CONTAINER_MOUNT, "sys/fs/cgroup/memory/memory.usage_in_bytes"),
        ("4:memory:/docker/abc/x", hosts.CONTAINER_MOUNT, "sys/fs/cgroup/memory/x/memory.usage_in_bytes"),
        ("0::/\n4:memory:/j", f"{hosts.V2_MOUNT}\n{hosts.V1_MOUNT}", "sys/fs/cgroup/memory/j/memory.usage_in_bytes"),
        ("0::/g", hosts.V2_MOUNT.replace("/sys/fs/cgroup", "/mnt/my\\040groups"), "mnt/my groups/g/memory.current"),
    ],
)
def test_the_cgroup_is_the_process_s_own(tmp_path, group, mount, file):
    put(tmp_path, file, 4096)
    assert running(hosts.proc(tmp_path, group, mount)).read().values["cgroup"] == 4096


@pytest.mark.parametrize(
    ("group", "mount"),
    [
        ("", hosts.V2_MOUNT),
        ("0::/gone", hosts.V2_MOUNT),
        ("0::/../../outside", hosts.V2_MOUNT),
        ("0::/g", ""),
        ("4:memory:/docker/abcd", hosts.CONTAINER_MOUNT),
        ("4:memory:/other", hosts.CONTAINER_MOUNT),
        ("nonsense", "nonsense - cgroup2"),
    ],
)
def test_another_s_cgroup_is_not_taken_for_it(tmp_path, group, mount):
    put(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", 1)
    put(tmp_path, "sys/fs/cgroup/memory/d/memory.usage_in_bytes", 1)
    put(tmp_path, "outside/memory.current", 1)
    sensor = running(hosts.proc(tmp_path, group, mount))
    assert "cgroup" not in sensor.read().values
    assert sensor.absent["cgroup"]


def test_a_kernel_without_swap_says_so(tmp_path):
    put(hosts.proc(tmp_path), "proc/self/status", "Name:\tx\nVmRSS:\t1 kB")
    sensor = running(tmp_path)
    assert "swap" not in sensor.read().values
    assert "swap" in sensor.absent


def test_what_fails_later_is_none(tmp_path):
    tree = Tree(hosts.proc(tmp_path), faults={})
    sensor = process.open(tree, Clock())
    tree.faults["proc/meminfo"] = "EIO"
    values = sensor.read().values
    assert values["available"] is None
    assert values["rss"] == 10 * 2**20


def test_this_machine():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc here")
    values = process.open(Tree(), Clock()).read().values
    psutil = pytest.importorskip("psutil")
    assert values["rss"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert values["available"] == pytest.approx(psutil.virtual_memory().available, rel=0.3)


class Psutil:
    """Stands for psutil on a machine without /proc."""

    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        self.busy_s: float | None = 2.0

    def Process(self):  # noqa: N802
        return self

    def cpu_times(self):
        if self.busy_s is None:
            raise self.Error
        return SimpleNamespace(user=self.busy_s - 1, system=1.0)

    def memory_info(self):
        return SimpleNamespace(rss=1234)

    def virtual_memory(self):
        return SimpleNamespace(available=5678)


def test_psutil_where_there_is_no_proc(tmp_path):
    clock, library = Clock(), Psutil()
    sensor = process.open(Tree(tmp_path), clock, library=library)
    sensor.read()
    clock.now, library.busy_s = clock.now + 2, 3.0
    assert sensor.read().values == {"rss": 1234, "available": 5678, "cpu": 0.5}
    assert set(sensor.absent) == {"swap", "cgroup"}
    library.busy_s = None
    assert set(sensor.read().values.values()) == {None}


def test_a_recording_without_processes_is_not_this_process(tmp_path):
    assert "no proc/self" in refusal(process.open, Tree(tmp_path, faults={}), Clock())


# android


def traced(tmp_path, text):
    file = tmp_path / "trace.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return android.open(Tree(tmp_path), Clock(), trace=file)


def readings(sensor):
    return list(iter(sensor.read, None))


def test_rails_are_counters_and_regulators_do_not_count_twice(tmp_path):
    sensor = traced(tmp_path, hosts.RAILS)
    assert {channel.name: channel.kind for channel in sensor.channels} == {
        "S2M_VDD_CPUCL2": "energy", "S8M_LLDO2": "energy", "L15M_VDD_SLC_M": "energy",
    }  # fmt: skip
    assert (sensor.total.scope, set(sensor.total.channels)) == ("partial", {"S2M_VDD_CPUCL2", "S8M_LLDO2"})
    got = readings(sensor)
    assert [reading.time_s for reading in got] == pytest.approx([1.0, 1.2, 1.25])
    assert [reading.values["S2M_VDD_CPUCL2"] for reading in got] == [5.0, pytest.approx(5.4), None]
    assert [reading.values["S8M_LLDO2"] for reading in got] == [pytest.approx(0.1), None, pytest.approx(0.11)]


def test_rails_as_the_standard_library_has_them(tmp_path):
    text = "id,ts,dur,power_rail_name,value,track_id\n1,0,9,cpu.big,2000000,3\n2,1000000000,9,cpu.big,[NULL],3\n"
    sensor = traced(tmp_path, text + "3,2000000000,9,cpu.big,3000000,3\n")
    assert [(r.time_s, r.values["cpu.big"]) for r in readings(sensor)] == [(0, 2.0), (2.0, 3.0)]
    assert sensor.bad_rows == 1
    assert "1" in sensor.absent["rows"]


def test_energy_below_0_is_none(tmp_path):
    sensor = traced(tmp_path, "ts,name,value\n0,power.A_uws,-5\n1000000000,power.A_uws,5000000\n")
    assert [reading.values["A"] for reading in readings(sensor)] == [None, 5.0]
    assert sensor.bad_rows == 1


def test_the_battery_is_the_board_while_it_discharges(tmp_path):
    sensor = traced(tmp_path, hosts.BATTERY)
    assert (sensor.total.scope, sensor.total.channels) == ("board", ("batt.power",))
    assert [r.values["batt.power"] for r in readings(sensor)] == [pytest.approx(2.0), pytest.approx(2.985), None]
    assert "1 of 3" in sensor.total.note


@pytest.mark.parametrize(("column", "volts"), [("voltage_mv", "4000"), ("voltage_uv", "4000000")])
def test_the_battery_in_columns(tmp_path, column, volts):
    sensor = traced(tmp_path, f"ts,current_ua,{column}\n0,-250000,{volts}\n250000000,-500000,{volts}\n")
    assert [r.values["batt.power"] for r in readings(sensor)] == [pytest.approx(1.0), pytest.approx(2.0)]


def test_a_falling_charge_tells_an_inverted_gauge(tmp_path):
    head = "ts,current_ua,voltage_uv,charge_uah\n"
    sensor = traced(tmp_path, f"{head}0,500000,4000000,900\n1000000000,250000,4000000,800\n")
    assert [r.values["batt.power"] for r in readings(sensor)] == [pytest.approx(2.0), pytest.approx(1.0)]
    text = refusal(traced, tmp_path, f"{head}0,500000,4000000,800\n1000000000,250000,4000000,900\n")
    assert "unplug" in text


def test_a_battery_beside_rails_is_the_total(tmp_path):
    sensor = traced(tmp_path, hosts.RAILS + hosts.BATTERY.partition("\n")[2])
    assert sensor.total.channels == ("batt.power",)
    assert len(sensor.channels) == 4


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "ts, name, value"),
        ("time,power\n1,2\n", "ts, name, value"),
        (b"\x0a\x1a\x08\x01\x12\xff\x00\xfe" * 99, "ts, name, value"),
        ("ts,name,value\n", "no row"),
        ("ts,name,value\nx,power.A_uws,1\n1,power.A_uws,[NULL]\n,,\n7\n", "4 could not be understood"),
        ("ts,name,value\n1,power.A_uws,1\n", "read only once"),
        ("ts,name,value\n1,batt.current_ua,-1\n", "VOLTAGE"),
        ("ts,name,value\n1,cpu.freq,1\n2,cpu.freq,1\n", "no row"),
        ("ts,current_ua,voltage_uv\n1,-5e300,4e300\n", "a unit is wrong"),
        ("ts,current_ua,voltage_uv,charge_uah\n1,1e308,4e6,9\n2,1e308,4e6,8\n", "a unit is wrong"),
    ],
)
def test_a_trace_without_power_says_why(tmp_path, text, word):
    message = refusal(traced, tmp_path, text)
    assert word in message
    assert "trace_processor" in message


def test_without_a_trace_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.delenv(android.VARIABLE, raising=False)
    assert "collect_power_rails" in refusal(android.open, Tree(tmp_path), Clock())
    assert "No such file" in refusal(android.open, Tree(tmp_path), Clock(), trace=tmp_path / "gone.csv")
    assert "directory" in refusal(android.open, Tree(tmp_path), Clock(), trace=tmp_path)


def test_the_variable_names_the_trace(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text(hosts.RAILS)
    monkeypatch.setenv(android.VARIABLE, str(tmp_path / "t.csv"))
    assert len(readings(android.open(Tree(tmp_path), Clock()))) == 3


CELLS = st.text(st.sampled_from('0123456789-.,e"\n\0 abtsnmelu_'), max_size=40)


@given(st.sampled_from(["ts,name,value\n", "ts,current_ua,voltage_uv,charge_uah\n", hosts.RAILS, ""]), CELLS)
def test_no_trace_breaks_it(tmp_path_factory, head, body):
    try:
        sensor = traced(tmp_path_factory.mktemp("t"), head + body)
    except SensorUnavailable:
        return
    names = {channel.name for channel in sensor.channels}
    assert all(set(reading.values) == names for reading in readings(sensor))


# null


def test_null_says_what_would_give_a_figure(tmp_path):
    sensor = null.open(Tree(tmp_path), Clock())
    assert (sensor.read(), sensor.channels, sensor.total.scope) == (None, (), "none")
    for name in set(sensors.names()) - {"null", "process", "thermal"}:
        assert name in sensor.total.note
