"""The verbs of a device's service and of its first day: serve, health, flash-plan."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from edge_sdss import console, options
from edge_sdss.options import Home, Json

Socket = Annotated[Path, typer.Option("--socket", envvar="EDGE_SDSS_SOCKET", help="Unix socket that it listens at.")]
SOCKET = Path(tempfile.gettempdir()) / "edge-sdss.sock"


def serve(socket: Socket = SOCKET, home: Home = None, json_: Json = False) -> None:
    """Answer health checks at a Unix socket until stopped: what serves, and whether its files are whole.

    Holds no model; nothing outside this machine can reach it.
    Example: edge-sdss serve --socket /run/edge-sdss/health.sock
    """
    from edge_sdss import serving

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with serving.server(socket, options.home(home)) as server:
        if json_:
            console.emit({"socket": str(socket)}, True)
        console.note(f"Listening at {socket}.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.note("Stopped.")


def health(socket: Socket = SOCKET, json_: Json = False) -> None:
    """Ask the service whether it is well. Exit 1 where it is not, 2 where none answers.

    Example: edge-sdss health --socket /run/edge-sdss/health.sock
    """
    from edge_sdss import serving

    well, document = serving.ask(socket)
    console.emit(document, json_)
    if not well:
        raise typer.Exit(1)


def flash_plan(
    board: Annotated[str, typer.Argument(help="A Jetson, such as orin-nano-8gb.")],
    l4t: Annotated[str, typer.Argument(metavar="L4T", help="The release of Jetson Linux, such as 36.4.3.")],
    overlay: Annotated[
        str | None, typer.Option("--overlay", metavar="FILE", help="Our overlay; default: the step that builds it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Print the commands that flash a board with NVIDIA's Jetson Linux and our overlay. Runs none of them.

    Example: edge-sdss flash-plan orin-nano-8gb 36.4.3
    """
    from edge_sdss import flashing

    found = flashing.plan(board, l4t, overlay)
    if json_:
        steps = [step._asdict() for step in found.steps]
        console.emit({**found._asdict(), "steps": steps, "notes": list(found.notes)}, True)
        return
    typer.echo(f"# {found.board}, L4T {found.l4t} (JetPack {found.jetpack}, Python {found.python})")
    for note in found.notes:
        typer.echo(f"# {note}")
    for step in found.steps:
        typer.echo(f"\n# {step.about}\n{step.command}")
