"""Whether the moment is one in which a device may work for itself: idle, charging, cool.

    idle      others use less than a share of the processor, from one look to the next; our own work does not count
    charging  on mains, or the battery is charging or full; a device without a battery always is
    cool      the hottest zone is below a limit

What was asked for and cannot be read is an error, never a yes. Knows nothing of what is done in the moment.
Sources: proc(5), proc_pid_stat(5); kernel documentation, sysfs-class-power.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from edge_sdss import config
from edge_sdss.errors import InputError, SensorUnavailable, message
from edge_sdss.sensors import Clock, thermal
from edge_sdss.tree import Tree

Name = Literal["idle", "charging", "cool"]
NAMES: tuple[Name, ...] = get_args(Name)

_SUPPLY = "sys/class/power_supply"
_CHARGED = ("Charging", "Full", "Not charging")


class State(NamedTuple):
    """Whether a condition holds now, and in words what was seen."""

    holds: bool
    why: str


class Condition(Protocol):
    """One of the names."""

    def look(self) -> State:
        """What is so now. Never raises."""


def names(text: str) -> tuple[Name, ...]:
    """Reads `idle,charging,cool`. Raises InputError for any other word, and for none."""
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in NAMES]
    if unknown or not wanted:
        found = f"{unknown[0]!r} is no condition" if unknown else "no condition"
        raise InputError(message(f"adapt when {text!r}", found, f"choose from {','.join(NAMES)}"))
    return tuple(name for name in NAMES if name in wanted)


def open(
    wanted: Sequence[Name], settings: config.Adapt, tree: Tree | None = None, clock: Clock = time.monotonic
) -> dict[Name, Condition]:
    """Opens the conditions. Raises SensorUnavailable where one cannot be told here."""
    tree = tree or Tree()
    made: dict[Name, Condition] = {}
    for name in wanted:
        if name == "idle":
            made[name] = Idle(tree, settings.idle_share)
        elif name == "charging":
            made[name] = Charging(tree)
        else:
            made[name] = Cool(tree, settings.cool_c, clock)
    return made


class Idle:
    """The share of all cores that others used since the last look; nothing is known at the first one."""

    def __init__(self, tree: Tree, limit: float, pid: int | None = None) -> None:
        """`pid` is the process whose work, and whose descendants', is our own. Raises SensorUnavailable."""
        self._tree, self._limit, self._pid = tree, limit, os.getpid() if pid is None else pid
        self._last = self._ticks()
        if self._last is None:
            raise SensorUnavailable(message("tell whether the machine is idle", "no /proc/stat", _without("idle")))
        self._state = State(False, "idle: not known yet")

    def look(self) -> State:
        """See `Condition`. Two looks within a tick say the same."""
        now, last = self._ticks(), self._last
        if now is None or last is None:
            self._last = now
            return State(False, "idle: /proc/stat cannot be read")
        passed, busy, own = (after - before for after, before in zip(now, last, strict=True))
        if passed <= 0:
            return self._state
        self._last = now
        # A child that has ended takes its ticks with it, unless it was waited for: never less than nothing.
        share = min(max(busy - max(own, 0), 0) / passed, 1.0)
        holds = share < self._limit
        self._state = State(holds, f"others use {share:.0%} of the processor")
        return self._state

    def _ticks(self) -> tuple[int, int, int] | None:
        """(all, busy, our own) ticks since boot."""
        line = (self._tree.maybe("proc/stat") or "").partition("\n")[0].split()
        if line[:1] != ["cpu"] or len(line) < 5 or not all(part.isdigit() for part in line[1:]):
            return None
        counts = [int(part) for part in line[1:9]]  # guest time is in user time already
        return sum(counts), sum(counts) - sum(counts[3:5]), self._own()

    def _own(self) -> int:
        """Ticks of our process, its descendants, and of the children that they have waited for."""
        parents, used = {}, {}
        for path in self._tree.glob("proc/[0-9]*/stat"):
            # The name, in brackets, may hold blanks and brackets itself.
            fields = (self._tree.maybe(path) or "").rpartition(")")[2].split()
            if len(fields) > 14:
                pid = int(path.split("/")[1])
                parents[pid] = int(fields[1])
                used[pid] = sum(int(part) for part in fields[11:15])
        return sum(ticks for pid, ticks in used.items() if self._ours(pid, parents))

    def _ours(self, pid: int, parents: dict[int, int]) -> bool:
        seen: set[int] = set()
        while pid not in (self._pid, 0) and pid not in seen:
            seen.add(pid)
            pid = parents.get(pid, 0)
        return pid == self._pid


class Charging:
    """The power supplies of the device itself; the battery of a mouse does not count."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def look(self) -> State:
        """See `Condition`."""
        supplies = [path.rpartition("/")[0] for path in self._tree.glob(f"{_SUPPLY}/*/type")]
        kinds = {folder: self._held(folder, "type") for folder in supplies if self._held(folder, "scope") != "Device"}
        states = [self._held(folder, "status") for folder, kind in kinds.items() if kind == "Battery"]
        if not states:
            return State(True, "no battery: always on mains")
        sources = [folder for folder, kind in kinds.items() if kind != "Battery"]
        online = any(self._held(folder, "online") in ("1", "2") for folder in sources)
        # A full battery says so for a while after it was unplugged, where there is a supply that says otherwise.
        holds = any(state in _CHARGED for state in states) and (online or not sources)
        return State(holds, f"battery: {', '.join(state or 'unknown' for state in states)}")

    def _held(self, folder: str, name: str) -> str:
        return self._tree.maybe(f"{folder}/{name}") or ""


class Cool:
    """The hottest zone that can be read now."""

    def __init__(self, tree: Tree, limit_c: float, clock: Clock) -> None:
        """Raises SensorUnavailable where there is no zone."""
        self._limit_c = limit_c
        asked = "tell whether the machine is cool"
        try:
            self._sensor = thermal.open(tree, clock)
        except SensorUnavailable as error:
            raise SensorUnavailable(message(asked, "no temperature can be read", _without("cool"))) from error
        self._zones = [channel.name for channel in self._sensor.channels if channel.kind == "temperature"]
        if not self._zones:
            raise SensorUnavailable(message(asked, "no temperature can be read", _without("cool")))

    def look(self) -> State:
        """See `Condition`."""
        values = self._sensor.read().values
        known = {zone: heat_c for zone in self._zones if (heat_c := values.get(zone)) is not None}
        if not known:
            return State(False, "no temperature can be read now")
        zone = max(known, key=known.__getitem__)
        return State(known[zone] < self._limit_c, f"{zone} is at {known[zone]:.0f} °C")


def _without(name: str) -> str:
    return f"leave {name} out of --when"
