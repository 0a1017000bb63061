"""The fake driver's half in Python: it takes images of PTX and hands each launch to the interpreter.

    import device; fake = device.install()        # before anything imports pycuda
    python -m pytest -p device ...                # the same, in a child process

It checks what a driver checks: the PTX version that this driver knows, a target that this device can run, an entry
that is there, and that the arguments' block is exactly as long as the entry's parameters, each at its alignment.
EDGE_SDSS_FAKE=driver,major,minor,bytes makes it another device.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import struct
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import driver_build
from ptx import Memory, PtxError, entries, parameters, run

INVALID_IMAGE, NO_BINARY, UNSUPPORTED_PTX, NOT_FOUND, INVALID_VALUE, LAUNCH_FAILED = 200, 209, 222, 500, 1, 719
NEWEST_PTX = {12020: (8, 2), 12060: (8, 5), 12080: (8, 7), 13000: (9, 0)}
NEWEST_ABI = (7, 8)  # before CUDA 13, and from it on
ELF, FATBIN = b"\x7fELF", b"\x50\xed\x55\xba"
KERNELS = Path(__file__).parents[3] / "kernels"
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_LOAD = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p)
_THREE = ctypes.POINTER(ctypes.c_uint)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int64, _THREE, _THREE, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint64
)


class _Hooks(ctypes.Structure):
    _fields_ = [("load", _LOAD), ("function", _FUNCTION), ("launch", _LAUNCH)]


@dataclass
class Fake:
    """The driver with its modules; `problems` says in words what it refused, `launched` what it ran."""

    library: ctypes.CDLL
    version: int = 13000
    capability: tuple[int, int] = (8, 7)
    images: list[str] = field(default_factory=list)
    functions: list[tuple[str, str]] = field(default_factory=list)
    launched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def be(self, version: int, capability: tuple[int, int], memory_bytes: int = 1 << 33) -> None:
        self.version, self.capability = version, capability
        self.library.fake_device(version, *capability, ctypes.c_uint64(memory_bytes))

    def counts(self) -> dict[str, int]:
        """Bytes copied to and from the device, launches, waits, since the start."""
        found = (ctypes.c_uint64 * 4)()
        self.library.fake_counts(found)
        return dict(zip(("to_device", "to_host", "launches", "waits"), found, strict=True))

    def recover(self) -> None:
        """Forgets a failed launch, which on a device would end the process's context."""
        self.library.fake_recover()

    def load(self, image: int) -> int:
        magic = ctypes.string_at(image, 4)
        if magic in (ELF, FATBIN):
            return self._machine_code(image, magic)
        text = ctypes.string_at(image).decode()
        version = re.search(r"^\.version (\d+)\.(\d+)", text, re.M)
        target = re.search(r"^\.target sm_(\d+)", text, re.M)
        if version is None or target is None:
            return self._refuse(INVALID_IMAGE, "this is no PTX")
        newest = max((v for d, v in NEWEST_PTX.items() if d <= self.version), default=(0, 0))
        if (int(version[1]), int(version[2])) > newest:
            return self._refuse(UNSUPPORTED_PTX, f"PTX {version[1]}.{version[2]} is newer than driver {self.version}")
        if int(target[1]) > 10 * self.capability[0] + self.capability[1]:
            return self._refuse(NO_BINARY, f"sm_{target[1]} is newer than the device")
        self.images.append(text)
        return len(self.images)

    def _machine_code(self, image: int, magic: bytes) -> int:
        """Takes an image of kernels/images, if a driver of this version would, and interprets the PTX made with it."""
        if magic == ELF:
            head = ctypes.string_at(image, 64)
            segments, sections = struct.unpack_from("<QQ", head, 32)
            segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from("<HHHH", head, 54)
            end = max(segments + segment_bytes * segment_count, sections + section_bytes * section_count)
            data = ctypes.string_at(image, end)
            if head[8] > NEWEST_ABI[self.version >= 13000]:
                return self._refuse(NO_BINARY, f"a driver of CUDA {self.version} takes no ELF ABI {head[8]}")
            if (arch := head[48 if head[8] == 7 else 49]) != 10 * self.capability[0] + self.capability[1]:
                return self._refuse(NO_BINARY, f"machine code of sm_{arch}")
        else:
            header, size = struct.unpack("<HQ", ctypes.string_at(image + 6, 10))
            data = ctypes.string_at(image, header + size)
            if self.version < 13000:
                return self._refuse(NO_BINARY, f"a driver of CUDA {self.version} takes no image of CUDA 13")
        images = json.loads((KERNELS / "images/manifest.json").read_text(encoding="utf-8"))["images"]
        digest = hashlib.sha256(data).hexdigest()
        name = next((name for name, facts in images.items() if facts["sha256"] == digest), None)
        if name is None:
            return self._refuse(NO_BINARY, "machine code from elsewhere is not interpreted")
        self.images.append((KERNELS / "images" / name).with_suffix(".ptx").read_text(encoding="utf-8"))
        return len(self.images)

    def function(self, module: int, name: bytes) -> int:
        text = self.images[module - 1]
        if name.decode() not in entries(text):
            return self._refuse(NOT_FOUND, f"no entry {name.decode()}")
        self.functions.append((text, name.decode()))
        return len(self.functions)

    def launch(self, function: int, grid: Any, block: Any, shared: int, arguments: int, size: int) -> int:
        text, name = self.functions[function - 1]
        extent = tuple(grid[:3]), tuple(block[:3])
        try:
            values = _values(parameters(text, name), ctypes.string_at(arguments, size))
            run(text, name, *extent, values, self._memory())
        except PtxError as error:
            return -self._refuse(LAUNCH_FAILED, f"{name}: {type(error).__name__}: {error}")
        except ValueError as error:
            return -self._refuse(INVALID_VALUE, f"{name}: {error}")
        except Exception:
            return -self._refuse(LAUNCH_FAILED, traceback.format_exc())
        self.launched.append((name, *extent))
        return 0

    def _memory(self) -> Memory:
        """All that is allocated on the device now, at its addresses."""
        memory = Memory()
        address, size, data = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_void_p()
        index = 0
        while self.library.fake_block(index, *map(ctypes.byref, (address, size, data))):
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(data.value))
            memory.bind_at(address.value, array)
            index += 1
        return memory

    def _refuse(self, code: int, why: str) -> int:
        self.problems.append(why)
        print(f"fake driver: {why}", file=sys.stderr)
        return -code


def _values(types: list[str], block: bytes) -> list[Any]:
    """Cuts a launch's arguments by the entry's parameters, each at its natural alignment."""
    values, at = [], 0
    for kind in types:
        size = _SIZES[kind.lstrip("busf")]
        at = -(-at // size) * size
        code = {"f": "f", "s": "i"}.get(kind[0], "u")
        if at + size > len(block):
            raise ValueError(f"{len(block)} bytes of arguments, and the entry's parameters are {types}")
        values.append(np.frombuffer(block, f"<{code}{size}", 1, at)[0])
        at += size
    if at != len(block):
        raise ValueError(f"{len(block)} bytes of arguments, and the entry has {at}")
    return values


_kept: list[Any] = []


def install() -> Fake:
    """Loads the fake driver into this process, so that PyCUDA finds it, and PyCUDA onto the path."""
    library = ctypes.CDLL(str(driver_build.driver()), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(driver_build.pycuda()))
    fake = Fake(library)
    if asked := os.environ.get("EDGE_SDSS_FAKE"):
        version, major, minor, memory_bytes = map(int, asked.split(","))
        fake.be(version, (major, minor), memory_bytes)
    hooks = _Hooks(_LOAD(fake.load), _FUNCTION(fake.function), _LAUNCH(fake.launch))
    library.fake_hooks(hooks)
    _kept.append(hooks)
    return fake


if "pytest" in sys.modules or os.environ.get("EDGE_SDSS_FAKE"):
    FAKE = install()
