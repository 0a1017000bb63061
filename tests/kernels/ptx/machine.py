"""Executes a parsed entry: all threads of the grid at once, those at the lowest instruction first.

Threads stop only at branches, barriers and shuffles, so the instructions between are executed for all threads that are
there together. Knows nothing of PTX's syntax.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx import decode
from ptx.memory import Memory, Traffic
from ptx.ops import DTYPES, OPS
from ptx.parser import (
    SIZES,
    Address,
    Immediate,
    Instruction,
    Operand,
    Pair,
    Program,
    PtxError,
    Register,
    Special,
    Symbol,
    parse,
)
from ptx.shared import Shared

Array = npt.NDArray[Any]
LANES = 32
MOST_THREADS = 1 << 15  # at once; larger grids are run in parts


@dataclass
class Counts:
    """instructions: executed, summed over threads, by opcode. issues: executed, summed over warps.

    reads, writes: traffic with the arrays of `Memory`, by address, since they were bound.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    issues: int = 0
    reads: dict[int, Traffic] = field(default_factory=dict)
    writes: dict[int, Traffic] = field(default_factory=dict)


def run(
    text: str,
    entry: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    memory: Memory,
    *,
    ulps: float = 0,
) -> Counts:
    """Launches `entry`. grid, block: up to three sizes. args: one integer or float per parameter.

    ulps: how far, at random, the results of `approx` instructions are off.
    Raises PtxError (see the package) and leaves memory as it was then.
    """
    program = parse(text, entry)
    grid3, block3 = (tuple(map(int, [*sizes, 1, 1][:3])) for sizes in (grid, block))
    threads = block3[0]
    if block3[1:] != (1, 1) or threads % LANES or not 0 < threads <= program.max_threads:
        limit = program.max_threads
        raise PtxError(f"{entry}: blocks of {block3} threads; it takes a multiple of {LANES} up to {limit}, in x")
    if min(grid3) < 1 or grid3[2] > 1:
        raise PtxError(f"{entry}: a grid of {grid3} blocks")
    values = decode.arguments(program, args)
    counts = Counts()
    blocks = grid3[0] * grid3[1]
    step = max(1, MOST_THREADS // threads)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, step):
            part = np.arange(first, min(first + step, blocks))
            Machine(program, part, grid3, threads, values, memory, ulps).run(counts)
    counts.reads, counts.writes = memory.traffic()
    return counts


class Machine:
    """Some blocks of one launch."""

    def __init__(
        self,
        program: Program,
        blocks: Array,
        grid: tuple[int, ...],
        threads: int,
        values: dict[str, np.generic],
        memory: Memory,
        ulps: float,
    ) -> None:
        self.program, self.memory, self.values, self.ulps = program, memory, values, ulps
        self.threads, self.count = threads, len(blocks) * threads
        self.block_of = np.repeat(np.arange(len(blocks)), threads)
        ids = np.repeat(blocks, threads).astype(np.uint32)
        zero, one = np.zeros(self.count, np.uint32), np.ones(self.count, np.uint32)
        self.special = {"tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(blocks)), "ntid.x": one * threads}
        self.special |= {"ctaid.x": ids % grid[0], "ctaid.y": ids // grid[0], "ctaid.z": zero}
        self.special |= {f"nctaid.{axis}": one * np.uint32(size) for axis, size in zip("xyz", grid, strict=True)}
        self.special |= {"tid.y": zero, "tid.z": zero, "ntid.y": one, "ntid.z": one}
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.shared = Shared(len(blocks), program.shared_bytes, threads)
        self.registers: dict[str, Array] = {}
        self.at = np.zeros(self.count, np.int64)
        self.alive = np.ones(self.count, bool)
        self.waiting = np.zeros(self.count, bool)
        self.random = np.random.default_rng(0)

    def run(self, counts: Counts) -> None:
        ends = decode.ends(self.program)
        while self.alive.any():
            runnable = self.alive & ~self.waiting
            if not runnable.any():
                self._release()
                continue
            first, self.active = self._next(runnable)
            self.__dict__.pop("lanes", None)
            self.full = bool(self.active.all())
            last = ends[first]
            self.at[self.active] = last + 1
            warps = int(self.active.reshape(-1, LANES).any(axis=1).sum())
            for instruction in self.program.instructions[first : last + 1]:
                counts.instructions[instruction.opcode] += int(self.lanes.size)
                counts.issues += warps
                try:
                    self._execute(instruction)
                except PtxError as error:
                    raise type(error)(f"{self.program.name}: {error}, in {instruction.text!r}") from None
            if (self.alive & (self.at >= len(self.program.instructions))).any():
                raise PtxError(f"{self.program.name}: runs past its end")

    @cached_property
    def lanes(self) -> Array:
        """Indices of the threads that execute now."""
        return np.flatnonzero(self.active)

    def _next(self, runnable: Array) -> tuple[int, Array]:
        """The lowest instruction at which threads can go on, and those threads."""
        for place in np.unique(self.at[runnable]).tolist():
            here = runnable & (self.at == place)
            instruction = self.program.instructions[place]
            if instruction.opcode.startswith(decode.AMONG_LANES):
                here = np.repeat(here.reshape(-1, LANES).all(axis=1), LANES)
            if here.any():
                return place, here
        raise PtxError(f"{self.program.name}: not all lanes of a warp reach {instruction.text!r}")

    def _uniform(self, operand: Operand, value: int) -> bool:
        """Whether every active lane holds this value."""
        return bool((np.broadcast_to(self._read(operand, "u32"), self.count)[self.active] == value).all())

    def _release(self) -> None:
        """Lets the blocks go on whose threads all wait at the same barrier."""
        waiting = self.waiting.reshape(-1, self.threads)
        places = self.at.reshape(-1, self.threads)
        stuck = waiting.any(axis=1) & ~(waiting.all(axis=1) & (places == places[:, :1]).all(axis=1))
        if stuck.any():
            raise PtxError(f"{self.program.name}: threads wait at a barrier that others of their block never reach")
        self.shared.new_epoch(waiting.all(axis=1))
        self.waiting[:] = False

    def _execute(self, instruction: Instruction) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if instruction.guard is None:
            return self._apply(opcode, operands)
        if opcode not in decode.BRANCHES:
            whole, full = self.active, self.full
            self._only(whole & (self._read(instruction.guard, "pred") ^ instruction.negated))
            self._apply(opcode, operands)
            self.active, self.full = whole, full
            self.__dict__.pop("lanes", None)
            return None
        taken = self.active & (self._read(instruction.guard, "pred") ^ instruction.negated)
        return self._branch(opcode, operands, taken)

    def _only(self, active: Array) -> None:
        self.active, self.full = active, bool(active.all())
        self.__dict__.pop("lanes", None)

    def _apply(self, opcode: str, operands: tuple[Operand, ...]) -> None:
        if opcode in decode.BRANCHES:
            self._branch(opcode, operands, self.active)
        elif opcode == "bar.sync" and operands == (Immediate("0"),):
            self.waiting |= self.active
        elif opcode.startswith("shfl.sync."):
            self._shuffle(opcode, *operands)
        elif opcode.startswith("redux.sync."):
            self._reduce(opcode, *operands)
        elif opcode == "mov.b32" and tuple in map(type, operands):
            self._pack(*operands)
        elif operation := OPS.get(opcode):
            to, kinds, function = operation
            if len(operands) != len(kinds) + 1:
                raise PtxError("another number of operands than known")
            low = opcode.startswith("cvt.")  # takes the low bits of a wider register
            result = function(*(self._read(o, kind, low) for o, kind in zip(operands[1:], kinds, strict=True)))
            if ".approx" in opcode and self.ulps:
                scale = np.maximum(np.abs(result), 1) if opcode.startswith("lg2") else result
                error = self.random.uniform(-self.ulps, self.ulps, np.shape(result)) * 2.0**-23
                result = (result + scale * error).astype(np.float32)
            self._write(operands[0], result, to)
        elif move := _MOVES.get(opcode):
            move(self, *operands)
        else:
            raise PtxError(f"unknown instruction {opcode}")

    def _branch(self, opcode: str, operands: tuple[Operand, ...], taken: Array) -> None:
        if opcode in ("ret", "exit"):
            self.alive &= ~taken
            return
        (target,) = operands
        if not isinstance(target, Symbol) or target.name not in self.program.labels:
            raise PtxError("branch to an unknown label")
        self.at[taken] = self.program.labels[target.name]

    def _shuffle(self, opcode: str, to: Operand, value: Operand, by: Operand, clamp: Operand, mask: Operand) -> None:
        if opcode != "shfl.sync.bfly.b32" or not self._uniform(clamp, LANES - 1):
            raise PtxError(f"unknown instruction {opcode}")
        if not self._uniform(mask, 0xFFFFFFFF):
            raise PtxError("a shuffle among fewer lanes than 32 is not known")
        values, thread = self._read(value, "b32"), np.arange(self.count)
        source = thread ^ (np.broadcast_to(self._read(by, "u32"), self.count).astype(np.int64) % LANES)
        if isinstance(to, Pair):
            self._write(to.valid, np.True_, "pred")  # a partner in 0..31 is always there
            to = to.value
        self._write(to, np.broadcast_to(values, self.count)[source], "b32")

    def _reduce(self, opcode: str, to: Operand, value: Operand, mask: Operand) -> None:
        if opcode != "redux.sync.max.s32" or not self._uniform(mask, 0xFFFFFFFF):
            raise PtxError(f"unknown instruction {opcode}, or among fewer lanes than 32")
        values = np.broadcast_to(self._read(value, "s32"), self.count).reshape(-1, LANES)
        self._write(to, np.repeat(values.max(axis=1), LANES), "s32")

    def _pack(self, to: Operand, value: Operand) -> None:
        """mov.b32 {low, high}, r  and  mov.b32 r, {low, high}."""
        if type(to) is tuple and len(to) == 2:
            word = self._read(value, "b32")
            self._write(to[0], word.astype(np.uint16), "b16")
            self._write(to[1], (word >> np.uint32(16)).astype(np.uint16), "b16")
        elif type(value) is tuple and len(value) == 2:
            low, high = (self._read(half, "b16").astype(np.uint32) for half in value)
            self._write(to, low | high << np.uint32(16), "b32")
        else:
            raise PtxError("unknown form of mov")

    def _addresses(self, operand: Operand) -> Array:
        """Of the active lanes."""
        if not isinstance(operand, Address):
            raise PtxError("an address is missing")
        if isinstance(operand.base, Register):
            kind = "u64" if SIZES[self.program.registers[operand.base.name]] == 8 else "u32"
            base = self._read(operand.base, kind)[self.lanes].astype(np.int64)
        elif operand.base in self.program.shared:
            base = np.full(self.lanes.size, self.program.shared[operand.base], np.int64)
        else:
            raise PtxError(f"unknown symbol {operand.base}")
        return base + operand.offset

    def load(self, space: str, kind: str, count: int, to: Operand, address: Operand) -> None:
        if space == "param":
            if not isinstance(address, Address) or address.base not in self.values or address.offset:
                raise PtxError("unknown parameter")
            self._write(to, *self._widened(to, self.values[address.base].astype(DTYPES[kind]), kind))
            return
        if not self.lanes.size:
            return
        where, dtype = self._addresses(address), DTYPES[kind]
        if space == "shared":
            values = self.shared.load(self.block_of[self.lanes], self._thread(), where, dtype, count)
        else:
            values = self.memory.load(where, dtype, count)
        for register, column in zip(decode.registers(to, count), values.T, strict=True):
            whole = np.zeros(self.count, dtype)
            whole[self.lanes] = column
            self._write(register, *self._widened(register, whole, kind))

    def _widened(self, register: Operand, value: Any, kind: str) -> tuple[Any, str]:
        """A loaded integer, extended to its register."""
        declared = self.program.registers[register.name] if isinstance(register, Register) else "pred"
        if kind[0] not in "us" or declared == "pred" or SIZES[declared] <= SIZES[kind]:
            return value, kind
        wide = f"{kind[0]}{8 * SIZES[declared]}"
        return value.astype(DTYPES[wide]), wide

    def store(self, space: str, kind: str, count: int, address: Operand, value: Operand) -> None:
        if not self.lanes.size:
            return
        columns = [np.broadcast_to(self._read(r, kind), self.count)[self.lanes] for r in decode.registers(value, count)]
        where, values = self._addresses(address), np.stack(columns, axis=1)
        if space == "shared":
            self.shared.store(self.block_of[self.lanes], self._thread(), where, values)
        else:
            self.memory.store(where, values)

    def _thread(self) -> Array:
        return self.lanes % self.threads

    def _read(self, operand: Operand, kind: str, low: bool = False) -> Any:
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            if operand.name not in self.registers:
                raise PtxError(f"{operand.name} is read before it is written")
            register = self.registers[operand.name]
            if low and register.dtype.itemsize > dtype.itemsize:
                register = register.astype(f"u{dtype.itemsize}")
            if register.dtype.itemsize != dtype.itemsize or (register.dtype == np.bool_) != (dtype == np.bool_):
                raise PtxError(f"{operand.name} is no register for {kind}")
            return register.view(dtype)
        if isinstance(operand, Special) and dtype.itemsize == 4:
            return self.special[operand.name].view(dtype)
        if isinstance(operand, Immediate):
            return decode.immediate(operand.text, dtype)
        if isinstance(operand, Symbol) and operand.name in self.program.shared:
            return dtype.type(self.program.shared[operand.name])
        raise PtxError(f"unknown operand {operand}")

    def _write(self, operand: Operand, value: Any, kind: str) -> None:
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write to {operand}")
        declared = self.program.registers[operand.name]
        raw = np.dtype(np.bool_ if declared == "pred" else f"u{SIZES[declared]}")
        value = np.asarray(value, DTYPES[kind])
        if value.dtype.itemsize != raw.itemsize or (kind == "pred") != (declared == "pred"):
            raise PtxError(f"{operand.name} is no register for {kind}")
        register = self.registers.get(operand.name)
        if register is None:
            register = self.registers[operand.name] = np.full(self.count, -1).astype(raw)
        np.copyto(register, value.view(raw), where=True if self.full else self.active)


def _moves() -> dict[str, Callable[..., None]]:
    """Loads and stores by full name."""

    def load(space: str, kind: str, count: int) -> Callable[..., None]:
        return lambda machine, *operands: machine.load(space, kind, count, *operands)

    def store(space: str, kind: str, count: int) -> Callable[..., None]:
        return lambda machine, *operands: machine.store(space, kind, count, *operands)

    moves = {}
    for kind in ("u16", "u32", "s32", "u64", "s64", "f32", "b16", "b32", "b64"):
        moves[f"ld.param.{kind}"] = load("param", kind, 1)
        for vector, count in (("", 1), ("v2.", 2), ("v4.", 4)):
            moves[f"ld.global.{vector}{kind}"] = moves[f"ld.global.nc.{vector}{kind}"] = load("global", kind, count)
            moves[f"ld.shared.{vector}{kind}"] = load("shared", kind, count)
            moves[f"st.global.{vector}{kind}"] = store("global", kind, count)
            moves[f"st.shared.{vector}{kind}"] = store("shared", kind, count)
    return moves


_MOVES = _moves()
