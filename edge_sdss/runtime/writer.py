"""From tokens to text that may be shown: no half characters, no stop strings. Knows nothing of the graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from edge_sdss.runtime.sampling import Logits, Sampling, choose

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet


class Pieces:
    """Text as its tokens come. What could still turn into another character or a stop string is held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], *, strip: bool) -> None:
        """`decode` leaves special tokens out; `strip`: spaces before the text are not part of it."""
        self.stopped = False
        self._decode, self._stop, self._strip = decode, tuple(stop), strip
        self._ids: list[int] = []
        self._start = self._read = 0  # decoded from _start, so that a token is seen behind those before it
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token; returns the text that may now be shown."""
        self._ids.append(token)
        before, now = self._window()
        if now.endswith(_HALF):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._show(now[len(before) :])

    def end(self) -> str:
        """Returns what was held back, unless a stop string ended the text."""
        if self.stopped:
            return ""
        before, now = self._window()
        self._start = self._read = len(self._ids)
        text = self._show(now[len(before) :])
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _window(self) -> tuple[str, str]:
        ids = self._ids[self._start :]
        return self._decode(ids[: self._read - self._start]), self._decode(ids)

    def _show(self, new: str) -> str:
        if self._strip:
            new = new.lstrip(" ")
            self._strip = not new
        text = self._held + new
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Writer:
    """One answer: chooses its tokens and turns them into text.

    `ids`: its tokens, the one that ended it included. `done`: nothing more comes; `finished`: the model stopped by
    itself, at a stop token or string, and was not cut off.
    """

    def __init__(
        self,
        pieces: Pieces,
        how: Sampling,
        stop_ids: Collection[int],
        prompt: Sequence[int],
        draws: np.random.Generator,
        limit: int,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.done = limit <= 0
        self.finished = False
        self._pieces, self._how, self._stop_ids, self._draws, self._limit = pieces, how, stop_ids, draws, limit
        self._seen = set(prompt) if how.repetition_penalty != 1 else set()

    @property
    def unfed(self) -> bool:
        """Whether the last token is part of the answer but never went through the model: it was cut off there."""
        return self.done and not self.finished and bool(self.ids)

    def take(self, logits: Logits) -> str:
        """Chooses the next token from logits [V]; returns the text that may now be shown."""
        draw = self._draws.random() if self._how.temperature > 0 else 0.0
        token = choose(logits, self._how, self._seen, draw)
        self.ids.append(token)
        piece = ""
        if token in self._stop_ids:
            self.finished = True
        else:
            self._seen.add(token)
            piece = self._pieces.push(token)
        self.done = self.finished or self._pieces.stopped or len(self.ids) >= self._limit
        if self.done:
            piece += self._pieces.end()
        self.finished |= self._pieces.stopped
        self.text += piece
        return piece
