"""E(T) of a set's dialogues, computed once and mapped from the disk. Knows nothing of scores."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from quality.cache import Cache
from quality.protocol import digest

from edge_sdss import config, embedding
from edge_sdss.errors import InputError, message
from edge_sdss.lm import LanguageModel
from edge_sdss.types import Dialogue, Progress

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """`rows[a:b]` are a dialogue's token embeddings, float16 on the disk. `seconds`: what one took on average."""

    rows: npt.NDArray[np.float16]
    spans: Mapping[str, tuple[int, int]]
    seconds: float

    def of(self, dialogue: Dialogue) -> Rows:
        """Returns E(T), [n, d] float32."""
        start, end = self.spans[dialogue.id]
        return np.asarray(self.rows[start:end], np.float32)


def load(
    cache: Cache, lm: LanguageModel, dialogues: Sequence[Dialogue], settings: config.Config, progress: Progress
) -> Embeddings:
    """Returns the embeddings of the dialogues, from the cache where these were embedded before.

    float16 holds what a bfloat16 model computes exactly, but for values under 6e-5. Raises InputError where it
    does not hold a value.
    """
    unique = {d.id: d for d in dialogues}
    asked = [lm.fingerprint, settings.model.model_dump(), settings.selection.text, sorted(unique)]

    def make(folder: Path) -> None:
        began, offsets, parts = time.perf_counter(), [0], []
        for done, dialogue in enumerate(unique.values(), start=1):
            tokens: Any = embedding.of(lm, dialogue, settings)
            parts.append(tokens.cpu().numpy().astype(np.float16))
            offsets.append(offsets[-1] + len(tokens))
            progress("embedding", done, len(unique))
        rows = np.concatenate(parts)
        if not np.isfinite(rows).all():
            raise InputError(message("keep the embeddings in float16", "some are too large", "use another model"))
        np.save(folder / "rows.npy", rows)
        facts = {
            "spans": dict(zip(unique, pairwise(offsets), strict=True)),
            "seconds": (time.perf_counter() - began) / len(unique),
        }
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    folder, _ = cache.once(f"embeddings/{digest(asked)[:24]}", make)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Embeddings(np.load(folder / "rows.npy", mmap_mode="r"), facts["spans"], facts["seconds"])
