"""When the next step may begin: at once, or later where the machine gets hot. Never touches clocks or power modes.

Knows nothing of what a step is. Later paces (a deadline, joules) are classes with the same one method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Clock, thermal
from edge_sdss.tree import Tree

HYSTERESIS_C = 5.0
POLL_S = 1.0
LONGEST_PAUSE_S = 600.0
LEAST_DUTY = 0.25

Say = Callable[[str], None]
"""Called with words for the user, when something changes."""


class Pace(Protocol):
    """What the training loop asks before each step."""

    def before_step(self) -> float:
        """Waits as long as is due. Returns the seconds waited."""


class Unhurried:
    """Never waits."""

    def before_step(self) -> float:
        """Returns 0 at once."""
        return 0.0


class Cool:
    """Keeps the hottest zone below `limit_c`.

    Within `hysteresis_c` below the limit it rests after each step, so that the share of time at work, its duty,
    falls in a straight line from 1 to 0.25; at the limit it pauses until that band is left. Where that takes
    more than `longest_pause_s`, the room is too warm for the limit: it goes on at a duty of 0.25, and pauses no
    more before it has been cool once.
    Raises SensorUnavailable where no temperature can be read.
    """

    def __init__(
        self,
        limit_c: float,
        say: Say,
        *,
        tree: Tree | None = None,
        hysteresis_c: float = HYSTERESIS_C,
        longest_pause_s: float = LONGEST_PAUSE_S,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit_c, self._cool_c, self._longest_pause_s = limit_c, limit_c - hysteresis_c, longest_pause_s
        self._say, self._clock, self._sleep = say, clock, sleep
        self._sensor = thermal.open(tree or Tree(), clock)
        self._zones = [channel.name for channel in self._sensor.channels if channel.kind == "temperature"]
        if not self._zones:
            self._sensor.close()
            asked = f"stay below {limit_c:g} °C"
            raise SensorUnavailable(message(asked, "no temperature can be read", "train without a limit of heat"))
        self._began: float | None = None
        self._rests = self._gave_up = False

    def before_step(self) -> float:
        """Rests or pauses. The time since the last call returned counts as work."""
        asked_s = self._clock()
        zone, heat_c = self._hottest()
        if heat_c >= self._limit_c and not self._gave_up:
            self._pause(zone, heat_c)
            zone, heat_c = self._hottest()
        self._rest(zone, heat_c, 0.0 if self._began is None else asked_s - self._began)
        self._began = self._clock()
        return self._began - asked_s

    def close(self) -> None:
        """Closes the sensor."""
        self._sensor.close()

    def _pause(self, zone: str, heat_c: float) -> None:
        self._say(f"{_at(zone, heat_c)}, the limit is {self._limit_c:g} °C: pausing until {self._cool_c:g} °C")
        paused_s = self._clock()
        while heat_c > self._cool_c and self._clock() - paused_s < self._longest_pause_s:
            self._sleep(POLL_S)
            zone, heat_c = self._hottest()
        waited_s = self._clock() - paused_s
        self._gave_up = heat_c > self._cool_c
        how = "going on" if not self._gave_up else f"still hot, going on at {LEAST_DUTY:.0%} of the time"
        self._say(f"{_at(zone, heat_c)} after a pause of {waited_s:.0f} s: {how}")

    def _rest(self, zone: str, heat_c: float, worked_s: float) -> None:
        share = (heat_c - self._cool_c) / max(self._limit_c - self._cool_c, 1e-9)
        duty = 1 - (1 - LEAST_DUTY) * min(max(share, 0.0), 1.0)
        rests = duty < 1
        self._gave_up &= rests
        if rests and not self._rests:
            self._say(f"{_at(zone, heat_c)}, near the limit of {self._limit_c:g} °C: resting between steps")
        elif self._rests and not rests:
            self._say(f"{_at(zone, heat_c)}: full speed again")
        self._rests = rests
        if worked_s > 0 and rests:
            self._sleep(worked_s * (1 / duty - 1))

    def _hottest(self) -> tuple[str, float]:
        """Zones that cannot be read now are left out; with none left, nothing is known to be hot."""
        values = self._sensor.read().values
        known = {zone: heat_c for zone in self._zones if (heat_c := values.get(zone)) is not None}
        zone = max(known, key=known.__getitem__, default="no zone")
        return zone, known.get(zone, float("-inf"))


def _at(zone: str, heat_c: float) -> str:
    return f"{zone} is at {heat_c:.0f} °C" if math.isfinite(heat_c) else "no temperature can be read now"


def pace(limit_c: float | None, say: Say, tree: Tree | None = None) -> Pace:
    """Returns the pace for a limit of heat in °C, None for no limit. Raises SensorUnavailable as `Cool` does."""
    return Unhurried() if limit_c is None else Cool(limit_c, say, tree=tree)
