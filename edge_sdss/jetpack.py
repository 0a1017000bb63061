"""What a Jetson's image is, and which wheels follow from it. Knows nothing of the boards or of what is installed
in Python.

What is installed says more than any table: versions come from the image's own package list where it names them.
An image that is newer than the table is not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_sdss.tree import Tree


@dataclass(frozen=True)
class Release:
    """What NVIDIA's release notes say of a JetPack; Python is the system's."""

    jetpack: str
    cuda: str
    tensorrt: str
    python: str


@dataclass(frozen=True)
class Jetson:
    """The image of a Jetson. None: neither the image nor the table says it."""

    l4t: str
    jetpack: str | None
    cuda: str | None
    tensorrt: str | None
    python: str | None
    known: bool
    note: str
    wheels: Mapping[str, str] = field(default_factory=dict)  # package -> which wheel, or why none


# By L4T; the longest prefix counts. From the release notes at developer.nvidia.com/embedded/jetpack-archive.
RELEASES: Mapping[str, Release] = {
    "32": Release("4", "10.2", "7 or 8", "3.6"),
    "32.4": Release("4.4", "10.2", "7.1", "3.6"),
    "32.5": Release("4.5", "10.2", "7.1", "3.6"),
    "32.6": Release("4.6", "10.2", "8.0", "3.6"),
    "32.7": Release("4.6", "10.2", "8.2", "3.6"),
    "35.1": Release("5.0.2", "11.4", "8.4", "3.8"),
    "35.2": Release("5.1", "11.4", "8.5", "3.8"),
    "35.3": Release("5.1.1", "11.4", "8.5", "3.8"),
    "35.4": Release("5.1.2", "11.4", "8.5", "3.8"),
    "35.5": Release("5.1.3", "11.4", "8.5", "3.8"),
    "35.6": Release("5.1", "11.4", "8.5", "3.8"),
    "36.2": Release("6.0", "12.2", "8.6", "3.10"),
    "36.3": Release("6.0", "12.2", "8.6", "3.10"),
    "36.4": Release("6.2", "12.6", "10.3", "3.10"),
    "36.4.0": Release("6.1", "12.6", "10.3", "3.10"),
    "36.4.4": Release("6.2.1", "12.6", "10.3", "3.10"),
    "36.5": Release("6.2.2", "12.6", "10.3", "3.10"),
    "38.2": Release("7.0", "13.0", "10.13", "3.12"),
    "38.4": Release("7.1", "13.0", "10.13", "3.12"),
    "39.2": Release("7.2", "13.2", "10.16", "3.12"),
    "39.2.1": Release("7.2.1", "13.2", "10.16", "3.12"),
}
NEWEST = "39.2.1"

_INDEX = "NVIDIA's Jetson index"


def detect(tree: Tree) -> Jetson | None:
    """Returns what the image of a Jetson holds; None where this is none."""
    installed = _installed(tree)
    l4t = _released(tree) or installed.get("nvidia-l4t-core", "").partition("-")[0]
    if not l4t:
        return None
    release = _release(l4t)
    jetpack = installed.get("nvidia-jetpack", "").partition("+")[0].partition("-")[0]
    inference = next((version for name, version in installed.items() if name.startswith("libnvinfer")), "")
    note = "" if release else f"unknown, newest known is L4T {NEWEST} (JetPack {RELEASES[NEWEST].jetpack})"
    return Jetson(
        l4t=l4t,
        jetpack=jetpack or (release.jetpack if release else None),
        cuda=_cuda(tree) or (release.cuda if release else None),
        tensorrt=inference.partition("-")[0] or (release.tensorrt if release else None),
        python=_python(tree) or (release.python if release else None),
        known=release is not None,
        note=note,
        wheels=_wheels(int(l4t.partition(".")[0])),
    )


def _released(tree: Tree) -> str | None:
    """L4T from the first line of nv_tegra_release: `# R36 (release), REVISION: 4.3, …` is 36.4.3."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+(?:\.\d+)*)", tree.maybe("etc/nv_tegra_release") or "")
    return f"{found[1]}.{found[2]}" if found else None


def _release(l4t: str) -> Release | None:
    parts = l4t.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((RELEASES[prefix] for prefix in prefixes if prefix in RELEASES), None)


def _installed(tree: Tree) -> dict[str, str]:
    """Versions of NVIDIA's packages that are installed, by name, from dpkg's status file."""
    found = {}
    for stanza in re.split(r"\n\s*\n", tree.maybe("var/lib/dpkg/status") or ""):
        name = re.match(r"Package: (nvidia-l4t-core|nvidia-jetpack|libnvinfer\d+)\n", stanza.lstrip())
        version = re.search(r"^Version: (?:\d+:)?(\S+)", stanza, re.M)
        if name and version and re.search(r"^Status: install ok installed", stanza, re.M):
            found[name[1]] = version[1]
    return found


def _cuda(tree: Tree) -> str | None:
    found = re.search(
        r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"(\d+\.\d+)', tree.maybe("usr/local/cuda/version.json") or ""
    )
    return found[1] if found else None


def _python(tree: Tree) -> str | None:
    """The system's Python: the lowest of /usr/bin/python3.N, which is the distribution's own."""
    minors = [path.rpartition(".")[2] for path in tree.glob("usr/bin/python3.*")]
    numbers = sorted(int(minor) for minor in minors if minor.isdigit())
    return f"3.{numbers[0]}" if numbers else None


def _wheels(major: int) -> dict[str, str]:
    """Which wheel of each package serves the GPU of an image, or why none does."""
    if major < 34:
        none = "none: Python 3.6 and Ubuntu 18.04 are too old for this package; JetPack 6 where the module takes it"
        return {"torch": none, "onnxruntime": none, "onnxruntime-gpu": none}
    if major < 36:
        none = "none: NVIDIA's are for Python 3.8, this package needs 3.10; update to JetPack 6"
        return {"torch": none, "onnxruntime": "PyPI's, in a Python 3.10 of your own, CPU only", "onnxruntime-gpu": none}
    if major < 38:
        return {
            "torch": f"from {_INDEX} for JetPack 6, Python 3.10; PyPI's is not built for this GPU and its driver",
            "onnxruntime": "PyPI's, CPU only",
            "onnxruntime-gpu": f"from {_INDEX} for JetPack 6; PyPI's for aarch64 needs Python 3.12, the image has 3.10",
        }
    tensorrt = "; leave its TensorRT provider alone, it misses libnvdla_compiler.so here" if major == 39 else ""
    return {
        "torch": "PyTorch's own for aarch64 and CUDA 13, Python 3.12; `torch.cuda.get_arch_list()` must name this GPU",
        "onnxruntime": "PyPI's, CPU only",
        "onnxruntime-gpu": f"PyPI's for aarch64, Python 3.12{tensorrt}",
    }
