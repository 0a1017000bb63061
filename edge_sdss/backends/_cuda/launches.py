"""The host's half of the kernels' ABI: of each entry its source file, its arguments and its grid.

`kernels/README.md` is the other half. Knows nothing of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLOCK = 256
PAIRWISE_BLOCK = 128
WARPS = BLOCK // 32
_TILE = 32  # rows of each side, of a block of pairwise
_SECTION_BYTES = 128  # of each row, what a block of ragged_mean takes
_COLUMN_BLOCKS = 64  # of centered_energy for each dialogue: enough rows at once to fill a Jetson's GPU

Type = Literal["f32", "f16", "bf16"]
ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Entry:
    """A kernel. `arguments`: P a device address, q a 64-bit and i a 32-bit integer, in the order of the source."""

    file: str
    arguments: str


ENTRIES = {
    "token_energy": Entry("energy.cu", "PPqi"),
    "centered_energy": Entry("energy.cu", "PPPPi"),
    "ragged_entropy": Entry("ragged_entropy.cu", "PPPi"),
    "ragged_mean": Entry("ragged_pool.cu", "PPPi"),
    "ragged_last": Entry("ragged_pool.cu", "PPPi"),
    "normalise": Entry("ragged_pool.cu", "PPqi"),
    "row_entropy": Entry("row_entropy.cu", "PPqi"),
    "dissimilarity": Entry("dissimilarity.cu", "PPPPii"),
    "pairwise": Entry("pairwise.cu", "PPPiii"),
}
FILES = tuple(sorted({entry.file for entry in ENTRIES.values()}))


def warp_per_row(rows: int) -> tuple[int, int]:
    """Grid of the kernels that give each row a warp."""
    return -(-rows // WARPS), 1


def block_per_dialogue(dialogues: int) -> tuple[int, int]:
    """Grid of the kernels that give each dialogue a block."""
    return dialogues, 1


def columns(dialogues: int, width: int, item_bytes: int) -> tuple[int, int]:
    """Grid of ragged_mean: a block for each dialogue and 128 bytes of a row."""
    return dialogues, -(-width * item_bytes // _SECTION_BYTES)


def shared_rows(dialogues: int, longest: int) -> tuple[int, int]:
    """Grid of the kernels whose blocks share the rows, or the values of a row, of one dialogue."""
    return dialogues, min(max(-(-longest // WARPS), 1), _COLUMN_BLOCKS)


def tiles(n: int, m: int) -> tuple[int, int]:
    """Grid of pairwise: a block for each tile of the [n, m] result."""
    return -(-m // _TILE), -(-n // _TILE)
