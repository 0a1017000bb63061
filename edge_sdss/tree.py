"""The files of a machine: of this one, of another root, or of one that was recorded. Knows nothing of their meaning.

Whatever reads /sys, /proc or /etc takes a `Tree`, so that tests and `--replay` give it any board there is.
A recording holds

    root/...           the files, with what they held
    faults.json        {path: errno name} of the files that could not be read, such as EIO or EACCES
    tegrastats.jsonl   {"t": seconds, "line": text} of each line that the board's tegrastats printed
    manifest.json      what was recorded, when and with which version
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdss.errors import InputError, message


class Tree:
    """Files below a root. Paths are relative to it, without a leading slash."""

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        faults: Mapping[str, str] | None = None,
        lines: Mapping[str, list[tuple[float, str]]] | None = None,
    ) -> None:
        """`faults` maps paths to errno names; `lines` maps commands to (seconds, line) of what they printed."""
        self.root = root
        self.faults = dict(faults or {})
        self.lines = dict(lines or {})
        self.recorded = faults is not None or lines is not None

    @classmethod
    def of(cls, folder: Path) -> Tree:
        """Opens a recording. Raises InputError where the folder holds none."""
        asked = f"replay {folder}"
        if not (folder / "root").is_dir():
            do = "give a folder that `edge-sdss profile --record` wrote"
            raise InputError(message(asked, "no root/ in it" if folder.is_dir() else "no such folder", do))
        try:
            faults = json.loads(_text(folder / "faults.json") or "{}")
            rows = [json.loads(line) for line in _text(folder / "tegrastats.jsonl").splitlines() if line.strip()]
            lines = [(float(row["t"]), str(row["line"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(message(asked, f"{type(error).__name__}: {error}", "record it anew")) from error
        return cls(folder / "root", faults=faults, lines={"tegrastats": lines} if lines else {})

    def text(self, path: str) -> str:
        """Returns a file's text. Raises OSError as the machine did."""
        if name := self.faults.get(path):
            number = getattr(errno, name, errno.EIO)
            raise OSError(number, os.strerror(number), path)
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except TypeError as error:  # Python's way of saying EAGAIN, as zones of an Orin answer while they sleep
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path) from error

    def maybe(self, path: str) -> str | None:
        """Returns a file's text without surrounding blanks and NULs; None where it cannot be read."""
        try:
            return self.text(path).strip("\0 \t\r\n")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder, readable or not."""
        return path in self.faults or (self.root / path).exists()

    def glob(self, pattern: str) -> list[str]:
        """Returns the paths that match, numbers in numeric order: hwmon2 before hwmon10."""
        found = {str(path.relative_to(self.root)) for path in self.root.glob(pattern)}
        found |= {path for path in self.faults if Path(path).match(pattern) and path.count("/") == pattern.count("/")}
        return sorted(found, key=_natural)

    def command(self, name: str) -> str | None:
        """Returns the path of a program; None where there is none, and always on a recording."""
        return None if self.recorded else shutil.which(name)


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""
