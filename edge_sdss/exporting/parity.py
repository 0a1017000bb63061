"""Two ways to compute one model agree, on every logit of some texts: torch, the graph, the quantised graph.

A way is a function from ids [n] to logits [n, vocabulary] float32. Knows nothing of how they were made, nor of
adapters: whether one has its effect, `bundles.checks` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_sdss.bundles import Check
from edge_sdss.errors import ParityError, message

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]
Logits = Callable[[Ids], Rows]


@dataclass(frozen=True)
class Limits:
    """What a stage may differ by; None is not limited.

    `difference`: largest |Δlogit|. `agreement`: least share of positions with the same most likely token. `kl`: mean
    Kullback-Leibler divergence from the reference, nats a token. `nll`: relative change of the mean negative log
    likelihood of the texts, to either side.
    """

    difference: float | None = None
    agreement: float | None = None
    kl: float | None = None
    nll: float | None = None


LIMITS: Mapping[str, Limits] = {
    "float32": Limits(difference=1e-3, agreement=0.999, nll=1e-4),
    "float16": Limits(agreement=0.97, kl=0.01, nll=0.01),
    "int8": Limits(agreement=0.90, kl=0.02, nll=0.01),
    "int4": Limits(agreement=0.50, kl=0.60, nll=0.08),
}
"""By precision of the graph: a broken graph exceeds them by far, a sound one of its precision does not.

SmolLM2-135M on 608 tokens of everyday dialogue: int8 agreement 0.93, KL 0.006, NLL +0.2 %; int4 with float zero points
0.96, 0.001, +0.2 % (its weights come from Q4_1); symmetric, on another grid than theirs, 0.60, 0.39, +4.2 %.
"""


@dataclass
class _Sums:
    """What is known after some sequences."""

    sequences: int = 0
    tokens: int = 0
    largest: float = 0.0
    same: int = 0
    divergence: float = 0.0
    predicted: int = 0
    nll: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, reference: Rows, candidate: Rows, ids: Ids) -> None:
        first, second = _log_softmax(reference), _log_softmax(candidate)
        self.sequences += 1
        self.tokens += len(ids)
        # a NaN anywhere makes the result NaN, which no limit admits
        self.largest = float(np.maximum(self.largest, np.abs(reference - candidate).max()))
        self.same += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.divergence += float((np.exp(first) * (first - second)).sum())
        following = ids[1:, None]
        self.predicted += len(following)
        for which, rows in enumerate((first, second)):
            self.nll[which] -= float(np.take_along_axis(rows[:-1], following, -1).sum())


def compare(
    stage: str, against: str, reference: Logits, candidate: Logits, texts: Sequence[Ids], limits: Limits
) -> tuple[Check, ...]:
    """Runs both on every text, ids [n ≥ 2], and returns what was measured, each with its limit.

    Metrics: "max |Δlogit|", "argmax agreement", "mean KL" (reference ‖ candidate, nats), "NLL change" (relative),
    and both NLL (nats a token). Raises ParityError, which names the metrics beyond their limits.
    """
    sums = _Sums()
    for ids in texts:
        sums.add(_checked(reference(ids), ids, against), _checked(candidate(ids), ids, stage), ids)
    before, after = (total / sums.predicted for total in sums.nll)
    measured = (
        ("max |Δlogit|", sums.largest, limits.difference, sums.tokens),
        ("argmax agreement", sums.same / sums.tokens, limits.agreement, sums.tokens),
        ("mean KL", sums.divergence / sums.tokens, limits.kl, sums.tokens),
        ("NLL change", after / before - 1, limits.nll, sums.predicted),
        (f"NLL of {against}", before, None, sums.predicted),
        ("NLL", after, None, sums.predicted),
    )
    checks = tuple(
        Check(stage=stage, against=against, metric=metric, value=value, limit=limit, n=n)
        for metric, value, limit, n in measured
    )
    _refuse(stage, against, checks, f"on {sums.sequences} texts")
    return checks


def _refuse(stage: str, against: str, checks: Sequence[Check], where: str) -> None:
    beyond = []
    for check in checks:
        least = check.metric == "argmax agreement"
        value = abs(check.value)
        if check.limit is None or (value >= check.limit if least else value <= check.limit):
            continue
        beyond.append(f"{check.metric} {check.value:.3g}, limit {check.limit:g}")
    if beyond:
        do = "choose a higher precision, or report the model if it is float32"
        raise ParityError(message(f"check {stage} against {against}", f"{'; '.join(beyond)} {where}", do))


def _checked(rows: Rows, ids: Ids, who: str) -> Rows:
    if rows.ndim != 2 or len(rows) != len(ids):
        found = f"it gives logits {rows.shape} for {len(ids)} ids"
        raise ParityError(message(f"run {who}", found, "export again without last_logits_only"))
    return rows.astype(np.float32, copy=False)


def _log_softmax(rows: Rows) -> npt.NDArray[np.float64]:
    shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
