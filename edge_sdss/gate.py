"""Accepts a round, or keeps the adapter before it. Knows losses, not models or adapters."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from edge_sdss import config
from edge_sdss.errors import InputError, message
from edge_sdss.statistics import Values, paired_interval
from edge_sdss.types import Interval


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of the gate: it holds where `value` is at most `limit`."""

    name: str
    passed: bool
    value: float
    limit: float
    unit: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a round is accepted, why in words, and the changes in loss that this rests on."""

    accepted: bool
    reason: str
    checks: tuple[Check, ...]
    personal: Interval | None
    general: Interval


def judge(
    personal_before: Values,
    personal_after: Values,
    general_before: Values,
    general_after: Values,
    settings: config.Gate,
) -> Verdict:
    """Compares the loss of each held-out item, in nats per token, before and after a round.

    A round is accepted if the mean loss of the user's own items has not risen, and that of the general
    items has risen by at most `max_forgetting`. The means decide; the intervals tell how sure they are.
    A loss that is not finite rejects. Without personal items the general ones decide alone.
    Raises InputError where items are not paired, or there is no general item.
    """
    if len(general_before) == 0:
        raise InputError(message("judge a round", "no general item", "give the general set"))
    general = paired_interval(general_before, general_after)
    checks = [_check("general loss", general, settings.max_forgetting)]
    personal = None
    if len(personal_before) or len(personal_after):
        personal = paired_interval(personal_before, personal_after)
        checks.insert(0, _check("personal loss", personal, 0.0))
    return Verdict(
        accepted=all(check.passed for check in checks),
        reason=_reason(checks),
        checks=tuple(checks),
        personal=personal,
        general=general,
    )


def held_out(dialogue_id: str, settings: config.Gate) -> bool:
    """Returns whether a dialogue is kept for the gate: a function of its id, so it never changes sides."""
    digest = hashlib.blake2b(f"gate:{dialogue_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < settings.holdout * 2**64


def _check(name: str, change: Interval, limit: float) -> Check:
    # NaN compares false, so a loss that is not finite fails.
    return Check(name, change.mean <= limit, change.mean, limit, "nats/token")


def _reason(checks: list[Check]) -> str:
    failed = [check for check in checks if not check.passed]
    words = "; ".join(_words(check) for check in (failed or checks))
    if len(checks) == 1:
        words += "; no personal item was held out, so the general set decides alone"
    return words


def _words(check: Check) -> str:
    if not math.isfinite(check.value):
        return f"{check.name} is not finite"
    relation = "within" if check.passed else "above"
    return f"{check.name} changed by {check.value:+.4f} {check.unit}, {relation} the limit of {check.limit:+.4f}"
