"""The file of results: one line a cell, appended whole or not at all, and who works on which cell.

Several processes may share a file. Knows nothing of what is in a line but its cell and protocol.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality.protocol import Cell, digest

Line = dict[str, Any]


class Ledger:
    """`path` holds the results; `claims` is a folder of lock files that only the processes of one machine share."""

    def __init__(self, path: Path, claims: Path) -> None:
        self.path = path
        self._claims = claims / digest(str(path.resolve()))[:16]

    def lines(self) -> list[Line]:
        """All results in the file. What a killed process left of a line is no line."""
        return read(self.path)

    def done(self, protocol: str) -> set[Cell]:
        """The cells that are done under the protocol of this digest."""
        return {Cell(**line["cell"]) for line in self.lines() if line["protocol"] == protocol}

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; the end of one that was never finished goes first. Raises ValueError for NaN."""
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed, or the process dies
            stream.seek(0)
            whole = stream.read().rfind(b"\n") + 1
            stream.truncate(whole)
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def claim(self, cell: Cell, protocol: str) -> Iterator[bool]:
        """Inside, whether the cell is ours to run: nobody is at it, it is not done. A claim ends with its process."""
        self._claims.mkdir(parents=True, exist_ok=True)
        with (self._claims / digest([asdict(cell), protocol])[:32]).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield cell not in self.done(protocol)  # asked with the claim in hand: another may just have finished


def read(path: Path) -> list[Line]:
    """The lines of a file of results; none where it is not there. Raises ValueError for a line that is no JSON."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
