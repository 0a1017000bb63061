"""What a command is held to, and what became of it. Knows nothing of how it is held."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdss import device


@dataclass(frozen=True)
class Limits:
    """Memory without swap, and cores; `board` is a name, or the path of a TOML file of the user's own."""

    board: str
    memory_bytes: int
    cores: int

    @property
    def usable_cores(self) -> int:
        """The cores that it gets: never more than this process has."""
        return min(self.cores, device.cores())


@dataclass(frozen=True)
class Outcome:
    """`code` is as a shell gives it: 128 and the signal's number where one ended it. None: nobody counted."""

    code: int
    peak_bytes: int | None = None
    at_limit: bool | None = None
