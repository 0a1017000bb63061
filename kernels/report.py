"""What the kernels cost, measured without a GPU: REPORT.md.

    python kernels/report.py           # writes kernels/REPORT.md
    python kernels/report.py --check   # fails where it would be another

Registers, stack, shared memory and 16-byte loads are read from the machine code of the committed images (cuobjdump and
nvdisasm, wheels of NVIDIA); instructions and bytes are counted by the interpreter of the tests while it executes the
committed PTX; occupancy is computed from registers and shared memory. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "kernels"))

import kernel_cases as cases  # noqa: E402
from ptx import Memory, run  # noqa: E402

REPORT = HERE / "REPORT.md"
WIDTHS = (576, 768, 2048)
TOKENS = 256  # rows, as two dialogues
# Instructions per element, of the dearest of WIDTHS, at most.
LIMITS = {"entropy": 18.0, "energy": 18.0, "dissimilarity": 9.0}
# Per multiprocessor: CUDA C++ Programming Guide, technical specifications per compute capability.
THREADS_PER_SM, REGISTERS_PER_SM, WARPS_PER_SM = 1536, 65536, 48
SHARED_PER_SM = {"sm_87": 164 * 1024, "sm_110": 228 * 1024}
REGISTERS_STEP, SHARED_RESERVED = 256, 1024  # registers of a warp come in steps; a block costs shared memory besides
BUILDS = (("jetpack6", "cubin", "sm_87"), ("jetpack7", "fatbin", "sm_87"), ("jetpack7", "fatbin", "sm_110"))


class ToolMissing(Exception):
    """cuobjdump or nvdisasm is not here."""


@dataclass(frozen=True)
class Compiled:
    """A kernel in an image. local: loads and stores of spilled registers. wide: 16-byte loads."""

    registers: int
    stack: int
    shared: int
    local: int
    wide: int


@dataclass(frozen=True)
class Cost:
    """One launch. instructions: by all threads; issues: by whole warps, times 32; both per element.

    read: bytes read of the operands that pass through once, as a share of their size. reused: different bytes read of
    the others (means, offsets, domains), as a share of theirs.
    """

    instructions: float
    issues: float
    read: float
    reused: float


def tool(name: str) -> str:
    """Path of a program of CUDA: on the PATH or in its wheel. Raises ToolMissing."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13" / "bin" for folder in (spec and spec.submodule_search_locations) or ()]
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), shutil.which(name))
    if found is None:
        raise ToolMissing(f"{name} is not here: pip install nvidia-cuda-{name}")
    return found


def dump(image: Path, option: str) -> str:
    """What cuobjdump says of an image."""
    environment = os.environ | {"PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool("cuobjdump"), option, str(image)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@cache
def compiled(jetpack: str, ending: str, architecture: str) -> dict[str, Compiled]:
    """Entry -> what the machine code for an architecture holds."""
    found = {}
    for source in sorted({source for source, _ in cases.ENTRIES.values()}):
        image = HERE / "images" / jetpack / f"{source}.{ending}"
        usage, code = (_of(dump(image, option), architecture) for option in ("-res-usage", "-sass"))
        bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", code, re.S))
        for match in re.finditer(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
            body = bodies[match[1]]
            local, wide = len(re.findall(r"\b(?:LDL|STL)\b", body)), len(re.findall(r"\bLDG\.E\.[\w.]*128\b", body))
            wide += len(re.findall(r"\bLDG\.E\.128\b", body)) if not wide else 0
            found[match[1]] = Compiled(int(match[2]), int(match[3]), int(match[4]), local, wide)
    return found


def _of(text: str, architecture: str) -> str:
    """The part of a dump that is about one architecture; a cubin holds only one."""
    sections = re.split(r"^Fatbin (?:elf|ptx) code:$", text, flags=re.M)
    matching = [section for section in sections if re.search(rf"^arch = {architecture}$", section, re.M)]
    return matching[0] if matching else text


def occupancy(facts: Compiled, threads: int, architecture: str) -> float:
    """Share of a multiprocessor's warps that fit at once."""
    warps = threads // 32
    registers = -(-facts.registers * 32 // REGISTERS_STEP) * REGISTERS_STEP * warps
    blocks = min(THREADS_PER_SM // threads, REGISTERS_PER_SM // registers)
    blocks = min(blocks, SHARED_PER_SM[architecture] // (facts.shared + SHARED_RESERVED))
    return blocks * warps / WARPS_PER_SM


def launches(d: int) -> Iterator[tuple[cases.Case, int]]:
    """(launch, elements) of every kernel, on aligned rows of d columns."""
    offsets = np.array([0, TOKENS // 2, TOKENS], np.int64)
    domain = np.zeros(TOKENS, np.int32)
    means = cases.unit(cases.normal((2, d), 1))
    warps = cases.warps(TOKENS, 256)
    for kind in cases.TYPES:
        x, other = (cases.Buffer(cases.stored(cases.unit(cases.normal((TOKENS, d), s)), kind)[0]) for s in (0, 1))
        tokens, rows = (cases.result(TOKENS), TOKENS, d), cases.result(2, d)
        columns = -(-d * cases.BYTES[kind] // 128)
        arguments = {
            "token_energy": (warps, 256, (x, *tokens)),
            "centered_energy": ((2, 16), 256, (x, means, offsets, cases.result(TOKENS), d)),
            "ragged_token_entropy": ((2, 1), 256, (x, offsets, cases.result(2), 2, d)),
            "ragged_centered_entropy": ((2, 1), 256, (x, means, offsets, cases.result(2), 2, d)),
            "ragged_mean": ((2, columns), 256, (x, offsets, rows, d)),
            "row_entropy": (warps, 256, (x, *tokens)),
            "dissimilarity": (warps, 256, (x, means, domain, *tokens)),
        }
        for name, (grid, block, args) in arguments.items():
            buffers = tuple(cases.Buffer(arg) if isinstance(arg, np.ndarray) else arg for arg in args)
            yield cases.Case(f"{name}_{kind}", f"d = {d}", grid, block, buffers, np.zeros(0)), TOKENS * d
        some = 32
        a, b = (cases.Buffer(operand.array[:some].copy()) for operand in (x, other))
        args = (a, b, cases.result(some, some), some, some, d)
        yield cases.Case(f"pairwise_{kind}", "", (1, 1), 128, args, np.zeros(0), streamed=(0, 1)), some * some * d


def cost(case: cases.Case, elements: int, jetpack: str) -> Cost:
    """Interprets one launch of the committed PTX."""
    text = (HERE / "images" / jetpack / f"{cases.ENTRIES[case.entry][0]}.ptx").read_text()
    memory = Memory()
    args = [memory.bind(arg.array) if isinstance(arg, cases.Buffer) else arg for arg in case.args]
    counts = run(text, case.entry, case.grid, (case.block,), args, memory)
    once, again = [0, 0], [0, 0]
    for place, arg in enumerate(case.args):
        if isinstance(arg, cases.Buffer) and not arg.output:
            traffic = counts.reads[args[place]]
            if place in case.streamed:
                once = [once[0] + traffic.bytes, once[1] + arg.array.nbytes]
            elif traffic.bytes:
                used = (
                    arg.array.nbytes if case.entry[:13] != "dissimilarity" or arg.array.ndim == 1 else traffic.distinct
                )
                again = [again[0] + traffic.distinct, again[1] + used]
    return Cost(
        sum(counts.instructions.values()) / elements,
        counts.issues * 32 / elements,
        once[0] / once[1],
        again[0] / again[1] if again[1] else math.nan,
    )


def limit(entry: str) -> float | None:
    """The most instructions per float32 element that an entry may take."""
    if not entry.endswith("_f32") or entry.startswith("pairwise"):
        return None
    return next((most for word, most in LIMITS.items() if word in entry), None)


@cache
def costs() -> dict[str, dict[tuple[str, int], Cost]]:
    """Entry -> (JetPack, width) -> cost."""
    found: dict[str, dict[tuple[str, int], Cost]] = {}
    for d in WIDTHS:
        for case, elements in launches(d):
            for jetpack in ("jetpack6", "jetpack7"):
                found.setdefault(case.entry, {})[jetpack, d] = cost(case, elements, jetpack)
    return found


def text() -> str:
    """REPORT.md. Raises ToolMissing."""
    lines = ["# What the kernels cost, measured without a GPU", "", __doc__.split("\n\n")[2].replace("\n", " "), ""]
    lines += ["Made by `python kernels/report.py`. Limits are checked by `tests/kernels/test_kernel_costs.py`.", ""]
    lines += [
        "## Compiled",
        "",
        "Registers / 16-byte loads / occupancy. Stack and spilled registers are 0 everywhere.",
        "",
    ]
    builds = {build: compiled(*build) for build in BUILDS}
    names = [f"{arch}, {'CUDA 12.6' if jetpack == 'jetpack6' else 'CUDA 13.0'}" for jetpack, _, arch in BUILDS]
    lines += [f"| kernel | shared memory, B | {' | '.join(names)} |", "|---|---:|" + "---:|" * len(names)]
    for entry in cases.ENTRIES:
        threads = 128 if entry.startswith("pairwise") else 256
        facts = [builds[build][entry] for build in BUILDS]
        cells = [
            f"{fact.registers} / {fact.wide} / {occupancy(fact, threads, build[2]):.0%}"
            for fact, build in zip(facts, BUILDS, strict=True)
        ]
        lines.append(f"| `{entry}` | {facts[0].shared} | {' | '.join(cells)} |")
    lines += ["", "## Executed", ""]
    lines += [
        f"Dynamic PTX instructions per element of {TOKENS} rows (of a pairwise product: per multiply-add of 32 x 32 "
        "rows), the idle lanes of a warp counted as busy. *Read*: bytes read of what passes through once, as a share "
        "of its size.",
        "",
        "| kernel | limit | " + " | ".join(f"{d}, PTX {v}" for v in ("8.5", "9.0") for d in WIDTHS) + " | read |",
        "|---|---:|" + "---:|" * (2 * len(WIDTHS) + 1),
    ]
    for entry, measured in costs().items():
        cells = [f"{measured[jetpack, d].issues:.1f}" for jetpack in ("jetpack6", "jetpack7") for d in WIDTHS]
        most = limit(entry)
        read = max((c.read for c in measured.values()), key=lambda share: abs(share - 1))
        lines.append(f"| `{entry}` | {'' if most is None else f'{most:.0f}'} | {' | '.join(cells)} | {read:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed report; write nothing")
    arguments = parser.parse_args()
    try:
        made = text()
    except ToolMissing as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    if not arguments.check:
        REPORT.write_text(made)
    elif made != REPORT.read_text():
        print("kernels: REPORT.md is stale: python kernels/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
