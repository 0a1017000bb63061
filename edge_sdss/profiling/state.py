"""What a result depends on and what may change while measuring. Reads only, and knows nothing of how to change it.

    power mode   var/lib/nvpmodel/status (`pmode:0002`) named by etc/nvpmodel.conf; x86: platform profile and EPP
    governors    sys/devices/system/cpu/cpufreq/policy*/scaling_governor
    clocks       the thermal sensor's files; of each also the limits in force, `<name> min` and `<name> max`
    fans         pwm1 to pwm9 of hwmon, 0 to 255; sys/devices/pwm-fan/cur_pwm before JetPack 5
    throttling   cooling devices that are at work, critical alarms of hwmon, and two counters since boot:
                 soctherm's oc*_event_cnt on a Tegra, thermal_throttle/*_throttle_count on x86

Sources: NVIDIA Jetson Linux Developer Guide, Platform Power and Performance; kernel documentation, cpufreq,
thermal/sysfs-api, hwmon/sysfs-interface, ABI/testing/sysfs-devices-system-cpu, sysfs-platform_profile.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from edge_sdss import processes
from edge_sdss.profiling import schema
from edge_sdss.sensors import Kind, thermal
from edge_sdss.tree import Tree

WARMER_C = 15.0
"""A rise in temperature that `changes` names, °C."""

SLOWER = 0.02
"""A drop of a clock that `changes` names, as a share; below it lies what a clock's steps and counters make."""

_POLICIES = "sys/devices/system/cpu/cpufreq/policy*"


def capture(tree: Tree) -> schema.State:
    """The machine's state now; None or empty where a source is missing. Never raises."""
    clocks = _clocks(tree)
    return schema.State(
        power_mode=_power_mode(tree),
        governors=governors(tree),
        clocks_hz=clocks,
        clocks_locked=_locked(clocks),
        fan=_fans(tree),
        temperatures_c=_temperatures(tree),
        throttled=(*_cooling(tree), *_alarms(tree)),
        throttle_counts=_counters(tree),
        available_bytes=available_bytes(tree),
        load_1min=_load(tree),
    )


def changes(before: schema.State, after: schema.State) -> list[str]:
    """What has changed between two states so that figures from between them may differ, in words.

    A clock that follows the load says nothing by being lower, so a clock counts where it was locked, its upper
    limit always. What is unknown in one of the states is no change.
    """
    return [
        *_mode_changes(before, after),
        *_throttle_changes(before, after),
        *_heat_changes(before.temperatures_c, after.temperatures_c),
        *_clock_changes(before.clocks_hz, after.clocks_hz),
    ]


def governors(tree: Tree) -> dict[str, str]:
    """The governor of each cpu policy, such as {"policy0": "schedutil"}."""
    found = {_name(path, -2): thermal.text(tree, path) for path in _glob(tree, f"{_POLICIES}/scaling_governor")}
    return {name: governor for name, governor in found.items() if governor}


def available_bytes(tree: Tree) -> int | None:
    """MemAvailable of proc/meminfo."""
    return processes.sizes(tree, "proc/meminfo").get("MemAvailable")


def _power_mode(tree: Tree) -> str | None:
    """NVIDIA's power mode by name, else what an x86 firmware and its processor were told."""
    status = re.search(r"pmode:\s*0*(\d+)", thermal.text(tree, "var/lib/nvpmodel/status") or "")
    if status:
        table = thermal.text(tree, "etc/nvpmodel.conf") or ""
        name = re.search(rf"<\s*POWER_MODEL\s+ID\s*=\s*0*{status[1]}\s+NAME\s*=\s*([^\s>]+)", table)
        return name[1] if name else f"mode {status[1]}"
    if nvpmodel := tree.command("nvpmodel"):
        return _asked(nvpmodel)
    profile = thermal.text(tree, "sys/firmware/acpi/platform_profile")
    paths = _glob(tree, f"{_POLICIES}/energy_performance_preference")
    preferences = dict.fromkeys(text for path in paths if (text := thermal.text(tree, path)))
    words = [*([profile] if profile else []), *([f"EPP {'/'.join(preferences)}"] if preferences else [])]
    return ", ".join(words) or None


def _asked(nvpmodel: str) -> str | None:
    try:
        done = subprocess.run(
            [nvpmodel, "-q"], capture_output=True, text=True, errors="replace", timeout=2, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"NV Power Mode\s*:\s*(\S+)", done.stdout)
    return found[1] if found else None


def _clocks(tree: Tree) -> dict[str, float]:
    """Each clock in Hz, and the limits between which it may be set now."""
    found: dict[str, float] = {}
    for source in _sources(tree, "frequency"):
        for name, path in (
            (source.name, source.path),
            (f"{source.name} min", re.sub(r"cur_freq$", "min_freq", source.path)),
            (f"{source.name} max", re.sub(r"cur_freq$", "max_freq", source.path)),
        ):
            if name == source.name or path != source.path:
                hertz = thermal.value(source, thermal.text(tree, path) or "")
                found |= {name: hertz} if hertz is not None else {}
    return found


def _locked(clocks: Mapping[str, float]) -> bool | None:
    """Whether every cpu policy has but one clock to choose; None where limits are not known."""
    names = {name.split()[0] for name in clocks if re.fullmatch(r"policy\d+( m..)?", name)}
    known = [(clocks.get(f"{name} min"), clocks.get(f"{name} max")) for name in names]
    if not known or any(None in pair for pair in known):
        return None
    return all(least == most for least, most in known)


def _temperatures(tree: Tree) -> dict[str, float]:
    found = {s.name: thermal.value(s, thermal.text(tree, s.path) or "") for s in _sources(tree, "temperature")}
    return {name: celsius for name, celsius in found.items() if celsius is not None}


def _sources(tree: Tree, kind: Kind) -> list[thermal.Source]:
    try:
        return [source for source in thermal.sources(tree) if source.kind == kind]
    except OSError:
        return []


def _fans(tree: Tree) -> dict[str, float]:
    paths = [p for p in _glob(tree, "sys/class/hwmon/hwmon*/pwm*") if re.search(r"/pwm\d$", p)]
    named = [(f"{_chip(tree, path)} {_name(path, -1)}", path) for path in paths]
    if not named:
        named = [("pwm-fan", "sys/devices/pwm-fan/cur_pwm")]
    found: dict[str, float] = {}
    for name, path in named:
        duty = _number(tree, path)
        if duty is not None and 0 <= duty <= 255:
            found[name if name not in found else f"{name} ({_name(path, -2)})"] = duty / 255
    return found


def _cooling(tree: Tree) -> Iterator[str]:
    """What the kernel's thermal framework slows down now. Fans are cooling devices too, and slow nothing."""
    for path in _glob(tree, "sys/class/thermal/cooling_device*/cur_state"):
        folder = path.rsplit("/", 1)[0]
        kind, level, most = (
            thermal.text(tree, f"{folder}/type"),
            _number(tree, path),
            _number(tree, f"{folder}/max_state"),
        )
        if kind and level and level > 0 and re.search(r"alert$|cpufreq|devfreq|^Processor$", kind):
            yield f"{kind} is on" if kind.endswith("alert") else f"{kind} is capped, step {level} of {most or '?'}"


def _alarms(tree: Tree) -> Iterator[str]:
    for pattern in ("curr*_crit_alarm", "temp*_crit_alarm"):
        for path in _glob(tree, f"sys/class/hwmon/hwmon*/{pattern}"):
            if _number(tree, path) == 1:
                yield f"{_chip(tree, path)} {_name(path, -1)} is on"


def _counters(tree: Tree) -> dict[str, int]:
    """Events since boot, where there were any."""
    counts: dict[str, int] = {}
    for path in _glob(tree, "sys/class/hwmon/hwmon*/oc*_event_cnt"):
        alarm = _name(path, -1).split("_")[0]
        idle = _number(tree, path.replace("_event_cnt", "_throt_en")) == 0
        counts[f"supply alarm {alarm}{' (throttles nothing)' if idle else ''}"] = _number(tree, path) or 0
    for kind in ("core", "package"):  # the cores of a package all show the package's count
        paths = _glob(tree, f"sys/devices/system/cpu/cpu*/thermal_throttle/{kind}_throttle_count")
        each = [_number(tree, path) or 0 for path in paths]
        counts[f"thermal throttling of a {kind}"] = max(each, default=0) if kind == "package" else sum(each)
    return {name: count for name, count in counts.items() if count > 0}


def _load(tree: Tree) -> float | None:
    try:
        load = float((thermal.text(tree, "proc/loadavg") or "").split()[0])
    except (IndexError, ValueError):
        return None
    return load if math.isfinite(load) else None


def _mode_changes(before: schema.State, after: schema.State) -> Iterator[str]:
    if before.power_mode and after.power_mode and before.power_mode != after.power_mode:
        yield f"the power mode went from {before.power_mode} to {after.power_mode}"
    for name, governor in before.governors.items():
        if after.governors.get(name, governor) != governor:
            yield f"the governor of {name} went from {governor} to {after.governors[name]}"


def _throttle_changes(before: schema.State, after: schema.State) -> Iterator[str]:
    for name, count in after.throttle_counts.items():
        rise = count - before.throttle_counts.get(name, 0)
        if rise > 0:
            yield f"{name}: {rise} more while measuring"
    devices = {word.split(" is ")[0] for word in before.throttled}
    yield from (f"{word}, and was not before" for word in after.throttled if word.split(" is ")[0] not in devices)


def _heat_changes(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    for name, celsius in before.items():
        if name in after and after[name] - celsius > WARMER_C:
            yield f"{name} rose from {celsius:.0f} to {after[name]:.0f} °C"


def _clock_changes(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
    for name, hertz in before.items():
        locked = f"{name} min" in before and before[f"{name} min"] == before.get(f"{name} max")
        if name in after and after[name] < hertz * (1 - SLOWER) and (locked or name.endswith(" max")):
            yield f"the clock {name} fell from {hertz / 1e6:.0f} to {after[name] / 1e6:.0f} MHz"


def _glob(tree: Tree, pattern: str) -> list[str]:
    try:
        return tree.glob(pattern)
    except OSError:
        return []


def _number(tree: Tree, path: str) -> int | None:
    try:
        return int(thermal.text(tree, path) or "")
    except ValueError:
        return None


def _chip(tree: Tree, path: str) -> str:
    folder = path.rsplit("/", 1)[0]
    return thermal.text(tree, f"{folder}/name") or _name(path, -2)


def _name(path: str, index: int) -> str:
    return PurePosixPath(path).parts[index]
