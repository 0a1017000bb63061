"""The machine: board, memory, power mode, disks, sensors, tools. Knows nothing of Python's packages."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_sdss import boards, device, processes, sensors
from edge_sdss.doctor._finding import LEAST_FREE_BYTES, Finding, gib, line, parts
from edge_sdss.errors import SensorUnavailable
from edge_sdss.tree import Tree

TOOLS = {
    "nvpmodel": "usr/sbin/nvpmodel",
    "tegrastats": "usr/bin/tegrastats",
    "trtexec": "usr/src/tensorrt/bin/trtexec",
    "nvcc": "usr/local/cuda/bin/nvcc",
}


def board(tree: Tree) -> Iterator[Finding]:
    """Model, profile and cores."""
    if tree.recorded:
        yield "recording", "n.a.", "board and sensors are those of a recording, the software is this machine's", ""
    here = not tree.recorded and tree.root == Path("/")
    processor = re.search(r"^model name\s*:\s*(.+)$", tree.maybe("proc/cpuinfo") or "", re.M)
    model = tree.maybe("proc/device-tree/model") or (processor[1] if processor else "")
    yield "model", "ok", model or (device.processor() if here else "unknown"), ""
    if found := boards.match(tree):
        yield "profile", "ok", f"{found.name}: {found.about}", ""
    else:
        yield "profile", "warn", "no profile fits this board", "write one TOML file, see docs/boards.md"
    if here and (emulated := device.emulated()):
        yield "emulated", "warn", f"{emulated}: memory and cores as limits, on another machine", ""
    online = tree.maybe("sys/devices/system/cpu/online")
    usable = f"{device.cores()} for this process" if here else ""
    cores = ", ".join(part for part in (f"{online} online" if online else "", usable) if part)
    yield "cores", "ok" if cores else "n.a.", cores or "unknown", ""


def memory(tree: Tree) -> Iterator[Finding]:
    """Memory and swap."""
    sizes = processes.sizes(tree, "proc/meminfo")
    if "MemTotal" not in sizes:
        yield "memory", "n.a.", "there is no /proc/meminfo", ""
        return
    total, free, swap = (sizes.get(key, 0) for key in ("MemTotal", "MemAvailable", "SwapTotal"))
    short = free < LEAST_FREE_BYTES
    do = "close other programs, or lower tuning.batch_size and tuning.max_tokens" if short else ""
    yield "memory", "warn" if short else "ok", f"{gib(total)}, {gib(free)} available", do
    do = "a swap file keeps a round from being killed where memory is short"
    tight = not swap and total < 9e9
    yield "swap", "warn" if tight else "ok", gib(swap) if swap else "none", do if tight else ""


def power_mode(tree: Tree) -> Iterator[Finding]:
    """The mode of nvpmodel."""
    now = re.search(r"pmode:\s*(\d+)", tree.maybe("var/lib/nvpmodel/status") or "")
    if not now:
        yield "power mode", "n.a.", "no nvpmodel here", ""
        return
    names = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", tree.maybe("etc/nvpmodel.conf") or ""))
    number = str(int(now[1]))
    yield "power mode", "ok", f"{names.get(number, 'unnamed')} (id {number})", ""


def disk() -> Iterator[Finding]:
    """Space and permission in the folders of state and cache."""
    import platformdirs

    from edge_sdss import default_model

    home = Path(os.environ.get("EDGE_SDSS_HOME") or platformdirs.user_data_dir("edge_sdss", appauthor=False))
    for name, folder in (("home", home), ("cache", default_model.cache())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found = f"{folder}: {gib(free)} free"
        if not os.access(existing, os.W_OK):
            yield name, "warn", f"{folder} cannot be written", f"set EDGE_SDSS_{name.upper()} to another folder"
        elif free < LEAST_FREE_BYTES:
            yield name, "warn", found, f"free some, or set EDGE_SDSS_{name.upper()} to another disk"
        else:
            yield name, "ok", found, ""


def sensing(tree: Tree) -> Iterator[Finding]:
    """Each sensor, and which of them gives the total."""
    opened: list[sensors.Sensor] = []
    try:
        for name in sensors.names():
            try:
                sensor = sensors.discover(tree, wanted=[name]).sensors[0]
            except SensorUnavailable as error:
                found, do = parts(error)
                yield name, "missing" if getattr(sensors.load(name), "LIVE", True) else "n.a.", found, do
            except Exception as error:  # one broken sensor does not hide the others
                yield name, "missing", line(error), "report this as an issue"
            else:
                opened.append(sensor)
                channels = ", ".join(channel.name for channel in sensor.channels)
                absent = "".join(f"; {rail} is not used: {why}" for rail, why in sensor.absent.items())
                yield name, "ok" if channels else "n.a.", f"{channels or 'reads nothing'}{absent}", ""
        best, total = sensors.total(opened)
        if best is None:
            yield (
                "total",
                "warn",
                f"{total.note}: energy will be unknown",
                "mend a power sensor above, or measure elsewhere",
            )
        else:
            yield "total", "ok", f"{total.scope} from {best.name}: {total.note or ', '.join(total.channels)}", ""
    finally:
        for sensor in opened:
            sensor.close()


def tools(tree: Tree, jetson: bool) -> Iterator[Finding]:
    """NVIDIA's programs."""
    for name, place in TOOLS.items():
        if path := tree.command(name):
            yield name, "ok", path, ""
        elif tree.exists(place):
            yield name, "warn", f"/{place}, which is not on PATH", f"add /{place.rpartition('/')[0]} to PATH"
        elif name in ("nvpmodel", "tegrastats") and not jetson:
            yield name, "n.a.", "of Jetsons only", ""
        elif tree.recorded:
            yield name, "n.a.", "a recording holds no programs", ""
        else:
            do = "install JetPack's packages" if jetson else "comes with NVIDIA's CUDA and TensorRT"
            yield name, "missing", "not found", do
