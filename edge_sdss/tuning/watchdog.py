"""Keeps a process to its budget of memory: looks 20 times a second, says so, and ends it only as a last resort.

A thread that sees the budget passed, or the machine or the cgroup run short, sets a flag. The training loop asks
for it between micro-batches and in hooks (`check`), frees, steps down and goes on. Knows nothing of training.

What is used is RSS; on a GPU that works in main memory, whose pages are in no process's RSS and no cgroup, what
torch has reserved there too. Short peaks between two looks are not seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from edge_sdss import cgroups, processes
from edge_sdss.cgroups import number
from edge_sdss.page.formats import mib
from edge_sdss.tree import Tree
from edge_sdss.tuning.ceiling import shares_memory

INTERVAL_S = 0.05
HARD = 1.1  # times the budget, for longer than GRACE_S: nobody reacts
GRACE_S = 1.0
_LIMITS_EVERY = 20  # looks


class OverBudget(Exception):
    """The budget was passed or memory ran short; to be treated as out of memory. Stays within `tuning`."""


class Usage(NamedTuple):
    """One look, in bytes; None where it cannot be read. `left`: what the cgroup may still take."""

    used: int | None
    available: int | None
    left: int | None


class Watchdog:
    """Context manager that watches while its block runs.

    `over` says in words what is wrong, or None; it stays until `clear`. `last_resort` is called with such words,
    once, from the watching thread, when more than 1.1 times the budget has been in use for a second without a
    break: a supervisor ends its child with it.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        reserve_bytes: int = 0,
        pid: int | None = None,
        children: bool = False,
        tree: Tree | None = None,
        last_resort: Callable[[str], None] | None = None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watches process `pid`, by default this one, with its `children` if so asked.

        `reserve_bytes` must stay free on the machine and in the cgroup.
        """
        self.budget_bytes, self.reserve_bytes = budget_bytes, reserve_bytes
        self.over: str | None = None
        self.peak_bytes = 0
        self.least_available_bytes: int | None = None
        self._tree, self._clock = tree or Tree(), clock
        self._meter = _Meter(self._tree, pid, children, reserve_bytes)
        self._last_resort, self._interval_s = last_resort, interval_s
        self._hard_since: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._meter.close()

    def check(self) -> None:
        """Raises OverBudget where the flag is set. Takes no time to speak of."""
        if self.over is not None:
            raise OverBudget(self.over)

    def clear(self) -> bool:
        """To be called when memory was freed: looks anew, and returns whether all is well."""
        self.over = None
        self.look()
        return self.over is None

    def look(self) -> Usage:
        """One look, with all that follows from it."""
        usage = self._meter.read()
        if usage.used is not None:
            self.peak_bytes = max(self.peak_bytes, usage.used)
        if usage.available is not None:
            least = self.least_available_bytes
            self.least_available_bytes = usage.available if least is None else min(least, usage.available)
        if words := self._wrong(usage):
            self.over = words
        self._consider_the_last_resort(usage.used)
        return usage

    def _wrong(self, usage: Usage) -> str:
        if usage.used is not None and usage.used > self.budget_bytes:
            return f"{mib(usage.used)} in use, {mib(self.budget_bytes)} allowed"
        for left, where in ((usage.available, "on this machine"), (usage.left, "in this cgroup")):
            if left is not None and left < self.reserve_bytes:
                return f"only {mib(left)} left {where}, {mib(self.reserve_bytes)} are to stay free"
        return ""

    def _consider_the_last_resort(self, used: int | None) -> None:
        if used is None or used <= HARD * self.budget_bytes:
            self._hard_since = None
        elif self._hard_since is None:
            self._hard_since = self._clock()
        elif self._clock() - self._hard_since > GRACE_S and self._last_resort is not None:
            last_resort, self._last_resort = self._last_resort, None
            last_resort(f"{mib(used)} in use for {GRACE_S:.0f} s, {mib(self.budget_bytes)} allowed")

    def _watch(self) -> None:
        while not self._end.wait(self._interval_s):
            self.look()


class _Meter:
    """Reads a process's memory; the files that it reads each time stay open, which is what makes it cheap."""

    def __init__(self, tree: Tree, pid: int | None, children: bool, reserve_bytes: int) -> None:
        self._tree, self._children, self._reserve_bytes = tree, children, reserve_bytes
        self._pid = "self" if pid is None else str(pid)
        self._statm = _open(tree, f"proc/{self._pid}/statm")
        self._meminfo = _open(tree, "proc/meminfo")
        self._page = os.sysconf("SC_PAGE_SIZE")
        groups = cgroups.folders(tree)
        self._groups = [(folder, _open(tree, cgroups.usage_file(tree, folder))) for folder in groups]
        self._limits: dict[str, int] = {}
        self._looks = 0

    def read(self) -> Usage:
        used, available = self._rss(), _available(self._meminfo)
        if self._statm is None and self._tree.root == Path("/"):
            found = processes.portable(None if self._pid == "self" else int(self._pid))
            used, available = (found.rss, found.available) if found else (None, None)
        if used is not None and self._pid == "self":
            used += self._gpu()
        return Usage(used, available, self._left())

    def close(self) -> None:
        for file in (self._statm, self._meminfo, *(file for _, file in self._groups)):
            if file is not None:
                os.close(file)
        self._statm = self._meminfo = None
        self._groups = []

    def _rss(self) -> int | None:
        pages = _pages(_text(self._statm))
        if pages is None or not self._children:
            return None if pages is None else pages * self._page
        for pid in _descendants(self._tree, self._pid):
            pages += _pages(self._tree.maybe(f"proc/{pid}/statm") or "") or 0
        return pages * self._page

    def _gpu(self) -> int:
        device = processes.cuda()
        if device is None or not shares_memory(self._tree, device):
            return 0
        return int(device.memory_reserved())

    def _left(self) -> int | None:
        if self._looks % _LIMITS_EVERY == 0:  # somebody may lower them
            every = {folder: cgroups.limits(self._tree, folder) for folder, _ in self._groups}
            self._limits = {folder: min(limits.values()) for folder, limits in every.items() if limits}
        self._looks += 1
        held = [(self._limits[folder], number(_text(file))) for folder, file in self._groups if folder in self._limits]
        found = [limit - current for limit, current in held if current is not None]
        left = min(found, default=None)
        if left is None or left >= self._reserve_bytes:
            return left
        # Page cache is not held against the limit. To know how much it is takes longer, so only where it matters.
        exact = [cgroups.left_bytes(self._tree, folder, limit) for folder, limit in self._limits.items()]
        return min((bytes_ for bytes_ in exact if bytes_ is not None), default=None)


def limit_cuda(budget_bytes: int) -> float | None:
    """Lets torch's CUDA allocator have no more than `budget_bytes`; beyond it raises torch.OutOfMemoryError.

    Returns the share of the GPU's memory, None without CUDA. The CUDA context itself is not counted.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    share = min(budget_bytes / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, 1.0)
    torch.cuda.set_per_process_memory_fraction(share)
    return share


@contextmanager
def rlimit(extra_bytes: int, kind: Literal["AS", "DATA"] = "DATA") -> Iterator[None]:
    """Lets this process take only `extra_bytes` more while the block runs: an out-of-memory to order, for tests."""
    import resource

    which = resource.RLIMIT_AS if kind == "AS" else resource.RLIMIT_DATA
    fields = Tree().text("proc/self/statm").split()
    held = int(fields[0] if kind == "AS" else fields[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(which)
    wanted = held + extra_bytes
    resource.setrlimit(which, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def _descendants(tree: Tree, pid: str) -> Iterator[str]:
    for path in tree.glob(f"proc/{pid}/task/*/children"):
        for child in (tree.maybe(path) or "").split():
            yield child
            yield from _descendants(tree, child)


def _open(tree: Tree, path: str) -> int | None:
    if path in tree.faults:
        return None
    with suppress(OSError):
        return os.open(tree.root / path, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _text(file: int | None) -> str:
    """The first lines; MemAvailable is the third of /proc/meminfo."""
    if file is None:
        return ""
    try:
        return os.pread(file, 512, 0).decode("utf-8", "replace").strip()
    except OSError:  # the process may have ended
        return ""


def _pages(statm: str) -> int | None:
    fields = statm.split()
    return number(fields[1]) if len(fields) > 1 else None


def _available(meminfo: int | None) -> int | None:
    text = _text(meminfo)
    start = text.find("MemAvailable:")
    kib = number(text[start + 13 : start + 40].partition("kB")[0].strip()) if start >= 0 else None
    return None if kib is None else kib * 1024
