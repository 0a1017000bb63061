"""Records what the sensors and `doctor` read of a machine, so that its owner can give it away as a fixture.

A recording is a folder that `Tree.of` replays; `_FILES` is all that is ever read. Left out on purpose: serial
numbers, MAC addresses, host and user names, logs. Knows nothing of what the files mean.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edge_sdss
from edge_sdss import device
from edge_sdss.errors import InputError, SensorUnavailable, message
from edge_sdss.sensors import Clock, tegrastats
from edge_sdss.tree import Tree
from edge_sdss.types import Progress, no_progress

_HWMON = (
    "name", "label", "*_label", "*_input", "*_average", "*_enable", "*_max", "*_crit", "*_alarm", "pwm[0-9]*",
    "oc*_event_cnt", "oc*_throt_en", "shunt*_resistor",
)  # fmt: skip
_CPUFREQ = ("scaling_*", "cpuinfo_*_freq", "*_cpus", "energy_performance_preference")

# Folders, and which of their files.
_FILES: Mapping[str, tuple[str, ...]] = {
    "etc": ("nv_tegra_release", "nvpmodel.conf", "nvfancontrol.conf"),
    "etc/nvpmodel": ("*.conf",),
    "var/lib/nvpmodel": ("status",),
    "proc": ("cpuinfo", "meminfo", "loadavg"),
    "proc/device-tree": ("model", "compatible"),
    "sys/firmware/devicetree/base": ("model", "compatible"),
    "sys/firmware/acpi": ("platform_profile",),
    "sys/class/dmi/id": ("product_name", "sys_vendor"),
    "sys/bus/i2c/drivers/ina*/*/hwmon/hwmon*": _HWMON,
    "sys/bus/i2c/drivers/ina3221*/*/iio*device*": ("rail_name_*", "in_*_input"),
    "sys/class/hwmon/hwmon*": _HWMON,
    "sys/class/thermal/thermal_zone*": ("type", "temp", "mode"),
    "sys/class/thermal/cooling_device*": ("type", "cur_state", "max_state"),
    "sys/devices/system/cpu": ("online", "present", "possible"),
    "sys/devices/system/cpu/cpufreq/policy*": _CPUFREQ,
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq": _CPUFREQ,
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle": ("*_throttle_count",),
    "sys/devices/system/cpu/cpu[0-9]*": ("online",),
    "sys/class/devfreq/*": ("name", "governor", "*_freq", "available_*"),
    "sys/devices/gpu.0": ("load",),
    "sys/devices/platform/gpu.0": ("load",),
    "sys/devices/pwm-fan": ("*_pwm", "pwm_cap"),
    "sys/class/powercap/*": ("name", "energy_uj", "max_energy_range_uj", "enabled"),
    "sys/kernel/debug/bpmp/debug/clk/emc": ("rate",),
}
_LEFT_OUT = ("serial numbers", "MAC addresses", "host and user names", "logs", "processes")
_SERIAL = re.compile(r"(?im)^serial[^\n]*\n?")
_PAUSE_S = 0.05


def record(
    folder: Path, tree: Tree, seconds: float, clock: Clock = time.monotonic, progress: Progress = no_progress
) -> dict[str, Any]:
    """Writes a recording: the files as they are now, and the lines of tegrastats for so many seconds.

    Returns its manifest. The folder appears when it is complete, or not at all. Raises InputError where it is
    there already, or where the machine has none of the files.
    """
    asked = f"record into {folder}"
    if folder.exists():
        raise InputError(message(asked, "it exists", "give a new folder, or remove it"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        files, faults = _copy(tree, making / "root", progress)
        if not files:
            raise InputError(message(asked, "none of the files that a recording holds", "run it on Linux"))
        lines, without = _lines(tree, seconds, clock, progress)
        manifest = {
            "format": 1,
            "edge_sdss": edge_sdss.__version__,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": device.processor(tree.root),
            "files": files,
            "unreadable": len(faults),
            "tegrastats_lines": len(lines),
            "tegrastats": without,
            "left_out": list(_LEFT_OUT),
        }
        rows = [json.dumps({"t": round(time_s, 4), "line": line}) + "\n" for time_s, line in lines]
        _write(making / "tegrastats.jsonl", "".join(rows))
        _write(making / "faults.json", json.dumps(faults, indent=2, sort_keys=True) + "\n")
        _write(making / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return manifest


def _copy(tree: Tree, root: Path, progress: Progress) -> tuple[int, dict[str, str]]:
    """Returns how many files were copied, and what the others said, by path."""
    paths = sorted({path for pattern in _patterns() for path in tree.glob(pattern)})
    held: dict[tuple[str, str | None], str | OSError] = {}
    faults: dict[str, str] = {}
    copied = 0
    for done, path in enumerate(paths):
        progress("recording files", done, len(paths))
        # One file may be reached by several paths and change between two reads: it is read once.
        once = (os.path.realpath(tree.root / path), tree.faults.get(path))
        if once not in held:
            held[once] = _content(tree, path)
        content = held[once]
        if isinstance(content, str):
            _write(root / path, content)
            copied += 1
        elif content.errno != errno.EISDIR:
            faults[path] = errno.errorcode.get(content.errno or 0, "EIO")
    root.mkdir(parents=True, exist_ok=True)
    return copied, faults


def _content(tree: Tree, path: str) -> str | OSError:
    try:
        real = tree.root / path
        if path not in tree.faults and not stat.S_ISREG(real.stat().st_mode):
            return OSError(errno.EISDIR, "no file", path)
        text = tree.text(path)
    except OSError as error:
        return error
    return _SERIAL.sub("", text) if path == "proc/cpuinfo" else text


def _lines(tree: Tree, seconds: float, clock: Clock, progress: Progress) -> tuple[list[tuple[float, str]], str]:
    """Returns the lines of tegrastats with the seconds since the first, or none and why."""
    lines: list[tuple[float, str]] = []
    try:
        source = tegrastats.source(tree, clock)
    except SensorUnavailable as error:
        return [], str(error)
    start = clock()
    try:
        while (passed := clock() - start) < seconds:
            progress("recording tegrastats", int(passed), max(1, round(seconds)))
            time.sleep(min(_PAUSE_S, seconds - passed))
            lines += source.new()
        problem = "" if lines else source.problem()
    finally:
        source.close()
    first = lines[0][0] if lines else 0.0
    return [(time_s - first, line) for time_s, line in lines], problem


def _patterns() -> list[str]:
    return [f"{folder}/{name}" for folder, names in _FILES.items() for name in names]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="")
