"""Faults that are known, each told by what it leaves in the graph and in the values, or not told at all.

A cause is a function from a suspect to what was found, or None. None of them guesses: each says what it saw, and a
fault of which no such trace is found has no name. Knows nothing of how the suspect was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.graph import Array, Node, Quantisation, Topology, numbers
from edge_sdss.exporting.explain.stages import Feeds, Stage

_HALF_MAX = 65504.0
_MASKED = -1e4
"""Less than any logit: such a number masks."""


@dataclass(frozen=True)
class Cause:
    """What is wrong, what shows it, what to do."""

    name: str
    evidence: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Suspect:
    """The first tensor that is wrong, at two stages, with all that can be asked.

    `values` are both stages' of it and of what is near it, by name; `errors` those of everything that was compared.
    """

    tensor: str
    topology: Topology
    reference: Stage
    candidate: Stage
    feeds: Sequence[Feeds]
    values: Mapping[str, tuple[Array, Array]]
    errors: Mapping[str, float]
    limit: float
    adapters: tuple[str, ...] = ()

    @property
    def node(self) -> Node:
        """What makes the tensor."""
        return self.topology.producers[self.tensor]

    @property
    def pair(self) -> tuple[Array, Array]:
        """The tensor at the reference and at the candidate, float64, of one shape where they have one size."""
        a, b = self.values[self.tensor]
        b = b.reshape(a.shape) if a.size == b.size else b
        return a.astype(np.float64), b.astype(np.float64)

    @property
    def logits(self) -> bool:
        """Whether a Softmax alone takes the tensor."""
        return self.topology.feeds_softmax(self.tensor)

    def error(self, reference: Array, candidate: Array) -> float:
        """Returns how far two values of the tensor are apart, as it is measured everywhere."""
        return measure.difference(reference, candidate, logits=self.logits).error

    def given(self, name: str) -> Array | None:
        """Returns what a graph's input or constant holds, None for what is computed."""
        if name in self.topology.constants:
            return self.topology.constants[name]
        parts = [feed[name] for feed in self.feeds if name in feed]
        return np.concatenate([np.atleast_1d(part) for part in parts]) if parts else None


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
        evidence.append(f"no node takes {numbers_of(loose)}")
    return Cause(
        "missing LoRA input", tuple(evidence), "connect the adapter's inputs, and feed them by the graph's names"
    )


def float16_overflow(suspect: Suspect) -> Cause | None:
    """The reference is beyond float16's range, and the candidate is not a number or stays at its end."""
    reference, candidate = suspect.pair
    if suspect.logits or suspect.candidate.quantisation(suspect.tensor) is not None:
        return None
    beyond = np.abs(reference) > _HALF_MAX
    lost = ~np.isfinite(candidate) | (np.abs(candidate) >= 0.99 * _HALF_MAX)
    if suspect.candidate.arithmetic != "float16" or not beyond.any() or not lost[beyond].all():
        return None
    evidence = (
        f"the greatest value is {np.abs(reference).max():.4g}, float16 ends at {_HALF_MAX:g}; all {int(beyond.sum())} "
        "values beyond it are infinite, no number, or held at that end",
    )
    return Cause("overflow of float16", evidence, "scale the tensor down before, or use the fused RMSNormalization")


def mask_not_clamped(suspect: Suspect) -> Cause | None:
    """A mask far below every logit takes the range of the logits, or is beyond float16."""
    for node in suspect.topology.above(suspect.tensor, 4):
        if node.op not in ("Add", "Where", "Sum"):
            continue
        logits = node.outputs[0]
        if not any(taker.op == "Softmax" for taker in suspect.topology.consumers.get(logits, ())):
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
    if suspect.candidate.arithmetic == "float16" and least < -_HALF_MAX and broken.any():
        return says, f"float16 ends at {-_HALF_MAX:g}; {broken.mean():.0%} of this tensor are no numbers"
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
        f"and what the {node.op} gives is {middle:.4g} times the right result (median; {numbers((ratio.min(), ratio.max()))})"
    ]
    if abs(middle - min(1.0, top)) < 0.05 * min(1.0, top):
        evidence.append(f"its range ends at {top:.4g}: the 1 in 1/x was taken in x's own quantisation, and held there")
    remedy = "write x / sqrt(…) as one Div, or RMSNormalization (opset 23), which is taken whole"
    return Cause("quantised Reciprocal in the norm", tuple(evidence), remedy)


def wrong_kv_position(suspect: Suspect) -> Cause | None:
    """Rows stand where other rows belong, or queries and keys are rotated by another position's angle.

    A rotation is a sum of two products, of which one is found first, so what follows is looked at too.
    """
    for name in (suspect.tensor, *suspect.topology.below(suspect.tensor, 3)):
        if name not in suspect.values:
            continue
        reference, candidate = (array.astype(np.float64) for array in suspect.values[name])
        if reference.ndim < 3 or reference.shape != candidate.shape:
            continue
        evidence = _moved(reference, candidate, suspect.limit) or _rotated(reference, candidate, suspect.limit)
        if evidence:
            remedy = "count positions, mask and the slot written in the cache from one origin: the tokens in the past"
            return Cause("wrong KV position", (f"{name}: {evidence}",), remedy)
    return None


def _moved(reference: Array, candidate: Array, limit: float) -> str:
    """Says which rows [..., row, width] stand elsewhere, where most of the wrong ones do; else nothing."""
    a, b = (np.moveaxis(one, -2, 0).reshape(one.shape[-2], -1) for one in (reference, candidate))
    size = np.linalg.norm(a, axis=1)
    size = np.maximum(size, 1e-30)
    wrong = np.flatnonzero(np.linalg.norm(b - a, axis=1) > limit * size)
    wrong = [row for row in wrong if np.linalg.norm(b[row]) > 0]
    moves = []
    for row in wrong:
        apart = np.linalg.norm(a - b[row], axis=1) / size
        apart[row] = np.inf
        if apart.min() <= limit and (apart <= limit).sum() == 1:
            moves.append((row, int(apart.argmin())))
    if not moves or len(moves) < max(1, len(wrong) / 2):
        return ""
    steps = {here - there for here, there in moves}
    text = ", ".join(f"{here} holds what belongs at {there}" for here, there in moves[:3])
    all_by = f"; all {len(moves)} by {steps.pop():+d}" if len(steps) == 1 and len(moves) > 1 else ""
    return f"of {len(wrong)} wrong positions {len(moves)} hold another's row: {text}{all_by}"


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
            f"every row has the right length in each pair of dimensions, and all are turned by one angle, {angles[0]:.3f} rad "
            f"in the first pair and {angles[1]:.3f} in the second: the rotation of a position {by:+d} away"
        )
    return ""


def _complex(values: Array, halves: bool) -> Array:
    if halves:
        low, high = np.split(values, 2, -1)
    else:
        low, high = values[..., 0::2], values[..., 1::2]
    result: Array = low + 1j * high
    return result


def scale_off_by_two(suspect: Suspect) -> Cause | None:
    """The value, or some channels of it, or a constant that it is made with, is the right one times a power of two."""
    evidence = []
    for name in suspect.node.inputs:
        if (factor := _constant_factor(suspect, name)) is not None:
            evidence.append(f"the constant {name}, dequantised, is {factor:.4g} times that of {suspect.reference.name}")
    quantisation = suspect.candidate.quantisation(suspect.tensor)
    if quantisation is not None and quantisation.stored is not None:
        made, read = float(quantisation.stored[0].ravel()[0]), float(quantisation.scale.ravel()[0])
        evidence.append(f"it is quantised with the scale {made:.4g} and read with {read:.4g}")
    if (says := _value_factor(suspect, quantisation)) is not None:
        evidence.append(says)
    elif not evidence or quantisation is None or not quantisation.saturated(suspect.pair[1]).any():
        return None  # where the value is held at the end of its range, the constant alone must tell
    if len(evidence) == 1 and says is not None:
        evidence.append(
            "no stored constant and no pair of scales differs by it, so the provider or an attribute does it"
        )
    return Cause("scale off by 2", tuple(evidence), "let what quantises a tensor and what reads it have one scale")


def _value_factor(suspect: Suspect, quantisation: Quantisation | None) -> str | None:
    reference, candidate = suspect.pair
    if suspect.logits or reference.ndim == 0:
        return None
    if quantisation is not None:  # values held at the end of the range do not show the factor
        free = ~quantisation.saturated(candidate)
        reference, candidate = reference * free, candidate * free
    width = reference.shape[-1]
    factor, channels = _factor(reference.reshape(-1, width), candidate.reshape(-1, width), suspect.limit)
    if factor is None:
        return None
    where = "" if channels == width else f" in {channels} of {width} channels, and right in the others"
    return f"the value is {factor:.4g} times the right one{where}"


def _factor(a: Array, b: Array, limit: float) -> tuple[float | None, int]:
    """The power of two by which the wrong channels [n, channels] differ, and how many do; None where it is none."""
    size = np.linalg.norm(a, axis=0)
    wrong = np.linalg.norm(b - a, axis=0) > limit * np.maximum(size, 1e-30)
    if not wrong.any() or not (size[wrong] > 0).all():
        return None, 0
    x, y = a[:, wrong], b[:, wrong]
    slope = float((x * y).sum() / (x * x).sum())
    if not slope > 0 or measure.relative(slope * x, y) > max(limit, 0.05):
        return None, 0
    power = round(float(np.log2(slope)))
    if power == 0 or abs(slope / 2.0**power - 1) > 0.05:
        return None, 0
    return slope, int(wrong.sum())


def _constant_factor(suspect: Suspect, name: str) -> float | None:
    right, stored = suspect.topology.constants.get(name), suspect.candidate.weight(name)
    if right is None or stored is None or right.dtype.kind != "f" or right.shape != stored.shape:
        return None
    width = right.shape[-1] if right.ndim else 1
    return _factor(right.reshape(-1, width), stored.reshape(-1, width), suspect.limit)[0]


def saturated_range(suspect: Suspect) -> Cause | None:
    """Values beyond the range of the tensor's quantisation are held at its end, and the error is there."""
    quantisation = suspect.candidate.quantisation(suspect.tensor)
    if quantisation is None or suspect.logits:
        return None
    reference, candidate = suspect.pair
    if not _explains(suspect, quantisation):
        return None
    low, high = quantisation.range
    beyond = (reference < low) | (reference > high)
    if not beyond.any():
        return None
    rest = np.where(beyond, reference, candidate)
    if suspect.error(reference, rest) > suspect.limit:
        return None
    need = max(reference.max() / high if high else 0.0, reference.min() / low if low else 0.0)
    evidence = (
        f"{beyond.mean():.2%} of the right values lie beyond the range {low:.4g} … {high:.4g}, and the error is in them alone",
        f"the greatest value needs {need:.2f} times this scale",
    )
    return Cause("saturated range", evidence, "calibrate on texts like these, and with the adapter that serves")


def stretched_range(suspect: Suspect) -> Cause | None:
    """A few large values make the steps so coarse that the others are lost."""
    quantisation = suspect.candidate.quantisation(suspect.tensor)
    if quantisation is None or not _explains(suspect, quantisation):
        return None
    reference, _ = suspect.pair
    middle, step = float(np.median(np.abs(reference))), float(np.max(quantisation.scale))
    if not middle < 4 * step:
        return None
    evidence = (
        f"the step is {step:.4g}, half of all values lie within ±{middle:.4g}, the greatest is {np.abs(reference).max():.4g}",
        "the right values in this quantisation have the error that is seen",
    )
    remedy = "more bits for this tensor, one scale a channel, or float; a massive first token goes into the KV prefix"
    return Cause("range stretched by outliers", evidence, remedy)


def _explains(suspect: Suspect, quantisation: Quantisation) -> bool:
    """Whether the right values, quantised like this, are as wrong as what is seen, by half at least."""
    reference, candidate = suspect.pair
    alone, seen = suspect.error(reference, quantisation.apply(reference)), suspect.error(reference, candidate)
    return bool(np.isfinite(seen) and 0.5 * seen <= alone <= 2 * seen)


def numbers_of(names: Sequence[str]) -> str:
    """Returns names, the later ones counted where there are many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


CAUSES: tuple[Callable[[Suspect], Cause | None], ...] = (
    missing_lora_input,
    float16_overflow,
    mask_not_clamped,
    quantised_reciprocal,
    wrong_kv_position,
    scale_off_by_two,
    saturated_range,
    stretched_range,
)
"""In the order in which they are asked: the special before the general."""
