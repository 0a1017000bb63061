"""Sensors: what a machine tells of its power, energy, temperature, clocks, load and memory. One file each.

A file's name is its sensor's key; `open(tree, clock)` in it returns a `Sensor` or raises SensorUnavailable
with the reason and the way out. What cannot be read is None, never 0. Knows nothing of windows or reports.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.tree import Tree

Clock = Callable[[], float]
"""Monotonic time in seconds."""

Kind = Literal["power", "energy", "temperature", "frequency", "load", "memory"]
UNITS: Mapping[Kind, str] = {
    "power": "W", "energy": "J", "temperature": "°C", "frequency": "Hz", "load": "1", "memory": "bytes",
}  # fmt: skip

Scope = Literal["board", "module", "gpu", "cpu-package", "partial", "none"]
"""Of what a total is: widest first. `partial`: rails that are known not to be all."""

SCOPES: tuple[Scope, ...] = ("board", "module", "gpu", "cpu-package", "partial", "none")


@dataclass(frozen=True)
class Channel:
    """One quantity of a sensor. An energy counter starts again at 0 J after `wraps_at_j`."""

    name: str
    kind: Kind
    wraps_at_j: float | None = None


@dataclass(frozen=True)
class Total:
    """The channels of a sensor that add up to the power or energy of `scope`; none of them counts twice."""

    scope: Scope = "none"
    channels: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Reading:
    """All channels of one pass: `time_s` of the sensor's clock, values in SI units, None where unreadable."""

    time_s: float
    values: Mapping[str, float | None]


class Sensor(Protocol):
    """What `open` of each file returns."""

    name: str
    channels: tuple[Channel, ...]
    total: Total
    absent: Mapping[str, str]  # rails or zones that exist but are not used, and why

    def read(self) -> Reading | None:
        """One pass over all channels; None where there is nothing new since the last one. Never raises."""

    def close(self) -> None:
        """Ends what the sensor holds open; safe to call twice."""


@dataclass(frozen=True)
class Found:
    """The sensors that work, and for the others the reason and the way out."""

    sensors: Sequence[Sensor] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """Every sensor there is, by file."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Any:
    """Returns a sensor's module. Raises SensorUnavailable for an unknown name."""
    if name not in names():
        raise SensorUnavailable(message(f"read sensor {name!r}", "no such sensor", f"choose {', '.join(names())}"))
    return importlib.import_module(f"edge_sdss.sensors.{name}")


def discover(tree: Tree | None = None, clock: Clock = time.monotonic, wanted: Sequence[str] | None = None) -> Found:
    """Opens every sensor that works here, or those in `wanted`, each of which must.

    A file with `LIVE = False` reads what was recorded elsewhere; it is opened only where it is wanted.
    Raises SensorUnavailable where one in `wanted` cannot be read; the others are closed then.
    """
    tree = tree or Tree()
    opened: list[Sensor] = []
    unavailable: dict[str, str] = {}
    live = [name for name in names() if getattr(load(name), "LIVE", True)]
    for name in wanted if wanted is not None else live:
        try:
            opened.append(load(name).open(tree, clock))
        except SensorUnavailable as error:
            if wanted is not None:
                for sensor in opened:
                    sensor.close()
                raise
            unavailable[name] = str(error)
    return Found(tuple(opened), unavailable)


def total(sensors: Sequence[Sensor]) -> tuple[Sensor | None, Total]:
    """Picks the one sensor whose total has the widest scope; between equals, a counter, then the order given.

    Two sensors may read the same rails (ina3221 and tegrastats do), so totals are never added up.
    """

    def rank(sensor: Sensor) -> tuple[int, bool]:
        kinds = {channel.name: channel.kind for channel in sensor.channels}
        counter = all(kinds[name] == "energy" for name in sensor.total.channels)
        return SCOPES.index(sensor.total.scope), not counter

    able = [sensor for sensor in sensors if sensor.total.scope != "none"]
    if not able:
        return None, Total(note="no power sensor can be read here")
    best = min(able, key=rank)
    return best, best.total
