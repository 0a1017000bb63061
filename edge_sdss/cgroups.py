"""The memory cgroups that hold this process: where their files are and what these say, of version 1 and 2.

    proc/self/cgroup      the process's own group in each hierarchy
    proc/self/mountinfo   where a hierarchy is mounted, and from which group down: in a container often from the
                          process's own, so that a group's path need not be one below the mount

A group that no mount shows is left alone. Knows nothing of what the machine has, nor of what a limit is for.
Sources: cgroups(7), proc(5); kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from edge_sdss.tree import Tree

USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}

NO_LIMIT_BYTES = 1 << 60  # v1 says "none" with 2^63 less a page

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")


class Group(NamedTuple):
    """`path` is its name in the hierarchy, `folder` where its files are; None where no mount shows it."""

    version: int
    path: str
    folder: str | None


def own(tree: Tree) -> Group | None:
    """The innermost group that counts this process's memory; None where there is none."""
    paths = _paths(tree)
    if not paths:
        return None
    version = min(paths)  # where both are mounted, v1 has the controller
    chain = next((chain for number, chain in _chains(tree, paths) if number == version), [None])
    return Group(version, paths[version], chain[0])


def folders(tree: Tree) -> list[str]:
    """The folders of this process's groups and of all above them, innermost first, up to where they are mounted."""
    found = [folder for _, chain in _chains(tree, _paths(tree)) for folder in chain]
    return list(dict.fromkeys(found))


def limits(tree: Tree, folder: str) -> dict[str, int]:
    """The limits that a group sets for itself, in bytes, by the file that says so."""
    found = {name: number(tree.maybe(f"{folder}/{name}")) for name in _LIMITS}
    return {name: limit for name, limit in found.items() if limit is not None and limit < NO_LIMIT_BYTES}


def inherited_limit(tree: Tree, folder: str) -> int | None:
    """The lowest limit of a group of version 1 and of all above it, those that cannot be seen too."""
    limit = _statistic(tree, folder, "hierarchical_memory_limit")
    return None if limit is None or limit >= NO_LIMIT_BYTES else limit


def usage_file(tree: Tree, folder: str) -> str:
    """The file that says how many bytes a group has in use, page cache included."""
    return f"{folder}/{USAGE[_version(tree, folder)]}"


def left_bytes(tree: Tree, folder: str, limit_bytes: int) -> int | None:
    """What a group may still take below a limit; None where its usage cannot be read.

    What it has of files that nobody used lately is free at need, so it is not held against the limit.
    """
    current = number(tree.maybe(usage_file(tree, folder)))
    if current is None:
        return None
    idle = _statistic(tree, folder, {1: "total_inactive_file", 2: "inactive_file"}[_version(tree, folder)]) or 0
    return max(limit_bytes - max(current - idle, 0), 0)


def number(text: str | None) -> int | None:
    """The number that a file holds; None for `max` and all else."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None


def _version(tree: Tree, folder: str) -> int:
    return 2 if tree.exists(f"{folder}/{USAGE[2]}") else 1


def _statistic(tree: Tree, folder: str, key: str) -> int | None:
    found = re.search(rf"^{key} (\d{{1,19}})$", tree.maybe(f"{folder}/memory.stat") or "", re.MULTILINE)
    return int(found[1]) if found else None


def _paths(tree: Tree) -> dict[int, str]:
    """The path of this process's group by version."""
    found = {}
    for line in (tree.maybe("proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path.startswith("/"):
            continue
        if not controllers:
            found[2] = path
        elif "memory" in controllers.split(","):
            found[1] = path
    return found


def _chains(tree: Tree, paths: dict[int, str]) -> Iterator[tuple[int, list[str]]]:
    """(version, folders from the process's group up to the mount) of each mount that shows the group."""
    for version, root, point in _mounts(tree):
        path = paths.get(version)
        if path is None or ".." in path.split("/"):
            continue
        if root != "/" and path != root and not path.startswith(f"{root}/"):
            continue
        parts = [part for part in path[0 if root == "/" else len(root) :].split("/") if part]
        yield version, ["/".join([point.strip("/"), *parts[:depth]]) for depth in range(len(parts), -1, -1)]


def _mounts(tree: Tree) -> Iterator[tuple[int, str, str]]:
    """(version, group that is the mount's root, where it is mounted) of the hierarchies that count memory."""
    for line in (tree.maybe("proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, system = left.split(" "), right.split(" ")
        if len(fields) < 6 or system[0] not in ("cgroup", "cgroup2"):
            continue
        if system[0] == "cgroup2" or "memory" in system[-1].split(","):
            root, point = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[3:5])
            yield 2 if system[0] == "cgroup2" else 1, root, point
