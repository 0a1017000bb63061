"""An answer in the making: pieces of text as they come, then the token embeddings that came with them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdss.runtime.lane import Floats
from edge_sdss.runtime.talk import Talk
from edge_sdss.runtime.writer import Writer


@dataclass(frozen=True)
class Embeddings:
    """The last hidden states, after the final norm, of a prompt and its answer as the model saw them.

    `states`: [n, d] float32 of `ids`, whose first `prompt_tokens` are the prompt in its template; `asked`: the rows
    of the last turn's own text, all of the prompt's where it is not found there unchanged. They differ from
    `Engine.token_embeddings` of the same words in two ways: the turns and the template before them are seen as
    context, and where `adapter` (name: scale) is not empty they are of the adapted model.
    """

    states: Floats
    ids: tuple[int, ...]
    prompt_tokens: int
    asked: slice
    adapter: Mapping[str, float]

    def dialogue(self) -> Floats:
        """Returns E(T) of the exchange: the rows of the last turn's text and of the answer, [m, d] float32."""
        return np.concatenate([self.states[self.asked], self.states[self.prompt_tokens :]])


class Stream(Iterator[str]):
    """Pieces of an answer; the model works while it is iterated, and no longer than that.

    `text` is the answer so far, `ids` its tokens, `prompt_ids` those before it, `reused` how many of them were in
    the KV cache already; `finished`: the model stopped by itself. `adapter`: name and scale of what is active.
    `embeddings` is of the prompt after the first piece, and of prompt and answer at the end; None where the graph
    gives none, or they were not asked for.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        writer: Writer,
        acquire: Callable[[], Talk],
        release: Callable[[Talk], None],
        asked: slice | None,
    ) -> None:
        """`asked`: rows of the last turn's text; None where no embeddings are wanted."""
        self.prompt_ids = tuple(prompt)
        self.reused = 0
        self.adapter: Mapping[str, float] = {}
        self.embeddings: Embeddings | None = None
        self._writer, self._acquire, self._release, self._asked = writer, acquire, release, asked
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer here."""
        self._pieces.close()

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._writer.text

    @property
    def ids(self) -> tuple[int, ...]:
        """Its tokens, the one that ended it included."""
        return tuple(self._writer.ids)

    @property
    def finished(self) -> bool:
        """Whether the model stopped by itself, and was not cut off."""
        return self._writer.finished

    def _run(self) -> Generator[str, None, None]:
        talk = self._acquire()
        self.adapter = talk.lane.mix.scales
        try:
            self.reused = talk.reuse(self.prompt_ids)
            logits = talk.feed(self.prompt_ids[self.reused :])
            self._embed(talk)
            while not self._writer.done:
                if piece := self._writer.take(logits):
                    yield piece
                if not self._writer.done:
                    logits = talk.feed(self._writer.ids[-1:])
            if self._asked is not None and self._writer.unfed:
                talk.feed(self._writer.ids[-1:])
            self._embed(talk)
        finally:
            if not talk.broken:
                self._release(talk)

    def _embed(self, talk: Talk) -> None:
        if self._asked is not None:
            self.embeddings = Embeddings(
                talk.states.copy(), tuple(talk.ids), len(self.prompt_ids), self._asked, self.adapter
            )
