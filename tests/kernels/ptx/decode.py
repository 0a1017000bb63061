"""Small steps between the parsed text and the machine: basic blocks, constants, arguments of a launch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx.ops import DTYPES
from ptx.parser import SIZES, Operand, Program, PtxError

AMONG_LANES = ("shfl.", "redux.")
BRANCHES = ("bra", "bra.uni", "ret", "exit")


def arguments(program: Program, args: Sequence[Any]) -> dict[str, np.generic]:
    """Parameter -> value, checked for number, kind and range."""
    if len(args) != len(program.parameters):
        raise PtxError(f"{program.name}: {len(args)} arguments, {len(program.parameters)} parameters")
    values = {}
    for (name, kind), value in zip(program.parameters.items(), args, strict=True):
        if kind.startswith("f") != isinstance(value, float | np.floating):
            raise PtxError(f"{program.name}: {value!r} for a parameter of type {kind}")
        if not kind.startswith("f") and not -(1 << 8 * SIZES[kind] - 1) <= int(value) < 1 << 8 * SIZES[kind]:
            raise PtxError(f"{program.name}: {value!r} does not fit {kind}")
        raw = struct.pack("<f", value) if kind == "f32" else (int(value) % (1 << 8 * SIZES[kind])).to_bytes(8, "little")
        values[name] = np.frombuffer(raw, DTYPES[kind], 1)[0]
    return values


def immediate(text: str, dtype: np.dtype[Any]) -> Any:
    if text[:2] in ("0f", "0F"):
        if dtype.itemsize != 4:
            raise PtxError(f"{text} as {dtype}")
        return np.frombuffer(int(text[2:], 16).to_bytes(4, "little"), dtype)[0]
    if dtype == np.bool_:
        return np.bool_(int(text, 0) != 0)
    value = int(text, 0)
    if dtype.kind == "f" or not -(1 << 8 * dtype.itemsize - 1) <= value < 1 << 8 * dtype.itemsize:
        raise PtxError(f"{text} as {dtype}")
    return np.frombuffer((value % (1 << 8 * dtype.itemsize)).to_bytes(8, "little"), dtype, 1)[0]


def registers(operand: Operand, count: int) -> tuple[Operand, ...]:
    registers = operand if type(operand) is tuple else (operand,)
    if len(registers) != count:
        raise PtxError("another number of registers than the vector has")
    return registers


def ends(program: Program) -> dict[int, int]:
    """First instruction of each basic block -> its last."""
    starts, size = {0, *program.labels.values()}, len(program.instructions)
    for number, instruction in enumerate(program.instructions):
        if instruction.opcode in BRANCHES or instruction.opcode.startswith("bar."):
            starts.add(number + 1)
        if instruction.opcode.startswith(AMONG_LANES):
            starts |= {number, number + 1}
    ordered = sorted(start for start in starts if start < size)
    return {a: b - 1 for a, b in zip(ordered, [*ordered[1:], size], strict=True)}
