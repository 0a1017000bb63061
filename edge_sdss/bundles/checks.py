"""Does an adapter do on a device what it did where it was trained? Each fault is refused by its name.

The questions are put to a function `logits(ids, adapter)` of whatever runs the graph, and the answers compared with
a probe of PEFT's. Logits are compared after the mean over a position's tokens is taken off, which no probability
depends on. What rounding adds to an effect is as large for a small one as for a large one, so an adapter of little
effect is asked for, and was probed, amplified. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdss.bundles import adapters
from edge_sdss.bundles import probe as probes
from edge_sdss.bundles.manifest import AdapterEntry, Check, Manifest, Precision, load
from edge_sdss.bundles.probe import CLEAR, Probe, centred, rows
from edge_sdss.errors import ExportError, ParityError, message

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_sdss.bundles.probe import Logits

_INACTIVE = 0.25  # an effect below this part of what it should be is none
_TINY = 1e-30
_SAME_DIRECTION = 0.5  # a cosine from which on a wrong size is a wrong scale: a doubled adapter was seen with 0.56


@dataclass(frozen=True)
class Comparison:
    """An adapter's effect o = adapted − base on the logits beside the expected one, e.

    `base`: |Δ| / |logits| of the base, in the 2-norm. `size`: |o| / |e|; a projection of o on e would say less the
    more the base was rounded, and take a doubled adapter on 4 bits for a right one. `cosine`: of o and e.
    `expected`: |e| / |logits| of the base. `equal`: base and adapted, not amplified, agree bit by bit. `n`: logits
    compared.
    """

    base: float
    size: float
    cosine: float
    expected: float
    equal: bool
    n: int


@dataclass(frozen=True)
class Limits:
    """The largest `Comparison.base`, how many times too large or too small the effect may be, and the least cosine."""

    base: float
    times: float
    cosine: float


# SmolLM2-135M, r = 8 on seven linears, weights and activations rounded in blocks of 32. Adapters whose effect is
# `CLEAR`, trained or amplified: at 8 bits base 0.035, size 0.99 to 1.03 and cosine 0.99; at 4 bits 0.04, 1.00 and 0.99
# where the model came from 4 bits, and 0.24, 0.84 to 1.04 and 0.72 to 0.87 rounded to nearest, the roughest there is.
# One of a tenth of that effect, not amplified: size 1.7 and cosine 0.52 at 8 bits, and it was right.
LIMITS: Mapping[Precision, Limits] = {
    "float32": Limits(base=0.005, times=1.02, cosine=0.999),
    "float16": Limits(base=0.02, times=1.05, cosine=0.99),
    "int8": Limits(base=0.1, times=1.1, cosine=0.97),
    "int4": Limits(base=0.5, times=1.5, cosine=0.3),
}


def activation(
    folder: Path,
    logits: Logits,
    *,
    inputs: Collection[str] | None = None,
    only: Collection[str] | None = None,
    unprobed: bool = False,
) -> tuple[Check, ...]:
    """Checks the adapters of the bundle in `folder`, or `only` some, and returns what was measured.

    `inputs` are the names that the loaded graph takes. An adapter without a probe is refused, or, with `unprobed`,
    checked for having any effect at all.
    Raises ExportError for what is wrong with the files: a renamed input, zeroed B, a wrong base; ParityError for
    what is wrong with the answers: an inactive adapter, a wrong scale, a wrong base or another adapter.
    """
    manifest = load(folder)
    measured: list[Check] = []
    for entry in manifest.adapters:
        if only is not None and entry.name not in only:
            continue
        files(folder, entry, manifest, inputs)
        if entry.probe:
            found = probes.read(folder / entry.probe.path)
            _check_probe(entry, found)
            measured += effect(logits, entry.name, found, manifest.graph.precision)
        elif unprobed:
            measured.append(any_effect(logits, entry.name, manifest))
        else:
            found_text = "it came without a probe of what PEFT computes with it"
            do = "make one where it was trained, or deploy it unprobed"
            raise ExportError(message(_asked(entry.name), found_text, do))
    return tuple(measured)


def files(folder: Path, entry: AdapterEntry, manifest: Manifest, inputs: Collection[str] | None = None) -> None:
    """Raises ExportError where an adapter's file cannot take effect in this graph, and names the fault."""
    asked, do = _asked(entry.name), "convert the adapter anew for this bundle"
    if entry.base_fingerprint != manifest.base_fingerprint:
        of, here = entry.base_fingerprint[:12], manifest.base_fingerprint[:12]
        raise ExportError(message(asked, f"wrong base: it was trained on {of}, the bundle has {here}", do))
    arrays = adapters.read(folder / entry.file.path, manifest.base_fingerprint)
    known = {name for site in manifest.graph.sites for name in (site.lora_a, site.lora_b)}
    partner = {site.lora_a: site.lora_b for site in manifest.graph.sites}
    partner.update({b: a for a, b in partner.items()})
    renamed = sorted(arrays.keys() - known) or sorted(arrays.keys() - set(known if inputs is None else inputs))
    if renamed:
        found = (
            f"renamed input: {len(renamed)} of its {len(arrays)} names are none of the graph's, {renamed[0]} for one"
        )
        raise ExportError(message(asked, found, do))
    alone = sorted(name for name in arrays if partner[name] not in arrays)
    if alone or not arrays:
        found = f"{partner[alone[0]]} is never fed, though {alone[0]} is" if alone else "it feeds no site of the graph"
        raise ExportError(message(asked, found, do))
    if not any(arrays[site.lora_b].any() for site in manifest.graph.sites if site.lora_b in arrays):
        found = "zeroed B: every lora_B is zero, so it changes nothing"
        raise ExportError(message(asked, found, "train it, or convert what was trained"))


def effect(logits: Logits, adapter: str, probe: Probe, precision: Precision) -> tuple[Check, ...]:
    """Compares the base, and what the adapter changes, with the probe. Raises ParityError, which names the fault."""
    asked, limits, found = _asked(adapter), LIMITS[precision], compare(logits, adapter, probe)
    if found.expected == 0:
        fault = "zeroed B: it changes nothing where it was trained either"
        raise ParityError(message(asked, fault, "train it, or probe what was trained"))
    if not found.base <= limits.base:
        fault = f"wrong base: without an adapter its logits are off by {found.base:.0%}, {limits.base:.1%} is allowed"
        raise ParityError(message(asked, fault, "export the model that it was trained on"))
    if found.equal:
        fault = "inactive: the logits are those of the base, bit by bit"
        raise ParityError(
            message(asked, fault, "bind its tensors as inputs: IO binding ignores adapters in RunOptions")
        )
    _check_effect(asked, found, limits, precision)
    measured = (
        ("|Δlogit| / |logit| of the base", found.base, limits.base),
        ("|effect| / |expected|", found.size, limits.times),
        ("1 − cosine of effect and expected", 1 - found.cosine, 1 - limits.cosine),
    )
    return tuple(
        Check(stage=f"adapter {adapter}", against="PEFT", metric=metric, value=value, limit=limit, n=found.n)
        for metric, value, limit in measured
    )


def compare(logits: Logits, adapter: str, probe: Probe) -> Comparison:
    """Returns how the answers of `logits` lie to those of the probe, over all samples. Judges nothing."""
    parts, equal = [], True
    asked = probes.asked(adapter, probe.scale)
    for sample in probe.samples:
        ids = sample.ids.tolist()
        base, adapted = (rows(logits(ids, what)) for what in (None, asked))
        equal = equal and np.array_equal(base, adapted if asked is adapter else rows(logits(ids, adapter)))
        last = len(base) == 1  # the graph gives the last position alone
        at = np.ix_(np.array([0]) if last else sample.positions, sample.tokens)
        theirs = (values[-1:] if last else values for values in (sample.base, sample.adapted))
        parts.append(np.stack([centred(v).ravel() for v in (base[at], adapted[at], *theirs)]))
    b, adapted, t, expected = np.concatenate(parts, 1)
    o, e = adapted - b, expected - t
    lengths = float(np.linalg.norm(o)), float(np.linalg.norm(e))
    length = float(np.linalg.norm(t))
    return Comparison(
        base=float(np.linalg.norm(b - t)) / max(length, _TINY),
        size=lengths[0] / max(lengths[1], _TINY),
        cosine=float(o @ e) / max(lengths[0] * lengths[1], _TINY),
        expected=lengths[1] / max(length, _TINY),
        equal=equal,
        n=len(e),
    )


def any_effect(logits: Logits, adapter: str, manifest: Manifest) -> Check:
    """Returns how far an adapter moves the logits of some arbitrary tokens. Raises ParityError where it does not."""
    ids = np.linspace(1, manifest.graph.vocabulary - 1, 16).astype(np.int64).tolist()
    moved = float(np.abs(rows(logits(ids, adapter)) - rows(logits(ids, None))).max())
    if not moved > 0:
        found = "inactive: the logits are those of the base, bit by bit"
        raise ParityError(message(_asked(adapter), found, "see that the graph's LoRA inputs are fed"))
    return Check(stage=f"adapter {adapter}", against="base", metric="max |Δlogit|", value=moved, n=len(ids))


def mix(
    logits: Logits,
    mixed: Callable[[Sequence[int]], NDArray[np.floating]],
    weights: Mapping[str, float],
    ids: Sequence[int],
) -> tuple[Check, ...]:
    """Checks that a mix has all its adapters in it: `mixed(ids)` are its logits, as `logits` gives those of each.

    To first order the effect of a mix is the weighted sum of the single effects; a least-squares fit gives the share
    of each, 1 where it is there with its weight. Raises ParityError where one has no share.
    """
    base = centred(rows(logits(ids, None)))
    names = [name for name, weight in weights.items() if weight]
    single = np.stack([(centred(rows(logits(ids, name))) - base).ravel() * weights[name] for name in names], 1)
    shares, *_ = np.linalg.lstsq(single, (centred(rows(mixed(ids))) - base).ravel(), rcond=None)
    missing = [name for name, share in zip(names, shares, strict=True) if not share > _INACTIVE]
    if missing:
        present = ", ".join(name for name in names if name not in missing) or "none"
        found = f"of {', '.join(names)} only {present} shows: of several active adapters the runtime takes the first"
        raise ParityError(message("mix adapters", found, "join their ranks, A on axis 1 and the weighted B on axis 0"))
    return tuple(
        Check(stage="mix", against=name, metric="share of its effect", value=float(share), n=len(base))
        for name, share in zip(names, shares, strict=True)
    )


def _check_effect(asked: str, found: Comparison, limits: Limits, precision: Precision) -> None:
    size, cosine, feed = found.size, found.cosine, "see that every LoRA input of the graph is fed"
    right = size > 0 and max(size, 1 / size) <= limits.times and cosine >= limits.cosine
    if not right and found.expected < CLEAR / 2 and precision in ("int8", "int4"):
        fault = f"not to be told: it should change the logits by {found.expected:.1%}, {precision} rounds by as much"
        raise ParityError(message(asked, fault, "take its probe anew, which amplifies an adapter of little effect"))
    if not size >= _INACTIVE:
        fault = f"inactive: its effect is {size:.2f} times what it should be"
        raise ParityError(message(asked, fault, feed))
    if cosine < min(limits.cosine, _SAME_DIRECTION):
        fault = f"the effect is not its own, the cosine between them is {cosine:.2f}"
        raise ParityError(message(asked, fault, "see that no adapters were exchanged and that all sites are fed"))
    if not max(size, 1 / size) <= limits.times:
        fault = f"wrong scale: the effect is {size:.{1 if abs(size - 1) >= 0.1 else 3}f} times what it should be"
        raise ParityError(message(asked, fault, "fold alpha / r into B once, and set no scale besides"))
    if cosine < limits.cosine:
        fault = f"part of its effect is missing or strange, the cosine is {cosine:.4f} and not {limits.cosine}"
        raise ParityError(message(asked, fault, feed))


def _check_probe(entry: AdapterEntry, probe: Probe) -> None:
    for what, of, here in (
        ("base", probe.base_fingerprint, entry.base_fingerprint),
        ("adapter", probe.source_sha256, entry.source_sha256),
    ):
        if of != here:
            found = f"its probe is of another {what}, {of[:12]} and not {here[:12]}"
            raise ExportError(message(_asked(entry.name), found, "make the probe anew where it was trained"))


def _asked(adapter: str) -> str:
    return f"activate adapter {adapter}"
