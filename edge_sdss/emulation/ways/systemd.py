"""systemd: a transient scope, which a user may have without being root where the memory controller is delegated.

The scope is gone with the command, so nobody counts its peak. Source: systemd-run(1), systemd.resource-control(5).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from edge_sdss.emulation.limits import Limits, Outcome
from edge_sdss.emulation.ways import _process
from edge_sdss.errors import BackendUnavailable, message

_ASKED, _DO = "limit by systemd-run", "run it under a systemd that may limit memory, or as root"
_READ = 'cat "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"'
_PAGE = 4096


def open(limits: Limits, image: str = "") -> Systemd:
    """Starts a scope and reads its limit from within."""
    way = Systemd(limits)
    said = _process.attempt(_ASKED, [*way.prefix, "sh", "-c", _READ], _DO).strip()
    if not said.isdecimal() or abs(int(said) - limits.memory_bytes) > _PAGE:
        raise BackendUnavailable(message(_ASKED, f"its scope's limit of memory is {said or 'unknown'}", _DO))
    return way


class Systemd:
    """A scope of this machine's systemd, of the user's own where we are not root."""

    name = "systemd"
    here = True
    lacks = ""

    def __init__(self, limits: Limits) -> None:
        whose = [] if os.geteuid() == 0 else ["--user"]
        held = [f"--property=MemoryMax={limits.memory_bytes}", "--property=MemorySwapMax=0"]
        self.prefix = ["systemd-run", *whose, "--scope", "--quiet", "--collect", *held, "--"]

    def run(self, command: Sequence[str], env: Mapping[str, str], stdout: int | None) -> Outcome:
        """See `Way`."""
        return Outcome(_process.run([*self.prefix, *command], env, stdout))
