"""cgroup: a memory group of our own, of version 1 or 2, where the kernel lets us make one (as root, or delegated).

The command enters it before it begins, so that nothing of it is outside. Swap is not to be had. What is left of it
when it has ended is ended too, as in a container. Sources: kernel documentation, cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_sdss import cgroups
from edge_sdss.emulation.limits import Limits, Outcome
from edge_sdss.emulation.ways import _process
from edge_sdss.errors import BackendUnavailable, message
from edge_sdss.tree import Tree

_PREFIX = "edge-sdss-"
_ENTER = 'echo $$ > "$0" && exec "$@"'
_FILES: Mapping[int, Mapping[str, str]] = {
    1: {"memory": "memory.limit_in_bytes", "swap": "memory.memsw.limit_in_bytes", "events": "memory.oom_control"},
    2: {"memory": "memory.max", "swap": "memory.swap.max", "events": "memory.events"},
}


def open(limits: Limits, image: str = "", tree: Tree | None = None) -> Cgroup:
    """Makes a group and takes it away again, to see that it can be."""
    way = Cgroup(limits, tree or Tree())
    with way.group():
        pass
    return way


class Cgroup:
    """Counts the memory of the command and of all that it starts together, page cache included."""

    name = "cgroup"
    here = True
    lacks = ""

    def __init__(self, limits: Limits, tree: Tree) -> None:
        self._limits, self._tree = limits, tree
        own = cgroups.own(tree)
        if own is None or own.folder is None:
            raise self._unavailable("this process is in no memory cgroup that a mount shows")
        self.version = own.version
        self._files = _FILES[own.version]
        above = cgroups.folders(tree)
        # Version 2 allows no process beside groups with limits, so its own group's parent may have to hold ours.
        self._parents = [tree.root / folder for folder in (above if own.version == 2 else above[:1])]

    def run(self, command: Sequence[str], env: Mapping[str, str], stdout: int | None) -> Outcome:
        """See `Way`."""
        with self.group() as folder:
            code = _process.run(["sh", "-c", _ENTER, str(folder / "cgroup.procs"), *command], env, stdout)
            peak = cgroups.number(_read(folder / cgroups.PEAK[self.version]))
            kills = re.search(r"^oom_kill (\d+)$", _read(folder / self._files["events"]), re.MULTILINE)
            return Outcome(code, peak, bool(int(kills[1])) if kills else None)

    @contextmanager
    def group(self) -> Iterator[Path]:
        """Inside, the group is there. Raises BackendUnavailable where it cannot be made with the limits."""
        folder = self._made()
        try:
            yield folder
        finally:
            _remove(folder)

    def _made(self) -> Path:
        problem = "no group"
        for parent in self._parents:
            _sweep(parent)
            folder = parent / f"{_PREFIX}{os.getpid()}"
            try:
                if self.version == 2 and "memory" not in _read(parent / "cgroup.subtree_control").split():
                    (parent / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
                folder.mkdir()
            except OSError as error:
                problem = f"{parent}: {error.strerror}"
                continue
            try:
                self._limit(folder)
                return folder
            except OSError as error:
                problem = f"{folder}: {error.strerror}"
                _remove(folder)
        raise self._unavailable(problem)

    def _limit(self, folder: Path) -> None:
        size = str(self._limits.memory_bytes)
        (folder / self._files["memory"]).write_text(size, encoding="ascii")
        if (swap := folder / self._files["swap"]).exists():
            swap.write_text(size if self.version == 1 else "0", encoding="ascii")
        elif self.version == 1:
            (folder / "memory.swappiness").write_text("0", encoding="ascii")

    def _unavailable(self, found: str) -> BackendUnavailable:
        return BackendUnavailable(message("limit by a cgroup", found, "run it as root, or with systemd-run"))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _remove(folder: Path) -> None:
    """Ends what is left in a group and takes it away; a process that cannot be ended keeps it."""
    for _ in range(100):
        for pid in _read(folder / "cgroup.procs").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with suppress(OSError):
            folder.rmdir()
        if not folder.exists():
            return
        time.sleep(0.02)


def _sweep(parent: Path) -> None:
    """Takes away empty groups of calls that were killed."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            with suppress(OSError):
                folder.rmdir()
