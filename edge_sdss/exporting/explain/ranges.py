"""Causes that lie in how numbers are kept: scales, ranges, float16. Each returns what shows it, or None."""

from __future__ import annotations

import numpy as np

from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.graph import Array
from edge_sdss.exporting.explain.quantised import Quantisation
from edge_sdss.exporting.explain.suspects import Cause, Suspect

HALF_MAX = 65504.0
"""Float16's greatest value."""


def float16_overflow(suspect: Suspect) -> Cause | None:
    """The reference is beyond float16's range, and the candidate is not a number or stays at its end."""
    reference, candidate = suspect.pair
    if suspect.logits or suspect.candidate.quantisation(suspect.tensor) is not None:
        return None
    beyond = np.abs(reference) > HALF_MAX
    lost = ~np.isfinite(candidate) | (np.abs(candidate) >= 0.99 * HALF_MAX)
    if suspect.candidate.arithmetic != "float16" or not beyond.any() or not lost[beyond].all():
        return None
    evidence = (
        f"the greatest value is {np.abs(reference).max():.4g}, float16 ends at {HALF_MAX:g}; all {int(beyond.sum())} "
        "values beyond it are infinite, no number, or held at that end",
    )
    return Cause("overflow of float16", evidence, "scale the tensor down before, or use the fused RMSNormalization")


def scale_off_by_two(suspect: Suspect) -> Cause | None:
    """The value, or some channels of it, or a constant that it is made with, is the right one times a power of two."""
    evidence = []
    for name in suspect.node.inputs:
        if (factor := _constant_factor(suspect, name)) is not None:
            evidence.append(f"the constant {name}, dequantised, is {factor:.3g} times that of {suspect.reference.name}")
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
    return f"the value is {factor:.3g} times the right one{where}"


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
        f"{beyond.mean():.2%} of the right values lie beyond the range {low:.4g} … {high:.4g}, and the error is in "
        "them alone",
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
        f"the step is {step:.4g}, half of all values lie within ±{middle:.4g}, the greatest is "
        f"{np.abs(reference).max():.4g}",
        "the right values in this quantisation have the error that is seen",
    )
    remedy = "more bits for this tensor, one scale a channel, or float; a massive first token goes into the KV prefix"
    return Cause("range stretched by outliers", evidence, remedy)


def _explains(suspect: Suspect, quantisation: Quantisation) -> bool:
    """Whether the right values, quantised like this, are as wrong as what is seen, by half at least."""
    reference, candidate = suspect.pair
    alone, seen = suspect.error(reference, quantisation.apply(reference)), suspect.error(reference, candidate)
    return bool(np.isfinite(seen) and 0.5 * seen <= alone <= 2 * seen)
