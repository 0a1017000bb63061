"""The verbs around a device: emulate one here, and let one tune by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sdss import cli_plan, config, console, options
from edge_sdss.options import Home, Json, Model, Set, Settings
from edge_sdss.page.formats import mib
from edge_sdss.types import Progress

if TYPE_CHECKING:
    from edge_sdss.session import Session


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


def adapt(
    when: Annotated[
        str, typer.Option("--when", metavar="CONDITIONS", help="All of them at once: idle, charging, cool.")
    ] = "idle,charging,cool",
    within: Annotated[
        str, typer.Option("--within", metavar="TIME", help="Wait at most so long for a moment, as 30min or 6h.")
    ] = "6h",
    max_time: Annotated[
        str | None, typer.Option("--max-time", metavar="TIME", help="Of work in any 24 hours; default: 4h.")
    ] = None,
    max_energy: Annotated[
        str | None, typer.Option("--max-energy", metavar="ENERGY", help="Of the machine in that time, as 40kJ or 20Wh.")
    ] = None,
    model: Model = None,
    home: Home = None,
    settings_file: Settings = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Tune by itself: when there is enough that is new, in a moment that suits, within limits of time and energy.

    A round that loses its moment stops after a checkpoint; the next call goes on, after a reboot too. The adapter
    changes only through the gate, and where a bundle is deployed, only if that passes its checks as well. Exit 1
    where the gate rejects. Example: edge-sdss adapt --when idle,charging,cool --within 6h --max-energy 40kJ
    """
    from edge_sdss import moment, nightly

    wanted = moment.names(when)
    limits = {
        "max_s": options.quantity(max_time, options.SECONDS, "4h") if max_time else None,
        "max_j": options.quantity(max_energy, options.JOULES, "40kJ") if max_energy else None,
    }
    settings = options.settings(settings_file, set_, {"adapt": limits, "model": {"name": model}})
    settings = _paced(settings, "cool" in wanted)
    folder = options.home(home)
    with ExitStack() as stack:
        result = nightly.adapt(
            _opener(folder, settings, stack.enter_context(console.progress())),
            folder,
            moment.open(wanted, settings.adapt),
            settings.adapt,
            within_s=options.quantity(within, options.SECONDS, "6h"),
            joules=nightly.meter(stack, settings.adapt),
            say=console.note,
        )
    served = _deployed(folder, settings_file, set_) if result.kind == "accepted" else {}
    facts = {("outcome" if name == "kind" else name): value for name, value in asdict(result).items()}
    console.emit({**facts, **served}, json_)
    if result.kind == "rejected":
        raise typer.Exit(1)


def _paced(settings: config.Config, cool: bool) -> config.Config:
    """While it tunes, a machine that is to stay cool is paced; on an emulated board the budget is the board's."""
    tuning = settings.tuning
    heat = settings.adapt.hot_c if cool and tuning.max_celsius is None else tuning.max_celsius
    return settings.override({"tuning": {"max_celsius": heat, "memory": cli_plan.budget_here(None, tuning.memory)}})


def _opener(
    folder: Path, settings: config.Config, progress: Progress
) -> Callable[[Progress, Callable[[dict[str, Any]], None]], AbstractContextManager[Session]]:
    """Opens the home's session; what a round says goes to the terminal, and to the watch, which may end it."""
    from edge_sdss.session import Session

    def opened(look: Progress, hear: Callable[[dict[str, Any]], None]) -> AbstractContextManager[Session]:
        def told(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            look(stage, done, total)

        def heard(event: dict[str, Any]) -> None:
            console.event(event)
            hear(event)

        return Session(folder, settings, progress=told, on_event=heard)

    return opened


def _deployed(folder: Path, settings_file: Path | None, set_: list[str] | None) -> dict[str, Any]:
    """Puts the new adapter into the deployed bundle, if there is one; where its checks fail, the one before serves.

    In a process of its own, which takes the models' memory with it.
    """
    from edge_sdss.bundles.shelf import Shelf

    if Shelf(folder).active() is None:
        return {}
    given = [*(["--config", str(settings_file)] if settings_file else []), *(f"--set={each}" for each in set_ or ())]
    command = [sys.executable, "-m", "edge_sdss", "deploy", "--json", "--home", str(folder), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return {"deployed": json.loads(done.stdout)["version"]}
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    console.note(f"The bundle keeps the adapter before: {why}")
    return {"deployed": None, "not_deployed": why}
