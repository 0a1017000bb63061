"""The kernels' own sources built for the host (cpu/cuda_on_cpu.h), under a sanitizer.

program = build(SOURCES, "thread", folder)
results = run(program, cases)          # raises Found where the sanitizer, a barrier or the kernel complains
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from kernel_cases import Buffer, Case

HERE = Path(__file__).resolve().parent / "cpu"
KERNELS = HERE.parents[2] / "kernels"
SANITIZERS = {"thread": ["-fsanitize=thread"], "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]}


class Found(Exception):
    """What a sanitizer or the barrier check found."""


def compiler() -> str | None:
    """g++ with C++20's barriers, or None."""
    return shutil.which("g++")


def build(entries: dict[str, str], sanitizer: str, out: Path, sources: Path = KERNELS) -> Path:
    """Compiles the files of the entries (entry -> file's name without ending) in the folder `sources`."""
    files = sorted(set(entries.values()), key=lambda name: (name == "pairwise", name))  # its macros are common words
    includes = "".join(f'#include "{name}.cu"\n#undef ENTRIES\n' for name in files)
    calls = "".join(f"ENTRY({entry})\n" for entry in entries)
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.inc").write_text(f"#ifdef INCLUDES\n{includes}#else\n{calls}#endif\n")
    program = out / f"harness-{sanitizer}"
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [*SANITIZERS[sanitizer], f"-I{out}", f"-I{sources}", f"-I{HERE}", str(HERE / "harness.cpp")]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return program


def run(program: Path, cases: Sequence[Case], timeout_s: float = 280) -> None:
    """Runs the cases and fills in their outputs. Raises Found."""
    command = [str(program)]
    if shutil.which("setarch"):  # ThreadSanitizer wants the addresses that it knows
        command = ["setarch", "-R", *command]
    try:
        done = subprocess.run(command, input=b"".join(map(_launch, cases)), capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise Found("threads wait for each other for ever") from error
    if done.returncode:
        raise Found(done.stderr.decode(errors="replace")[-4000:])
    results = done.stdout
    for case in cases:
        size = case.output.nbytes
        case.output.reshape(-1).view(np.uint8)[:] = np.frombuffer(results[:size], np.uint8)
        results = results[size:]


def _launch(case: Case) -> bytes:
    parts = [f"{case.entry} {case.grid[0]} {case.grid[1]} {case.block} {len(case.args)}\n".encode()]
    for arg in case.args:
        if isinstance(arg, Buffer):
            parts += [f"B {arg.array.nbytes} {arg.shift} {int(arg.output)}\n".encode(), arg.array.tobytes()]
        else:
            parts.append(f"I {arg}\n".encode())
    return b"".join(parts)


def check(program: Path, cases: Iterable[Case], tolerance: float, timeout_s: float = 280) -> float:
    """Runs the cases; returns the largest error. Raises Found also where it is above the tolerance."""
    listed = list(cases)
    run(program, listed, timeout_s)
    worst = max(listed, key=Case.error)
    if not worst.error() <= tolerance:
        raise Found(f"{worst.entry}, {worst.about}: error {worst.error():.2g}")
    return worst.error()
