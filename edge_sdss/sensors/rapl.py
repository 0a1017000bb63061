"""RAPL: the energy counters of Intel and AMD processors, through the kernel's powercap files.

A zone is a folder `intel-rapl:N` (on AMD too: the driver is the same) with `name`, `energy_uj` and
`max_energy_range_uj`, where the counter starts again at 0; `intel-rapl:N:M` is a part or a neighbour of zone N.

    package-N  a processor with its cores, caches and built-in GPU: the total
    core, uncore  within the package
    dram       beside the package and outside of it, so that it is not in a total of scope cpu-package
    psys       what the vendor of the board wired to the platform's meter: often all of a laptop, on some boards
               nothing or less than the package. It contains the package, so it is never added, and because what
               it covers differs from board to board it is no total either.

Sources: docs.kernel.org/power/powercap/powercap.html; Intel SDM volume 3B, 15.10 (domains by product segment).
Knows nothing of intervals: readings are counters, whose differences are for the window to take.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Reading, Total
from edge_sdss.tree import Tree

POWERCAP = "sys/class/powercap"
ASKED = "read the processor's energy (rapl)"
NAMELESS = "its name cannot be read, so it is not known what it counts"
PSYS = "; psys is a rail of its own: the platform as the board's vendor wired it, with the package in it"


@dataclass(frozen=True)
class Zone:
    """One energy counter. `path` is its folder, `package` whether it is a whole processor."""

    channel: str
    path: str
    package: bool


class Rapl:
    """The zones that could be read when it was opened; one that vanishes later is None."""

    name = "rapl"

    def __init__(self, tree: Tree, clock: Clock, zones: list[Zone], total: Total, absent: Mapping[str, str]) -> None:
        self._tree, self._clock = tree, clock
        self._files = {zone.channel: f"{zone.path}/energy_uj" for zone in zones}
        self.channels = tuple(
            Channel(zone.channel, "energy", _joules(tree, f"{zone.path}/max_energy_range_uj") or None) for zone in zones
        )
        self.total = total
        self.absent = absent

    def read(self) -> Reading | None:
        """Returns every counter in J since it last started at 0."""
        time_s = self._clock()
        return Reading(time_s, {channel: _joules(self._tree, file) for channel, file in self._files.items()})

    def close(self) -> None:
        """Does nothing: no file stays open."""


def open(tree: Tree, clock: Clock) -> Rapl:
    """Opens the zones of the processors. Raises SensorUnavailable where no counter can be read."""
    zones, absent = _zones(tree)
    if not zones:
        raise SensorUnavailable(_no_zones(tree, absent))
    readable = [zone for zone in zones if _joules(tree, f"{zone.path}/energy_uj") is not None]
    if not readable:
        raise SensorUnavailable(_no_counters(tree, zones))
    dead = [zone for zone in zones if zone not in readable]
    lost = [zone.channel for zone in dead if zone.package]
    lost += [zone for zone, why in absent.items() if why == NAMELESS and zone.count(":") == 1]
    absent |= {zone.channel: _fault(tree, f"{zone.path}/energy_uj") for zone in dead}
    return Rapl(tree, clock, readable, _total(readable, lost), absent)


def _zones(tree: Tree) -> tuple[list[Zone], dict[str, str]]:
    """Every zone that counts something of its own, and the others with the reason."""
    absent: dict[str, str] = {}
    zones: list[Zone] = []
    names: dict[str, str] = {}  # by zone; a parent comes before its parts
    amd = re.search("AuthenticAMD|HygonGenuine", tree.maybe("proc/cpuinfo") or "") is not None
    dies: set[str] = set()
    for path in tree.glob(f"{POWERCAP}/intel-rapl*:*"):
        zone = path.rpartition("/")[2]
        name = tree.maybe(f"{path}/name")
        parent = zone.rpartition(":")[0]
        if not zone.startswith("intel-rapl:"):
            absent[zone] = "the same package through other registers"
        elif not name:
            absent[zone] = NAMELESS
        else:
            channel = f"{names.get(parent, parent)}/{name}" if ":" in parent else name
            channel = f"{channel} ({zone})" if channel in names.values() else channel
            names[zone] = channel
            package = re.match(r"package-\d+", name) if ":" not in parent else None
            if amd and package and package[0] in dies:
                absent[channel] = "on AMD every die shows the counter of the whole package"
            elif amd and name == "core":
                absent[channel] = "on AMD it counts one core, not all"
            else:
                zones.append(Zone(channel, path, package is not None))
            dies |= {package[0]} if package else set()
    return zones, absent


def _total(zones: list[Zone], lost: list[str]) -> Total:
    packages = tuple(zone.channel for zone in zones if zone.package)
    psys = PSYS if any(zone.channel == "psys" for zone in zones) else ""
    if not packages:
        return Total(note=f"no package can be read, and its parts are no total{psys}")
    if lost:
        return Total("partial", packages, f"without {', '.join(lost)}{psys}")
    return Total("cpu-package", packages, f"{' + '.join(packages)}, without memory and the rest of the board{psys}")


def _no_zones(tree: Tree, absent: Mapping[str, str]) -> str:
    if not tree.exists(POWERCAP):
        found = "no powercap in sysfs, usual in virtual machines and on Arm"
        return message(ASKED, found, "run it on the physical machine, if that is Intel's or AMD's")
    zones = "; ".join(f"{zone}: {why}" for zone, why in absent.items())
    found = f"no RAPL zone in /{POWERCAP}, usual in virtual machines and containers" + (f" ({zones})" if zones else "")
    do = "load the module intel_rapl_msr; in a container, which hides the counters by default, run it on the host"
    return message(ASKED, found, do)


def _no_counters(tree: Tree, zones: list[Zone]) -> str:
    file = f"{zones[0].path}/energy_uj"
    try:
        tree.text(file)
    except PermissionError:
        found = f"/{file} {_mode(tree, file)}, root only since CVE-2020-8694 (PLATYPUS): it leaks what others compute"
        do = (
            f"run as root, or let a group read it: `chgrp GROUP /{POWERCAP}/intel-rapl:*/energy_uj` and `chmod g+r` "
            'at each start by a udev rule for SUBSYSTEM=="powercap", or `setcap cap_dac_read_search=ep` on a Python '
            "of your own"
        )
        return message(ASKED, found, do)
    except OSError:
        pass
    return message(ASKED, f"/{file}: {_fault(tree, file)}", "update the kernel, or measure on the host")


def _mode(tree: Tree, file: str) -> str:
    """The file's mode in words; a recording's copy no longer has that of the machine."""
    try:
        return "cannot be read" if tree.recorded else f"has mode {stat.S_IMODE((tree.root / file).stat().st_mode):04o}"
    except OSError:
        return "cannot be read"


def _fault(tree: Tree, file: str) -> str:
    try:
        return f"it holds {tree.text(file).strip()[:20]!r}, no count of energy"
    except OSError as error:
        return error.strerror or type(error).__name__


def _joules(tree: Tree, file: str) -> float | None:
    """Returns a file's µJ in J; None where it cannot be read or holds no count."""
    try:
        value = float(tree.maybe(file) or "nan") * 1e-6
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
