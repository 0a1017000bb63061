"""Engine, the one class that other modules use. Knows nothing of where bundles lie or how adapters are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from edge_sdss import bundles
from edge_sdss.bundles import Manifest
from edge_sdss.errors import BackendUnavailable, ConfigError, InputError, message
from edge_sdss.lm.chat import Chat, Encoded
from edge_sdss.lm.decoding import Generation
from edge_sdss.runtime import adapters, batch, measures, providers
from edge_sdss.runtime.adapters import ACTIVE, Adapter, Asked, Mix
from edge_sdss.runtime.chat import Tokenizer, read_json, rows_of
from edge_sdss.runtime.lane import Floats, Lane, Loaded
from edge_sdss.runtime.sampling import Sampling
from edge_sdss.runtime.stream import Embeddings, Stream
from edge_sdss.runtime.talk import Talk
from edge_sdss.runtime.writer import Pieces, Writer
from edge_sdss.types import Example, Progress, Turn, no_progress

_ROOM = 4  # a prompt keeps a quarter of the context, however long an answer is asked for


class Engine:
    """A bundle that answers. It has what selection, synthesis and measuring ask of `lm.LanguageModel`.

    `provider` is what it runs on and `provider_reason` why; `chat` turns conversations into ids; `active` is the
    adapter, by name or as names with scales, of requests that ask for no other. Not for use by several threads.
    """

    def __init__(self, folder: Path, manifest: Manifest, opened: providers.Opened) -> None:
        self.folder, self.manifest = folder, manifest
        self.provider, self.provider_reason = opened.provider, opened.reason
        self.tokenizer = Tokenizer(folder)
        self._generation = read_json(folder / "generation_config.json")
        stops = self._generation.get("eos_token_id")
        self.chat = Chat(self.tokenizer, manifest.stop_ids or (stops if isinstance(stops, list) else [stops]))
        self.active: str | Mapping[str, float] | None = manifest.active
        self._loaded = Loaded.of(opened.session, manifest, opened.device)
        self._mixes: dict[adapters.Key, Mix] = {}
        self._talk: Talk | None = None  # of the last stream, for the next turn of its chat
        self._read: Talk | None = None  # of the base model beside it, for `hidden_states`
        self.adapters: dict[str, Adapter] = {
            entry.name: adapters.read_entry(folder, entry, manifest) for entry in manifest.adapters
        }

    @classmethod
    def open(cls, bundle: Path, *, provider: str = "auto", threads: int | None = None) -> Engine:
        """Opens a bundle on a provider of `providers.PROVIDERS`, or "auto", and loads its adapters.

        Raises InputError where a file of the bundle is absent, broken or does not fit, BackendUnavailable where
        a library or the provider that was asked for is not there.
        """
        providers.library()
        manifest = bundles.load(bundle)
        if manifest.graph.static is not None:
            found, do = (
                "its graphs have fixed shapes, which the engine does not run yet",
                "see docs/npu.md for its checks",
            )
            raise BackendUnavailable(message(f"answer with the bundle {bundle}", found, do))
        opened = providers.open_session(bundle / manifest.graph.file, manifest, provider, threads)
        return cls(bundle, manifest, opened)

    # What a language model is asked for its facts

    @property
    def name(self) -> str:
        """The base model's name."""
        return self.manifest.base

    @property
    def fingerprint(self) -> str:
        """`LanguageModel.fingerprint` of the base model, whatever the graph's precision."""
        return self.manifest.base_fingerprint

    @property
    def width(self) -> int:
        """The size d of a hidden state."""
        return self.manifest.graph.width

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""
        return self.manifest.graph.context

    @property
    def inputs(self) -> frozenset[str]:
        """The names that the graph takes, those of adapters among them."""
        session = self._loaded.session
        return frozenset(value.name for value in (*session.get_inputs(), *session.get_overridable_initializers()))

    @property
    def device(self) -> SimpleNamespace:
        """`device.type` is "cpu" or "cuda"."""
        return SimpleNamespace(type=self._loaded.device)

    @cached_property
    def defaults(self) -> Sampling:
        """How the model's makers sample, by generation_config.json; greedily where it does not say."""
        return Sampling.of_makers(self._generation)

    # Adapters

    def load_adapter(self, name: str, file: Path) -> Adapter:
        """Reads an .onnx_adapter file under a name, in place of one that had it; raises what `adapters.read` does."""
        adapter = adapters.read(name, file, self.manifest)
        self.unload_adapter(name)
        self.adapters[name] = adapter
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Lets an adapter's memory go; a name that is not loaded is none."""
        if gone := self.adapters.pop(name, None):
            self._mixes = {key: mix for key, mix in self._mixes.items() if gone.serial not in dict(key)}
            if self._talk is not None and gone.serial in dict(self._talk.lane.mix.key):
                self._talk = None

    def attach(self, adapter: str | Mapping[str, float] | None) -> None:
        """Makes a loaded adapter, or a mix, the active one; None: the base model. Raises InputError for others."""
        self._mix(adapter)
        self.active = adapter

    # Answers

    def stream(
        self,
        conversation: Sequence[Turn],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: tuple[str, ...] = (),
        adapter: Asked = ACTIVE,
        embeddings: bool = False,
    ) -> Stream:
        """Answers a conversation piece by piece; for equal arguments `generate` gives the same text.

        What the KV cache of the stream before has of the prompt, under the same adapters, is not computed again.
        Old turns are left out where the context would overflow. With `embeddings` the prefill's and decode's
        hidden states are kept, see `Stream.embeddings`. Raises InputError for an unknown adapter, turns that the
        template refuses, or embeddings of a graph without; ConfigError for settings out of range.
        """
        how = Sampling(temperature, top_p, top_k, repetition_penalty)
        if embeddings:
            self._check_hidden()
        mix, prompt = self._mix(adapter), self._prompt(conversation, max_new_tokens, [])
        writer = self._writer(prompt, how, stop, np.random.default_rng([seed, 0]), max_new_tokens)
        total = len(prompt) + max_new_tokens

        def acquire() -> Talk:
            talk, self._talk = self._talk, None
            return talk if talk is not None and talk.lane.mix.key == mix.key else self._new_talk(mix, total)

        def release(talk: Talk) -> None:
            self._talk = talk

        return Stream(
            prompt, writer, acquire, release, rows_of(conversation[-1].text, prompt, self.chat) if embeddings else None
        )

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        prefix: str = "",
        stop: tuple[str, ...] = (),
        adapter: Asked = ACTIVE,
        progress: Progress = no_progress,
    ) -> list[Generation]:
        """Answers each conversation; see `LanguageModel.generate` for seeds, `prefix` and `stop`.

        Prompts are prefilled one after another, each computing only what it does not share with the one before;
        then the rows of a batch are decoded together, or one by one where the graph would not keep their positions
        apart (a growing cache without position_ids). Raises as `stream` does.
        """
        how = Sampling(temperature, top_p, top_k, repetition_penalty)
        mix = self._mix(adapter)
        opened = self.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
        prompts = [self._prompt(turns, max_new_tokens, opened) for turns in conversations]
        seeds = [[seed, row] if isinstance(seed, int) else seed[row] for row in range(len(prompts))]
        writers = [
            self._writer(prompt, how, stop, np.random.default_rng(own), max_new_tokens)
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        graph = self.manifest.graph
        together = batch_size if graph.kv_cache == "shared" or graph.position_ids else 1
        order = sorted(range(len(prompts)), key=lambda row: prompts[row], reverse=True)
        talk = self._new_talk(mix, max(map(len, prompts), default=0) + max_new_tokens)
        for start in range(0, len(order), together):
            rows = order[start : start + together]
            batch.write(talk, [prompts[row] for row in rows], [writers[row] for row in rows], max_new_tokens)
            progress("generating", start + len(rows), len(order))
        return [Generation(writer.text, writer.finished, len(writer.ids)) for writer in writers]

    def follow(self, prompt: Sequence[int], adapter: Asked = ACTIVE) -> Iterator[int]:
        """Yields the ids that follow a prompt, greedily, until the context is full or the caller stops.

        The first id costs the prompt's prefill, each further one a decode step. Raises InputError for an empty
        prompt, or one that the context cannot hold.
        """
        talk = self._new_talk(self._mix(adapter), len(prompt) + 1)
        ids: Sequence[int] = self._fitting(prompt)
        while len(talk.ids) + len(ids) <= self.context:
            token = int(talk.feed(ids).argmax())
            yield token
            ids = [token]

    # Measures

    def encode(self, example: Example, max_tokens: int) -> Encoded:
        """Returns prompt, answer and end of turn as ids; see `Chat.encode` for what is cut."""
        return self.chat.encode(example, max_tokens)

    def nll(
        self,
        examples: Sequence[Example],
        *,
        max_tokens: int | None = None,
        batch_size: int = 1,
        adapter: Asked = ACTIVE,
        progress: Progress = no_progress,
    ) -> npt.NDArray[np.float64]:
        """Returns each example's loss, [len(examples)] float64: mean nats per token of the answer and its end.

        Rows are computed one by one whatever `batch_size` says: on a small machine a batch is no faster.
        """
        limit = min(max_tokens or self.context, self.context)
        mix, losses = self._mix(adapter), np.zeros(len(examples))
        for row, example in enumerate(examples):
            encoded = self.encode(example, limit)
            losses[row] = measures.loss(self._new_talk(mix, limit), encoded.ids, encoded.prompt_tokens)
            progress("measuring loss", row + 1, len(examples))
        return losses

    def text_nll(self, text: str, adapter: Asked = ACTIVE) -> float:
        """Returns the loss of plain text: mean nats per token over its tokens 2..n, cut at the context.

        Raises InputError where the text has fewer than two tokens.
        """
        ids = self.tokenizer(self.chat.plain(text))["input_ids"][: self.context]
        if len(ids) < 2:
            raise InputError(message("measure a text", f"it has {len(ids)} token(s)", "give a longer one"))
        return measures.loss(self._new_talk(self._mix(adapter), len(ids)), ids, 1)

    def logits(self, ids: Sequence[int], adapter: Asked = ACTIVE) -> Floats:
        """Returns the logits at each position, [n, V] float32, for comparing with another implementation."""
        talk = self._new_talk(self._mix(adapter), len(ids))
        return np.concatenate([part.copy() for _, part in measures.logits(talk, self._fitting(ids), 0)])

    def token_embeddings(self, text: str, max_tokens: int) -> Floats:
        """Returns E(T), the base model's last hidden states after the final norm: [n, d] float32.

        As `LanguageModel.token_embeddings`, whatever adapter is active. A forward pass of its own: see
        `Stream.embeddings` for those that an answer yields anyhow. Raises InputError where the text has no token,
        or the graph gives no hidden states.
        """
        self._check_hidden()
        ids, rows = self.tokenizer.cut(self.chat.plain(text), min(max_tokens, self.context))
        if not rows:
            raise InputError(message("embed a text", "it is empty", "give one with at least one word"))
        return self.hidden_states(ids)[rows]

    def embed(self, conversation: Sequence[Turn], answer: str, max_tokens: int) -> Embeddings:
        """Returns what a stream that gives this answer has at its end, by one prefill of the base model.

        Prompt and answer are cut to `max_tokens` as `Chat.encode` says. Raises InputError where the graph gives no
        hidden states, or the template refuses the turns.
        """
        encoded = self.encode(Example(tuple(conversation), answer), min(max_tokens, self.context))
        ids, prompt = encoded.ids, encoded.ids[: encoded.prompt_tokens]
        if len(ids) > len(prompt) and ids[-1] == self.chat.end_of_turn:  # a stream ends with it, and never feeds it
            ids = ids[:-1]
        asked = rows_of(conversation[-1].text, prompt, self.chat)
        return Embeddings(self.hidden_states(ids), tuple(ids), len(prompt), asked, {})

    def hidden_states(self, ids: Sequence[int], *, follows: bool = False) -> Floats:
        """Returns the base model's last hidden states of ids as they are, after the final norm: [n, d] float32.

        `follows`: they go on from those of the call before, whose beginning is then not computed again; its KV cache is
        held for that. Raises InputError where there are none, more than the context holds, or the graph gives none.
        """
        self._check_hidden()
        ids = self._fitting(ids)
        talk = self._read if follows else None
        if talk is None or talk.broken:
            talk = self._new_talk(self._mix(None), len(ids))
        talk.feed(ids[talk.reuse(ids) :])
        self._read = talk if follows else self._read
        return talk.states

    # Inside

    def _prompt(self, turns: Sequence[Turn], max_new_tokens: int, opened: list[int]) -> list[int]:
        if max_new_tokens < 1:
            raise ConfigError(message("set max_new_tokens", f"it is {max_new_tokens}", "give at least 1"))
        room = max(self.context - max_new_tokens, self.context // _ROOM, 1 + len(opened))
        return [*self.chat.prompt_ids(turns, room - len(opened)), *opened]

    def _writer(
        self, prompt: list[int], how: Sampling, stop: tuple[str, ...], draws: np.random.Generator, limit: int
    ) -> Writer:
        if not all(stop):
            raise ConfigError(message("set stop", "a stop string is empty", "give texts"))

        def decode(ids: Sequence[int]) -> str:
            return self.tokenizer.decode(ids, skip_special_tokens=True)

        pieces = Pieces(decode, stop, strip=not self.tokenizer.chat_template)
        return Writer(pieces, how, self.chat.stop_ids, prompt, draws, min(limit, self.context - len(prompt)))

    def _new_talk(self, mix: Mix, capacity: int) -> Talk:
        return Talk(Lane.empty(self._loaded, mix, capacity))

    def _mix(self, asked: Asked) -> Mix:
        if asked is ACTIVE:
            asked = self.active
        scales = {asked: 1.0} if isinstance(asked, str) else dict(asked or {})
        for name in scales:
            if name not in self.adapters:
                found = f"there are {', '.join(sorted(self.adapters)) or 'none'}"
                raise InputError(message(f"use adapter {name}", found, "load it, or give another"))
        parts = {name: (self.adapters[name], adapters.check_scale(name, scale)) for name, scale in scales.items()}
        mix = Mix(parts, self.manifest.graph, self._loaded.device)
        if mix.key not in self._mixes:  # tensors of one adapter are bound as they are; of others one set is kept
            self._mixes = {key: one for key, one in self._mixes.items() if one.borrowed or mix.borrowed}
        return self._mixes.setdefault(mix.key, mix)

    def _fitting(self, ids: Sequence[int]) -> Sequence[int]:
        if not 0 < len(ids) <= self.context:
            found = f"it has {len(ids)} tokens, the context {self.context}"
            raise InputError(message("feed the model", found, "give at least one, and no more than that"))
        return ids

    def _check_hidden(self) -> None:
        if not self.manifest.graph.hidden_states:
            found = "its graph gives no hidden states"
            raise InputError(message(f"embed with bundle {self.folder}", found, "export it with embeddings"))
