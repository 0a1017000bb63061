"""Cuts a byte stream into records: lines, JSON elements, table rows. Knows nothing of dialogues.

Memory is bounded by `limit` bytes for one record, however long the line, the document or the field.
Whatever cannot be a record comes out as a `Raw` with a problem, in its place in the stream.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from edge_sdss.errors import InputError, message

PIECE_BYTES = 1 << 16
SHOWN_BYTES = 8000
_CONTROL = bytes(sorted({*range(32), 127} - set(b"\t\n\r\f")))
_AHEAD = 4
_STRUCTURE = re.compile(rb'\\.?|["\[\]{},]', re.DOTALL)


class RecordError(Exception):
    """Why a record, or a part of one, cannot be used. Raised or yielded; becomes a `Reject`."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A record as it stands in the file; `data` is only its beginning where it is over the limit."""

    number: int
    data: bytes
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A decoded record: its text, and the JSON object, the cells by column or the line in it."""

    number: int
    source: str
    text: str
    value: Any


def pieces(stream: BinaryIO, asked: str) -> Iterator[bytes]:
    """Yields the stream in pieces that end at a line's end or after 64 KiB, without a byte order mark.

    Raises InputError for an empty stream, UTF-16 and UTF-32; `asked` opens the message.
    """
    piece = stream.readline(PIECE_BYTES)
    if piece.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(message(asked, "it is UTF-16 or UTF-32 text", "save it as UTF-8"))
    piece = piece.removeprefix(b"\xef\xbb\xbf")
    blank = True
    while piece:
        blank = blank and not piece.strip()
        yield piece
        piece = stream.readline(PIECE_BYTES)
    if blank:
        raise InputError(message(asked, "it is empty", "give a file with at least one dialogue"))


def is_binary(data: bytes) -> bool:
    """Whether more than one byte in 20 is a control character that text does not have."""
    return len(data) - len(data.translate(None, _CONTROL)) > len(data) / 20


def lines(stream: Iterable[bytes], limit: int) -> Iterator[Raw]:
    """Yields every line with its number from 1, blank ones too, line ends kept."""
    number, size = 1, 0
    kept: list[bytes] = []
    for piece in stream:
        if size <= limit:
            kept.append(piece)
        size += len(piece)
        if piece.endswith(b"\n"):
            yield _raw(number, b"".join(kept), size, limit)
            number, size, kept = number + 1, 0, []
    if size:
        yield _raw(number, b"".join(kept), size, limit)


def elements(stream: Iterable[bytes], limit: int, level: Literal[0, 1]) -> Iterator[Raw]:
    """Yields the JSON values at the top of a document (level 0) or inside its one container (level 1).

    Brackets and quotes alone decide where a value ends, so a bad one does not take the next with it.
    A document that breaks off yields what was complete, then one `Raw` with a problem.
    """
    number, depth, size = 1, 0, 0
    quoted = escaped = False
    kept: list[bytes] = []

    def cut(part: bytes) -> Raw:
        nonlocal number, size, kept
        raw = _raw(number, b"".join([*kept, part]).strip(), size + len(part), limit)
        number, size, kept = number + 1, 0, []
        return raw

    for piece in stream:
        start, last = 0, b""
        for match in _STRUCTURE.finditer(piece, 1 if escaped else 0):
            last = match.group()
            if last == b'"':
                quoted = not quoted
            elif quoted or last[:1] == b"\\":
                continue
            elif last in b"[{":
                depth += 1
                if depth == level == 1:
                    start = match.end()
            elif last in b"]}":
                depth -= 1
                if depth == 0 and (level == 0 or kept or piece[start : match.start()].strip()):
                    yield cut(piece[start : match.end() - level])
                if depth <= 0:
                    depth, start = 0, match.end() if depth == 0 else start
            elif depth == level == 1:
                yield cut(piece[start : match.start()])
                start = match.end()
        escaped = last == b"\\" and piece.endswith(b"\\")
        rest = piece[start:]
        if size <= limit and (kept or rest.strip()):
            kept.append(rest)
        size += len(rest) if kept else 0
    if depth:
        if depth == level and b"".join(kept).rstrip().endswith((b"}", b"]")):
            yield cut(b"")
        yield Raw(number, b"".join(kept)[:SHOWN_BYTES], "the document breaks off here")
    elif kept:
        yield Raw(number, b"".join(kept)[:SHOWN_BYTES], "text after the end of the document")


def rows(stream: Iterable[bytes], limit: int, delimiter: str) -> Iterator[Raw]:
    """Yields the rows of a table, quoted line breaks included; a row's number is that of its first line.

    Where a quote is never closed, or its row then has not as many cells as the header, only its line is
    a problem: reading goes on with the next one. `budget` keeps the looking ahead for a closing quote
    in proportion to what has been read.
    """
    source, again = lines(stream, limit), list[Raw]()
    mark, width, budget = delimiter.encode(), 0, _AHEAD * limit
    while (first := again.pop() if again else next(source, None)) is not None:
        group, size = [first], len(first.data)
        is_open = _open(first.data, mark, False) and not first.problem
        while is_open and size <= min(limit, budget) and (line := again.pop() if again else next(source, None)):
            group.append(line)
            size += len(line.data)
            is_open = _open(line.data, mark, True)
        problem = next((line.problem for line in group if line.problem), None)
        row = _raw(first.number, b"".join(line.data for line in group), size, limit, problem)
        found = 0 if is_open or row.problem else _width(row, delimiter)
        budget = min(_AHEAD * limit, budget + _AHEAD * len(first.data))
        if is_open or (len(group) > 1 and width and found != width):
            again.extend(reversed(group[1:]))
            budget -= size
            row = Raw(first.number, first.data, "a quote is never closed")
        width = width or found
        yield row


def cells(text: str, delimiter: str) -> list[str]:
    """Returns the cells of one row. Raises RecordError where the row is no valid CSV."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        return next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error as error:
        raise RecordError(f"invalid CSV: {error}") from error


def decode(raw: Raw) -> str:
    """Returns the record's text. Raises RecordError where it is over the limit, not UTF-8 or holds a NUL."""
    if raw.problem:
        raise RecordError(raw.problem)
    if b"\0" in raw.data:
        raise RecordError("NUL character")
    try:
        return raw.data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RecordError(f"invalid UTF-8 at byte {error.start + 1}") from error


def parse_object(text: str) -> dict[str, Any]:
    """Returns a JSON object, raw control characters in strings allowed. Raises RecordError."""
    try:
        value = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise RecordError(f"invalid JSON: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise RecordError("invalid JSON: a number is too long") from error
    except RecursionError as error:
        raise RecordError("JSON nested too deeply") from error
    if not isinstance(value, dict):
        raise RecordError("not an object")
    return value


def _raw(number: int, data: bytes, size: int, limit: int, problem: str | None = None) -> Raw:
    if size > limit and (size > len(data) or len(data.rstrip(b"\r\n")) > limit):
        problem = f"over max_record_bytes ({limit})"
    return Raw(number, data[:SHOWN_BYTES] if problem else data, problem)


def _width(row: Raw, delimiter: str) -> int:
    """How many cells a row has, also where what they hold is refused later; 0 where it is no row."""
    text = row.data.replace(b"\0", b" ").decode("utf-8", "replace").rstrip("\r\n")
    try:
        return len(cells(text, delimiter)) if row.data.strip() else 0
    except RecordError:
        return 0


def _open(line: bytes, delimiter: bytes, quoted: bool) -> bool:
    """Whether a quoted field is still open at the line's end. A quote opens only at a field's start."""
    for field in line.split(delimiter):
        if quoted or field.startswith(b'"'):
            body = field if quoted else field[1:]
            quoted = b'"' not in body.replace(b'""', b"")
    return quoted
