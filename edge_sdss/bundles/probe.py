"""What a reference computes with an adapter, in a few kilobytes: the device has no torch to ask.

Knows nothing of what is compared with it; see `checks`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edge_sdss.errors import InputError, message

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Asked: TypeAlias = str | Mapping[str, float] | None
    """An adapter's name, its name with a factor for its effect, or None for the base."""

    Logits: TypeAlias = Callable[[Sequence[int], Asked], NDArray[np.floating]]
    """(ids [n], what is asked for) -> logits [n, V], or [1, V] where the graph gives the last position alone; a
    leading axis of length 1 is no matter. Who gives no factors must not be asked of adapters of little effect."""

PROBE = "edge_sdss_probe.npz"
"""The file's name in a PEFT folder."""

CLEAR = 0.25
"""The effect, as a part of the base's logits in the 2-norm, from which on rounding does not hide what it is."""

_POSITIONS, _TOP, _SPREAD = 8, 48, 80
_TRIES, _STEP = 8, 16.0
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
    """What the reference said, for one base and the adapter whose adapter_model.safetensors has this SHA-256.

    `scale` is the factor that the adapter had, beyond its own: one of little effect is judged amplified.
    """

    base_fingerprint: str
    source_sha256: str
    samples: tuple[Sample, ...]
    scale: float = 1.0


def take(
    logits: Logits, adapter: str, prompts: Sequence[Sequence[int]], *, base_fingerprint: str, source_sha256: str
) -> Probe:
    """Returns a probe from the reference `logits`, float32 if possible: PEFT on the model as it was trained.

    A handful of prompts as users write them, of 16 to 64 tokens each, is enough; the last position is always used.
    Where the adapter's effect on the first is less than `CLEAR`, it is amplified until it is not.
    """
    scale = 1.0
    for _ in range(_TRIES):
        effect = _effect(_sample(logits, adapter, scale, prompts[0]))
        if effect == 0 or effect >= CLEAR:
            break
        scale *= min(1.05 * CLEAR / effect, _STEP)
    samples = tuple(_sample(logits, adapter, scale, prompt) for prompt in prompts)
    return Probe(base_fingerprint, source_sha256, samples, scale)


def centred(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns logits [..., V] without the mean over the last axis, which no probability depends on."""
    values = logits.astype(np.float64)
    result: NDArray[np.float64] = values - values.mean(-1, keepdims=True)
    return result


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
            np.savez_compressed(stream, made_of=made_of, scale=np.float64(probe.scale), **arrays)
    except OSError as error:
        raise InputError(message(f"write {file}", error.strerror or "failed", "free space")) from error


def read(file: Path) -> Probe:
    """Reads a probe. Raises InputError where the file is none."""
    asked, do = f"read the probe {file}", "make it anew where the adapter was trained"
    try:
        with np.load(file, allow_pickle=False) as found:
            base, source = (str(text) for text in found["made_of"])
            scale = float(found["scale"])
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
    return Probe(base, source, samples, scale)


def asked(adapter: str, scale: float) -> Asked:
    """Returns what `Logits` is asked for: an adapter as it is, or amplified."""
    return adapter if scale == 1 else {adapter: scale}


def _sample(logits: Logits, adapter: str, scale: float, prompt: Sequence[int]) -> Sample:
    ids = np.asarray(prompt, np.int64)
    base, adapted = rows(logits(prompt, None)), rows(logits(prompt, asked(adapter, scale)))
    positions = np.unique(np.linspace(len(ids) // 2, len(ids) - 1, _POSITIONS).astype(np.int64))
    top = (np.argsort(-array[-1], kind="stable")[: _TOP // 2] for array in (base, adapted))
    spread = np.linspace(0, base.shape[1] - 1, _SPREAD).astype(np.int64)
    tokens = np.unique(np.concatenate([*top, spread]))
    values = (array[np.ix_(positions, tokens)].astype(np.float32) for array in (base, adapted))
    return Sample(ids, positions, tokens, *values)


def _effect(sample: Sample) -> float:
    """|adapted − base| / |base| of a sample, in the 2-norm; rounding adds about the base's own error to it."""
    base = centred(sample.base)
    return float(np.linalg.norm(centred(sample.adapted) - base)) / max(float(np.linalg.norm(base)), 1e-30)
