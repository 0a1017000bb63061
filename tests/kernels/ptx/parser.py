"""PTX text of one entry -> instructions in basic blocks. What it does not know, it refuses.

Knows the form of PTX (directives, scopes, labels, operands), nothing of what an instruction does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple


class PtxError(Exception):
    """Stops an interpretation."""


class Register(NamedTuple):
    name: str


class Special(NamedTuple):
    name: str  # tid.x


class Immediate(NamedTuple):
    text: str


class Address(NamedTuple):
    base: Register | str  # str: a parameter or a shared variable
    offset: int


class Symbol(NamedTuple):
    name: str  # a label or a shared variable


class Pair(NamedTuple):
    value: Register  # of a shuffle
    valid: Register


Operand = Register | Special | Immediate | Address | Symbol | Pair | tuple


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld.global.nc.v4.f32"
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False
    text: str = ""


@dataclass
class Program:
    name: str
    target: str
    parameters: dict[str, str]  # name -> type
    max_threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: dict[str, int] = field(default_factory=dict)  # name -> address
    shared_bytes: int = 0


SIZES = {"b8": 1, "u8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
SIZES |= {"s64": 8, "f64": 8, "f16": 2}
_SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
_MODULE = re.compile(r"\s*(\.version\s+[\d.]+|\.target\s+(?P<target>sm_\w+)|\.address_size\s+64)")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_PARAMETER = re.compile(r"\.param\s+\.([a-z]\d+)(?:\s+\.ptr[^,]*?)?\s+(\w+)$")


def entries(text: str) -> list[str]:
    """Names of the entries of a module."""
    return [match[1] for match in _ENTRY.finditer(_clean(text))]


def parameters(text: str, entry: str) -> list[str]:
    """PTX types of an entry's parameters."""
    return list(parse(text, entry).parameters.values())


@lru_cache(maxsize=128)
def parse(text: str, entry: str) -> Program:
    """Raises PtxError where the entry is missing or the text holds something unknown."""
    clean = _clean(text)
    target, program, position, shared = "", None, 0, []
    while rest := clean[position:].strip():
        position = len(clean) - len(clean[position:].lstrip())
        if match := _MODULE.match(clean, position):
            target = match["target"] or target
            position = match.end()
        elif match := _SHARED.match(clean, position):
            shared.append(match)
            position = match.end() + 1
        elif match := _ENTRY.match(clean, position):
            end = _closing(clean, match.end())
            if match[1] == entry:
                program = _header(match, target)
                for declared in shared:
                    _share(program, declared)
                _body(program, clean[match.end() : end])
            position = end + 1
        else:
            raise PtxError(f"unknown at module level: {rest.splitlines()[0]!r}")
    if program is None:
        raise PtxError(f"no entry {entry!r}")
    return program


def _clean(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text.split("\0", 1)[0], flags=re.S)


def _closing(text: str, position: int) -> int:
    """Where the brace that is open at `position` closes."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a brace is not closed")


def _header(match: re.Match[str], target: str) -> Program:
    kinds = {}
    for declared in filter(None, map(str.strip, match[2].split(","))):
        if not (parts := _PARAMETER.match(declared)):
            raise PtxError(f"unknown parameter: {declared!r}")
        kinds[parts[2]] = parts[1]
    directives = match[3].strip()
    limit = re.fullmatch(r"(?:\.maxntid\s+(\d+)(?:, 1, 1)?)?(?:\s*\.minnctapersm \d+)?", directives)
    if limit is None:
        raise PtxError(f"unknown directive of an entry: {directives!r}")
    return Program(match[1], target, kinds, int(limit[1] or 1024))


class _Scope(dict[str, str]):
    """Names as written -> unique names, through enclosing scopes."""

    def __init__(self, outer: _Scope | None, number: int) -> None:
        super().__init__(outer or {})
        self.outer, self.number = outer, number

    def declare(self, name: str) -> str:
        self[name] = f"{name}@{self.number}" if self.number else name
        return self[name]


def _body(program: Program, body: str) -> None:
    scope, scopes, position = _Scope(None, 0), 0, 0
    statement = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):|(?P<text>[^;]+);)")
    while body[position:].strip():
        match = statement.match(body, position)
        if match is None:
            raise PtxError(f"unknown: {body[position:].strip()[:60]!r}")
        position = match.end()
        if match["brace"] == "{":
            scopes += 1
            scope = _Scope(scope, scopes)
        elif match["brace"]:
            if scope.outer is None:
                raise PtxError("a brace too many")
            scope = scope.outer
        elif match["label"]:
            program.labels[match["label"]] = len(program.instructions)
        elif match["text"].startswith("."):
            _directive(program, scope, match["text"])
        else:
            program.instructions.append(_instruction(program, scope, match["text"]))


def _directive(program: Program, scope: _Scope, text: str) -> None:
    if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", text, re.S):
        kind, names = match[1], match[2]
        for name in map(str.strip, names.split(",")):
            if several := re.fullmatch(r"(%\w+)<(\d+)>", name):
                for number in range(int(several[2])):
                    program.registers[scope.declare(f"{several[1]}{number}")] = kind
            else:
                program.registers[scope.declare(name)] = kind
    elif match := _SHARED.fullmatch(text):
        _share(program, match)
    elif not re.fullmatch(r'\.pragma\s+"nounroll"', text):
        raise PtxError(f"unknown directive: {text!r}")


def _share(program: Program, match: re.Match[str]) -> None:
    """Gives a shared variable its address."""
    align, size = int(match[1]), SIZES[match[2]] * int(match[4] or 1)
    start = -(-program.shared_bytes // align) * align
    program.shared[match[3]] = start
    program.shared_bytes = start + size


def _instruction(program: Program, scope: _Scope, text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-zA-Z][\w.:]*)\s*(.*)", text, re.S)
    if match is None:
        raise PtxError(f"unknown: {text!r}")
    operands = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s][^,]*", match[4])
    guard = _operand(program, scope, match[2]) if match[2] else None
    if guard is not None and not isinstance(guard, Register):
        raise PtxError(f"unknown guard: {text!r}")
    parsed = tuple(_operand(program, scope, operand.strip()) for operand in operands)
    return Instruction(match[3], parsed, guard, bool(match[1]), text)


def _operand(program: Program, scope: _Scope, text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(program, scope, part.strip()) for part in text[1:-1].split(","))
    if text.startswith("["):
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", text)
        if match is None:
            raise PtxError(f"unknown address: {text!r}")
        base = Register(scope[match[1]]) if match[1] in scope else match[1]
        return Address(base, int(match[2] or 0))
    if text in scope:
        return Register(scope[text])
    if all(part in scope for part in text.split("|")):
        value, valid = text.split("|")
        return Pair(Register(scope[value]), Register(scope[valid]))
    if text in _SPECIAL:
        return Special(text[1:])
    if re.fullmatch(r"-?\d+|0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|0x[0-9A-Fa-f]+", text):
        return Immediate(text)
    if re.fullmatch(r"[$\w]+", text):
        return Symbol(text)
    raise PtxError(f"unknown operand: {text!r}")
