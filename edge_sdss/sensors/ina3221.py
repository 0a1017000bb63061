"""Power rails of a Jetson, read from its INA3221 monitors in sysfs, and from the INA238 at Thor's input.

What there is differs by kernel and is discovered, never looked up by version:

    JetPack 5 to 7  sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmonN/{inK_label, inK_input mV, currK_input mA}
    JetPack 4       sys/bus/i2c/drivers/ina3221x/6-0040/iio:deviceN/{rail_name_K, in_powerK_input mW}
    Thor            sys/class/hwmon/hwmonN/{name: ina238, label, power1_input µW}

Sources: the kernel's hwmon documentation of ina3221 and ina238, the Jetson Linux developer guides, jetson_stats.
Knows nothing of energy: integrating is the profile's work.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Reading, _rails
from edge_sdss.sensors._files import OpenFile
from edge_sdss.tree import Tree

# A busy or suspended I2C bus says these at times, and recovers.
_PASSING = {"EIO", "EREMOTEIO", "ETIMEDOUT", "EAGAIN"}


@dataclass(frozen=True)
class _Rail:
    """One channel: the product of its files times `scale` is its power in W."""

    place: str
    label: str
    files: tuple[str, ...]
    scale: float


class Ina3221:
    """The rails of every monitor chip. A rail that cannot be read in one pass is None in that pass."""

    name = "ina3221"

    def __init__(self, tree: Tree, clock: Clock, rails: Sequence[_Rail], absent: Mapping[str, str]) -> None:
        self._clock, self._rails = clock, rails
        self._files = {path: OpenFile(tree, path) for rail in rails for path in rail.files}
        self.channels = tuple(Channel(rail.label, "power") for rail in rails)
        self.total = _rails.total(rail.label for rail in rails)
        self.absent = absent

    def read(self) -> Reading | None:
        """One pass over all rails, W."""
        now = self._clock()
        return Reading(now, {rail.label: self._power(rail) for rail in self._rails})

    def close(self) -> None:
        """Closes the files; what is read after it is None."""
        for file in self._files.values():
            file.close()

    def _power(self, rail: _Rail) -> float | None:
        try:
            return _watts(rail, [self._files[path].read() for path in rail.files])
        except (OSError, ValueError):
            return None


def open(tree: Tree, clock: Clock = time.monotonic) -> Ina3221:
    """Finds the rails. Raises SensorUnavailable where there is no monitor, or none of its rails can be read."""
    asked = "read the power rails"
    rails: dict[str, _Rail] = {}
    absent: dict[str, str] = {}
    readable = False
    for rail in _found(tree):
        if not _rails.connected(rail.label):
            absent[rail.place] = "not connected (NC)" if rail.label else "has no label"
        elif rail.label in rails:
            absent[rail.place] = f"a second rail named {rail.label}; the first is used"
        else:
            problem, passing = _problem(tree, rail)
            readable = readable or not problem
            if problem:
                absent[rail.label] = problem
            if not problem or passing:
                rails[rail.label] = rail
    if readable:
        return Ina3221(tree, clock, list(rails.values()), {k: v for k, v in absent.items() if k not in rails})
    if not absent:
        do = "on a Jetson look for sys/class/hwmon/*/name = ina3221 and mount /sys into the container; else use rapl"
        raise SensorUnavailable(message(asked, "no INA3221 or INA238 monitor in sysfs", do))
    raise SensorUnavailable(message(asked, "; ".join(f"{k}: {v}" for k, v in absent.items()), _way_out(absent)))


def _found(tree: Tree) -> Iterator[_Rail]:
    """Yields every channel of every chip, each chip once although sysfs shows it in several places."""
    hwmon = {
        _name(path): _folder(path) for path in tree.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in[1-3]_input")
    }
    inputs = {}
    for path in tree.glob("sys/class/hwmon/hwmon*/name"):
        driver = tree.maybe(path) or ""
        if driver.startswith("ina3221"):
            hwmon.setdefault(_name(path), _folder(path))
        elif driver == "ina238":
            inputs[_name(path)] = _folder(path)
    for name, folder in hwmon.items():
        # in4 to in6 are shunt voltages, in7 is their sum: no rails.
        for path in tree.glob(f"{folder}/in[1-3]_input"):
            k = path.removesuffix("_input")[-1]
            files = (path, f"{folder}/curr{k}_input")
            yield _Rail(f"{name} channel {k}", tree.maybe(f"{folder}/in{k}_label") or "", files, 1e-6)
    yield from _iio(tree)
    for name, folder in inputs.items():
        label = tree.maybe(f"{folder}/label") or ("VIN" if len(inputs) == 1 else f"ina238 {name}")
        yield _Rail(name, label, (f"{folder}/power1_input",), 1e-6)


def _iio(tree: Tree) -> Iterator[_Rail]:
    # Some releases show the same device as the link iio_device too.
    drivers = "sys/bus/i2c/drivers/ina3221*/*"
    for path in tree.glob(f"{drivers}/iio:device*/rail_name_*") or tree.glob(f"{drivers}/iio_device/rail_name_*"):
        folder, k = _folder(path), path.rsplit("_", 1)[1]
        power = f"{folder}/in_power{k}_input"
        place, label = f"{_name(path)} channel {k}", tree.maybe(path) or ""
        if tree.exists(power):
            yield _Rail(place, label, (power,), 1e-3)
        else:
            yield _Rail(place, label, (f"{folder}/in_voltage{k}_input", f"{folder}/in_current{k}_input"), 1e-6)


def _watts(rail: _Rail, read: Sequence[bytes | str]) -> float | None:
    values = [float(text) for text in read]
    if len(values) == 2 and values[0] < 0:
        raise ValueError(f"a voltage of {values[0]:g} mV")
    return _rails.plausible(math.prod(values) * rail.scale)


def _problem(tree: Tree, rail: _Rail) -> tuple[str, bool]:
    """Returns why a rail cannot be read now, '' if it can, and whether that may pass."""
    try:
        return (
            ""
            if _watts(rail, [tree.text(path) for path in rail.files]) is not None
            else "the power that it tells is out of range"
        ), False
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "EIO")
        return f"{error.strerror} ({name})", name in _PASSING
    except ValueError as error:
        return re.sub(r"\s+", " ", str(error))[:80], False


def _way_out(absent: Mapping[str, str]) -> str:
    reasons = " ".join(absent.values())
    if "EACCES" in reasons or "EPERM" in reasons:
        return "run with sudo, or let a udev rule give your group the right to read in*_input and curr*_input"
    if any(name in reasons for name in _PASSING):
        return "try again; if it lasts, dmesg says what the I2C bus has"
    return "look into the monitor's folder under sys/bus/i2c/drivers, or use tegrastats"


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    """`hwmon3` of `.../hwmon3/in1_input`: unique on a machine."""
    return path.split("/")[-2]
