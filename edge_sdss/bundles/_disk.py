"""Files that are on the disk when a function returns. Knows nothing of bundles."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_sdss.errors import InputError, message

# What says that this filesystem, or these two, have no links; a full disk is not among them.
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_BLOCK = 1 << 20


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """Writes a small file."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copies a file's bytes; folders are made where they are missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        while block := old.read(_BLOCK):
            new.write(block)
        new.flush()
        os.fsync(new.fileno())


def link(source: Path, target: Path) -> bool:
    """Makes a hard link; returns whether this filesystem can."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def point(path: Path, name: str, partial: Path) -> None:
    """Makes `path` a symlink to `name` in one step, or a file with the name in it where there are no symlinks."""
    partial.unlink(missing_ok=True)
    try:
        os.symlink(name, partial)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        write(partial, name + "\n")
    os.replace(partial, path)
    with suppress(OSError):  # it is done; a loss of power may undo it, and then the old name stands
        sync(path.parent)


@contextmanager
def locked(path: Path, asked: str) -> Iterator[None]:
    """Holds a lock, which also ends with the process. Raises InputError where another process holds it."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = "another process is changing the bundles"
            raise InputError(message(asked, found, "wait until it is done")) from error
        yield
