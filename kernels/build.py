"""Builds the images of the kernels ahead of time, for devices that have no compiler and tests that have no nvcc.

    python kernels/build.py           # writes kernels/images and its manifest.json
    python kernels/build.py --check   # builds again, twice, and compares with what is committed

    images/jetpack6/<kernel>.cubin    sm_87, for the driver of CUDA 12.6: ELF ABI 7       NVRTC 12.6, from its wheel
    images/jetpack6/<kernel>.ptx      compute_87, PTX 8.5
    images/jetpack7/<kernel>.fatbin   sm_87, sm_110 and compute_110 PTX: ELF ABI 8        nvcc 13.0
    images/jetpack7/<kernel>.ptx      compute_110, PTX 9.0

A driver of CUDA 12.6 refuses what CUDA 13 makes. manifest.json names, for each image, the compiler, the target, the ELF
ABI or PTX version that was found in it, and the hash of the sources it was made from. The images are the same, bit
by bit, in every build by the same compilers.

Knows nothing of devices, and of how an image is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "images"
KERNELS = sorted(source.stem for source in HERE.glob("*.cu"))
NVRTC_VERSION = (12, 6)
NVCC_VERSION = "13.0"
# Lambdas have no annotation of their own, which NVRTC alone minds: -default-device.
STANDARD = "-std=c++17"
FATBIN = ["-gencode", "arch=compute_87,code=sm_87", "-gencode", "arch=compute_110,code=[sm_110,compute_110]"]
# What the driver of each JetPack accepts, and the images must have.
WANTED = {
    "jetpack6": {"elf_abi": 7, "ptx_version": "8.5"},
    "jetpack7": {"elf_abi": 8, "ptx_version": "9.0"},
}


class BuildError(Exception):
    """A compiler is missing, is another version, or fails; or an image is not what its driver accepts."""


def sources(kernel: str) -> dict[str, bytes]:
    """The texts of a kernel, its headers first, by name."""
    texts: dict[str, bytes] = {}

    def add(name: str) -> None:
        text = (HERE / name).read_bytes()
        for included in re.findall(rb'^#include "([\w.]+)"', text, re.M):
            if included.decode() not in texts:
                add(included.decode())
        texts[name] = text

    add(f"{kernel}.cu")
    return texts


def source_hash(kernel: str) -> str:
    """SHA-256 of a kernel's sources."""
    digest = hashlib.sha256()
    for name, text in sources(kernel).items():
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def elf_abi(image: bytes) -> int:
    """The ABI version in the head of a cubin."""
    if image[:4] != b"\x7fELF" or len(image) < 16:
        raise BuildError("not an ELF file")
    return image[8]


def ptx_version(text: str) -> str:
    """The version of the language in the head of PTX."""
    match = re.search(r"^\.version (\d+\.\d+)$", text, re.M)
    if match is None:
        raise BuildError("no PTX version")
    return match[1]


def nvcc() -> str:
    """Path of nvcc 13.0; BuildError where it is missing or another version."""
    found = shutil.which("nvcc")
    if found is None:
        raise BuildError(f"nvcc is not on the PATH; install CUDA {NVCC_VERSION}")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {NVCC_VERSION}," not in text:
        raise BuildError(f"nvcc is {text.split('release ')[-1].split(',')[0]}; CUDA {NVCC_VERSION} is needed")
    return found


def nvcc_version() -> str:
    """As "nvcc 13.0.88"."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {text.split('release ')[1].split(', V')[1].split()[0]}"


def compile_nvcc(kernel: str, out: Path, *options: str) -> str:
    """Runs nvcc on a kernel; returns what it said."""
    command = [nvcc(), STANDARD, *options, "-o", str(out), f"{kernel}.cu"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"nvcc refuses {kernel}.cu: {done.stderr.strip()}")
    return done.stderr


def nvrtc() -> ctypes.CDLL:
    """The library of the wheel nvidia-cuda-nvrtc-cu12; BuildError where it is missing or another version."""
    wheel = "pip install nvidia-cuda-nvrtc-cu12==12.6.85"
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    folders = [Path(folder) / "lib" for folder in (spec and spec.submodule_search_locations) or ()]
    folder = next((folder for folder in folders if (folder / "libnvrtc.so.12").exists()), None)
    if folder is None:
        raise BuildError(f"NVRTC 12.6 is missing: {wheel}")
    builtins = next(folder.glob("libnvrtc-builtins.so.*"))
    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if (major.value, minor.value) != NVRTC_VERSION:
        raise BuildError(f"NVRTC is {major.value}.{minor.value}; 12.6 is needed: {wheel}")
    return library


def compile_nvrtc(kernel: str, architecture: str) -> bytes:
    """A cubin for `sm_*`, PTX for `compute_*`."""
    library, texts = nvrtc(), sources(kernel)
    main = texts.pop(f"{kernel}.cu")
    strings = ctypes.c_char_p * len(texts)
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program), main, f"{kernel}.cu".encode(), len(texts),
        strings(*texts.values()), strings(*(name.encode() for name in texts)),
    )  # fmt: skip
    options = [f"--gpu-architecture={architecture}".encode(), STANDARD.encode(), b"-default-device"]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if failed:
        log = _nvrtc_bytes(library, program, "ProgramLog").decode(errors="replace")
        raise BuildError(f"NVRTC refuses {kernel}.cu: {log.strip()}")
    image = _nvrtc_bytes(library, program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return image if architecture.startswith("sm_") else image.rstrip(b"\0")


def _nvrtc_bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def build_jetpack6(kernel: str, out: Path) -> None:
    """A kernel's images for the driver of CUDA 12.6."""
    (out / f"{kernel}.cubin").write_bytes(compile_nvrtc(kernel, "sm_87"))
    (out / f"{kernel}.ptx").write_bytes(compile_nvrtc(kernel, "compute_87"))


def build_jetpack7(kernel: str, out: Path) -> None:
    """A kernel's images for the driver of CUDA 13.0."""
    compile_nvcc(kernel, out / f"{kernel}.fatbin", "-fatbin", "-compress-mode=size", *FATBIN)
    compile_nvcc(kernel, out / f"{kernel}.ptx", "-ptx", "-arch=compute_110")


def check_facts(kernel: str, out: Path) -> None:
    """BuildError unless the images are what the drivers accept."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "image.cubin"
        compile_nvcc(kernel, cubin, "-cubin", "-arch=sm_110")
        found = {
            "jetpack6": {"elf_abi": elf_abi((out / "jetpack6" / f"{kernel}.cubin").read_bytes())},
            "jetpack7": {"elf_abi": elf_abi(cubin.read_bytes())},
        }
    for jetpack, facts in found.items():
        facts_and_version = facts | {"ptx_version": ptx_version((out / jetpack / f"{kernel}.ptx").read_text())}
        if facts_and_version != WANTED[jetpack]:
            raise BuildError(f"{jetpack}/{kernel}: found {facts_and_version}, wanted {WANTED[jetpack]}")


def manifest(out: Path) -> dict[str, Any]:
    """What the images in `out` were made of and by."""
    compilers = {"jetpack6": "NVRTC 12.6.85", "jetpack7": nvcc_version()}
    targets = {".cubin": "sm_87", ".fatbin": "sm_87 sm_110 compute_110"}
    images = {}
    for path in sorted(out.glob("*/*")):
        jetpack = path.parent.name
        fact = "ptx_version" if path.suffix == ".ptx" else "elf_abi"
        images[f"{jetpack}/{path.name}"] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "compiler": compilers[jetpack],
            "target": targets.get(path.suffix, "compute_87" if jetpack == "jetpack6" else "compute_110"),
            fact: WANTED[jetpack][fact],
        }
    return {"sources": {kernel: source_hash(kernel) for kernel in KERNELS}, "images": images}


def build(out: Path) -> None:
    """All images and their manifest into the empty folder `out`."""
    for jetpack, compiler in (("jetpack6", build_jetpack6), ("jetpack7", build_jetpack7)):
        (out / jetpack).mkdir(parents=True)
        for kernel in KERNELS:
            compiler(kernel, out / jetpack)
    for kernel in KERNELS:
        check_facts(kernel, out)
    (out / "manifest.json").write_text(json.dumps(manifest(out), indent=2) + "\n")


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not the same in two folders."""
    names = {str(path.relative_to(root)) for root in (one, other) for path in root.rglob("*") if path.is_file()}
    return sorted(
        name
        for name in names
        if not ((one / name).exists() and (other / name).exists())
        or (one / name).read_bytes() != (other / name).read_bytes()
    )


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="build twice and compare; write nothing")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "first", Path(folder) / "second"
            build(first)
            build(second)
            if changed := differences(first, second):
                raise BuildError(f"not reproducible: {', '.join(changed)}")
            if not arguments.check:
                shutil.rmtree(IMAGES, ignore_errors=True)
                shutil.copytree(first, IMAGES)
            elif stale := differences(first, IMAGES):
                raise BuildError(f"the committed images are stale ({', '.join(stale)}): python kernels/build.py")
    except BuildError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in IMAGES.glob("*/*"))
    print(f"{len(KERNELS)} kernels, built twice and equal; {size / 1e3:.0f} kB of images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
