"""The compiled form of a kernel file that fits a device and its driver: made ahead of time, or compiled here, once.

What is compiled here lies in the cache by (hash of the source, compute capability, driver). It is PTX, which the
driver turns into machine code and keeps by itself. Knows nothing of what kernels compute.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge_sdss.backends import kernels as folder
from edge_sdss.errors import BackendUnavailable, message

_TIMEOUT_S = 300
_LEAST_DRIVER = {
    ("elf_abi", 7): 12060,
    ("ptx_version", "8.5"): 12060,
    ("elf_abi", 8): 13000,
    ("ptx_version", "9.0"): 13000,
}
"""The CUDA of the first driver that surely takes an image, by what is in it."""


@dataclass(frozen=True)
class Target:
    """A device's compute capability, such as (8, 7), and its driver's CUDA, such as 12060."""

    capability: tuple[int, int]
    driver: int

    @property
    def sm(self) -> int:
        """87 of (8, 7)."""
        return 10 * self.capability[0] + self.capability[1]


@dataclass(frozen=True)
class Image:
    """What the driver loads, and where it is from."""

    data: bytes
    origin: str


def source_hash(file: str) -> str:
    """SHA-256 of a kernel file and of what it includes, as in the images' manifest."""
    digest = hashlib.sha256()
    for name, text in _texts(file).items():
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def _texts(file: str) -> dict[str, bytes]:
    """A source by name, after what it includes."""
    text = (folder() / file).read_bytes()
    texts: dict[str, bytes] = {}
    for included in re.findall(rb'^#include "([\w.]+)"', text, re.M):
        if included.decode() not in texts:
            texts.update(_texts(included.decode()))
    return {**texts, file: text}


@cache
def image(file: str, target: Target) -> Image:
    """Returns the image of kernels/`file` for a device.

    Raises BackendUnavailable where none was made for it ahead of time and no compiler is here.
    """
    return ahead_of_time(file, target) or compiled(file, target)


def ahead_of_time(file: str, target: Target) -> Image | None:
    """Returns an image from kernels/images that was made of these sources and that the driver and the device take.

    Machine code for exactly this device comes before PTX, which the driver has to compile.
    """
    try:
        manifest = json.loads((folder() / "images" / "manifest.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    stem = Path(file).stem
    if manifest["sources"].get(stem) != source_hash(file):
        return None
    fitting = [
        (rank, name)
        for name, facts in manifest["images"].items()
        if Path(name).stem == stem and (rank := _rank(facts, target)) is not None
    ]
    for _, name in sorted(fitting):
        data = (folder() / "images" / name).read_bytes()
        if hashlib.sha256(data).hexdigest() == manifest["images"][name]["sha256"]:
            return Image(data + b"\0", f"images/{name}")
    return None


def _rank(facts: dict[str, Any], target: Target) -> tuple[int, int] | None:
    """Machine code of this very device, then PTX that it can run, each by the newer compiler first; else None."""
    least = [driver for (key, value), driver in _LEAST_DRIVER.items() if facts.get(key) == value]
    if not least or target.driver < least[0]:
        return None
    codes = facts["target"].split()
    if f"sm_{target.sm}" in codes:
        return 0, -least[0]
    virtual = (int(code.removeprefix("compute_")) for code in codes if code.startswith("compute_"))
    return (1, -least[0]) if any(code <= target.sm for code in virtual) else None


def compiled(file: str, target: Target) -> Image:
    """Returns what NVRTC or nvcc makes of a file, from the cache after the first time."""
    from edge_sdss import default_model

    name = f"{Path(file).stem}-{source_hash(file)[:16]}-sm_{target.sm}-{target.driver}.ptx"
    path = default_model.cache() / "kernels" / name
    if not path.is_file():
        ptx = _compile(file, f"compute_{target.sm}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
                partial.write(ptx)
            os.replace(partial.name, path)
        except OSError:
            return Image(ptx, f"{file} compiled here")  # a full disk costs the next start, not this one
    return Image(path.read_bytes(), name)


def _compile(file: str, architecture: str) -> bytes:
    """PTX of a file, ended by a zero byte. Raises BackendUnavailable with what the compilers said."""
    problems = []
    for compiler in (_nvrtc, _nvcc):
        try:
            return compiler(folder() / file, architecture).rstrip(b"\0") + b"\0"
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            problems.append(f"{compiler.__name__[1:]}: {error}")
    do = "install the CUDA toolkit (nvcc, or libnvrtc) of the driver's version, or choose --backend torch or numpy"
    raise BackendUnavailable(message(f"compile kernels/{file} for {architecture}", ", ".join(problems), do))


def _nvrtc(source: Path, architecture: str) -> bytes:
    names = ("nvrtc", *(f"libnvrtc.so.{major}" for major in (13, 12)))
    name = next((found for n in names if (found := ctypes.util.find_library(n) or (n if _loads(n) else None))), None)
    if name is None:
        raise RuntimeError("not installed")
    library = ctypes.CDLL(name)
    program = ctypes.c_void_p()
    text, include = source.read_bytes(), f"-I{source.parent}".encode()
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", include]
    if library.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None):
        raise RuntimeError("it makes no program")
    try:
        if library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            log = _sized(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise RuntimeError(log.rstrip(b"\0").decode(errors="replace").strip().partition("\n")[0] or "failed")
        return _sized(program, library.nvrtcGetPTXSize, library.nvrtcGetPTX)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _sized(program: Any, size: Callable[..., int], text: Callable[..., int]) -> bytes:
    length = ctypes.c_size_t()
    size(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    text(program, buffer)
    return buffer.raw


def _nvcc(source: Path, architecture: str) -> bytes:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("not installed")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out.ptx"
        command = [nvcc, "-ptx", "-std=c++17", f"-arch={architecture}", f"-I{source.parent}", "-o", str(out)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").partition("\n")[0])
        return out.read_bytes()
