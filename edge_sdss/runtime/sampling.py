"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in that order.

Knows nothing of text or of how the logits were made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ConfigError, message

Logits = npt.NDArray[np.float32]

_NEAR = 10.0  # most tokens that count have logits so near the highest: then not all need be sorted


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; greedily where `temperature` is 0.

    `top_k` keeps the k most probable tokens (0: all); `top_p` the smallest set of the most probable of those with
    at least that mass (nucleus sampling, Holtzman et al., arXiv 1904.09751). `repetition_penalty` divides the
    positive and multiplies the negative logits of tokens that the prompt or the answer has (Keskar et al., arXiv
    1909.05858). Raises ConfigError where a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, do in (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "give a number from 0"),
            ("top_p", 0 < self.top_p <= 1, "give a number above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "give 0 for all tokens or how many are kept"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "give a number above 0; 1 changes nothing"),
        ):
            if not good:
                raise ConfigError(message(f"set {name}", f"it is {getattr(self, name)}", do))

    @classmethod
    def of_makers(cls, generation: Mapping[str, Any]) -> Sampling:
        """Returns what a model's generation_config.json says; greedily where it does not say to sample."""
        says = {key: value for key, value in generation.items() if value is not None}
        penalty = float(says.get("repetition_penalty") or 1.0)
        if not says.get("do_sample", False):
            return cls(repetition_penalty=penalty)
        temperature, top_p = (float(says.get(name, 1.0)) for name in ("temperature", "top_p"))
        return cls(temperature, top_p, int(says.get("top_k", 0)), penalty)


def choose(logits: Logits, how: Sampling, seen: Collection[int], draw: float) -> int:
    """Returns the next token. logits: [V] float32, left as they are; `draw`: uniform in [0, 1).

    The draw is looked up in the cumulated probabilities in order of token id.
    """
    scores = penalised(logits, seen, how.repetition_penalty) if how.repetition_penalty != 1 else logits
    if how.temperature == 0:
        return int(scores.argmax())
    tokens, probabilities = distribution(scores, how)
    cumulated = probabilities.cumsum(dtype=np.float64)
    at = int(np.searchsorted(cumulated, draw * cumulated[-1], side="right"))
    return int(tokens[min(at, len(tokens) - 1)])


def penalised(logits: Logits, seen: Collection[int], penalty: float) -> Logits:
    """Returns a copy, [V], in which the tokens that were seen are less probable."""
    scores = logits.copy()
    at = np.fromiter(seen, dtype=np.int64, count=len(seen))
    scores[at] = np.where(scores[at] < 0, scores[at] * penalty, scores[at] / penalty)
    return scores


def distribution(scores: Logits, how: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Returns the tokens that may be chosen, ascending, and their weights, [k] float32, which need not sum to 1."""
    tokens: npt.NDArray[Any] = np.arange(len(scores))
    if 0 < how.top_k < len(scores):
        near = scores[scores > scores.max() - _NEAR]
        near = near if len(near) >= how.top_k else scores
        tokens = np.flatnonzero(scores >= np.partition(near, -how.top_k)[-how.top_k])
        scores = scores[tokens]
    weights = np.exp((scores - scores.max()) / np.float32(how.temperature))
    weights /= weights.sum()
    if how.top_p < 1:
        kept = _nucleus(weights, how.top_p)
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def _nucleus(probabilities: npt.NDArray[np.float32], top_p: float) -> npt.NDArray[np.int64]:
    """The indices, ascending, of the smallest set of the most probable with at least that mass."""
    ranked = np.sort(probabilities[probabilities > probabilities.max() * math.exp(-_NEAR)])[::-1]
    if ranked.sum() < top_p:
        ranked = np.sort(probabilities)[::-1]
    count = int(np.count_nonzero(ranked.cumsum(dtype=np.float64) - ranked < top_p))
    kept = np.flatnonzero(probabilities >= ranked[count - 1])
    if len(kept) > count:  # of equals the later ones are left out
        equal = np.flatnonzero(probabilities[kept] == ranked[count - 1])
        kept = np.delete(kept, equal[count - len(kept) :])
    return kept
