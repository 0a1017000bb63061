"""Files of sysfs that stay open: to look up a path costs more than to read. Knows nothing of what is in them."""

from __future__ import annotations

import os

from edge_sdss.tree import Tree


class OpenFile:
    """A file of sysfs, open: to read one anew takes a seek and no look-up of its path."""

    def __init__(self, tree: Tree, path: str) -> None:
        self.tree, self.path = tree, path
        self._number: int | None = None
        self._closed = False

    def read(self) -> bytes:
        """Raises OSError; the next call opens the file anew, as a core that was switched off may be back."""
        if self._closed:
            raise OSError(f"{self.path} is closed")
        try:
            if self._number is None:
                if self.path in self.tree.faults:
                    self.tree.text(self.path)  # raises what the machine that was recorded raised
                self._number = os.open(self.tree.root / self.path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._number, 64, 0)
        except BlockingIOError:
            raise
        except OSError:
            self._drop()
            raise

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None
