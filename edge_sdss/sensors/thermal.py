"""Temperatures and clocks from sysfs. Knows nothing of power, of fans, or of what a temperature means.

    thermal zones   sys/class/thermal/thermal_zone*/{type,temp}, millidegrees Celsius
    hwmon           of the processor (k10temp, coretemp), where no zone but ACPI's is of use
    cpufreq         sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq, kHz
    devfreq         GPU and memory controller, sys/class/devfreq/<name>/cur_freq, Hz
    emc             clock of a Tegra's memory, from the firmware's debug files (root only), Hz

A zone that is off gives -256 °C or fails with EAGAIN (Orin's cv zones do). `scaling_cur_freq` is what the driver
last set, or on x86 and new arm64 kernels what hardware counters averaged; either is cheap. `cpuinfo_cur_freq`, which
may stop the processor for a while, is not read. Sources: kernel documentation, thermal/sysfs-api, cpu-freq and
sysfs-class-devfreq; NVIDIA Jetson Linux Developer Guide, Platform Power and Performance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Kind, Reading, Total
from edge_sdss.sensors._files import OpenFile
from edge_sdss.tree import Tree

# Integrated GPUs: Tegra by its address (17000000.ga10b, 17000000.gpu) or name (gpu-gpc-0), Adreno, Mali.
_GPU = re.compile(r"gpu|kgsl-3d|mali|\.g[a-z]\d+b$", re.IGNORECASE)
_MEMORY = re.compile(r"^bwmgr$|emc", re.IGNORECASE)
_EMC = "sys/kernel/debug/bpmp/debug/clk/emc/rate"
_PROCESSOR_HWMON = {"coretemp", "cpu_thermal", "k10temp", "zenpower"}
_COLDEST_C, _HOTTEST_C = -60.0, 150.0
_OFF_MC = -256_000
_PLACEHOLDERS_C = (50.0, 100.0)  # what the PMIC's zone of Nano, TX2 and Xavier shows at all times
_FASTEST_HZ = 1e11


@dataclass(frozen=True)
class Source:
    """One file that holds one quantity: its channel's name, its path in the tree, and the SI value of 1 in it."""

    name: str
    kind: Kind
    path: str
    scale: float


def sources(tree: Tree) -> list[Source]:
    """Every temperature and clock that the tree has a file for, readable or not, under names that are unique."""
    found = [*_zones(tree)]
    if all("acpi" in source.name.lower() for source in found):
        found += _hwmon(tree)
    found += [
        Source(_part(path, -2), "frequency", path, 1e3)
        for path in tree.glob("sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq")
    ]
    found += [Source(_part(path, -2), "frequency", path, 1.0) for path in devfreq(tree)]
    if tree.exists(_EMC):
        found.append(Source("emc", "frequency", _EMC, 1.0))
    return list(_unique(found))


def devfreq(tree: Tree, *, memory: bool = True) -> list[str]:
    """Paths of `cur_freq` of the GPUs that sit on the processor, and of the memory controller."""
    paths = tree.glob("sys/class/devfreq/*/cur_freq")
    return [p for p in paths if _GPU.search(_part(p, -2)) or (memory and _MEMORY.search(_part(p, -2)))]


def text(tree: Tree, path: str) -> str | None:
    """Text of a file without surrounding blanks; None where it cannot be read."""
    try:
        return tree.maybe(path)
    except (TypeError, ValueError):  # EAGAIN makes Python's text layer decode None
        return None


def value(source: Source, raw: bytes | str) -> float | None:
    """Value in °C or Hz of what a file holds; None where it is no number, or none that can be."""
    try:
        number = int(raw)
    except ValueError:
        return None
    if abs(number) >= 1 << 63:
        return None
    scaled = round(number * source.scale, 3)
    if source.kind == "temperature":
        constant = source.name.startswith("PMIC") and scaled in _PLACEHOLDERS_C
        return scaled if _COLDEST_C < scaled < _HOTTEST_C and not constant else None
    return scaled if 0 <= scaled < _FASTEST_HZ else None


def open(tree: Tree, clock: Clock) -> Thermal:
    """Opens every temperature and clock that gives a value now.

    Raises SensorUnavailable where there is none.
    """
    sensor = Thermal(tree, clock, sources(tree))
    if not sensor.channels:
        sensor.close()
        asked = "read temperatures and clocks"
        raise SensorUnavailable(message(asked, _none_found(sensor.absent), "in a container or VM, ask the host"))
    return sensor


class Thermal:
    """Temperatures in °C and clocks in Hz; the files stay open between passes."""

    name = "thermal"
    total = Total(note="temperatures and clocks hold no power")

    def __init__(self, tree: Tree, clock: Clock, found: Iterable[Source]) -> None:
        self._clock = clock
        self._files: list[tuple[Source, OpenFile]] = []
        absent: dict[str, str] = {}
        for source in found:
            file = OpenFile(tree, source.path)
            reason = _unfit(source, file)
            # A GPU that sleeps has no temperature, and wakes up when it is measured.
            asleep = source.kind == "temperature" and reason.startswith("off") and "gpu" in source.name.lower()
            if reason and not asleep:
                absent[source.name] = reason
                file.close()
            else:
                self._files.append((source, file))
        self.channels = tuple(Channel(source.name, source.kind) for source, _ in self._files)
        self.absent: Mapping[str, str] = absent

    def read(self) -> Reading:
        """One pass over all files; None for a zone that has gone off or a file that fails."""
        now = self._clock()
        values: dict[str, float | None] = {}
        for source, file in self._files:
            try:
                values[source.name] = value(source, file.read())
            except OSError:
                values[source.name] = None
        return Reading(now, values)

    def close(self) -> None:
        """Closes the files."""
        for _, file in self._files:
            file.close()


def _unfit(source: Source, file: OpenFile) -> str:
    """Why a source is of no use now; empty where it is."""
    try:
        raw = file.read()
    except BlockingIOError:
        return "off: it fails with EAGAIN, as the zone of a block without power does"
    except PermissionError:
        return "root only" if source.path == _EMC else "no permission to read it"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if value(source, raw) is not None:
        return ""
    shown = raw.decode("utf-8", "replace").strip("\0 \t\r\n")
    if source.kind == "temperature" and shown == str(_OFF_MC):
        return "off: it reports -256 °C"
    return f"no {source.kind}: {shown[:20]!r}"


def _zones(tree: Tree) -> Iterator[Source]:
    for path in tree.glob("sys/class/thermal/thermal_zone*/temp"):
        folder = path.rsplit("/", 1)[0]
        yield Source(text(tree, f"{folder}/type") or _part(path, -2), "temperature", path, 1e-3)


def _hwmon(tree: Tree) -> Iterator[Source]:
    for path in tree.glob("sys/class/hwmon/hwmon*/temp*_input"):
        chip = text(tree, f"{path.rsplit('/', 1)[0]}/name")
        if chip in _PROCESSOR_HWMON:
            label = text(tree, path.replace("_input", "_label")) or _part(path, -1).removesuffix("_input")
            yield Source(f"{chip} {label}", "temperature", path, 1e-3)


def _unique(found: Iterable[Source]) -> Iterator[Source]:
    """The second `acpitz` is `acpitz 2`."""
    taken: set[str] = set()
    for source in found:
        name, number = source.name, 1
        while name in taken:
            number += 1
            name = f"{source.name} {number}"
        taken.add(name)
        yield Source(name, source.kind, source.path, source.scale)


def _part(path: str, index: int) -> str:
    return path.split("/")[index]


def _none_found(absent: Mapping[str, str]) -> str:
    if not absent:
        return "no thermal zone, cpufreq policy or devfreq device in sysfs"
    return "; ".join(f"{name}: {reason}" for name, reason in absent.items())
