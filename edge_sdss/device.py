"""What machine and software this is. Knows nothing of what runs on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import edge_sdss

EMULATED = "EDGE_SDSS_EMULATED"
"""Set for what `edge-sdss emulate` runs: a board's name, or the path of its TOML file."""

PACKAGES = ("numpy", "torch", "transformers", "peft", "tokenizers", "safetensors", "rouge-score", "empath")


def environment(root: Path = Path("/")) -> dict[str, Any]:
    """The facts that a result depends on; None where one is not known. `root` is the file system's, for tests."""
    return {
        "edge_sdss": edge_sdss.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(root),
        "cores": cores(),
        "memory_bytes": memory_bytes(root),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "emulated": emulated(),
    }


def processor(root: Path = Path("/")) -> str:
    """The board's model on a device tree, else the processor's name."""
    board = _read(root / "proc/device-tree/model").strip("\0 \n")
    if board:
        return board
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(root: Path = Path("/")) -> str:
    """The machine's name for files and results, such as x86-64-intel-xeon-platinum-8488c-2-cores."""
    detail = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", processor(root), flags=re.I)
    return re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()} {detail} {cores()} cores".lower()).strip("-")


def emulated() -> str | None:
    """The name of the board whose limits this process runs under, by `edge-sdss emulate`; None on the real one."""
    board = emulated_board()
    return Path(board).stem if board else None


def emulated_board() -> str | None:
    """The same board as `boards.load` takes it: its name, or the path of the user's own TOML file."""
    return os.environ.get(EMULATED) or None


def cores() -> int:
    """Processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Main memory in bytes; None where it cannot be read."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `-dirty` where it was changed; None elsewhere."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
