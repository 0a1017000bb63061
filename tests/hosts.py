"""Writes /sys and /proc of hosts that are no Jetson, a stand-in for pynvml, and traces of a phone.

Written after public sources, not recorded on a device: zones after the kernel's powercap documentation and what
issues of powercap/powercap and mlco2/codecarbon show of laptops and servers; /proc after man 5 proc; pynvml after
NVML's reference; rails after the names that Pixel phones give them and Perfetto's documentation. Figures are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

from boards import link, put

# By zone: name, µJ, µJ at which it wraps.
LAPTOP = {
    "intel-rapl:0": ("package-0", 60_293_987_000, 262_143_328_850),
    "intel-rapl:0:0": ("core", 20_000_000_000, 262_143_328_850),
    "intel-rapl:0:1": ("uncore", 1_000_000_000, 262_143_328_850),
    "intel-rapl:0:2": ("dram", 5_000_000_000, 262_143_328_850),
    "intel-rapl:1": ("psys", 150_000_000_000, 262_143_328_850),
    "intel-rapl-mmio:0": ("package-0", 60_100_000_000, 262_143_328_850),
}
SERVER = {
    "intel-rapl:0": ("package-1", 7_000_000, 262_143_328_850),
    "intel-rapl:0:0": ("dram", 3_000_000, 65_712_999_613),
    "intel-rapl:1": ("package-0", 5_000_000, 262_143_328_850),
    "intel-rapl:1:0": ("dram", 2_000_000, 65_712_999_613),
}
THREADRIPPER = {
    "intel-rapl:0": ("package-0-die-0", 68_000_000, 65_532_610_987),
    "intel-rapl:0:0": ("core", 1_000_000, 65_532_610_987),
    "intel-rapl:1": ("package-0-die-1", 68_001_000, 65_532_610_987),
    "intel-rapl:1:0": ("core", 1_100_000, 65_532_610_987),
}


def powercap(root: Path, zones: Mapping[str, tuple[str, int, int]], vendor: str = "GenuineIntel") -> Path:
    """Writes zones as the kernel shows them: flat links in sys/class to nested folders in sys/devices."""
    put(root, "proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {vendor}")
    (root / "sys/class/powercap").mkdir(parents=True, exist_ok=True)
    for zone, (name, energy, wraps) in zones.items():
        parts = zone.split(":")
        folders = [":".join(parts[: n + 1]) for n in range(len(parts))]
        device = "sys/devices/virtual/powercap/" + "/".join(folders)
        put(root, f"{device}/name", name)
        put(root, f"{device}/energy_uj", energy)
        put(root, f"{device}/max_energy_range_uj", wraps)
        link(root, f"sys/class/powercap/{zone}", device)
    return root


STAT = "4711 (py (edge) sdss) S 1 4711 4711 0 -1 4194304 9 0 0 0 {user} {system} 0 0 20 0 4 0 99 1000000 2500"


def proc(root: Path, cgroup: str = "", mounts: str = "", *, user: int = 150, system: int = 50) -> Path:
    """Writes this process's part of /proc: 10 MiB in RAM, 1 MiB swapped out, 4 GiB left."""
    put(root, "proc/self/status", "Name:\tpython\nVmPeak:\t   99999 kB\nVmRSS:\t   10240 kB\nVmSwap:\t    1024 kB")
    put(root, "proc/self/stat", STAT.format(user=user, system=system))
    put(root, "proc/meminfo", "MemTotal:        8388608 kB\nMemFree:          100000 kB\nMemAvailable:    4194304 kB")
    put(root, "proc/self/cgroup", cgroup)
    put(root, "proc/self/mountinfo", mounts)
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
CONTAINER_MOUNT = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime master:15 - cgroup cgroup rw,memory"


class NVMLError(Exception):
    """As in pynvml, where every code has a class of its own below this one."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801
    def __init__(self) -> None:
        super().__init__("Not Supported")


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801
    def __init__(self) -> None:
        super().__init__("NVML Shared Library Not Found")


class NVMLError_NoPermission(NVMLError):  # noqa: N801
    def __init__(self) -> None:
        super().__init__("Insufficient Permissions")


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801
    def __init__(self) -> None:
        super().__init__("GPU is lost")


class Nvml:
    """Stands for pynvml: GPUs as {function: answer or exception}, and how often it was started and ended."""

    NVMLError = NVMLError
    NVMLError_NoPermission = NVMLError_NoPermission
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    def __init__(self, *gpus: dict[str, object], start: Exception | None = None) -> None:
        self.gpus, self.start = gpus, start
        self.started = self.ended = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.start:
            raise self.start
        self.started += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, object]:  # noqa: N802
        gpu = self.gpus[index]
        if isinstance(gpu.get("Handle"), Exception):
            raise gpu["Handle"]
        return gpu

    def __getattr__(self, name: str) -> Callable[..., object]:
        question = name.removeprefix("nvmlDeviceGet")

        def ask(gpu: dict[str, object], *which: int) -> object:
            answer = gpu.get(question, NVMLError_NotSupported())
            if isinstance(answer, Exception):
                raise answer
            if question in ("ClockInfo", "Temperature"):
                assert which == ((self.NVML_CLOCK_SM,) if question == "ClockInfo" else (self.NVML_TEMPERATURE_GPU,))
            return answer

        return ask


def gpu(**changes: object) -> dict[str, object]:
    """A GPU that answers everything; None takes an answer away."""
    answers: dict[str, object] = {
        "Name": "NVIDIA RTX", "TotalEnergyConsumption": 1_234_567, "PowerUsage": 71_500, "Temperature": 41,
        "ClockInfo": 1410, "UtilizationRates": SimpleNamespace(gpu=37, memory=12),
        "MemoryInfo": SimpleNamespace(total=8 << 30, free=6 << 30, used=2 << 30),
    }  # fmt: skip
    return {key: value for key, value in {**answers, **changes}.items() if value is not None}


ORIN = {"Name": b"Orin (nvgpu)"}

RAILS = """"ts","name","value"
1000000000,"power.S2M_VDD_CPUCL2_uws",5000000
1000000000,"power.S8M_LLDO2_uws",100000
1000000000,"power.L15M_VDD_SLC_M_uws",70000
1200000000,"power.S2M_VDD_CPUCL2_uws",5400000
1200000000,"power.L15M_VDD_SLC_M_uws",72000
1250000000,"power.S8M_LLDO2_uws",110000
1250000000,"mem.rss",7
"""
BATTERY = """"ts","name","value"
338297039804951,"batt.charge_uah",2085000.0
338297039804951,"batt.current_ua",-500000.0
338297039804951,"batt.voltage_uv",4000000.0
338297289804951,"batt.current_ua",-750000.0
338297289804951,"batt.voltage_uv",3980000.0
338297539804951,"batt.current_ua",120000.0
338297539804951,"batt.charge_uah",2084000.0
"""
