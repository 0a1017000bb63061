"""Reads files of dialogues in the formats they come in, one record at a time.

Knows nothing of what becomes of a dialogue. A record that cannot be used never stops the reading: it
is counted, told with file and line, and kept in the rejects file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from edge_sdss import config
from edge_sdss.errors import InputError, message
from edge_sdss.readers import detect, records, turns
from edge_sdss.readers.detect import FORMATS
from edge_sdss.readers.records import Raw, Record, RecordError
from edge_sdss.types import Dialogue

__all__ = ["FORMATS", "Reading", "Reject", "one", "read"]

_REJECTS_SHOWN = 20
_RECORD_SHOWN = 2000
_TRIED = 1000
_GIVE = f"give UTF-8 text in one of the formats {', '.join(FORMATS)}"


@dataclass(frozen=True, slots=True)
class Reject:
    """A record, or a part of one, that cannot be used.

    `line` counts from 1: lines, or records where the file is one JSON document (`Reading.unit` says
    which). `record` is the original text, cut to 2,000 characters.
    """

    file: str
    line: int
    reason: str
    record: str


class Reading(Iterator[Dialogue]):
    """One pass over one file: iterate it for the dialogues, then ask it for the counts.

    `accepted` counts dialogues, `rejected` what could not be used, `skipped` records that need no answer
    (a user's turn that nobody has answered yet); every record of the file is in at least one of them.
    `rejects` holds the first 20 rejects, `unit` is what `Reject.line` counts: "line" or "record".
    Iterating raises InputError where the file cannot be read on, or had not one dialogue at its end.
    """

    def __init__(
        self,
        path: str,
        settings: config.Reading,
        asked: str | None,
        rejects: Path | None,
        stdin: BinaryIO | None,
    ) -> None:
        self.path = path
        self.format = ""
        self.unit: Literal["line", "record"] = "line"
        self.accepted = self.rejected = self.skipped = 0
        self.rejects: list[Reject] = []
        self._name = "stdin" if path == "-" else Path(path).name
        self._action = f"read dialogues from {'standard input' if path == '-' else path}"
        self._settings = settings
        self._asked = asked
        self._rejects_path = rejects
        self._rejects_file: TextIO | None = None
        self._stdin = stdin
        self._dialogues = self._run()
        next(self._dialogues)

    def __next__(self) -> Dialogue:
        return cast(Dialogue, next(self._dialogues))

    def close(self) -> None:
        """Closes the files before the end is reached."""
        self._dialogues.close()

    def _run(self) -> Generator[Dialogue | None, None, None]:
        """Yields None once the format is known, then the dialogues."""
        try:
            with self._opened() as stream:
                shape, delimiter, pieces = self._shape(records.pieces(stream, self._action))
                source = self._records(self._cut(pieces, shape, delimiter), shape, delimiter)
                self.format, source = self._choose(source, detect.container_of(shape))
                yield None
                for record, outcome in detect.load(self.format).outcomes(source, self._settings.context_turns):
                    if isinstance(outcome, Dialogue):
                        self.accepted += 1
                        yield outcome
                    elif outcome is None:
                        self.skipped += 1
                    else:
                        self._reject(record.number, outcome, record.text)
        except OSError as error:
            raise self._fail(error.strerror or str(error), "check the path and its permissions") from error
        finally:
            if self._rejects_file:
                self._rejects_file.close()
        if not self.accepted:
            raise self._nothing()

    def _opened(self) -> AbstractContextManager[BinaryIO]:
        if self.path == "-":
            return nullcontext(self._stdin or sys.stdin.buffer)
        path = Path(self.path)
        if path.is_dir():
            raise self._fail("it is a folder", "give a file in it")
        if self._rejects_path and self._rejects_path.exists() and self._rejects_path.samefile(path):
            raise self._fail("the rejects would be written into it", "give the rejects another path")
        return path.open("rb")

    def _shape(self, pieces: Iterator[bytes]) -> tuple[detect.Shape, str, Iterator[bytes]]:
        shape, delimiter, pieces = detect.shape(pieces, self._settings.max_record_bytes)
        if shape == "unknown":
            if self._asked is None or detect.load(self._asked).container != "json":
                start = b"".join(islice(pieces, 8)).strip()
                if records.is_binary(start):
                    raise self._fail("it is binary, not text", _GIVE)
                raise self._fail(f"it is in no known format, it begins with {_shown(start)}", _GIVE)
            shape = "json lines"
        self.unit = "record" if shape in ("json array", "json object", "json values") else "line"
        return shape, delimiter, pieces

    def _cut(self, pieces: Iterator[bytes], shape: detect.Shape, delimiter: str) -> Iterator[Raw]:
        limit = self._settings.max_record_bytes
        if shape == "table":
            return records.rows(pieces, limit, delimiter)
        if self.unit == "record":
            return records.elements(pieces, limit, 0 if shape == "json values" else 1)
        return records.lines(pieces, limit)

    def _records(self, raws: Iterator[Raw], shape: detect.Shape, delimiter: str) -> Iterator[Record]:
        """Yields what can be decoded and rejects the rest."""
        columns: list[str] = []
        for raw in raws:
            if not raw.data.strip() and not raw.problem:
                continue
            try:
                text = records.decode(raw)
                value: Any = text
                if shape == "table":
                    row = records.cells(text, delimiter)
                    if not columns:
                        columns = [detect.column(name) for name in row]
                        continue
                    if len(row) != len(columns):
                        raise RecordError(f"{len(row)} cells where the header has {len(columns)}")
                    value = dict(zip(columns, row, strict=True))
                elif shape != "text lines":
                    value = records.parse_object(f"{{{text}}}" if shape == "json object" else text)
            except RecordError as problem:
                self._reject(raw.number, problem, raw.data.decode("utf-8", "replace").rstrip("\r\n"))
            else:
                yield Record(raw.number, f"{self._name}:{raw.number}", text, value)

    def _choose(self, source: Iterator[Record], container: detect.Container) -> tuple[str, Iterator[Record]]:
        """Returns the format of the first record that is of one, and the records from there on."""
        asked, others = self._asked, list[str]()
        wanted = detect.load(asked) if asked else None
        before: list[Record] = []
        for record in islice(source, _TRIED):
            found = detect.match(record.value, container)
            if wanted and wanted.container == container and wanted.matches(record.value):
                found = asked
            if found and (asked is None or found == asked):
                for unknown in before:
                    self._reject(unknown.number, RecordError(f"not of the format {found}"), unknown.text)
                return found, chain([record], source)
            others += [found] if found else []
            before.append(replace(record, text=record.text[:_RECORD_SHOWN], value=None))
            if found and wanted and wanted.container != container:
                break
        if others:
            raise self._fail(f"--format {asked} was asked for, but it is {others[0]}", f"leave out --format {asked}")
        if not before:
            raise self._nothing()
        start = _shown(before[0].text.encode())
        raise self._fail(f"none of its records is in a known format, the first begins with {start}", _GIVE)

    def _reject(self, number: int, problem: RecordError, text: str) -> None:
        reject = Reject(self._name, number, str(problem), text[:_RECORD_SHOWN])
        self.rejected += 1
        if len(self.rejects) < _REJECTS_SHOWN:
            self.rejects.append(reject)
        if self._rejects_path is None:
            return
        try:
            if self._rejects_file is None:
                self._rejects_path.parent.mkdir(parents=True, exist_ok=True)
                self._rejects_file = self._rejects_path.open("a", encoding="utf-8")
            self._rejects_file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
            self._rejects_file.flush()
        except OSError as error:
            asked = f"write rejects to {self._rejects_path}"
            raise InputError(message(asked, str(error.strerror), "give another path for them")) from error

    def _nothing(self) -> InputError:
        if not self.rejects:
            return self._fail("it has no dialogue", "give a file in which an assistant answers a user")
        first = self.rejects[0]
        where = f"{self.unit} {first.line}: {first.reason}"
        return self._fail(f"none of its {self.rejected} records can be used, the first at {where}", _GIVE)

    def _fail(self, found: str, do: str) -> InputError:
        return InputError(message(self._action, found, do))


def read(
    path: Path | str,
    *,
    settings: config.Reading | None = None,
    format: str | None = None,
    rejects: Path | None = None,
    stdin: BinaryIO | None = None,
) -> Reading:
    """Opens a file of dialogues, "-" for standard input, and finds its format by its content.

    `format` insists on one of FORMATS. Rejects are appended to the file `rejects`, which is made only
    where there is one, as JSON Lines of {file, line, reason, record}. A file is read as the iteration
    goes on, with no more of it in memory than about one record of `max_record_bytes` bytes.
    Raises InputError where the file is missing, empty, binary, in no known format or not in `format`.
    """
    if format is not None and format not in FORMATS:
        raise InputError(message(f"read {path} as {format!r}", "no such format", _GIVE))
    return Reading(str(path), settings or config.Reading(), format, rejects, stdin)


def _shown(start: bytes) -> str:
    return repr(start.split(b"\n", 1)[0][:60].decode("utf-8", "replace"))


def one(prompt: str, response: str, source: str) -> Dialogue:
    """A single dialogue under the checks of a file's. Raises InputError for text that cannot be used."""
    try:
        asked = turns.filled(prompt, "prompt", "empty prompt")
        return Dialogue(asked, turns.clean(response, "response"), source=source)
    except RecordError as problem:
        raise InputError(message(f"read the dialogue of the {source}", str(problem), "mend the text")) from problem
