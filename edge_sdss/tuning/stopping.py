"""When to stop early: a part of the examples is held out, and epochs count only while its loss falls.

Knows nothing of models or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from edge_sdss import config
from edge_sdss.types import Example


def split(examples: Sequence[Example], settings: config.Tuning) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on and, with `settings.patience`, those that are held out; no dialogue is in both.

    A dialogue with all its variants goes to one side, by its hash: the same from round to round. One at least is
    held out, and one at least is trained on.
    """
    ids = sorted({example.dialogue_id for example in examples}, key=lambda name: _hash(name, settings.seed))
    if settings.patience is None or len(ids) < 2:
        return list(examples), []
    count = min(max(round(settings.validation * len(ids)), 1), len(ids) - 1)
    held = set(ids[:count])
    return (
        [example for example in examples if example.dialogue_id not in held],
        [example for example in examples if example.dialogue_id in held],
    )


class Stopping:
    """What was measured at the end of each epoch, and what follows from it."""

    def __init__(self, patience: int | None, measured: Sequence[Mapping[str, Any]] = ()):
        self._patience = patience
        self.measured = [dict(each) for each in measured]

    @property
    def best(self) -> int | None:
        """The step after which the loss was lowest, the first of such; None before the first measurement."""
        lowest = min(self.measured, key=lambda each: each["loss"], default=None)
        return None if lowest is None else int(lowest["step"])

    @property
    def over(self) -> bool:
        """Whether so many epochs have passed without a lower loss."""
        steps = [each["step"] for each in self.measured]
        return self._patience is not None and bool(steps) and len(steps) - steps.index(self.best) > self._patience

    def due(self, step: int, steps_each: int) -> bool:
        """Whether the loss is to be measured after `step` steps, where an epoch has `steps_each`."""
        last = self.measured[-1]["step"] if self.measured else 0
        return self._patience is not None and step > last and step % steps_each == 0


def _hash(name: str, seed: int) -> str:
    return hashlib.sha256(f"validation:{seed}:{name}".encode()).hexdigest()
