"""What answers in a conversation: a bundle's engine, or the torch model of a session. Both are asked alike.

Knows nothing of turns before, of the buffer or of terminals.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edge_sdss import config, embedding
from edge_sdss.bundles.shelf import Shelf
from edge_sdss.config import Config
from edge_sdss.errors import InputError, message
from edge_sdss.runtime import Engine, Sampling, Stream
from edge_sdss.runtime.writer import Pieces, Writer
from edge_sdss.types import FloatArray, Turn

if TYPE_CHECKING:
    import torch

    from edge_sdss.lm import LanguageModel
    from edge_sdss.session import Session

Adapter = Mapping[str, float]
"""Adapters by name, each with its scale; none: the base model."""


class Reply(Protocol):
    """Pieces of an answer, made while it is iterated."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None:
        """Ends the answer here."""

    @property
    def text(self) -> str:
        """The answer so far."""

    @property
    def ids(self) -> Sequence[int]:
        """Its tokens, the one that ended it included."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Those before it."""

    @property
    def finished(self) -> bool:
        """Whether the model stopped by itself."""


class Speaker(Protocol):
    """Answers conversations. `name`: the model and how it is computed."""

    name: str

    @property
    def adapters(self) -> Sequence[str]:
        """The names that may be asked for."""

    @property
    def adapter(self) -> Adapter:
        """What answers."""

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    def use(self, adapter: Adapter) -> None:
        """Answers with an adapter from now on. Raises InputError for one that is not there."""

    def count(self, turns: Sequence[Turn]) -> int:
        """Returns how many tokens a conversation is."""

    def answer(self, turns: Sequence[Turn], seed: int) -> Reply:
        """Begins an answer."""

    def embeddings(self, reply: Reply) -> FloatArray | None:
        """Returns E(T) of an answer that is complete; None: whoever wants it computes it."""


def sampling(asked: config.Chat, defaults: Sampling) -> Sampling:
    """Returns the defaults with what was asked for in their place. Raises ConfigError where a value is no good."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    return replace(defaults, **given)


def read_adapter(text: str) -> Adapter:
    """Reads "none", a name, or "a=0.7,b=0.3". Raises InputError for anything else."""
    if text.strip() == "none":
        return {}
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, scale = (word.strip() for word in part.partition("="))
        try:
            value = float(scale) if equals else 1.0
        except ValueError:
            name = ""
        if not name or name in found:
            do = "write NAME, none, or NAME=SCALE,NAME=SCALE"
            raise InputError(message(f"use adapter {text}", f"{part.strip()!r} is no adapter, or named twice", do))
        found[name] = value
    return found


class BundleSpeaker:
    """A bundle answers. With `embeds`, E(T) of an exchange comes with the answer (ADR 0010)."""

    def __init__(self, engine: Engine, settings: Config, *, embeds: bool) -> None:
        self.engine, self._settings, self._embeds = engine, settings, embeds
        self._sampling = sampling(settings.chat, engine.defaults)
        self.name = f"{engine.name}, {engine.manifest.graph.precision} on {engine.provider}"

    @property
    def adapters(self) -> Sequence[str]:
        """Those of the bundle."""
        return sorted(self.engine.adapters)

    @property
    def adapter(self) -> Adapter:
        """What answers."""
        active = self.engine.active
        return {active: 1.0} if isinstance(active, str) else dict(active or {})

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.engine.context

    def use(self, adapter: Adapter) -> None:
        """Switches within milliseconds; the conversation is then prefilled anew."""
        self.engine.attach(adapter or None)

    def count(self, turns: Sequence[Turn]) -> int:
        """Tokens in the bundle's chat template."""
        return len(self.engine.chat.prompt_ids(turns, 1 << 30))

    def answer(self, turns: Sequence[Turn], seed: int) -> Stream:
        """A stream of the engine's."""
        how, asked = self._sampling, self._settings.chat
        return self.engine.stream(
            turns,
            max_new_tokens=asked.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            repetition_penalty=how.repetition_penalty,
            seed=seed,
            stop=asked.stop,
            embeddings=self._embeds,
        )

    def embeddings(self, reply: Reply) -> FloatArray | None:
        """Those that the answer came with; where an adapter was active, of one prefill of the base model."""
        return embedding.of_answer(self.engine, reply, self._settings) if isinstance(reply, Stream) else None


class TorchSpeaker:
    """The torch model of a session answers, with the adapter of one of its rounds; mixing needs a bundle."""

    def __init__(self, session: Session, settings: Config) -> None:
        self._session, self._settings = session, settings
        self._sampling = sampling(settings.chat, Sampling())
        self.name = f"{session.lm.name}, torch {settings.model.dtype}"
        self._adapter: str | None = None
        if active := session.active_adapter:
            self.use({active.name: 1.0})

    @property
    def adapters(self) -> Sequence[str]:
        """Those of the accepted rounds."""
        accepted = [r.number for r in self._session.store.rounds() if r.state == "accepted"]
        return [self._session.adapter_folder(number).name for number in accepted]

    @property
    def adapter(self) -> Adapter:
        """What answers."""
        return {self._adapter: 1.0} if self._adapter else {}

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self._session.lm.context

    def use(self, adapter: Adapter) -> None:
        """Attaches the adapter of a round."""
        if any(name not in self.adapters for name in adapter) or list(adapter.values()) not in ([], [1.0]):
            found = f"there are {', '.join(self.adapters) or 'none'}, and without a bundle they are not scaled or mixed"
            raise InputError(message(f"use adapter {', '.join(adapter)}", found, "give one of these, or none"))
        self._adapter = next(iter(adapter), None)
        self._session.lm.attach(self._session.home / "adapters" / self._adapter if self._adapter else None)

    def count(self, turns: Sequence[Turn]) -> int:
        """Tokens in the model's chat template."""
        return len(self._session.lm.chat.prompt_ids(turns, 1 << 30))

    def answer(self, turns: Sequence[Turn], seed: int) -> Reply:
        """An answer of the torch model."""
        lm, asked = self._session.lm, self._settings.chat
        room = max(lm.context - asked.max_new_tokens, lm.context // 4, 1)
        prompt = lm.chat.prompt_ids(turns, room)

        def decode(ids: Sequence[int]) -> str:
            text: str = lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return text

        pieces = Pieces(decode, asked.stop, strip=not lm.tokenizer.chat_template)
        limit = min(asked.max_new_tokens, lm.context - len(prompt))
        draws = np.random.default_rng([seed, 0])
        return _Written(lm, prompt, Writer(pieces, self._sampling, lm.chat.stop_ids, prompt, draws, limit))

    def embeddings(self, reply: Reply) -> None:
        """None: E(T) of the text alone, as `observe` computes it, does not come with an answer."""


class _Written:
    """An answer of the torch model, by the same writer as the engine's."""

    def __init__(self, lm: LanguageModel, prompt: Sequence[int], writer: Writer) -> None:
        self.prompt_ids, self._writer = tuple(prompt), writer
        self._pieces = self._run(lm)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()

    @property
    def text(self) -> str:
        return self._writer.text

    @property
    def ids(self) -> Sequence[int]:
        return tuple(self._writer.ids)

    @property
    def finished(self) -> bool:
        return self._writer.finished

    def _run(self, lm: LanguageModel) -> Generator[str, None, None]:
        shown: list[str] = []

        def choose(logits: torch.Tensor, rows: Sequence[int], step: int) -> list[int]:
            shown.append(self._writer.take(logits[0].cpu().numpy()))
            return self._writer.ids[-1:]

        for _ in lm.follow(self.prompt_ids, choose):
            if piece := shown.pop():
                yield piece
            if self._writer.done:
                return


def bundle(home: Path, given: Path | None) -> Path | None:
    """Returns the bundle given, or the one that is active in a home; None without one."""
    return given or Shelf(home).active()


def has_torch() -> bool:
    """Whether torch is installed."""
    return find_spec("torch") is not None
