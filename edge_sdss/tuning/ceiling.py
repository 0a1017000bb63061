"""How much memory this process may have, and by whose word. Knows nothing of what it wants the memory for.

    cgroup v2   memory.max and memory.high of its own group and of every group above it that can be seen
    cgroup v1   memory.limit_in_bytes of the same, and hierarchical_memory_limit for those that cannot
    rlimits     address space and data size
    machine     MemTotal and MemAvailable, which show the host's memory even within a container
    CUDA        free memory of a GPU that has its own; a Jetson's is main memory, which counts once

Sources: kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory; proc(5), getrlimit(2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdss import cgroups, processes
from edge_sdss.processes import sizes
from edge_sdss.tree import Tree

_MACHINE = "the machine's memory"


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
    if not bounds and not tree.recorded and tree.root == Path("/") and (found := processes.portable()):
        used, bounds = found.rss, [Bound(_MACHINE, found.total, found.available)]
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


def shares_memory(tree: Tree, device: Any) -> bool:
    """Whether the GPU `device`, a torch.cuda module, works in main memory."""
    if "nvidia,tegra" in (tree.maybe("proc/device-tree/compatible") or ""):
        return True
    return bool(getattr(device.get_device_properties(device.current_device()), "is_integrated", False))


def _machine(tree: Tree) -> Iterator[Bound]:
    memory = sizes(tree, "proc/meminfo")
    if "MemTotal" in memory:
        yield Bound(_MACHINE, memory["MemTotal"], memory.get("MemAvailable"))


def _cgroups(tree: Tree) -> Iterator[Bound]:
    for folder in cgroups.folders(tree):
        limits = cgroups.limits(tree, folder)
        if (inherited := cgroups.inherited_limit(tree, folder)) is not None:
            limits["memory.stat"] = inherited
        for name, limit in limits.items():
            yield Bound(f"the cgroup's limit /{folder}/{name}", limit, cgroups.left_bytes(tree, folder, limit))


def _rlimits(tree: Tree, status: dict[str, int]) -> Iterator[Bound]:
    """As limits of RSS: what the process has mapped and not touched is taken to stay so."""
    for name, held in (("address space", "VmSize"), ("data size", "VmData")):
        found = re.search(rf"^Max {name}\s+(\d+)\s", tree.maybe("proc/self/limits") or "", re.MULTILINE)
        if found and int(found[1]) < cgroups.NO_LIMIT_BYTES and held in status:
            left = max(int(found[1]) - status[held], 0)
            yield Bound(f"the process's limit of {name}", status.get("VmRSS", 0) + left, left)


def _device(tree: Tree) -> Bound | None:
    device = processes.cuda()
    if device is None or shares_memory(tree, device):
        return None
    free, total = device.mem_get_info()
    return Bound("the GPU's memory", total, free)
