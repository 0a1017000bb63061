"""Ways to hold a command to limits, one file each; a file's name is its key.

`open(limits, image)` in it returns a `Way` that was tried and works, or raises BackendUnavailable with the reason.
Files that begin with _ are shared by several. Knows nothing of boards.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from edge_sdss.emulation.limits import Outcome
from edge_sdss.errors import InputError, message

HERE = ("systemd", "cgroup")
"""These run the command on this machine's own files, in the order in which they are tried."""

CONTAINERS = ("docker", "podman")
LAST = "rlimits"


class Way(Protocol):
    """A way that works here. `lacks` says in words what it does not hold the command to; empty where nothing."""

    name: str
    here: bool  # the command is this machine's, not an image's
    lacks: str

    def run(self, command: Sequence[str], env: Mapping[str, str], stdout: int | None) -> Outcome:
        """Runs the command to its end, with `env` added to its environment and `stdout` as Popen takes it."""


def names() -> tuple[str, ...]:
    """Every way there is, by file."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> Any:
    """Returns a way's module. Raises InputError for an unknown name."""
    if name not in names():
        raise InputError(message(f"emulate by {name}", "no such way", f"choose {', '.join(names())}"))
    return importlib.import_module(f"edge_sdss.emulation.ways.{name}")
