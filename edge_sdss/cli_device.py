"""The verbs around a device: emulate one here."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from edge_sdss import console
from edge_sdss.options import Json
from edge_sdss.page.formats import mib


def emulate(
    board: Annotated[str, typer.Argument(help="A board's name or TOML file, such as orin-nano-8gb.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND...", help="What to run; none: say only what would be done."),
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", metavar="WAY", help="systemd, cgroup, docker, podman or rlimits.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", help="Run in a container of this image, by docker or podman.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run a command with the memory and cores of a board; what it reports is stamped as emulated.

    A stand-in for whether it fits, not for how fast it is. Exit code: the command's. With --json the command's output
    goes to stderr. Example: edge-sdss emulate orin-nano-8gb -- edge-sdss plan --weights nf4
    """
    from edge_sdss import emulation

    limits = emulation.limits(board)
    trial = emulation.find(limits, with_, image)
    way = trial.way
    assert way is not None
    facts: dict[str, Any] = {**asdict(limits), "usable_cores": limits.usable_cores, "way": way.name, "lacks": way.lacks}
    if not command:
        console.emit({**facts, "refused": dict(trial.refused)}, json_)
        return
    console.note(f"Emulated: {limits.board} as {mib(limits.memory_bytes)}, {limits.usable_cores} cores, by {way.name}.")
    emulation.notes(limits, console.note)
    if way.lacks:
        console.note(f"Warning, no real limit: {way.lacks}.")
        for problem in trial.refused.values():
            console.note(f"  {problem}")
    outcome = emulation.run(limits, way, command, stdout=sys.stderr.fileno() if json_ else None)
    stopped = emulation.stopped(outcome)
    if stopped:
        console.note(f"Stopped at the limit of {mib(limits.memory_bytes)}.")
    elif outcome.peak_bytes is not None:
        console.note(f"Peak {mib(outcome.peak_bytes)} of {mib(limits.memory_bytes)}, files in memory included.")
    if json_:
        ended = {"code": outcome.code, "peak_bytes": outcome.peak_bytes, "stopped": stopped}
        console.emit({**facts, **ended}, True)
    raise typer.Exit(outcome.code)
