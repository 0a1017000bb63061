"""The layers that a round puts into a model: frozen weights, LoRA, norms, checkpoints. Here, what needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """The update is scaling * B @ A, with A [rank, in] and B [out, rank].

    scaling is alpha / rank, or alpha / sqrt(rank) with `rslora` (Kalajdzievski, arXiv 2312.03732). `dropout`
    is that of the update's input. `dora` learns each row's norm apart from its direction (Liu et al., arXiv
    2402.09353); it saves the layer's output for the backward, and builds the weight's rows at every forward.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scaling(self) -> float:
        """By what B @ A is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
