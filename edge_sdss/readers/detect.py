"""Tells from the content how a file is cut into records and which format they are of.

Knows the formats only by their files in `formats/`; a file's extension is never looked at.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal, Protocol, cast

from edge_sdss.readers import formats, records
from edge_sdss.readers.records import Raw, Record, RecordError
from edge_sdss.types import Dialogue

Shape = Literal["json lines", "json array", "json object", "json values", "text lines", "table", "unknown"]
Container = Literal["json", "lines", "table"]

FORMATS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(formats.__path__)))
DELIMITERS = ("\t", ",", ";")
_LOOK_LINES = 64
_LOOK_BYTES = 1 << 20
_HOLDS_OBJECT = re.compile(rb'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')


class Format(Protocol):
    """What a file in `formats/` provides.

    `matches` sees one value (a JSON object, a row's cells by column, or a line) and judges its shape.
    `outcomes` gives for every record at least one pair: a dialogue, a problem, or None for skipped.
    """

    container: Container

    def matches(self, value: object) -> bool:
        """Whether a value has the shape of this format's records."""
        ...

    def outcomes(
        self, source: Iterable[Record], context_turns: int
    ) -> Iterator[tuple[Record, Dialogue | RecordError | None]]:
        """Yields what became of each record."""
        ...


def load(name: str) -> Format:
    """Returns the format of that name, one of FORMATS."""
    return cast(Format, importlib.import_module(f"{formats.__name__}.{name}"))


def match(value: object, container: Container) -> str | None:
    """Returns the first format that such a value is of, or None."""
    candidates = ((name, load(name)) for name in FORMATS)
    return next((name for name, each in candidates if each.container == container and each.matches(value)), None)


def container_of(shape: Shape) -> Container:
    """Returns which kind of format a shape can hold."""
    return "table" if shape == "table" else "lines" if shape == "text lines" else "json"


def shape(pieces: Iterator[bytes], limit: int) -> tuple[Shape, str, Iterator[bytes]]:
    """Looks at the first lines, only as far as needed. Returns the shape, a table's delimiter, the stream."""
    seen: list[bytes] = []

    def watched() -> Iterator[bytes]:
        looked = 0
        for piece in pieces:
            seen.append(piece)
            yield piece
            if (looked := looked + len(piece)) > limit + _LOOK_BYTES:
                return

    found, delimiter = _look(records.lines(watched(), limit), seen)
    return found, delimiter, chain(seen, pieces)


def header(text: str) -> str | None:
    """Returns the delimiter under which a line is the header of a known table, or None."""
    for delimiter in DELIMITERS:
        try:
            columns = records.cells(text, delimiter)
        except RecordError:
            continue
        if len(columns) > 1 and match(dict.fromkeys(map(column, columns), ""), "table"):
            return delimiter
    return None


def column(name: str) -> str:
    """Returns a column's name as formats know it: lower case, underscores for spaces."""
    return "_".join(name.lower().split())


def _look(lines: Iterator[Raw], seen: list[bytes]) -> tuple[Shape, str]:
    looked: list[Raw] = []
    for raw in lines:
        data = raw.data.strip()
        if not data:
            continue
        looked.append(raw)
        if data.startswith(b"[") and len(looked) == 1 and not _is_json(data, list):
            return "json array", ""
        if raw.data.startswith(b"{") and not raw.problem and _is_json(data, dict):
            return "json lines", ""
        if not raw.problem and not data.startswith((b"{", b"[")) and (found := _text_shape(raw, len(looked) == 1)):
            return found
        if len(looked) == _LOOK_LINES:
            break
    first = looked[0].data.strip() if looked else b""
    if first.startswith(b"["):
        return "json array", ""
    if not first.startswith(b"{"):
        return "unknown", ""
    if _HOLDS_OBJECT.match(b"".join(seen)[: records.PIECE_BYTES]):
        return "json object", ""
    return ("json lines" if all(raw.data.startswith(b"{") for raw in looked) else "json values"), ""


def _text_shape(raw: Raw, is_first: bool) -> tuple[Shape, str] | None:
    try:
        text = records.decode(raw)
    except RecordError:
        return None
    if match(text, "lines"):
        return "text lines", ""
    delimiter = header(text) if is_first else None
    return ("table", delimiter) if delimiter else None


def _is_json(data: bytes, kind: type) -> bool:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, kind) and bool(value)
