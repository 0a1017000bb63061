"""Plants files of /proc and /sys below a folder, and says what a process and its cgroups have there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hosts
from boards import put

from edge_sdss.tree import Tree

MIB, GIB = 1 << 20, 1 << 30


def plant(root: Path, files: Mapping[str, object], **options: Any) -> Tree:
    """Writes each file as the kernel does, with a line end; `options` are those of the tree."""
    for path, held in files.items():
        put(root, path, held)
    return Tree(root, **options)


def process(rss: int = 200 * MIB, size: int = 900 * MIB, data: int = 300 * MIB) -> dict[str, object]:
    """This process, in bytes, on a machine of 16 GiB of which 9 are available."""
    lines = {"VmSize": size, "VmRSS": rss, "VmData": data}
    status = "".join(f"{name}:\t{value // 1024:8} kB\n" for name, value in lines.items())
    meminfo = f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 5 kB\nMemAvailable:   {9 * GIB // 1024} kB"
    return {"proc/self/status": f"Name:\tpython\n{status}Threads:\t1", "proc/meminfo": meminfo}


def v2(group: str, mount: str = hosts.V2_MOUNT) -> dict[str, object]:
    """The process is in `group` of the one hierarchy of version 2."""
    return {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": mount}


def v1(group: str, root: str = "/") -> dict[str, object]:
    """The process is in `group` of the memory hierarchy of version 1, which is mounted from `root` down."""
    lines = f"5:cpu,cpuacct:/\n4:memory:{group}\n0::/"
    return {"proc/self/cgroup": lines, "proc/self/mountinfo": hosts.V1_MOUNT.replace(" / /", f" {root} /")}


def gpu(integrated: bool) -> SimpleNamespace:
    """Stands for torch with one GPU in use, of 4 GiB."""
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(is_integrated=integrated),
        mem_get_info=lambda: (3 * GIB, 4 * GIB),
    )
    return SimpleNamespace(cuda=cuda)
