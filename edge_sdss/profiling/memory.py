"""The memory of this process over a window. Looks at its edges only, and knows nothing of what runs in it.

    RSS and its peak    proc/self/status; 5 to proc/self/clear_refs resets the peak (Linux 4.0)
    USS, PSS, swap      proc/self/smaps_rollup (Linux 4.14), which walks the whole page table: read once, at the end
    cgroup's peak       memory.peak (v2; from Linux 6.12 it can be reset, for one open file), or v1's
                        memory.max_usage_in_bytes, which is not reset, as that would be for every reader
    torch               peaks of the CUDA allocator, where torch is loaded and CUDA in use
    MemAvailable        least of the samples that the caller has, or of the two edges

A peak that could not be reset is the window's own if it rose in it, and else an upper bound: the note says so.
Sources: proc(5); kernel documentation, filesystems/proc and admin-guide/cgroup-v2.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
from collections.abc import Callable, Iterable
from types import TracebackType

from edge_sdss import cgroups, processes
from edge_sdss.profiling import schema
from edge_sdss.profiling.state import available_bytes
from edge_sdss.tree import Tree

Samples = Iterable[float | None]

_watching: list[Watch] = []


class Watch:
    """Context manager; `result` holds the figures after the block. May be nested.

    `available` gives samples of MemAvailable in bytes that were taken within the window: an iterable, or a
    callable that is asked at the end. On a recording the process is still this machine's.
    """

    result: schema.Memory

    def __init__(self, tree: Tree | None = None, *, available: Callable[[], Samples] | Samples = ()) -> None:
        self._tree = Tree() if tree is None or tree.recorded else tree
        self._available = available
        self._peaks: dict[str, int] = {}
        self._notes: list[str] = []

    def __enter__(self) -> Watch:
        for outer in _watching:
            outer._keep()  # resetting below takes it from them
        self._before = available_bytes(self._tree)
        self._cgroup = _CgroupPeak(self._tree)
        self._peak_before = None if _reset_rss_peak(self._tree) else _peak_rss(self._tree)
        _reset_torch()
        _watching.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep()
        _watching.remove(self)
        rollup = processes.sizes(self._tree, "proc/self/smaps_rollup")
        rss, uss = processes.sizes(self._tree, "proc/self/status").get("VmRSS"), _uss(rollup)
        if rss is None and self._tree.root.resolve() == Tree().root and (found := processes.portable(uss=True)):
            rss, uss = found.rss, found.uss
        self.result = schema.Memory(
            peak_rss_bytes=self._peak_rss(),
            rss_bytes=rss,
            uss_bytes=uss,
            pss_bytes=rollup.get("Pss"),
            swap_bytes=rollup.get("Swap"),
            cgroup_peak_bytes=self._cgroup.close(self._notes),
            torch_allocated_bytes=self._peaks.get("allocated"),
            torch_reserved_bytes=self._peaks.get("reserved"),
            available_drop_bytes=self._drop(),
            note="; ".join(self._notes),
        )

    def _keep(self) -> None:
        """Takes over the peaks as they are now, for what comes may reset them."""
        seen = {"rss": _peak_rss(self._tree), **_torch_peaks()}
        for name, value in seen.items():
            if value is not None:
                self._peaks[name] = max(value, self._peaks.get(name, 0))

    def _peak_rss(self) -> int | None:
        peak = self._peaks.get("rss")
        if peak is not None and self._peak_before is not None and peak <= self._peak_before:
            self._notes.append("the peak of RSS is that of the process's life: it cannot be reset here")
        return peak

    def _drop(self) -> int | None:
        samples = self._available() if callable(self._available) else self._available
        known = [value for value in samples if value is not None and math.isfinite(value)]
        after = available_bytes(self._tree)
        if self._before is None or after is None:
            return None
        if not known:
            self._notes.append("MemAvailable was seen before and after only")
        return self._before - int(min([*known, after, self._before]))


def release() -> None:
    """Gives back what nothing uses, garbage and the allocator's free pages, so that a peak is not an earlier one's."""
    gc.collect()
    processes.trim()


class _CgroupPeak:
    """The peak of the process's own cgroup. v2's is reset for this open file alone."""

    def __init__(self, tree: Tree) -> None:
        self._number: int | None = None
        self._before: int | None = None
        path = _cgroup_file(tree)
        if path is None:
            return
        file, writable = tree.root / path, path.endswith("memory.peak")
        for flags in (os.O_RDWR, os.O_RDONLY) if writable else (os.O_RDONLY,):
            with contextlib.suppress(OSError):
                self._number = os.open(file, flags | os.O_CLOEXEC)
                break
        if writable and self._number is not None:
            with contextlib.suppress(OSError):
                os.write(self._number, b"reset\n")
                return
        self._before = self._read()

    def close(self, notes: list[str]) -> int | None:
        """The peak in bytes; adds to the notes where it may be from before the window."""
        peak = self._read()
        if peak is not None and self._before is not None and peak <= self._before:
            notes.append("the cgroup's peak is that of its life: it cannot be reset here")
        if self._number is not None:
            os.close(self._number)
        self._number = None
        return peak

    def _read(self) -> int | None:
        if self._number is None:
            return None
        try:
            return int(os.pread(self._number, 64, 0))
        except (OSError, ValueError):
            return None


def _cgroup_file(tree: Tree) -> str | None:
    """Path of the file with the peak of the process's own cgroup; None where there is none."""
    group = cgroups.own(tree)
    if group is None or group.folder is None:
        return None
    file = f"{group.folder}/{cgroups.PEAK[group.version]}"
    return file if tree.exists(file) else None


def _reset_rss_peak(tree: Tree) -> bool:
    try:
        number = os.open(tree.root / "proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(number, b"5")
        return True
    except OSError:
        return False
    finally:
        os.close(number)


def _peak_rss(tree: Tree) -> int | None:
    peak = processes.sizes(tree, "proc/self/status").get("VmHWM")
    if peak is None and tree.root.resolve() == Tree().root and sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def _uss(rollup: dict[str, int]) -> int | None:
    known = [rollup[name] for name in ("Private_Clean", "Private_Dirty", "Private_Hugetlb") if name in rollup]
    return sum(known) if known else None


def _reset_torch() -> None:
    if cuda := processes.cuda():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _torch_peaks() -> dict[str, int]:
    if not (cuda := processes.cuda()):
        return {}
    devices = range(cuda.device_count())
    return {
        "allocated": sum(cuda.max_memory_allocated(device) for device in devices),
        "reserved": sum(cuda.max_memory_reserved(device) for device in devices),
    }
