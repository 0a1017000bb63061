"""A seeded stream of made-up dialogues with embeddings, for tests that need no model."""

from __future__ import annotations

import numpy as np

from edge_sdss import config
from edge_sdss.lexicon import Lexicon
from edge_sdss.selection import Buffer, Selector
from edge_sdss.types import Dialogue

WIDTH = 40
LEXICON = Lexicon(
    {
        "animals": ["cat", "dog", "guinea pig"],
        "food": ["soup", "bread", "salt"],
        "work": ["roof", "hammer", "nail"],
    }
)
_WORDS = [
    "cat",
    "dog",
    "guinea",
    "pig",
    "soup",
    "bread",
    "salt",
    "roof",
    "hammer",
    "nail",
    *"a of the to it".split(),
]


class Stream:
    """Dialogues on one of four subjects each, with token embeddings around the subject's direction."""

    def __init__(self, seed: int, words: int = 12) -> None:
        self._draws = np.random.default_rng(seed)
        self._subjects = np.random.default_rng(0).normal(size=(4, WIDTH))
        self._words = words

    def take(self, n: int):
        for i in range(n):
            n_words = int(self._draws.integers(2, 2 * self._words))
            text = " ".join(self._draws.choice(_WORDS, n_words))
            spread = self._draws.uniform(0.1, 2, size=(n_words, 1))
            rows = self._subjects[i % 4] + spread * self._draws.normal(size=(n_words, WIDTH))
            yield Dialogue(f"{i} {text}", text), rows.astype(np.float32)


class Valued(Selector):
    """A selector that finds the value that its policy asks for: made up, equal for equal dialogues."""

    def decide(self, dialogue, tokens, value=None):
        made_up = sum(dialogue.prompt.encode()) % 97 / 10 if self.asks else None
        return super().decide(dialogue, tokens, made_up if value is None else value)


def make_selector(policy="sdss", offers=0, eoe="centered", seed=0, **buffer) -> Selector:
    settings = config.Selection(policy=policy, eoe=eoe, seed=seed)
    return Valued(settings, Buffer(config.Buffer(**buffer), WIDTH), LEXICON, offers=offers)
