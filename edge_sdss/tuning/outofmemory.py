"""What running out of memory looks like, in an error and in a dead process. Knows nothing of how to go on.

An allocation that fails on a Jetson rarely raises torch.OutOfMemoryError. Texts and where they were reported:

    NVML_SUCCESS == r INTERNAL ASSERT FAILED at "…/CUDACachingAllocator.cpp"
        torch asks NVML, which Tegra has not, for its report on the failure: pytorch#112377, #122068, #185240,
        #128661 (skips a test for it on Jetson); forums.developer.nvidia.com/t/370049 (Orin Nano, JetPack 6.2.2)
    NvMapMemAllocInternalTagged: 1075072515 error 12; NvMapMemHandleAlloc: error 0
        the driver's own words, on stderr: NVIDIA's forum on Orin Nano, audio.cpp#12
    CUDA driver error: out of memory
        where expandable segments are in use: pytorch#112121 (Orin AGX), unsloth-zoo#1235
    CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
        a library's handle or workspace: FairMOT#403, torch7#780; cuDNN 9 writes …_ALLOCATION_FAILED
    DefaultCPUAllocator: can't allocate memory; not enough memory (Windows)
        seen with torch 2.13 under RLIMIT_AS; pytorch#31302, Fooocus#237
    unable to mmap … Cannot allocate memory (12)
        pytorch#87861

CUBLAS_STATUS_NOT_INITIALIZED is not among them: it may as well be an index out of range.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from edge_sdss import cgroups, files, processes
from edge_sdss.tree import Tree
from edge_sdss.tuning.watchdog import OverBudget

_FACES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|NVML_SUCCESS == .*INTERNAL ASSERT FAILED.*CUDACachingAllocator"
    r"|NvMapMem\w*:? .*error 12\b"
    r"|CUDA (driver |runtime )?error:? out of memory|CUDA out of memory|cuda runtime error \(2\) : out of memory"
    r"|CU(BLAS|DNN|SPARSE|SOLVER)_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
    r"|[Cc]annot allocate memory|[Uu]nable to alloc(ate)? (\S+ )?(memory|buffer|bytes|[KMG]i?B)\b|std::bad_alloc"
    r"|\b(OutOf|_Array)?MemoryError\b"
)
_CUDA_DEVICES = ("dev/nvidiactl", "dev/nvidia0", "dev/nvhost-gpu", "dev/nvgpu", "dev/nvmap", "dev/dxg")
_SEGMENTS = "expandable_segments:True"
_PROBE = """
import torch
blocks = [torch.ones(size << 20, dtype=torch.uint8, device="cuda") for size in (1, 3, 64, 1)]
assert all(int(block.sum()) == block.numel() for block in blocks)
print("expandable", any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()))
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, the watchdog's OverBudget included."""
    if isinstance(error, (MemoryError, OverBudget)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    return (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") and says_so(str(error))


def says_so(text: str) -> bool:
    """Whether a text, such as what a process wrote to stderr, tells of memory that ran out."""
    return _FACES.search(text) is not None


def free(error: BaseException | None = None) -> None:
    """Gives back what nobody holds: to torch's allocators, and from there to the system.

    `error` is the one that was caught: its traceback keeps the tensors of every frame that it went through.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    if device := processes.cuda():
        device.empty_cache()
    processes.trim()


def oom_kills(tree: Tree | None = None) -> int | None:
    """How many processes the kernel's OOM killer has ended in this cgroup, or where that is unknown, at all.

    To be asked before and after. None where the kernel does not count.
    """
    tree = tree or Tree()
    paths = [f"{folder}/{name}" for folder in cgroups.folders(tree) for name in ("memory.events", "memory.oom_control")]
    for path in (*paths, "proc/vmstat"):
        found = re.search(r"^oom_kill (\d+)$", tree.maybe(path) or "", re.MULTILINE)
        if found:
            return int(found[1])
    return None


def killed_by_kernel(returncode: int, before: int | None, after: int | None) -> bool:
    """Whether a child that ended with `returncode` was the OOM killer's, from `oom_kills` before and after.

    Android's and systemd's own daemons kill without being counted, so any SIGKILL that nobody owns up to may have
    been for memory.
    """
    return returncode == -signal.SIGKILL and before is not None and after is not None and after > before


class Probe(NamedTuple):
    """Whether PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True works here, and why not."""

    works: bool
    why: str


def expandable_segments(
    state: Path,
    tree: Tree | None = None,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> Probe:
    """Tries in a process of its own, once: the answer is kept in the folder `state` until torch or driver change.

    On some Tegra systems the setting makes the first allocation fail (unsloth-zoo#1235), or gets ignored
    (pytorch#122057). Without an NVIDIA device no process is started.
    """
    tree = tree or Tree()
    if not any(tree.exists(device) for device in _CUDA_DEVICES):
        return Probe(False, "there is no CUDA device")
    key = _system(tree)
    file = state / "expandable-segments.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["system"] == key:
            return Probe(bool(known["works"]), str(known["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not tried yet
    probe = _try(run)
    files.replace(file, json.dumps({"system": key, **probe._asdict()}) + "\n")
    return probe


def allocator_environment(probe: Probe, environ: Mapping[str, str]) -> dict[str, str]:
    """What a child's environment needs for expandable segments; nothing where the user has set the allocator."""
    chosen = any(name in environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return {"PYTORCH_CUDA_ALLOC_CONF": _SEGMENTS} if probe.works and not chosen else {}


def _try(run: Callable[..., subprocess.CompletedProcess[str]]) -> Probe:
    # The older of the variable's two names, as some versions of torch ignore the newer one (pytorch#183387).
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": _SEGMENTS}
    environment.pop("PYTORCH_ALLOC_CONF", None)
    try:
        done = run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return Probe(False, f"the trial failed: {type(error).__name__}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Probe(False, lines[-1][:200] if lines else f"the trial ended with {done.returncode}")
    return Probe(True, "") if "expandable True" in done.stdout else Probe(False, "torch ignores the setting here")


def _system(tree: Tree) -> list[str]:
    """All that the answer depends on."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    drivers = [tree.maybe(path) or "" for path in ("proc/driver/nvidia/version", "etc/nv_tegra_release")]
    return [torch, platform.release(), *drivers]
