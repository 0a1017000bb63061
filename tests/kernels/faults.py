"""Plants faults in the kernels, one at a time, and says which executor finds them: FAULTS.md.

    python tests/kernels/faults.py           # writes tests/kernels/FAULTS.md
    python tests/kernels/faults.py --check   # fails where it would be another

Needs g++, and nvcc 13.0 or the wheel of NVRTC 12.6. The third executor, PyCUDA over a fake driver, sees the host's
code and has its own faults.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "kernels")]

import build
import host
from kernel_cases import ENTRIES, TOLERANCE, Buffer, Case
from ptx import Memory, PtxError, run

TABLE = HERE / "FAULTS.md"
EXECUTORS = ("PTX interpreter", "host, ThreadSanitizer", "host, AddressSanitizer")


@dataclass(frozen=True)
class Fault:
    """Replaces `old`, which occurs once in `file`, by `new`; `entry` is run."""

    about: str
    file: str
    old: str
    new: str
    entry: str


FAULTS = (
    Fault(
        "dropped barrier: merge of a block's warps", "ragged_entropy.cu", "__syncthreads();", "", "ragged_entropy_f32"
    ),
    Fault("dropped barrier: sums of the columns", "ragged_pool.cu", "__syncthreads();", "", "ragged_mean_f32"),
    Fault(
        "dropped barrier: before the tiles are overwritten",
        "pairwise.cu",
        "+= part[p][q];\n        __syncthreads();",
        "+= part[p][q];",
        "pairwise_f32",
    ),
    Fault("off by one: a token too many", "ragged_entropy.cu", "i < last;", "i <= last;", "ragged_entropy_f32"),
    Fault(
        "off by one: a warp too many in the merge",
        "ragged_entropy.cu",
        "lane < warps;",
        "lane <= warps;",
        "ragged_entropy_f32",
    ),
    Fault(
        "off by one: the last column of a row",
        "warp.cuh",
        "lane < head + tail",
        "lane + 1 < head + tail",
        "token_energy_f32",
    ),
    Fault(
        "swapped arguments: rows and columns",
        "row_entropy.cu",
        "row_entropy(logits, out, n, d);",
        "row_entropy(logits, out, d, n);",
        "row_entropy_f32",
    ),
    Fault(
        "swapped arguments: vectors and means",
        "dissimilarity.cu",
        "dissimilarity(v, means, domain, out, n, d);",
        "dissimilarity(means, v, domain, out, n, d);",
        "dissimilarity_f32",
    ),
    Fault(
        "swapped arguments: shift and sum",
        "row_entropy.cu",
        "factor * fmaf(shift, z, s)",
        "factor * fmaf(shift, s, z)",
        "row_entropy_f32",
    ),
    Fault(
        "wrong stride: rows",
        "energy.cu",
        "energy_of(x + row * d, d, lane)",
        "energy_of(x + row * (d - 1), d, lane)",
        "token_energy_f32",
    ),
    Fault(
        "wrong stride: vectors of a tile",
        "warp.cuh",
        "from + k * LANES * V, values",
        "from + k * LANES, values",
        "token_energy_f32",
    ),
    Fault(
        "wrong stride: tokens of a warp",
        "ragged_entropy.cu",
        "LANES * warps) {",
        "LANES * (warps + 1)) {",
        "ragged_token_entropy_f32",
    ),
    Fault("unguarded tail: rows", "row_entropy.cu", "if (row >= n) return;", "", "row_entropy_f32"),
    Fault("unguarded tail: columns", "ragged_pool.cu", "if (start + k * SECTION + place < d) ", "", "ragged_mean_f32"),
    Fault("unguarded tail: rows of a tile", "pairwise.cu", "a_start + i + p < n && ", "", "pairwise_f32"),
    Fault(
        "unguarded head: rows that are not aligned",
        "warp.cuh",
        "min(d, (int)((-reinterpret_cast<size_t>(row) & 15) / sizeof(T)))",
        "0",
        "token_energy_f32",
    ),
    Fault(
        "shuffle: a step too few",
        "warp.cuh",
        "step > 0; step /= 2) x +=",
        "step > 1; step /= 2) x +=",
        "dissimilarity_f32",
    ),
    Fault("sums not rescaled", "row_entropy.cu", "z *= factor;", "", "row_entropy_f32"),
    Fault("NaN dropped", "row_entropy.cu", "max_or_nan(x[k] - m, FLOOR)", "fmaxf(x[k] - m, FLOOR)", "row_entropy_f32"),
)


def plant(fault: Fault, folder: Path) -> None:
    """Copies the sources into `folder`, with the fault, and for float32 alone, which compiles faster."""
    for path in [*host.KERNELS.glob("*.cu"), *host.KERNELS.glob("*.cuh")]:
        shutil.copy(path, folder)
    changed = folder / fault.file
    text = changed.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.about}: {fault.old!r} occurs {text.count(fault.old)} times in {fault.file}")
    changed.write_text(text.replace(fault.old, fault.new))
    shared = folder / "warp.cuh"
    shared.write_text(re.sub(r"ENTRY\(f16.*", "", shared.read_text()))


def ptx_of(source: str, folder: Path) -> str:
    """PTX of a kernel in `folder`, by nvcc, else by NVRTC. Raises BuildError."""
    build.HERE = folder
    try:
        out = folder / "faulty.ptx"
        build.compile_nvcc(source, out, "-ptx", "-arch=compute_110")
        return out.read_text()
    except build.BuildError:
        return build.compile_nvrtc(source, "compute_87").decode()
    finally:
        build.HERE = host.KERNELS


def interpreted(text: str, cases: Iterator[Case]) -> str:
    """What the interpreter finds first; empty for nothing."""
    for case in cases:
        memory = Memory()
        args: list[Any] = [memory.bind(a.array, a.shift) if isinstance(a, Buffer) else a for a in case.args]
        try:
            run(text, case.entry, case.grid, (case.block,), args, memory)
        except PtxError as error:
            return _word(str(error))
        if not case.error() <= TOLERANCE:
            return "values"
    return ""


def on_host(program: Path, cases: Iterator[Case]) -> str:
    """What a sanitizer or the comparison finds; empty for nothing."""
    try:
        host.check(program, cases, TOLERANCE, timeout_s=60)
    except host.Found as error:
        return _word(str(error))
    return ""


def _word(complaint: str) -> str:
    words = {"data race": "race", "another thread": "race", "at once": "race", "misaligned": "alignment"}
    words |= {"outside": "bounds", "heap-buffer-overflow": "bounds", "global-buffer-overflow": "bounds"}
    words |= {"use-after": "bounds", "SEGV": "bounds", "not all lanes": "divergence", "never reach": "divergence"}
    words |= {"barrier": "divergence", "for ever": "divergence", "index": "bounds", ": error ": "values"}
    return next((word for sign, word in words.items() if sign in complaint), "stopped")


def found(fault: Fault, executors: Sequence[str] = EXECUTORS) -> dict[str, str]:
    """Executor -> what it found."""
    source, cases = ENTRIES[fault.entry]
    words = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(fault, folder)
        for executor in executors:
            if executor == EXECUTORS[0]:
                words[executor] = interpreted(ptx_of(source, folder), cases())
                continue
            sanitizer = "thread" if executor == EXECUTORS[1] else "address"
            program = host.build({fault.entry: source}, sanitizer, folder / sanitizer, sources=folder)
            words[executor] = on_host(program, cases())
    return words


def row(fault: Fault) -> str:
    """The fault's line of the table. Without a watch on races, whether values go wrong is chance."""
    words = found(fault)
    if "race" in words.values():
        words[EXECUTORS[2]] = "by chance"
    return f"| {fault.about} | `{fault.entry}` | {' | '.join(words[e] or '-' for e in EXECUTORS)} |"


def text() -> str:
    """FAULTS.md."""
    head = ["# Planted faults, and which executor finds them", ""]
    head += ["Made by `python tests/kernels/faults.py`; `test_kernel_faults.py` checks it. - : not found.", ""]
    head += [f"| fault | kernel | {' | '.join(EXECUTORS)} |", "|---|---|" + "---|" * len(EXECUTORS)]
    return "\n".join([*head, *map(row, FAULTS)]) + "\n"


def table() -> dict[str, dict[str, str]]:
    """The committed table: fault -> executor -> word."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {about: dict(zip(EXECUTORS, words, strict=True)) for about, _, *words in lines[1:]}


if __name__ == "__main__":
    made = text()
    if "--check" not in sys.argv:
        TABLE.write_text(made)
    elif made != TABLE.read_text():
        sys.exit("FAULTS.md is stale: python tests/kernels/faults.py")
