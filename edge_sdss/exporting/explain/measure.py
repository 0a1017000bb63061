"""How far two values of one tensor are apart. Knows nothing of graphs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdss.exporting.explain.graph import Array

_SEEN = 30.0  # e^-30 of a row's largest weight: what lies further below its greatest logit has no weight in a Softmax
_ROWS = 0.9


@dataclass(frozen=True)
class Difference:
    """Of one tensor at two stages.

    `error`: ‖candidate - reference‖ / ‖reference‖ over all, or over each row of the last axis the 90th percentile,
    whichever is greater: a few rows with large values hide what happens to all the others in the first, and a few
    wrong rows among many are not seen in the second. Infinite where a value is not a number, or the shapes differ.
    """

    error: float
    reference_range: tuple[float, float]
    candidate_range: tuple[float, float]
    nonfinite: float = 0.0
    note: str = ""


def difference(reference: Array, candidate: Array, *, logits: bool = False) -> Difference:
    """Compares two arrays of one shape. `logits`: both go into a Softmax over the last axis, and are compared as it
    sees them: relative to their row's greatest, and no further below than has weight."""
    ranges = _range(reference), _range(candidate)
    if reference.size != candidate.size:
        return Difference(np.inf, *ranges, note=f"shape {candidate.shape}, not {reference.shape}")
    a, b = reference.astype(np.float64), candidate.astype(np.float64).reshape(reference.shape)
    if logits:
        a, b = seen(a), seen(b)
    bad = ~np.isfinite(b) & np.isfinite(a)
    if bad.any():
        return Difference(np.inf, *ranges, nonfinite=float(bad.mean()), note="values that are no numbers")
    both = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
    return Difference(max(relative(a, b), _by_row(a, b)), *ranges)


def seen(logits: Array) -> Array:
    """Returns logits as a Softmax over the last axis sees them: from -30 to 0 below their row's greatest."""
    with np.errstate(invalid="ignore"):
        shifted = logits - np.max(logits, -1, keepdims=True)
    # a row that is -inf throughout gives NaN in a Softmax, and here
    result: Array = np.maximum(shifted, -_SEEN)
    return result


def relative(reference: Array, candidate: Array) -> float:
    """Returns ‖candidate - reference‖ / ‖reference‖, 0 where both are nothing."""
    apart, size = float(np.linalg.norm(candidate - reference)), float(np.linalg.norm(reference))
    if not apart:
        return 0.0
    return apart / size if size else np.inf


def _by_row(reference: Array, candidate: Array) -> float:
    rows = reference.reshape(-1, reference.shape[-1]) if reference.ndim else reference.reshape(1, 1)
    if len(rows) < 2 or rows.shape[-1] < 2:
        return 0.0
    size = np.linalg.norm(rows, axis=-1)
    apart = np.linalg.norm(candidate.reshape(rows.shape) - rows, axis=-1)
    floor = 1e-3 * float(np.median(size))  # a row of almost nothing is not to be met to a share of it
    known = size + floor > 0
    return float(np.quantile(apart[known] / (size + floor)[known], _ROWS)) if known.any() else 0.0


def _range(values: Array) -> tuple[float, float]:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
