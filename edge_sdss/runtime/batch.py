"""The answers of a batch. Knows nothing of where its prompts come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdss.runtime.lane import Lane
from edge_sdss.runtime.talk import Talk
from edge_sdss.runtime.writer import Writer


def write(talk: Talk, prompts: Sequence[Sequence[int]], writers: Sequence[Writer], max_new_tokens: int) -> None:
    """Lets each writer write its answer. A row that is done leaves the batch.

    `talk` prefills one prompt after another, from where it differs from the one before, so that nothing is computed
    for padding; then the keys and values of all are joined and decoded together.
    """
    live, parts = [], []
    for prompt, writer in zip(prompts, writers, strict=True):
        logits = talk.feed(prompt[talk.reuse(prompt) :])
        if not writer.done:
            writer.take(logits)
        if not writer.done:
            live.append(writer)
            parts.append(talk.lane.past)
    if not live:
        return
    longest = max(part[0].shape[2] for part in parts)
    lane = Lane.joined(talk.lane, parts, longest + max_new_tokens)
    del parts
    while live:
        rows = lane.feed(np.array([writer.ids[-1:] for writer in live], np.int64))[:, -1]
        for writer, row in zip(live, rows, strict=True):
            writer.take(row)
        keep = [k for k, writer in enumerate(live) if not writer.done]
        if keep and len(keep) < len(live):
            lane.select(keep)
        live = [live[k] for k in keep]
