"""Causes that lie in what stands where in a decoder: rows of the KV cache, rotations of positions.

Each returns what shows it, or None.
"""

from __future__ import annotations

import numpy as np

from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.graph import Array
from edge_sdss.exporting.explain.suspects import Cause, Suspect


def wrong_kv_position(suspect: Suspect) -> Cause | None:
    """Rows stand where other rows belong, or queries and keys are rotated by another position's angle.

    A rotation is a sum of two products, of which one is found first, so what follows is looked at too.
    """
    for name in (suspect.tensor, *suspect.topology.below(suspect.tensor, 3)):
        if name not in suspect.values:
            continue
        reference, candidate = (array.astype(np.float64) for array in suspect.values[name])
        if reference.ndim != 4 or reference.shape != candidate.shape:  # [1, heads, positions, head_dim]
            continue
        evidence = _moved(reference, candidate, suspect.limit) or _rotated(reference, candidate, suspect.limit)
        if evidence:
            remedy = "count positions, mask and the slot written in the cache from one origin: the tokens in the past"
            return Cause("wrong KV position", (f"{name}: {evidence}",), remedy)
    return None


def moved_rows(suspect: Suspect) -> Cause | None:
    """Rows of a tensor that is no cache stand where others belong, though what it is made of is right."""
    reference, candidate = suspect.pair
    if reference.ndim not in (2, 3):
        return None
    evidence = _moved(reference, candidate, suspect.limit)
    remedy = "compile it with another shape or soc_model, or leave the node in float; send the graph to the provider"
    return Cause("rows in the wrong place", (evidence,), remedy) if evidence else None


def _moved(reference: Array, candidate: Array, limit: float) -> str:
    """Says which rows [..., row, width] stand elsewhere, where most of the wrong ones do; else nothing."""
    a, b = (np.moveaxis(one, -2, 0).reshape(one.shape[-2], -1) for one in (reference, candidate))
    size = np.linalg.norm(a, axis=1)
    size = np.maximum(size, 1e-30)
    wrong = np.flatnonzero(np.linalg.norm(b - a, axis=1) > limit * size)
    rows = [int(row) for row in wrong if np.linalg.norm(b[row]) > 0]
    moves = []
    for row in rows:
        apart = np.linalg.norm(a - b[row], axis=1) / size
        apart[row] = np.inf
        if apart.min() <= limit and (apart <= limit).sum() == 1:
            moves.append((row, int(apart.argmin())))
    if not moves or len(moves) < max(1, len(rows) / 2):
        return ""
    steps = {here - there for here, there in moves}
    text = ", ".join(f"{here} holds what belongs at {there}" for here, there in moves[:3])
    all_by = f"; all {len(moves)} by {steps.pop():+d}" if len(steps) == 1 and len(moves) > 1 else ""
    return f"of {len(rows)} wrong positions {len(moves)} hold another's row: {text}{all_by}"


def _rotated(reference: Array, candidate: Array, limit: float) -> str:
    """Says by which angle pairs of dimensions are turned, where it is one angle for all rows and nothing else; a rotary
    embedding turns the first pair by one radian a position (arXiv 2104.09864, section 3.2.2)."""
    width = reference.shape[-1]
    if width < 4 or width % 2:
        return ""
    for halves in (True, False):  # how the pairs lie: i and i + width/2, or 2i and 2i + 1
        a, b = (_complex(one, halves) for one in (reference, candidate))
        if measure.relative(np.abs(a), np.abs(b)) > limit:
            continue
        turned = (b * a.conj()).reshape(-1, a.shape[-1])
        mean = turned.sum(0) / np.maximum(np.abs(turned).sum(0), 1e-30)
        if np.abs(mean[0]) < 0.99 or measure.relative(a * mean / np.maximum(np.abs(mean), 1e-30), b) > max(limit, 0.05):
            continue
        angles = np.angle(mean)
        steps = np.arange(-4096, 4097)
        near = np.abs(np.angle(np.exp(1j * (steps - angles[0])))) < 0.02 + limit
        if not near.any() or abs(angles[0]) < 0.05:
            continue
        by = int(min(steps[near], key=abs))
        return (
            "every row has the right length in each pair of dimensions, and all are turned by one angle, "
            f"{angles[0]:.3f} rad in the first pair and {angles[1]:.3f} in the second: the rotation of a position "
            f"{by:+d} away"
        )
    return ""


def _complex(values: Array, halves: bool) -> Array:
    if halves:
        low, high = np.split(values, 2, -1)
    else:
        low, high = values[..., 0::2], values[..., 1::2]
    result: Array = low + 1j * high
    return result
