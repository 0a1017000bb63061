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
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge_sdss.errors import BackendUnavailable, message

_PACKAGE = Path(__file__).parents[2]
_TIMEOUT_S = 300
OLDEST = (8, 7)  # Orin: what the images made ahead of time begin with


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


def folder() -> Path:
    """Where the kernels' sources are: inside of an installed package, or beside it in a checkout."""
    inside = _PACKAGE / "_kernels"
    return inside if inside.is_dir() else _PACKAGE.parent / "kernels"


def source_hash(file: str) -> str:
    """SHA-256 of a kernel file and of all headers beside it."""
    digest = hashlib.sha256()
    for path in (folder() / file, *sorted(folder().glob("*.cuh"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def image(file: str, target: Target) -> Image:
    """Returns the image of kernels/`file` for a device.

    Raises BackendUnavailable where none was made for it ahead of time and no compiler is here.
    """
    return ahead_of_time(file, target) or compiled(file, target)


def ahead_of_time(file: str, target: Target) -> Image | None:
    return None


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
