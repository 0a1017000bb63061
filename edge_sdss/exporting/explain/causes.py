"""Faults that are known, each told by what it leaves in the graph and in the values, or not told at all.

A cause is a function from a suspect to what was found, or None. None of them guesses: each says what it saw, and a
fault of which no such trace is found has no name. Knows nothing of how the suspect was found.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.attention import moved_rows, wrong_kv_position
from edge_sdss.exporting.explain.graph import listed
from edge_sdss.exporting.explain.ranges import (
    HALF_MAX,
    float16_overflow,
    saturated_range,
    scale_off_by_two,
    stretched_range,
)
from edge_sdss.exporting.explain.suspects import Cause, Suspect

_MASKED = -1e4
"""Less than any logit: such a number masks."""


def name_cause(suspect: Suspect) -> Cause | None:
    """Returns the first known cause of which there is evidence."""
    if suspect.pair[0].shape != suspect.pair[1].shape:
        return None
    return next((cause for one in CAUSES if (cause := one(suspect)) is not None), None)


def missing_lora_input(suspect: Suspect) -> Cause | None:
    """The candidate gives what the reference gives without the adapter."""
    if not suspect.adapters or not any(
        np.any(feed.get(name, 0)) for feed in suspect.feeds for name in suspect.adapters
    ):
        return None
    empty = [{n: np.zeros_like(a) if n in suspect.adapters else a for n, a in feed.items()} for feed in suspect.feeds]
    bare = [suspect.reference.run(feed, [suspect.tensor]) for feed in empty]
    if not all(suspect.tensor in one for one in bare):
        return None
    without = np.concatenate([one[suspect.tensor] for one in bare], 0)
    reference, candidate = suspect.pair
    apart, effect = suspect.error(without, candidate), suspect.error(reference, without)
    if not (effect > suspect.limit and apart <= max(suspect.limit, 0.1 * effect)):
        return None
    evidence = [
        f"the adapter changes this tensor by {effect:.2g} at the stage {suspect.reference.name}, and what the stage "
        f"{suspect.candidate.name} gives is within {apart:.2g} of the reference without the adapter"
    ]
    loose = [name for name in suspect.adapters if name not in suspect.topology.consumers]
    if loose:
        evidence.append(f"no node takes {listed(loose)}")
    return Cause(
        "missing LoRA input", tuple(evidence), "connect the adapter's inputs, and feed them by the graph's names"
    )


def mask_not_clamped(suspect: Suspect) -> Cause | None:
    """A mask far below every logit takes the range of the logits, or is beyond float16."""
    for node in suspect.topology.above(suspect.tensor, 4):
        if node.op not in ("Add", "Where", "Sum"):
            continue
        logits = node.outputs[0]
        if not suspect.topology.feeds_softmax(logits):
            continue
        for name in node.inputs:
            mask = suspect.given(name)
            if mask is None or mask.dtype.kind != "f" or not mask.size or not float(mask.min()) < _MASKED:
                continue
            evidence = _mask_evidence(suspect, logits, name, float(mask.min()))
            if evidence:
                return Cause("mask not clamped", evidence, "mask with -100: e^-100 is 0 in float32 too")
    return None


def _mask_evidence(suspect: Suspect, logits: str, mask: str, least: float) -> tuple[str, ...]:
    says = f"{mask} holds {least:.4g}"
    for name in (logits, mask):
        quantisation = suspect.candidate.quantisation(name)
        if quantisation is None or logits not in suspect.values:
            continue
        seen = measure.seen(suspect.values[logits][0].astype(np.float64))
        spread, step = float(-seen[seen > -20].min(initial=0.0)), float(np.max(quantisation.scale))
        if step > spread / 16:
            return (
                says,
                f"{name} is quantised with a step of {step:.4g}, and the logits that count lie within {spread:.4g}: "
                f"{spread / step:.2g} steps for all of them",
            )
    reference, candidate = suspect.pair
    broken = ~np.isfinite(candidate) & np.isfinite(reference)
    if suspect.candidate.arithmetic == "float16" and least < -HALF_MAX and broken.any():
        return says, f"float16 ends at {-HALF_MAX:g}; {broken.mean():.0%} of this tensor are no numbers"
    return ()


def quantised_reciprocal(suspect: Suspect) -> Cause | None:
    """A reciprocal between quantised tensors is wrong though what it takes is right, and was right before."""
    node = suspect.node
    if node.op == "Reciprocal":
        of = node.inputs[0]
    elif node.op == "Div" and (one := suspect.given(node.inputs[0])) is not None and np.all(one == 1):
        of = node.inputs[1]
    else:
        return None
    taken, made = suspect.candidate.quantisation(of), suspect.candidate.quantisation(suspect.tensor)
    if taken is None or made is None or of not in suspect.values:
        return None
    if (
        suspect.errors.get(of, np.inf) > suspect.limit
        or suspect.error(made.apply(suspect.pair[0]), suspect.pair[0]) > suspect.limit
    ):
        return None  # what it takes is wrong already, or its own quantisation explains it
    reference, candidate = suspect.pair
    ratio = candidate[reference != 0] / reference[reference != 0]
    middle, top = float(np.median(ratio)), taken.range[1]
    evidence = [
        f"{of}, which it takes, is right (error {suspect.errors[of]:.2g}), the right result fits this tensor's range, "
        f"and what the {node.op} gives is {middle:.4g} times it (median; {ratio.min():.4g} … {ratio.max():.4g})"
    ]
    if abs(middle - min(1.0, top)) < 0.05 * min(1.0, top):
        evidence.append(f"its range ends at {top:.4g}: the 1 in 1/x was taken in x's own quantisation, and held there")
    remedy = "write x / sqrt(…) as one Div, or RMSNormalization (opset 23), which is taken whole"
    return Cause("quantised Reciprocal in the norm", tuple(evidence), remedy)


CAUSES: tuple[Callable[[Suspect], Cause | None], ...] = (
    missing_lora_input,
    float16_overflow,
    mask_not_clamped,
    quantised_reciprocal,
    wrong_kv_position,
    moved_rows,
    scale_off_by_two,
    saturated_range,
    stretched_range,
)
"""In the order in which they are asked: the special before the general."""
