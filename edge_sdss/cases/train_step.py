"""Does one optimiser step of LoRA on a batch: forward, loss, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_sdss.cases import Subject
from edge_sdss.profiling.harness import Repetition
from edge_sdss.tuning import adapter
from edge_sdss.types import Example

ITEM = "step"
_STEPS = 1_000


def settings(subject: Subject) -> dict[str, object]:
    """What the figures depend on."""
    chosen = subject.settings.tuning
    return {"batch_size": chosen.batch_size, "rank": chosen.rank, "max_tokens": chosen.max_tokens}


@contextmanager
def open(subject: Subject) -> Iterator[Callable[[], Repetition]]:
    """One repetition is a step on the first dialogues of the stream, the same batch each time."""
    import torch

    from edge_sdss.tuning.steps import Optimisation

    lm = subject.lm
    chosen = subject.settings.tuning
    picked = subject.dialogues[: chosen.batch_size]
    encoded = [lm.encode(Example(d.messages, d.preferred or d.response), chosen.max_tokens) for d in picked]
    chosen = chosen.model_copy(update={"epochs": _STEPS})
    with torch.random.fork_rng(), adapter.trainable(lm, chosen, None) as adapted:
        run = Optimisation(adapted, encoded, chosen)
        run.advance()
        run.advance()  # the second one measures its tensors and is slower

        def repeat() -> Repetition:
            run.advance()
            done = run.done[-1]
            return Repetition(1, {"time_per_token": [done.seconds / done.tokens]})

        yield repeat
