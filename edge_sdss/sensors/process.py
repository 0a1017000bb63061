"""This process's memory and load, its cgroup's memory and what the machine has left.

    rss        memory of this process that is in RAM
    swap       and that was swapped out
    cgroup     memory of its control group (a container, a service): everything in it, page cache included
    available  MemAvailable: what new work can get without swapping; of the machine, also within a container
    cpu        processor time since the last read as a share of one core, in steps of 10 ms; None at first

On Linux it reads /proc, elsewhere psutil, which knows neither swap nor cgroup. Sources: man 5 proc, man 7 cgroups.
Knows nothing of PSS and USS, which take the kernel milliseconds, nor of peaks.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_sdss import cgroups
from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Reading, Total
from edge_sdss.tree import Tree

ASKED = "read this process's memory (process)"
TICKS_PER_S = 100.0  # USER_HZ, in which /proc counts on every architecture of interest, whatever the kernel's HZ

Take = Callable[[], dict[str, "float | None"]]
"""Returns the memory figures in bytes and `cpu`, the processor time so far, in seconds."""


class Process:
    """The quantities that could be read when it was opened."""

    name = "process"

    def __init__(self, clock: Clock, take: Take, absent: Mapping[str, str]) -> None:
        self._clock, self._take = clock, take
        self._last: tuple[float, float] | None = None
        found = {name for name, value in take().items() if value is not None}
        if "rss" not in found:
            raise SensorUnavailable(message(ASKED, "its size cannot be read", "mount /proc, or install psutil"))
        self.channels = tuple(Channel(name, "load" if name == "cpu" else "memory") for name in sorted(found))
        self.total = Total(note="memory and load, no power")
        self.absent = {name: why for name, why in absent.items() if name not in found}

    def read(self) -> Reading | None:
        """Returns memory in bytes and the load since the last read."""
        time_s = self._clock()
        values = self._take()
        values["cpu"] = self._load(time_s, values.get("cpu"))
        return Reading(time_s, {channel.name: values[channel.name] for channel in self.channels})

    def _load(self, time_s: float, busy_s: float | None) -> float | None:
        last = self._last
        self._last = None if busy_s is None else (time_s, busy_s)
        if last is None or busy_s is None or time_s <= last[0] or busy_s < last[1]:
            return None
        return (busy_s - last[1]) / (time_s - last[0])

    def close(self) -> None:
        """Does nothing: no file stays open."""


def open(tree: Tree, clock: Clock, *, library: Any = None) -> Process:
    """Opens /proc of the tree, or where this machine has none, psutil, for which `library` stands.

    Raises SensorUnavailable where there is neither.
    """
    if tree.exists("proc/self/status"):
        file, why = cgroup_file(tree)
        return Process(clock, lambda: _proc(tree, file), {"cgroup": why, "swap": "not in proc/self/status"})
    library = library or _import(tree)
    absent = {"swap": "unknown outside of Linux", "cgroup": "only Linux has them"}
    return Process(clock, _psutil(library), absent)


def _proc(tree: Tree, cgroup: str | None) -> dict[str, float | None]:
    status = _text(tree, "proc/self/status")
    return {
        "rss": _bytes(status, "VmRSS:"),
        "swap": _bytes(status, "VmSwap:"),
        "available": _bytes(_text(tree, "proc/meminfo"), "MemAvailable:"),
        "cgroup": _number(_text(tree, cgroup)) if cgroup else None,
        "cpu": _busy_s(_text(tree, "proc/self/stat")),
    }


def _text(tree: Tree, path: str) -> str:
    """`tree.maybe` by bare system calls, which take half the time; empty where it cannot be read."""
    if path in tree.faults:
        return ""
    try:
        file = os.open(f"{tree.root}/{path}", os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(file, 1 << 14).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(file)


def _bytes(text: str, key: str) -> float | None:
    """Returns the figure behind `key`, which /proc gives in KiB."""
    start = text.find(f"\n{key}")
    if start < 0:
        return None
    kib = _number(text[start + len(key) + 1 : start + len(key) + 40].partition("kB")[0])
    return None if kib is None else kib * 1024


def _busy_s(stat: str) -> float | None:
    """Fields 14 and 15, user and system time in ticks; a process's name, field 2, may hold blanks and brackets."""
    fields = stat.rpartition(")")[2].split(maxsplit=13)[11:13]
    user, system = (_number(field) for field in fields) if len(fields) == 2 else (None, None)
    return None if user is None or system is None else (user + system) / TICKS_PER_S


def _number(text: str) -> float | None:
    text = text.strip()
    return float(text) if text.isdecimal() and len(text) < 20 else None


def cgroup_file(tree: Tree) -> tuple[str | None, str]:
    """Returns the file that counts the memory of this process's own cgroup; else None, and why."""
    group = cgroups.own(tree)
    if group is None:
        return None, "the process is in no memory cgroup"
    if group.folder is None:
        return None, f"its cgroup {group.path} is not below any mount"
    file = f"{group.folder}/{cgroups.USAGE[group.version]}"
    if _number(_text(tree, file)) is None:
        return None, f"/{file} cannot be read; a root cgroup has none"
    return file, ""


def _import(tree: Tree) -> Any:
    if tree.recorded or tree.root != Path("/"):
        raise SensorUnavailable(message(ASKED, f"no proc/self below {tree.root}", "read this machine's own files"))
    try:
        return importlib.import_module("psutil")
    except ImportError as error:
        raise SensorUnavailable(message(ASKED, "no /proc and no psutil", "run `pip install psutil`")) from error


def _psutil(library: Any) -> Take:
    process = library.Process()

    def take() -> dict[str, float | None]:
        try:
            times = process.cpu_times()
            return {
                "rss": float(process.memory_info().rss),
                "available": float(library.virtual_memory().available),
                "cpu": float(times.user + times.system),
            }
        except (library.Error, OSError):
            return {"rss": None, "available": None, "cpu": None}

    return take
