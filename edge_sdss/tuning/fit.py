"""How a step is cut so that it fits into memory, and what to give up next. Knows nothing of how a step is done."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_sdss import config

LEAST_CHUNK, LEAST_TOKENS = 16, 64


@dataclass(frozen=True)
class Fit:
    """`micro_batch` examples go through the model at a time, cut at `max_tokens`.

    `loss_chunk` answer tokens have logits at a time; with `checkpointing` layers are recomputed in the backward.
    All but `max_tokens` change the result of a step by rounding only; a smaller `micro_batch` draws other dropout,
    where there is any.
    """

    micro_batch: int
    loss_chunk: int
    checkpointing: bool
    max_tokens: int

    @classmethod
    def of(cls, settings: config.Tuning) -> Fit:
        """Returns the plain one: whole batches, as the settings say."""
        return cls(settings.batch_size, settings.loss_chunk, settings.checkpointing == "on", settings.max_tokens)

    @property
    def words(self) -> str:
        """What it is, for people."""
        layers = "layers recomputed" if self.checkpointing else "layers kept"
        return (
            f"{self.micro_batch} at a time, logits of {self.loss_chunk} tokens, {layers}, "
            f"sequences of at most {self.max_tokens} tokens"
        )

    def smaller(self) -> Fit | None:
        """Returns the next one that takes less memory, what costs least first; None where nothing is left to give.

        Only the last resort, shorter sequences, changes what is learnt.
        """
        if self.loss_chunk > LEAST_CHUNK:
            return replace(self, loss_chunk=max(self.loss_chunk // 2, LEAST_CHUNK))
        if not self.checkpointing:
            return replace(self, checkpointing=True)
        if self.micro_batch > 1:
            return replace(self, micro_batch=self.micro_batch // 2)
        if self.max_tokens > LEAST_TOKENS:
            return replace(self, max_tokens=max(self.max_tokens // 2, LEAST_TOKENS))
        return None

    def within(self, other: Fit) -> Fit:
        """Returns the largest fit that is no larger than this one and the other."""
        return Fit(
            min(self.micro_batch, other.micro_batch),
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
        if self.micro_batch != before.micro_batch:
            changes.append(f"{self.micro_batch} examples at a time instead of {before.micro_batch}")
        if self.max_tokens != before.max_tokens:
            changes.append(
                f"sequences cut at {self.max_tokens} tokens instead of {before.max_tokens}, which changes the result"
            )
        return "; ".join(changes)
