"""What a round of tuning tells of itself. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: its loss in nats per answer token, and how many tokens it took in."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """A finished round. `tokens` counts prompts and answers over all steps, `seconds` the steps alone."""

    adapter: Path
    steps: int
    seconds: float
    tokens: int
    examples: int
    trainable_parameters: int
    peak_tensor_bytes: int
    adapter_bytes: int
    losses: tuple[Step, ...]
