"""Which entries of a full buffer may give way to an offer: one policy a file, named by the file.

A policy is a module with
    replaceable(candidate, buffer) -> the bins that may be emptied for it, the first choice first; none: drop it
    KEPT, DROPPED                  -> the reason given in words
    ASKS = "perplexity"            -> only where it needs `candidate.value`, see `surprise.of`
    REMEMBERS = True               -> only where it needs `candidate.memory`, of the stream beyond the buffer
The selector empties as many of them, in that order, as both budgets ask for.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ConfigError, message

if TYPE_CHECKING:
    from edge_sdss.selection.buffer import Buffer
    from edge_sdss.selection.selector import Candidate


Slots = npt.NDArray[np.int64]
"""Bins of the buffer, [k] int64."""


class Policy(Protocol):
    """What each module in this package provides."""

    KEPT: str
    DROPPED: str

    def replaceable(self, candidate: Candidate, buffer: Buffer) -> Slots:
        """The bins that may be emptied for the candidate, the first choice first."""


def names() -> list[str]:
    """The policies there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Policy:
    """Returns the policy `name`; raises ConfigError where there is none."""
    if name not in names():
        raise ConfigError(message(f"use policy {name!r}", "no such policy", f"choose one of {', '.join(names())}"))
    module: Any = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module  # type: ignore[no-any-return]
