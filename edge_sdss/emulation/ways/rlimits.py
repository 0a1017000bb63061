"""rlimits: the last resort, for anyone anywhere. A process that asks for more is told that there is no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_sdss.emulation.limits import Limits, Outcome
from edge_sdss.emulation.ways import _process

_LIMIT = 'ulimit -d "$0" && exec "$@"'


def open(limits: Limits, image: str = "") -> Rlimits:
    """Sets the limit on a process that does nothing."""
    way = Rlimits(limits)
    _process.attempt("limit by rlimits", [*way.prefix, "true"], "use a cgroup or a container")
    return way


class Rlimits:
    """RLIMIT_DATA: private memory that can be written. An address space would count mapped files and CUDA's too."""

    name = "rlimits"
    here = True
    lacks = "each process by itself has the limit, what they share and what files have in memory does not count"

    def __init__(self, limits: Limits) -> None:
        self.prefix = ["sh", "-c", _LIMIT, str(limits.memory_bytes >> 10)]

    def run(self, command: Sequence[str], env: Mapping[str, str], stdout: int | None) -> Outcome:
        """See `Way`."""
        return Outcome(_process.run([*self.prefix, *command], env, stdout), at_limit=None)
