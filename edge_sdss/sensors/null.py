"""No sensor: opens anywhere and reads nothing. Knows only what would give a power figure."""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdss.sensors import Channel, Clock, Reading, Total
from edge_sdss.tree import Tree

NOTE = (
    "no power figure: the power sensors of a Jetson (ina3221, tegrastats), the energy counters of an Intel or AMD "
    "processor (rapl), an NVIDIA GPU (nvml), a recorded Android trace (android) or an instrument's CSV (powerlog) "
    "would give one; "
    "`edge-sdss doctor` says what keeps each of them from being read here"
)


class Null:
    """A sensor without channels."""

    name = "null"
    channels: tuple[Channel, ...] = ()
    total = Total(note=NOTE)
    absent: Mapping[str, str] = {}

    def read(self) -> Reading | None:
        """Returns None: there is never anything new."""
        return None

    def close(self) -> None:
        """Does nothing."""


def open(tree: Tree, clock: Clock) -> Null:
    """Returns the sensor that reads nothing. Never raises."""
    return Null()
