"""How a step is cut so that it fits into memory, and what to give up next. Knows nothing of how a step is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from edge_sdss import config

LEAST_CHUNK, LEAST_TOKENS = 16, 64


@dataclass(frozen=True)
class Fit:
    """As many sequences go through the model at a time as make `tokens` with their padding, and one in any case.

    Each is cut at `max_tokens`. `loss_chunk` answer tokens have logits at a time; with `checkpointing` layers are
    recomputed in the backward. All but `max_tokens` change the result of a step by rounding only; fewer `tokens` draw
    other dropout, where there is any.
    """

    tokens: int
    loss_chunk: int
    checkpointing: bool
    max_tokens: int

    @classmethod
    def of(cls, settings: config.Tuning) -> Fit:
        """Returns the plain one: whole batches, as the settings say."""
        whole = settings.batch_size * settings.max_tokens
        return cls(whole, settings.loss_chunk, settings.checkpointing == "on", settings.max_tokens)

    @property
    def words(self) -> str:
        """What it is, for people."""
        layers = "layers recomputed" if self.checkpointing else "layers kept"
        return (
            f"{self._at_a_time} at a time, logits of {self.loss_chunk} tokens, {layers}, "
            f"sequences of at most {self.max_tokens} tokens"
        )

    def parts(self, lengths: Sequence[int]) -> list[range]:
        """Cuts sequences, the shortest first, into what goes through the model at a time: ranges of indices."""
        starts = [0]
        for index, length in enumerate(lengths):
            if index > starts[-1] and (index + 1 - starts[-1]) * length > self.tokens:
                starts.append(index)
        return [range(*bounds) for bounds in pairwise([*starts, len(lengths)])]

    def of_sequences(self, longest: int, batch_size: int) -> Fit:
        """Returns the same for sequences that are known to be no longer, so that a smaller one really is smaller."""
        return replace(self, tokens=min(self.tokens, batch_size * longest), max_tokens=min(self.max_tokens, longest))

    def smaller(self) -> Fit | None:
        """Returns the next one that takes less memory, what costs least first; None where nothing is left to give.

        Only the last resort, shorter sequences, changes what is learnt.
        """
        if self.loss_chunk > LEAST_CHUNK:
            return replace(self, loss_chunk=max(self.loss_chunk // 2, LEAST_CHUNK))
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        if self.tokens > self.max_tokens:
            return replace(self, tokens=max(self.tokens // 2, self.max_tokens))
        if self.tokens > 1:
            return replace(self, tokens=1)
        if self.max_tokens > LEAST_TOKENS:
            return replace(self, max_tokens=max(self.max_tokens // 2, LEAST_TOKENS))
        return None

    def within(self, other: Fit) -> Fit:
        """Returns the largest fit that is no larger than this one and the other."""
        return Fit(
            min(self.tokens, other.tokens),
            min(self.loss_chunk, other.loss_chunk),
            self.checkpointing or other.checkpointing,
            min(self.max_tokens, other.max_tokens),
        )

    def instead_of(self, before: Fit) -> str:
        """What is different from `before`, in words that say so where the result changes."""
        changes = []
        if self.loss_chunk != before.loss_chunk:
            changes.append(f"logits of {self.loss_chunk} tokens at a time instead of {before.loss_chunk}")
        if self.checkpointing != before.checkpointing:
            changes.append("layers recomputed" if self.checkpointing else "layers kept")
        if self.tokens != before.tokens:
            changes.append(f"{self._at_a_time} at a time instead of {before._at_a_time}")
        if self.max_tokens != before.max_tokens:
            changes.append(
                f"sequences cut at {self.max_tokens} tokens instead of {before.max_tokens}, which changes the result"
            )
        return "; ".join(changes)

    @property
    def _at_a_time(self) -> str:
        return "one sequence" if self.tokens == 1 else f"{self.tokens} tokens"
