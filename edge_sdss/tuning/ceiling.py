"""How much memory this process may have, and by whose word. Knows nothing of what it wants the memory for.

    cgroup v2   memory.max and memory.high of its own group and of every group above it that can be seen
    cgroup v1   memory.limit_in_bytes of the same, and hierarchical_memory_limit for those that cannot
    rlimits     address space and data size
    machine     MemTotal and MemAvailable, which show the host's memory even within a container
    CUDA        free memory of a GPU that has its own; a Jetson's is main memory, which counts once

What a group has of files that nobody used lately is free at need, so it is not held against the limit.
Sources: kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory; proc(5), getrlimit(2).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdss.tree import Tree

_NO_LIMIT_BYTES = 1 << 60  # v1 says "none" with 2^63 less a page
_V2 = ("memory.max", "memory.high")
_V1 = "memory.limit_in_bytes"


@dataclass(frozen=True)
class Bound:
    """One limit: `limit_bytes` in all, `left_bytes` of it still to be had; None where it cannot be read."""

    source: str
    limit_bytes: int
    left_bytes: int | None


@dataclass(frozen=True)
class Ceiling:
    """What holds a process down. `source` and `available_source` say in words which bound is the lowest.

    `limit_bytes` is the most it may ever have, `available_bytes` what it can get beside the `used_bytes` (RSS)
    that it has; None where nobody says. `device` is the bound of a GPU with memory of its own.
    """

    limit_bytes: int | None
    available_bytes: int | None
    used_bytes: int
    source: str
    available_source: str
    bounds: tuple[Bound, ...] = ()
    device: Bound | None = None

    @property
    def reachable_bytes(self) -> int | None:
        """The RSS that the process can grow to as things stand; None where nobody says."""
        return None if self.available_bytes is None else self.used_bytes + self.available_bytes


def ceiling(tree: Tree | None = None) -> Ceiling:
    """Reads every limit that holds this process. Never raises."""
    tree = tree or Tree()
    status = sizes(tree, "proc/self/status")
    used = status.get("VmRSS", 0)
    bounds = [*_machine(tree), *_cgroups(tree), *_rlimits(tree, status)]
    if not bounds and not tree.recorded and tree.root == Path("/"):
        used, bounds = _portable()
    lowest = min(bounds, key=lambda bound: bound.limit_bytes, default=None)
    left = {bound.source: bound.left_bytes for bound in bounds if bound.left_bytes is not None}
    scarcest = min(left, key=left.__getitem__, default="unknown")
    return Ceiling(
        limit_bytes=lowest.limit_bytes if lowest else None,
        available_bytes=left.get(scarcest),
        used_bytes=used,
        source=lowest.source if lowest else "unknown",
        available_source=scarcest,
        bounds=tuple(bounds),
        device=_device(tree),
    )


def cgroup_folders(tree: Tree) -> list[str]:
    """The folders of this process's memory cgroups, innermost first, up to where they are mounted."""
    groups = {}
    for line in (tree.maybe("proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            groups["cgroup2"] = path
        elif "memory" in controllers.split(","):
            groups["cgroup"] = path
    found: list[str] = []
    for kind, root, point in _mounts(tree):
        group = groups.get(kind)
        if group is None or ".." in group.split("/"):
            continue
        if root != "/" and group != root and not group.startswith(f"{root}/"):
            continue
        parts = [part for part in group[0 if root == "/" else len(root) :].split("/") if part]
        folders = ["/".join([point.strip("/"), *parts[:depth]]) for depth in range(len(parts), -1, -1)]
        found += [folder for folder in folders if folder not in found]
    return found


def cgroup_left_bytes(tree: Tree, folder: str, limit_bytes: int) -> int | None:
    """What a cgroup may still take below `limit_bytes`; None where its use cannot be read."""
    v2 = tree.exists(f"{folder}/memory.current")
    current = number(tree.maybe(f"{folder}/{'memory.current' if v2 else 'memory.usage_in_bytes'}"))
    if current is None:
        return None
    key = "inactive_file" if v2 else "total_inactive_file"
    idle = _statistic(tree, folder, key) or 0
    return max(limit_bytes - max(current - idle, 0), 0)


def sizes(tree: Tree, path: str) -> dict[str, int]:
    """Lines such as `VmRSS:  123 kB` of a file of /proc, in bytes."""
    lines = re.findall(r"^(\w+):\s+(\d{1,15}) kB$", tree.maybe(path) or "", re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in lines}


def number(text: str | None) -> int | None:
    """The number that a file holds; None for `max` and all else."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None


def cuda(torch: Any = None) -> Any:
    """`torch.cuda` where torch is loaded and CUDA in use, else None. Never loads either."""
    found = getattr(torch or sys.modules.get("torch"), "cuda", None)
    try:
        return found if found is not None and found.is_initialized() else None
    except Exception:  # torch is half loaded
        return None


def shares_memory(tree: Tree, device: Any) -> bool:
    """Whether the GPU `device`, a torch.cuda module, works in main memory."""
    if "nvidia,tegra" in (tree.maybe("proc/device-tree/compatible") or ""):
        return True
    return bool(getattr(device.get_device_properties(device.current_device()), "is_integrated", False))


def _machine(tree: Tree) -> Iterator[Bound]:
    memory = sizes(tree, "proc/meminfo")
    if "MemTotal" in memory:
        yield Bound("the machine's memory", memory["MemTotal"], memory.get("MemAvailable"))


def _cgroups(tree: Tree) -> Iterator[Bound]:
    for folder in cgroup_folders(tree):
        limits = {name: number(tree.maybe(f"{folder}/{name}")) for name in (*_V2, _V1)}
        limits["memory.stat"] = _statistic(tree, folder, "hierarchical_memory_limit")
        for name, limit in limits.items():
            if limit is not None and limit < _NO_LIMIT_BYTES:
                yield Bound(f"the cgroup's limit /{folder}/{name}", limit, cgroup_left_bytes(tree, folder, limit))


def _rlimits(tree: Tree, status: dict[str, int]) -> Iterator[Bound]:
    """As limits of RSS: what the process has mapped and not touched is taken to stay so."""
    for name, held in (("address space", "VmSize"), ("data size", "VmData")):
        found = re.search(rf"^Max {name}\s+(\d+)\s", tree.maybe("proc/self/limits") or "", re.MULTILINE)
        if found and int(found[1]) < _NO_LIMIT_BYTES and held in status:
            left = max(int(found[1]) - status[held], 0)
            yield Bound(f"the process's limit of {name}", status.get("VmRSS", 0) + left, left)


def _statistic(tree: Tree, folder: str, key: str) -> int | None:
    found = re.search(rf"^{key} (\d{{1,19}})$", tree.maybe(f"{folder}/memory.stat") or "", re.MULTILINE)
    return int(found[1]) if found else None


def _mounts(tree: Tree) -> Iterator[tuple[str, str, str]]:
    """(kind, folder of that file system that is mounted, where) of the memory cgroups."""
    for line in (tree.maybe("proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, system = left.split(" "), right.split(" ")
        if len(fields) < 6 or system[0] not in ("cgroup", "cgroup2"):
            continue
        if system[0] == "cgroup2" or "memory" in system[-1].split(","):
            root, point = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[3:5])
            yield system[0], root, point


def _device(tree: Tree) -> Bound | None:
    device = cuda()
    if device is None or shares_memory(tree, device):
        return None
    free, total = device.mem_get_info()
    return Bound("the GPU's memory", total, free)


def _portable() -> tuple[int, list[Bound]]:
    """RSS and the machine's memory where there is no /proc."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return psutil.Process().memory_info().rss, [Bound("the machine's memory", memory.total, memory.available)]
    except Exception:  # psutil is missing or was denied
        return 0, []
