"""Made-up dialogues for a session with the tiny model, as files and records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edge_sdss.config import Config
from edge_sdss.types import Dialogue

_SUBJECTS = [
    "cat",
    "dog",
    "soup",
    "bread",
    "doctor",
    "pain",
    "music",
    "train",
    "money",
    "garden",
    "school",
    "phone",
]
_WORDS = "the a of to my is not so very I you we old new small green fast slow today again please".split()


def dialogues(n: int, seed: int = 0) -> list[Dialogue]:
    """n dialogues, a third of them near-empty small talk; every one has a preferred response."""
    draws = np.random.default_rng(seed)
    made = []
    for i in range(n):
        if i % 3 == 0:
            made.append(Dialogue(f"hello {i}", "hello", preferred="hello", source=f"talk:{i}"))
            continue
        subject = draws.choice(_SUBJECTS)
        text = " ".join(draws.choice(_WORDS, draws.integers(3, 14)))
        wanted = f"the {subject} is {draws.choice(_WORDS)}"
        made.append(
            Dialogue(f"{i} what of my {subject} {text}", f"{subject} {text}", preferred=wanted, source=f"talk:{i}")
        )
    return made


def write(path: Path, n: int, seed: int = 0) -> Path:
    """The same as a JSONL file."""
    fields = ("prompt", "response", "preferred")
    lines = [json.dumps({f: getattr(d, f) for f in fields}) for d in dialogues(n, seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def settings(tiny: Path, **sections: dict) -> Config:
    """Settings under which a whole round with the tiny model takes about a second."""
    quick = {
        "model": {"name": str(tiny), "device": "cpu"},
        "buffer": {"bins": 8},
        "synthesis": {
            "variants": 1,
            "max_new_tokens": 8,
            "min_rouge1": 0.0,
            "max_rouge1": 1.0,
            "temperature": 1.0,
        },
        "tuning": {"epochs": 2, "batch_size": 2, "rank": 2, "max_tokens": 128, "checkpoint_every": 2},
        "gate": {"max_forgetting": 100.0},
        "evaluation": {"rouge_items": 2, "max_new_tokens": 4, "max_items": 10},
    }
    return Config().override({key: {**quick.get(key, {}), **sections.get(key, {})} for key in {*quick, *sections}})
