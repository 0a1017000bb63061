"""What cells share: embeddings, variants, trained outcomes, each computed once and found by what it depends on.

Lies in the user's cache folder; whatever is deleted there is made again. Knows nothing of what it holds.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Cache:
    """Folders by name under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Returns the folder `name`, and whether it was there: else `make` fills it first.

        It appears whole or not at all. Where several processes ask at once, one makes it and the others wait.
        """
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target, True
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(target)
            return target, False
