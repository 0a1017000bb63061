"""Boards: what a device has and what its power modes allow. One TOML each; a file's name is its key.

Every figure names its source, and whether the source itself, or only a copy of it or nothing, was read.
What is not known is absent. Knows nothing of what is measured or planned on a board.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_sdss.files import read_named
from edge_sdss.tree import Tree

_FOLDER = Path(__file__).parent


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Match(_Record):
    """How a board is told from others. Texts match as parts of what the device tree says, in any case."""

    compatible: tuple[str, ...] = Field(default=(), description="parts of the device tree's `compatible`")
    models: tuple[str, ...] = Field(default=(), description="parts of the device tree's `model`")
    cpu_vendors: tuple[str, ...] = Field(default=(), description="`vendor_id` in /proc/cpuinfo, without a device tree")
    memory_bytes: tuple[int, int] | None = Field(default=None, description="least and greatest MemTotal")


class Cpu(_Record):
    """The processor: all cores and the greatest clock of any of them."""

    name: str
    cores: int = Field(ge=1)
    max_hz: int | None = Field(default=None, gt=0)


class Gpu(_Record):
    """The graphics processor; `fp16_flops` is dense, with tensor cores where there are any."""

    name: str
    cores: int | None = Field(default=None, ge=1, description="CUDA cores, or the vendor's")
    multiprocessors: int | None = Field(default=None, ge=1)
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    max_hz: int | None = Field(default=None, gt=0)
    fp16_flops: float | None = Field(default=None, gt=0, description="peak, multiply-adds counted as two, 1/s")


class PowerMode(_Record):
    """One mode of nvpmodel. None: the mode sets no limit; the board's greatest clock holds."""

    name: str
    id: int = Field(ge=0, description="for `nvpmodel -m`; differs between images with and without Super")
    watts: float | None = Field(default=None, gt=0, description="the budget that its name states")
    cores: int | None = Field(default=None, ge=1, description="processor cores that are on")
    cpu_max_hz: int | None = Field(default=None, gt=0)
    gpu_max_hz: int | None = Field(default=None, gt=0)
    emc_max_hz: int | None = Field(default=None, gt=0, description="clock of the memory controller")
    super: bool = Field(default=False, description="only in images with Super clocks, JetPack 6.2 and later")
    default: bool = False


class Document(_Record):
    """What a figure comes from; `read_at` is the copy that was read, where it was not the original."""

    title: str
    url: str
    read_at: str | None = None


class Source(_Record):
    """Where in the documents a figure stands. Not verified: known from the document, but not read there."""

    document: str
    verified: bool
    note: str = ""


class Board(_Record):
    """One device. `memory_bytes` is what is installed, `usable_bytes` the limit of what stands for it."""

    name: str
    about: str
    match: Match = Match()
    memory_bytes: int | None = Field(default=None, gt=0, description="None: that of the host")
    usable_bytes: int | None = Field(default=None, gt=0, description="MemTotal, after firmware and carve-outs")
    usable_note: str = ""
    memory_bandwidth_bytes_per_s: int | None = Field(default=None, gt=0, description="theoretical peak")
    cpu: Cpu | None = None
    gpu: Gpu | None = None
    npu: str | None = None
    storage: str = ""
    power_modes: tuple[PowerMode, ...] = ()
    source: dict[str, Source] = Field(default_factory=dict, description="by field; `cpu` covers `cpu.cores` too")
    documents: dict[str, Document] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sources_exist(self) -> Board:
        unknown = {source.document for source in self.source.values()} - self.documents.keys()
        if unknown:
            raise ValueError(f"the source {sorted(unknown)[0]!r} is not among the documents")
        return self

    def source_of(self, field: str) -> Source | None:
        """Returns the source of a field such as `gpu.max_hz`, or of what holds it; None where none is given."""
        parts = field.split(".")
        keys = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        return next((self.source[key] for key in keys if key in self.source), None)


def names() -> tuple[str, ...]:
    """Every board there is, by file."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


def load(name: str) -> Board:
    """Returns a board by name, or one of the user's own by the path of its TOML file.

    Raises InputError for an unknown name and for a file that is no board.
    """
    return read_named(name, _FOLDER, Board, "board", "docs/boards.md")


def match(tree: Tree) -> Board | None:
    """Returns the board that a device tree and the memory fit best; None where none does.

    `compatible` names the module, so it counts more than `model`, even where the kernel was given less memory
    than there is. A longer text counts more than a shorter one: the name of a module with Super clocks holds
    that of the module without.
    """
    compatible = (tree.maybe("proc/device-tree/compatible") or "").replace("\0", " ").lower()
    model = (tree.maybe("proc/device-tree/model") or "").lower()
    vendor = "" if compatible or model else _cpuinfo(tree, "vendor_id")
    memory = _memory_bytes(tree)

    def rank(board: Board) -> tuple[int, bool, int]:
        wanted = board.match
        least, most = wanted.memory_bytes or (0, memory or 0)
        fits, possible = not memory or least <= memory <= most, not memory or memory <= most
        module = max((len(part) for part in wanted.compatible if part.lower() in compatible), default=0)
        name = max((len(part) for part in wanted.models if part.lower() in model), default=0)
        name = max(name, int(bool(vendor) and vendor in wanted.cpu_vendors))
        return module if possible else 0, fits and bool(module or name), name if fits else 0

    best = max((_known(name) for name in names()), key=rank)
    return best if any(rank(best)) else None


@cache
def _known(name: str) -> Board:
    return load(name)


def _memory_bytes(tree: Tree) -> int | None:
    for line in (tree.maybe("proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:") and line.split()[1:2] and line.split()[1].isdigit():
            return int(line.split()[1]) * 1024
    return None


def _cpuinfo(tree: Tree, key: str) -> str:
    for line in (tree.maybe("proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
