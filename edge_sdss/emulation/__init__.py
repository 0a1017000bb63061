"""Runs any command with a board's memory and cores: a stand-in for whether it fits, not for how fast it is.

What the command writes of its machine says `emulated` with the board's name: EDGE_SDSS_EMULATED is set for it and
for all that it starts, see `device.emulated`. The ways to hold it to the limits are the files of `ways`.
Knows nothing of what the command does, of processors of other kinds, or of GPUs.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_sdss import boards
from edge_sdss.device import EMULATED
from edge_sdss.emulation import ways
from edge_sdss.emulation.limits import Limits, Outcome
from edge_sdss.errors import BackendUnavailable, InputError, message
from edge_sdss.tuning.ceiling import ceiling

IMAGE = "edge-sdss:x86"
_ENDED_BY_KILL = 137


@dataclass(frozen=True)
class Trial:
    """What became of each way that was tried: the first that works, and why the others do not."""

    way: ways.Way
    refused: Mapping[str, str]


def limits(board: str) -> Limits:
    """The limits of a board by name or TOML file. Raises InputError where there is none, or its memory is not known.

    Memory is what the board's Linux has to give, not what is soldered on; cores are at most those of this process.
    """
    found = boards.load(board)
    memory = found.usable_bytes or found.memory_bytes
    if memory is None or found.cpu is None:
        do = "give a board with memory and cpu.cores, or write a TOML file, see docs/boards.md"
        raise InputError(message(f"emulate {board}", "its memory or cores are not known", do))
    named = found.name if board in boards.names() else str(Path(board).expanduser().resolve())
    return Limits(named, memory, found.cpu.cores)


def find(limits: Limits, wanted: str | None = None, image: str | None = None) -> Trial:
    """Tries the ways in turn, or the one that is wanted, by really using each.

    A container runs what is in its image, not the command of this machine, so it comes after those that do, unless
    an image is asked for. Raises BackendUnavailable where the one that is wanted does not work.
    """
    names = [wanted] if wanted else [*(ways.HERE if image is None else ()), *ways.CONTAINERS]
    refused: dict[str, str] = {}
    for name in names:
        try:
            return Trial(ways.load(name).open(limits, image or IMAGE), refused)
        except BackendUnavailable as error:
            if wanted:
                raise
            refused[name] = str(error)
    if image is None:
        return Trial(ways.load(ways.LAST).open(limits, IMAGE), refused)
    raise BackendUnavailable(message(f"emulate {limits.board}", "; ".join(refused.values()), "leave --image out"))


def run(limits: Limits, way: ways.Way, command: Sequence[str], *, stdout: int | None = None) -> Outcome:
    """Runs a command to its end and returns what became of it. Raises InputError where there is no such program."""
    program = list(command)
    if way.here:
        program = _found(program)
    env = {EMULATED: limits.board}
    with _cores(limits.cores if way.here else None):
        return way.run(program, env, stdout)


def notes(limits: Limits, say: Callable[[str], None]) -> None:
    """Says where this machine has less than the board."""
    if limits.usable_cores < limits.cores:
        say(f"This machine gives {limits.usable_cores} of the board's {limits.cores} cores.")
    found = ceiling()
    if found.limit_bytes is not None and found.limit_bytes < limits.memory_bytes:
        say(f"This machine gives less memory than the board has: {found.limit_bytes >> 20} MiB, by {found.source}.")


def stopped(outcome: Outcome) -> bool:
    """Whether the command was ended at the limit of memory: known, or where nobody counts, by its exit code."""
    return outcome.at_limit if outcome.at_limit is not None else outcome.code == _ENDED_BY_KILL


def _found(program: list[str]) -> list[str]:
    """The command with its program's path; `edge-sdss` is this very one where none is on the PATH."""
    path = shutil.which(program[0])
    if path:
        return [path, *program[1:]]
    if program[0] == "edge-sdss":
        return [sys.executable, "-m", "edge_sdss", *program[1:]]
    raise InputError(message(f"run {program[0]}", "no such program", "check its name and the PATH"))


@contextmanager
def _cores(count: int | None) -> Iterator[None]:
    """Inside, this process may use so many of its cores, and so may what it starts."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
