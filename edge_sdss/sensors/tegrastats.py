"""What `tegrastats` prints on a Jetson: power rails, temperatures, clocks, loads and memory.

A line is a list of fields whose form has changed over the releases; `parse` knows all that were seen:

    RAM 2448/7772MB (lfb 1x4MB) SWAP 0/3886MB (cached 0MB) CPU [5%@1190,off]  cpu [17%,5%]@408
    EMC_FREQ 0%@2133  GR3D_FREQ 62%@612  26%@[306]  @[314,314,314]  VIC_FREQ 115  NVDEC off  NVDEC0_FREQ @0  APE 174
    cpu@45.5C  tj@47C/49C  gpu@-256C (off)  VDD_IN 4654mW/4654mW  2930/3405  3918mW/3952mW/4019mW

The first of several values is the current one. Sources: the developer guides' appendix on tegrastats, and
lines in public logs of JetPack 3 to 7. Knows nothing of what a rail is part of, and nothing of energy.
"""

from __future__ import annotations

import atexit
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from edge_sdss.errors import SensorUnavailable, message
from edge_sdss.sensors import Channel, Clock, Kind, Reading, _rails
from edge_sdss.tree import Tree

INTERVAL_MS = 100
FIRST_LINE_S = 2.0

_ASKED = "read tegrastats"
_LONGEST = 8192
_WAITING = 1024  # lines kept until someone takes them

_MEMORY = re.compile(r"(?<!\S)(RAM|SWAP) (\d+)/(\d+)([kMG])B(?!\w)", re.A)
_CPUS = re.compile(r"(?<!\S)CPU \[([^\]]*)\](?:@(\d+))?(?!\S)", re.A | re.I)
_CORE = re.compile(r"(\d+)%(?:@(\d+))?", re.A)
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C(?:/-?\d+(?:\.\d+)?C)*(?!\S)", re.A)
_POWER = re.compile(r"(?<!\S)(?!I?RAM |SWAP )([A-Za-z]\w*) (-?\d+)(?:mW(?:/-?\d+mW)*|(?:/-?\d+)+)(?!\S)", re.A)
_ENGINE = re.compile(
    r"(?<!\S)(?!I?RAM |SWAP |CPU |NC |VDD|VIN|POM)([A-Z][A-Z0-9_]*?)(?:_FREQ)? "
    r"(?:off|(?:(\d+)%)?@\[?(\d+(?:,\d+)*)\]?|(\d+)%|(\d+))(?!\S)",
    re.A,
)

_UNITS = {"k": 2.0**10, "M": 2.0**20, "G": 2.0**30}
_SUFFIXES: Mapping[str, Kind] = {
    " load": "load", " clock": "frequency", " temperature": "temperature", " used": "memory",
}  # fmt: skip
_RANGES: Mapping[Kind, tuple[float, float]] = {
    "load": (0.0, 1.0), "frequency": (0.0, 1e10), "temperature": (-55.0, 200.0), "memory": (0.0, 2.0**42),
}  # fmt: skip


class Source(Protocol):
    """Lines with the time at which each came, from a running tegrastats or from a recording."""

    def first(self) -> str | None:
        """Waits for a line that tells of memory or power, as each does; None where none comes."""

    def problem(self) -> str:
        """Why none came."""

    def new(self) -> Sequence[tuple[float, str]]:
        """Takes the lines since the last call, oldest first."""

    def close(self) -> None:
        """Ends what runs; safe to call twice."""


class Tegrastats:
    """The channels of the first line; lines are taken as they come, none is waited for."""

    name = "tegrastats"

    def __init__(self, source: Source, line: str) -> None:
        self._source = source
        self.channels = tuple(Channel(name, kind(name)) for name in parse(line))
        self.total = _rails.total(channel.name for channel in self.channels if channel.kind == "power")
        self.absent = _absent(line)

    def read(self) -> Reading | None:
        """The newest line that came since the last call, with the time of its arrival."""
        for time_s, line in reversed(self._source.new()):
            if _telling(line):
                values = parse(line)
                return Reading(time_s, {channel.name: values.get(channel.name) for channel in self.channels})
        return None

    def close(self) -> None:
        """Ends tegrastats."""
        self._source.close()


def open(tree: Tree, clock: Clock = time.monotonic) -> Tegrastats:
    """Starts tegrastats, or plays what a recording holds of it, at its pace.

    Raises SensorUnavailable where there is none, or where it prints nothing of use within two seconds.
    """
    lines = source(tree, clock)
    line = lines.first()
    if line is None:
        problem = lines.problem()
        lines.close()
        do = "run `tegrastats` by hand; in a container it may lack rights or files: then use ina3221"
        raise SensorUnavailable(message(_ASKED, problem, do))
    return Tegrastats(lines, line)


def source(tree: Tree, clock: Clock = time.monotonic) -> Source:
    """Returns the lines themselves, as they come. Raises SensorUnavailable where there is no tegrastats."""
    if recorded := tree.lines.get("tegrastats"):
        return _Played(recorded, clock)
    program = tree.command("tegrastats")
    if program is None:
        found = "the recording holds no lines of it" if tree.recorded else "no such program on PATH"
        do = "on a Jetson it is /usr/bin/tegrastats: mount it into the container; elsewhere use another sensor"
        raise SensorUnavailable(message(_ASKED, found, do))
    try:
        return _Live(program, clock)
    except OSError as error:
        do = "make it a program that this user may run"
        raise SensorUnavailable(message(_ASKED, f"{error.strerror or error}", do)) from error


def parse(line: str) -> dict[str, float | None]:
    """Returns what a line says, in SI units by channel name: `VDD_IN`, `GR3D load`, `GR3D clock`, `tj temperature`.

    None: it says that this is off, or something impossible. Never raises; what cannot be understood is left out.
    Of an engine with several clocks the highest counts.
    """
    values: dict[str, float | None] = {}
    for name, value in _fields(line[:_LONGEST]):
        values.setdefault(name, value if value is None else _sane(name, value))
    return values


def kind(name: str) -> Kind:
    """Returns the kind of a channel by its name; a name without a suffix is a power rail."""
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), "power")


def _telling(line: str) -> bool:
    return any(kind(name) in ("memory", "power") for name in parse(line))


def _fields(line: str) -> Iterator[tuple[str, float | None]]:
    for name, used, all_, unit in _MEMORY.findall(line):
        yield f"{name} used", float(used) * _UNITS[unit] if float(used) <= float(all_) else None
    for cores, clock in _CPUS.findall(line):
        for number, core in enumerate(cores.split(",")):
            found = _CORE.fullmatch(core.strip())
            yield f"CPU{number} load", float(found[1]) / 100 if found else None
            yield f"CPU{number} clock", _hertz((found[2] or clock) if found else None)
    for name, load, clocks, load_alone, clock_alone in _ENGINE.findall(line):
        if percent := load or load_alone:
            yield f"{name} load", float(percent) / 100
        yield f"{name} clock", _hertz(clocks or clock_alone)
    for name, celsius in _TEMPERATURE.findall(line):
        if name.upper() != "PMIC":
            yield f"{name.lower()} temperature", float(celsius)
    for name, milliwatts in _POWER.findall(line):
        if _rails.connected(name):
            yield name, float(milliwatts) / 1000


def _hertz(megahertz: str | None) -> float | None:
    return max(float(clock) for clock in megahertz.split(",")) * 1e6 if megahertz else None


def _sane(name: str, value: float) -> float | None:
    which = kind(name)
    if which == "power":
        return _rails.plausible(value)
    low, high = _RANGES[which]
    return value if low <= value <= high else None


def _absent(line: str) -> dict[str, str]:
    absent = {name: "not connected (NC)" for name, _ in _POWER.findall(line) if not _rails.connected(name)}
    if any(name.upper() == "PMIC" for name, _ in _TEMPERATURE.findall(line)):
        absent["pmic temperature"] = "a fixed value, not a measurement"
    return absent


class _Live:
    """A running tegrastats. A thread stamps each line when it comes, whoever reads it later."""

    def __init__(self, program: str, clock: Clock) -> None:
        self._clock = clock
        self._news = threading.Condition()
        self._lines: deque[tuple[float, str]] = deque(maxlen=_WAITING)
        self._first: str | None = None
        self._ended = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [program, "--interval", str(INTERVAL_MS)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        except OSError:
            self._errors.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="tegrastats", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def first(self) -> str | None:
        with self._news:
            self._news.wait_for(lambda: self._first is not None or self._ended, FIRST_LINE_S)
            return self._first

    def new(self) -> Sequence[tuple[float, str]]:
        with self._news:
            lines = list(self._lines)
            self._lines.clear()
            return lines

    def problem(self) -> str:
        code = self._process.poll()
        self._errors.seek(0)
        said = self._errors.read(_LONGEST).decode("utf-8", "replace").split("\n")
        last = next((text.strip() for text in reversed(said) if text.strip()), "")[:200]
        state = f"nothing of use within {FIRST_LINE_S:g} s" if code is None else f"it ended with {code}"
        return f"{state}: {last}" if last else state

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._thread.join(1.0)
        if not self._thread.is_alive() and self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout
        while line := self._process.stdout.readline(_LONGEST):
            now = self._clock()
            if not line.endswith(b"\n"):
                continue  # cut off: its last number may be another one
            text = line.decode("utf-8", "replace").strip()
            with self._news:
                self._lines.append((now, text))
                if self._first is None and _telling(text):
                    self._first = text
                    self._news.notify_all()
        self._process.wait()
        with self._news:
            self._ended = True
            self._news.notify_all()


class _Played:
    """Lines of a recording, due when as much time has passed here as had then. The first is due at once."""

    def __init__(self, lines: Sequence[tuple[float, str]], clock: Clock) -> None:
        self._clock = clock
        start = clock() - min(time_s for time_s, _ in lines)
        self._due = deque(sorted((start + time_s, line) for time_s, line in lines))

    def first(self) -> str | None:
        return next((line for _, line in self._due if _telling(line)), None)

    def problem(self) -> str:
        return "no line of the recording can be understood"

    def new(self) -> Sequence[tuple[float, str]]:
        now = self._clock()
        lines = []
        while self._due and self._due[0][0] <= now:
            lines.append(self._due.popleft())
        return lines

    def close(self) -> None:
        self._due.clear()
