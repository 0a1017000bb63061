"""A conversation's tokens in a lane: what a new prompt has in common with them is not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_sdss.runtime.lane import Floats, Lane


class Talk:
    """A lane of one row that remembers what it was fed, and the hidden states where the graph gives them."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.ids: list[int] = []
        self.broken = False
        self._states: list[Floats] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keeps what the prompt begins with, its last token excepted; returns how many tokens that are."""
        same = 0
        for mine, asked in zip(self.ids, prompt[:-1], strict=False):
            if mine != asked:
                break
            same += 1
        self.lane.cut(same)
        self._states = [self.states[:same]] if self._states else []
        del self.ids[same:]
        return same

    def feed(self, ids: Sequence[int]) -> Floats:
        """Feeds ids, in pieces where they are many; returns logits [V] after the last."""
        self.broken = True  # unless all goes well
        logits = np.empty((1, 1, 0), np.float32)
        for start in range(0, len(ids), self.lane.piece):
            piece = list(ids[start : start + self.lane.piece])
            logits = self.lane.feed(np.array([piece], np.int64))
            self.ids += piece
            if self.lane.hidden is not None:
                self._states.append(self.lane.hidden[0].copy())
        self.broken = False
        last: Floats = logits[0, -1]
        return last

    @property
    def states(self) -> Floats:
        """The hidden states of all that was fed, [n, d] float32."""
        self._states = [np.concatenate(self._states)] if len(self._states) > 1 else self._states
        return self._states[0] if self._states else np.zeros((0, 0), np.float32)
