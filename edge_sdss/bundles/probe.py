"""What a reference computes with an adapter, in a few kilobytes: the device has no torch to ask.

Knows nothing of what is compared with it; see `checks`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edge_sdss.errors import InputError, message

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Logits: TypeAlias = Callable[[Sequence[int], str | None], NDArray[np.floating]]
    """(ids [n], an adapter's name or None for the base) -> logits [n, V], or [1, V] where the graph gives the last
    position alone; a leading axis of length 1 is no matter."""

PROBE = "edge_sdss_probe.npz"
"""The file's name in a PEFT folder."""

_POSITIONS, _TOP, _SPREAD = 8, 48, 80
_FIELDS = ("ids", "positions", "tokens", "base", "adapted")


@dataclass(frozen=True)
class Sample:
    """One prompt: `ids` [n] int64; of its logits those at `positions` [p] for `tokens` [k] of the vocabulary.

    `base` and `adapted` [p, k] float32. The tokens are the likeliest of both, and others spread over the vocabulary.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    base: NDArray[np.float32]
    adapted: NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """What the reference said, for one base and the adapter whose adapter_model.safetensors has this SHA-256."""

    base_fingerprint: str
    source_sha256: str
    samples: tuple[Sample, ...]


def take(
    logits: Logits, adapter: str, prompts: Sequence[Sequence[int]], *, base_fingerprint: str, source_sha256: str
) -> Probe:
    """Returns a probe from the reference `logits`, float32 if possible: PEFT on the model as it was trained.

    A handful of prompts as users write them, of 16 to 64 tokens each, is enough; the last position is always used.
    """
    samples = []
    for prompt in prompts:
        ids = np.asarray(prompt, np.int64)
        base, adapted = rows(logits(prompt, None)), rows(logits(prompt, adapter))
        positions = np.unique(np.linspace(len(ids) // 2, len(ids) - 1, _POSITIONS).astype(np.int64))
        top = (np.argsort(-array[-1], kind="stable")[: _TOP // 2] for array in (base, adapted))
        spread = np.linspace(0, base.shape[1] - 1, _SPREAD).astype(np.int64)
        tokens = np.unique(np.concatenate([*top, spread]))
        values = (array[np.ix_(positions, tokens)].astype(np.float32) for array in (base, adapted))
        samples.append(Sample(ids, positions, tokens, *values))
    return Probe(base_fingerprint, source_sha256, tuple(samples))


def rows(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Returns logits [n, V], whether a batch of one was around them or not."""
    return logits[0] if logits.ndim == 3 and len(logits) == 1 else logits


def write(file: Path, probe: Probe) -> None:
    """Writes a probe. Raises InputError where the file cannot be written."""
    arrays = {f"{i}.{field}": getattr(s, field) for i, s in enumerate(probe.samples) for field in _FIELDS}
    made_of = np.array([probe.base_fingerprint, probe.source_sha256])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            np.savez_compressed(stream, made_of=made_of, **arrays)
    except OSError as error:
        raise InputError(message(f"write {file}", error.strerror or "failed", "free space")) from error


def read(file: Path) -> Probe:
    """Reads a probe. Raises InputError where the file is none."""
    asked, do = f"read the probe {file}", "make it anew where the adapter was trained"
    try:
        with np.load(file, allow_pickle=False) as found:
            base, source = (str(text) for text in found["made_of"])
            count = sum(name.endswith(".ids") for name in found.files)
            samples = tuple(Sample(*(found[f"{i}.{field}"] for field in _FIELDS)) for i in range(count))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(message(asked, f"it is none, {type(error).__name__}: {error}", do)) from error
    for sample in samples:
        shape = (len(sample.positions), len(sample.tokens))
        inside = len(sample.ids) > sample.positions.max(initial=-1) and sample.positions.min(initial=0) >= 0
        if not inside or sample.base.shape != shape or sample.adapted.shape != shape or 0 in shape:
            raise InputError(message(asked, "its arrays do not fit each other", do))
    if not samples:
        raise InputError(message(asked, "it has no prompt", do))
    return Probe(base, source, samples)
