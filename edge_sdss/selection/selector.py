"""One offer: score a dialogue, ask the policy, decide. Knows nothing of the model or the store.

Source: "Enabling On-Device Large Language Model Personalization with Self-Supervised Data Selection
and Synthesis" (arXiv 2311.12275), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss import backends, config
from edge_sdss.errors import BudgetExceeded, InputError, message
from edge_sdss.lexicon import Lexicon
from edge_sdss.selection import policies
from edge_sdss.selection.buffer import Buffer, entry_bytes
from edge_sdss.selection.memory import Memory
from edge_sdss.types import Decision, Dialogue, Exemplar, Scores


@dataclass(frozen=True)
class Candidate:
    """What a policy sees of an offer. `draws` is the generator of this offer alone.

    `memory` is of the stream before this offer; None where the policy asks for none. So is `value`, then 0.
    """

    seq: int
    scores: Scores
    domain: str
    words: int
    vector: npt.NDArray[np.float32]
    seed: int
    memory: Memory | None = None
    value: float = 0.0

    @cached_property
    def draws(self) -> np.random.Generator:
        """Counter-based (Philox): seed and offer number are its whole state, so a resumed stream goes on exactly."""
        return _draws(self.seed, self.seq)


class Selector:
    """Offers go in, decisions come out: `decide` changes nothing, `apply` carries a decision out."""

    def __init__(
        self,
        settings: config.Selection,
        buffer: Buffer,
        lexicon: Lexicon,
        *,
        device: str = "cpu",
        offers: int = 0,
    ) -> None:
        """`offers` is the number of offers already made, for a stream that goes on.

        Raises BudgetExceeded where what the policy remembers would fill the buffer's bytes alone.
        """
        self.settings = settings
        self.buffer = buffer
        self.lexicon = lexicon
        self.offers = offers
        self.forgotten: set[str] = set()
        self._policy = policies.load(settings.policy)
        self.asks: str | None = getattr(self._policy, "ASKS", None)
        self.memory = Memory(buffer.codec) if getattr(self._policy, "REMEMBERS", False) else None
        buffer.reserved = self.memory.max_bytes if self.memory else 0
        if buffer.reserved >= buffer.max_bytes:
            found = f"it remembers {buffer.reserved:,} bytes of the stream, the buffer has {buffer.max_bytes:,} in all"
            raise BudgetExceeded(message(f"use policy {settings.policy}", found, "give more, or another policy"))
        self._backend = backends.load(settings.backend, device)

    def offer(self, dialogue: Dialogue, tokens: Any, value: float | None = None) -> Decision:
        """Decides and applies. tokens: [n, d] float, the token embeddings E(T) of `scored_text`.

        value: what the policy `asks` for, as `surprise.of` gives it.
        """
        decision = self.decide(dialogue, tokens, value)
        self.apply(decision)
        return decision

    def scored_text(self, dialogue: Dialogue) -> str:
        """The text whose embeddings and words are scored."""
        return dialogue.prompt if self.settings.text == "prompt" else dialogue.text

    def decide(self, dialogue: Dialogue, tokens: Any, value: float | None = None) -> Decision:
        """Scores the dialogue and says what becomes of it.

        Raises InputError for non-finite embeddings, or where the policy asks for a value and there is none.
        """
        if self.asks and (value is None or not math.isfinite(value)):
            found = f"policy {self.settings.policy} asks for its {self.asks}, which is {value}"
            raise InputError(message(f"select dialogue {dialogue.id}", found, "give it, or use another policy"))
        candidate, exemplar = self._score(dialogue, tokens, value or 0.0)
        remembered = self._remembered(candidate, exemplar)
        need = entry_bytes(dialogue, self.buffer.codec.row_bytes)
        slots, reason = self._place(dialogue.id, need, candidate)
        if slots is None:
            return Decision(
                candidate.seq,
                dialogue.id,
                "dropped",
                candidate.domain,
                candidate.scores,
                reason,
                remembered=remembered,
            )
        evicted = {slot: self.buffer.entries[slot].dialogue.id for slot in slots}
        slot = slots[0] if slots else self.buffer.free_slot()
        return Decision(
            candidate.seq,
            dialogue.id,
            "kept",
            candidate.domain,
            candidate.scores,
            reason,
            slot,
            evicted,
            exemplar,
            remembered,
        )

    def apply(self, decision: Decision) -> None:
        """Carries a decision out, in the order of the stream."""
        self.offers = decision.seq
        for slot in decision.evicted:
            self.buffer.remove(slot)
        if decision.exemplar is not None and decision.slot is not None:
            self.buffer.put(decision.slot, decision.exemplar)
        if self.memory is not None:
            self.memory.update(decision.remembered)

    def recall(self, parts: Mapping[str, bytes]) -> None:
        """Takes up what the policy remembered of the stream, as it was stored."""
        if self.memory is not None:
            self.memory.update(parts)

    def restart_memory(self) -> dict[str, bytes]:
        """Makes what is kept now all that the policy remembers of the stream; returns the parts to store."""
        if self.memory is None:
            return {}
        codes = [self.buffer.entries[slot].vector for slot in sorted(self.buffer.entries)]
        return self.memory.restart(codes, _draws(self.settings.seed, self.offers, use=1))

    def rescored(self, exemplar: Exemplar, tokens: Any) -> Exemplar:
        """Returns the exemplar with the EOE and the vector of other token embeddings; nothing is decided."""
        _, found = self._score(exemplar.dialogue, tokens, exemplar.value)
        return replace(exemplar, eoe=found.eoe, vector=found.vector)

    def _score(self, dialogue: Dialogue, tokens: Any, value: float) -> tuple[Candidate, Exemplar]:
        offsets = np.array([0, len(tokens)], dtype=np.int64)
        eoe = float(self._backend.entropy(tokens, offsets, self.settings.eoe)[0])
        unit = self._backend.pool(tokens, offsets, self.settings.pooling)[0]
        if not math.isfinite(eoe + float(np.dot(unit, unit))):
            do = "check the model, or load it with --dtype float32"
            raise InputError(message(f"score dialogue {dialogue.id}", "the embeddings are not finite", do))
        code, vector = self.buffer.codec.encode(unit)  # judged as it would be stored
        hits = self.lexicon.hits(self.scored_text(dialogue))
        scores = Scores(eoe, hits.dss, self._idd(vector, hits.domain))
        seq = self.offers + 1
        candidate = Candidate(seq, scores, hits.domain, hits.words, vector, self.settings.seed, self.memory, value)
        return candidate, Exemplar(dialogue, code.tobytes(), hits.domain, eoe, hits.dss, hits.words, seq, value=value)

    def _remembered(self, candidate: Candidate, exemplar: Exemplar) -> dict[str, bytes]:
        """What the policy's memory takes from an offer. What the user asked to forget leaves nothing."""
        if self.memory is None or exemplar.dialogue.id in self.forgotten:
            return {}
        code = np.frombuffer(exemplar.vector, np.uint8)
        return self.memory.after(code, _draws(candidate.seed, candidate.seq, use=1))

    def _idd(self, vector: npt.NDArray[np.float32], domain: str) -> float:
        mean = self.buffer.mean(domain)
        return 1.0 if mean is None else float(self._backend.dissimilarity(vector[None], mean[None])[0])

    def _place(self, dialogue_id: str, need: int, candidate: Candidate) -> tuple[Sequence[int] | None, str]:
        """The bins to empty for the candidate (none where there is room), or None; and the reason."""
        buffer = self.buffer
        if dialogue_id in buffer:
            return None, "the identical dialogue is kept already"
        if dialogue_id in self.forgotten:
            return None, "the user asked to forget it"
        if need > buffer.max_entry_bytes:
            return None, f"larger than a bin: {need:,} of {buffer.max_entry_bytes:,} bytes"
        if buffer.fits(need):
            return (), "there was room"
        gone: list[int] = []
        for slot in self._policy.replaceable(candidate, buffer):
            gone.append(int(slot))
            if buffer.fits(need, gone):
                return gone, f"replaced {len(gone)}: {self._policy.KEPT}"
        if gone:
            return None, f"the {len(gone)} entries it may replace free too few bytes for its {need:,}"
        return None, self._policy.DROPPED


def _draws(seed: int, seq: int, use: int = 0) -> np.random.Generator:
    """The generator of one offer, counter-based; each use of it has its own."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[use, 0, 0, seq]))
