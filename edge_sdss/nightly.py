"""A round that the device decides on by itself: when there is something new to learn, in a moment that suits, within
limits of time and energy in any 24 hours.

    due? ── no ──▶ done
     │ yes            a moment that is lost ends the round after a checkpoint;
    wait for the  ◀── the next one, after a reboot too, goes on from there
    moment, work ─── the gate ──▶ accepted: serves; rejected: the adapter before goes on

Only the session's own round, which ends in the gate, ever changes the adapter. What was spent is on the disk before
more is. Knows nothing of how a round is done, nor of what a moment is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from edge_sdss import config, files
from edge_sdss.errors import InputError, SensorUnavailable, message
from edge_sdss.moment import Condition
from edge_sdss.profiling.meter import Meter
from edge_sdss.sensors import total
from edge_sdss.session import Session
from edge_sdss.types import Progress

Kind = Literal["accepted", "rejected", "not due", "no moment", "spent"]
DAY_S = 86_400.0

Say = Callable[[str], None]
Joules = Callable[[], float | None]
"""Energy since it was last asked; None where it is not known."""

Open = Callable[[Progress, Callable[[dict[str, Any]], None]], AbstractContextManager[Session]]
"""Opens the session of the home, which tells these two how it goes."""


@dataclass(frozen=True)
class Result:
    """What came of it, and why; the round where there was one. What was spent is of this call."""

    kind: Kind
    why: str
    round: int | None
    seconds: float
    joules: float | None


class Halt(KeyboardInterrupt):
    """Ends a round in order, after a checkpoint, as Ctrl-C does. `lasting`: there is no use in waiting for more."""

    def __init__(self, why: str, *, lasting: bool) -> None:
        super().__init__(why)
        self.why, self.lasting = why, lasting


def due(session: Session, settings: config.Adapt) -> tuple[bool, str]:
    """Whether a round would be worth it, and why or why not."""
    past = session.store.rounds()
    if past and past[-1].state == "running":
        return True, f"round {past[-1].number} was cut short"
    material = session.material()
    active = session.store.active_round()
    if material and active and active.stale and past[-1].number == active.number:
        return True, "the active adapter was trained on a dialogue that was forgotten since"
    tried = session.store.tried()
    new = sum(example.dialogue_id not in tried for example in material)
    if new < settings.least_new:
        return False, f"{new} dialogues to learn from are new, {settings.least_new} are needed"
    return True, f"{new} dialogues to learn from are new"


class Ledger:
    """What was spent on rounds, in a file of the home: [[ISO 8601 time, s, J or null], ...]."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self._path, self._now = path, now
        self._rows: list[tuple[str, float, float | None]] = []
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            self._rows = [(str(when), float(s), None if j is None else float(j)) for when, s, j in held]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            do = "move the file away; what was spent today is not known then"
            raise InputError(message(f"read {path}", f"it is no ledger, {error}", do)) from error

    def spent(self) -> tuple[float, float | None]:
        """Seconds and joules of the last 24 hours; None where some of the energy is not known.

        A time in the future, as before a clock was set, counts as well.
        """
        since = (self._now() - timedelta(seconds=DAY_S)).isoformat(timespec="seconds")
        rows = [row for row in self._rows if row[0] > since]
        joules = [row[2] for row in rows]
        known = [each for each in joules if each is not None]
        return sum(row[1] for row in rows), sum(known) if len(known) == len(joules) else None

    def add(self, seconds: float, joules: float | None) -> None:
        """Writes down a stretch of work; what is older than a day goes."""
        since = (self._now() - timedelta(seconds=DAY_S)).isoformat(timespec="seconds")
        self._rows = [row for row in self._rows if row[0] > since]
        self._rows.append((self._now().isoformat(timespec="seconds"), seconds, joules))
        files.replace(self._path, json.dumps(self._rows) + "\n")


class Watch:
    """Looks at the moment and the limits while a round is at work, whenever the round says something.

    A condition must fail at two looks in a row: a mail that arrives is not yet the user.
    """

    def __init__(
        self,
        conditions: Mapping[Any, Condition],
        settings: config.Adapt,
        ledger: Ledger,
        joules: Joules,
        clock: Callable[[], float],
    ) -> None:
        self._conditions, self._settings, self._ledger = conditions, settings, ledger
        self._joules, self._clock, self._last = joules, clock, clock()
        self._failed = ""
        self.seconds, self.joules = 0.0, 0.0
        self.known = True
        joules()  # from here on

    def look(self, *_: object) -> None:
        """Raises Halt where the round is to end; does nothing until `poll_s` have passed since the last look."""
        if self._clock() - self._last < self._settings.poll_s:
            return
        self.note()
        if why := over(self._ledger, self._settings):
            raise Halt(why, lasting=True)
        broken = [state.why for each in self._conditions.values() if not (state := each.look()).holds]
        if broken and self._failed:
            raise Halt("; ".join(broken), lasting=False)
        self._failed = "; ".join(broken)

    def note(self) -> None:
        """Writes down what was spent since the last time."""
        now, used = self._clock(), self._joules()
        seconds, self._last = now - self._last, now
        self.seconds += seconds
        self.joules += used or 0.0
        self.known &= used is not None
        self._ledger.add(seconds, used)


def over(ledger: Ledger, settings: config.Adapt) -> str:
    """Which limit is reached, in words; empty for none. Energy that is not known is held against its limit."""
    seconds, joules = ledger.spent()
    if settings.max_s is not None and seconds >= settings.max_s:
        return f"{seconds:.0f} s of {settings.max_s:.0f} s were spent in 24 hours"
    if settings.max_j is not None and (joules is None or joules >= settings.max_j):
        used = (
            "an amount of energy that is not known" if joules is None else f"{joules:.0f} J of {settings.max_j:.0f} J"
        )
        return f"{used} was spent in 24 hours" if joules is None else f"{used} were spent in 24 hours"
    return ""


def adapt(
    open_session: Open,
    home: Path,
    conditions: Mapping[Any, Condition],
    settings: config.Adapt,
    *,
    within_s: float,
    joules: Joules,
    say: Say = lambda words: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> Result:
    """Does at most one round, in as many moments as it takes, and gives up `within_s` after the call.

    Raises what a round raises; what was spent is written down all the same.
    """
    ledger, until = Ledger(home / "nightly.json", now), clock() + within_s
    spent: list[Watch] = []

    def ended(kind: Kind, why: str, number: int | None = None) -> Result:
        known = all(watch.known for watch in spent)
        used = sum(watch.joules for watch in spent) if known else None
        return Result(kind, why, number, sum(watch.seconds for watch in spent), used)

    while True:
        with open_session(lambda *_: None, lambda event: None) as session:
            worth, why = due(session, settings)
        if not worth:
            return ended("not due", why)
        if limit := over(ledger, settings):
            return ended("spent", limit)
        if missing := _wait(conditions, settings.poll_s, until, clock, sleep):
            return ended("no moment", missing)
        say(f"A round begins: {why}.")
        watch = Watch(conditions, settings, ledger, joules, clock)
        spent.append(watch)
        try:
            with open_session(watch.look, watch.look) as session:
                adapted = session.adapt()
        except Halt as halt:
            say(f"Stopped after a checkpoint: {halt.why}.")
            if halt.lasting:
                return ended("spent", halt.why)
            continue
        finally:
            watch.note()
        verdict = adapted.verdict
        return ended("accepted" if verdict.accepted else "rejected", verdict.reason, adapted.number)


def _wait(
    conditions: Mapping[Any, Condition],
    poll_s: float,
    until: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> str:
    """Waits until all conditions hold at once; returns what was missing where that did not come in time."""
    while True:
        missing = "; ".join(state.why for each in conditions.values() if not (state := each.look()).holds)
        if not missing or clock() >= until:
            return missing
        sleep(poll_s)


def meter(stack: ExitStack, settings: config.Adapt, sensors: Sequence[str] | None = None) -> Joules:
    """The machine's energy by the sensor whose total is the widest, sampled once a second.

    Raises SensorUnavailable where there is a limit of energy and none can be read.
    """
    opened = Meter.auto(wanted=sensors, interval_s=1.0)
    if total(opened.sensors)[0] is None:
        if settings.max_j is not None:
            asked = f"keep to {settings.max_j:.0f} J"
            raise SensorUnavailable(message(asked, "no power sensor can be read here", "limit the time instead"))
        return lambda: None
    running = stack.enter_context(opened)
    last = running.now()

    def since() -> float | None:
        nonlocal last
        start, last = last, running.now()
        return running.energy([(start, last)]).total_j if last > start else 0.0

    return since
