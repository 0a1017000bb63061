"""What a process has of memory, by whoever can tell, and giving some back. Knows nothing of who asks, nor of limits.

On Linux /proc tells, elsewhere psutil; torch's share of a GPU is asked for only where torch has one in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from typing import Any, NamedTuple

from edge_sdss.tree import Tree


class Portable(NamedTuple):
    """In bytes: of a process `rss` and, where it was asked for and is known, `uss`; of the machine the rest."""

    rss: int
    uss: int | None
    total: int
    available: int


def sizes(tree: Tree, path: str) -> dict[str, int]:
    """Lines such as `VmRSS:  123 kB` of a file of /proc, in bytes."""
    lines = re.findall(r"^(\w+):\s+(\d{1,15}) kB$", tree.maybe(path) or "", re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in lines}


def portable(pid: int | None = None, *, uss: bool = False) -> Portable | None:
    """What psutil says of process `pid`, by default this one, for where there is no /proc. To find USS takes long.

    None where psutil is missing, was denied, or finds that the process has ended.
    """
    try:
        import psutil

        process, machine = psutil.Process(pid), psutil.virtual_memory()
        found = process.memory_full_info() if uss else process.memory_info()
        return Portable(found.rss, getattr(found, "uss", None), machine.total, machine.available)
    except Exception:  # psutil's own errors cannot be named without it
        return None


def cuda() -> Any:
    """`torch.cuda` where torch is loaded and CUDA in use, else None. Never loads either."""
    found = getattr(sys.modules.get("torch"), "cuda", None)
    try:
        return found if found is not None and found.is_initialized() else None
    except Exception:  # torch is half loaded
        return None


def trim() -> None:
    """Gives the free pages of malloc's heap back to the system, where that is glibc's."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # others lack the function, or a name for themselves
        ctypes.CDLL(None).malloc_trim(0)
