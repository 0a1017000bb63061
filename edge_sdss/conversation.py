"""A conversation: its turns within the model's context, its answers, and what the buffer kept of it.

An exchange is offered to the buffer as soon as its answer is complete, so that a crash loses none; an answer that
the user stopped is remembered in the conversation and not offered. Nothing is sent anywhere. Knows nothing of
terminals, and of the model only what `speakers.Speaker` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edge_sdss import readers
from edge_sdss.config import Config
from edge_sdss.errors import InputError
from edge_sdss.session import Session
from edge_sdss.speakers import Adapter, Reply, Speaker
from edge_sdss.store import now
from edge_sdss.types import Decision, Turn

_NAME = "chat"


@dataclass(frozen=True)
class Exchange:
    """A question and what came of it.

    `tokens`: of the answer, the one that ended it included. `ttft_s`: seconds to the first text; `tokens_per_s`: after
    it, None where one was all. `finished`: the model stopped by itself; `stopped`: the user did.
    `decision`: None where nothing was offered, `problem` says why where it should have been.
    """

    prompt: str
    answer: str
    tokens: int
    prompt_tokens: int
    ttft_s: float | None
    tokens_per_s: float | None
    finished: bool
    stopped: bool
    adapter: Adapter
    decision: Decision | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Fill:
    """How full the buffer is."""

    entries: int
    bins: int
    bytes: int
    max_bytes: int


class Conversation:
    """What is said to a speaker and answered. `session`: whose buffer sees it, None: nobody's.

    `exchanges`: all since it was opened, those included that `clear` took out of the model's sight.
    """

    def __init__(self, speaker: Speaker, settings: Config, session: Session | None) -> None:
        """Raises ConfigError where the home's scores are of another model."""
        self.speaker, self.settings, self.session = speaker, settings, session
        self.turns: list[Turn] = []
        self.exchanges: list[Exchange] = []
        self._name = f"{_NAME} {now()}"
        self._stop = False
        if session is not None:
            _ = session.selector  # refuses or takes long now, not after the first answer

    def ask(self, text: str, show: Callable[[str], None] = lambda piece: None) -> Exchange:
        """Answers; `show` is given the pieces as they come. Raises InputError for a text that cannot be asked."""
        prompt = readers.one(text, "", _NAME).prompt
        self._stop = False
        self._fit(prompt)
        before, started = list(self.turns), time.perf_counter()
        reply = self.speaker.answer([*before, Turn("user", prompt)], self.settings.chat.seed + len(self.exchanges))
        first = None
        try:
            for piece in reply:
                first = first or (time.perf_counter(), len(reply.ids))
                show(piece)
                if self._stop:
                    break
        finally:
            reply.close()
        if reply.text:
            self.turns += [Turn("user", prompt), Turn("assistant", reply.text)]
        made = self._exchange(prompt, reply, started, first)
        exchange = made if made.stopped else self._offered(made, reply, before)
        self.exchanges.append(exchange)
        return exchange

    def stop(self) -> None:
        """Ends the answer that is being made, after its next piece. May be called by a signal's handler."""
        self._stop = True

    def clear(self) -> None:
        """Forgets the turns; what the buffer kept of them stays."""
        self.turns.clear()
        self._name = f"{_NAME} {now()}"

    @property
    def fill(self) -> Fill | None:
        """How full the buffer is; None without one."""
        if self.session is None:
            return None
        buffer = self.session.selector.buffer
        return Fill(len(buffer), buffer.bins, buffer.bytes, buffer.max_bytes)

    def is_kept(self, exchange: Exchange) -> bool:
        """Whether an exchange is in the buffer now: what was kept may have been replaced since."""
        decision = exchange.decision
        return (
            decision is not None and self.session is not None and decision.dialogue_id in self.session.selector.buffer
        )

    def _fit(self, prompt: str) -> None:
        """Lets the oldest exchanges go where the context would overflow: until half of it is free, so that the KV cache
        serves the next turns too, and in pairs, because many templates refuse a conversation that begins otherwise."""
        limit, asked = self.speaker.context, self.settings.chat.max_new_tokens
        room = max(limit - asked, limit // 4, 1)
        if self._count(prompt) > room:
            while self.turns and self._count(prompt) > room // 2:
                del self.turns[:2]

    def _count(self, prompt: str) -> int:
        return self.speaker.count([*self.turns, Turn("user", prompt)])

    def _exchange(self, prompt: str, reply: Reply, started: float, first: tuple[float, int] | None) -> Exchange:
        tokens, rate = len(reply.ids), None
        if first is not None and tokens > first[1]:
            rate = (tokens - first[1]) / (time.perf_counter() - first[0])
        return Exchange(
            prompt,
            reply.text,
            tokens,
            len(reply.prompt_ids),
            first[0] - started if first else None,
            rate,
            reply.finished,
            self._stop and not reply.finished,
            dict(self.speaker.adapter),
        )

    def _offered(self, exchange: Exchange, reply: Reply, before: Sequence[Turn]) -> Exchange:
        if self.session is None:
            return exchange
        turns = self.settings.reading.context_turns // 2 * 2
        try:
            dialogue = readers.one(exchange.prompt, exchange.answer, _NAME)
            context = tuple(before[max(len(before) - turns, 0) :])
            dialogue = replace(dialogue, context=context, conversation=self._name, time=now())
            decision = self.session.observe(dialogue, self.speaker.embeddings(reply))
            return replace(exchange, decision=decision)
        except InputError as error:  # the answer was given all the same
            return replace(exchange, problem=str(error))
