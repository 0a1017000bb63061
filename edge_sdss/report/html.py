"""Turns a report into one HTML page that needs nothing else: no script, no other file, no network.

Knows nothing of how the figures came about. Every text of the report is escaped by the template.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from edge_sdss import page
from edge_sdss.page.formats import flat, num
from edge_sdss.report import plots
from edge_sdss.report.schema import Entry, EvalInfo, EvalItem, RunReport, SynthesisExample

FIRST_ENTRIES, MAX_ENTRIES, MAX_GROUPS, MAX_ANSWERS = 12, 100, 8, 4


def headline(report: RunReport) -> str:
    """Returns the verdict in words: what held-out NLL did, and whether the new adapter is active."""
    board = report.environment.emulated
    stamp = f" Emulated: within the limits of {board}, on another machine." if board else ""
    return f"{_change(report.eval)} {_outcome(report)}{stamp}"


def render(report: RunReport) -> str:
    """Returns the page. Raises BackendUnavailable where jinja2 or matplotlib is missing."""
    shown = plots.series(report.buffer)
    return page.render(
        "report/template.html.j2",
        _drawings(report, shown),
        title=report.title,
        r=report,
        headline=headline(report),
        state=_state(report),
        series=shown,
        look={one.name: one for one in shown},
        entries=_mixed(report.buffer.entries)[:MAX_ENTRIES],
        first=FIRST_ENTRIES,
        thinned=len(report.buffer.decisions) < report.buffer.offers,
        groups=_groups(report.synthesis.examples if report.synthesis else ())[:MAX_GROUPS],
        answers=Answers.of(report.eval),
        change=_delta,
        settings=list(flat(report.settings)),
    )


@dataclass(frozen=True)
class Answers:
    """The held-out dialogues that were answered: those whose NLL fell most, and those where it rose most."""

    n: int
    improved: Sequence[EvalItem]
    worsened: Sequence[EvalItem]

    @classmethod
    def of(cls, result: EvalInfo | None) -> Answers:
        """Picks at most four of each."""
        items = [
            i for i in (result.items if result else ()) if i.answer_before is not None and i.answer_after is not None
        ]
        changes = sorted(((_rank(item), i) for i, item in enumerate(items)))
        better = [items[i] for change, i in changes if change < 0]
        worse = [items[i] for change, i in reversed(changes) if change > 0]
        return cls(len(items), better[:MAX_ANSWERS], worse[:MAX_ANSWERS])


def _delta(item: EvalItem) -> float | None:
    if item.nll_before is None or item.nll_after is None:
        return None
    return item.nll_after - item.nll_before


def _rank(item: EvalItem) -> float:
    change = _delta(item)
    return math.inf if change is None else change


def _mixed(entries: Sequence[Entry]) -> list[Entry]:
    """Orders the entries so that one of each domain comes first, then a second of each, and so on."""
    seen: Counter[str] = Counter()
    ranked = []
    for entry in sorted(entries, key=lambda e: e.seq):
        seen[entry.domain] += 1
        ranked.append((seen[entry.domain], entry.domain, entry))
    return [entry for _, _, entry in sorted(ranked, key=lambda one: one[:2])]


def _change(result: EvalInfo | None) -> str:
    if result is None:
        return "No held-out dialogue was measured."
    before, after, delta = num(result.before.nll), num(result.after.nll), result.delta_nll
    if delta.lo is None or delta.hi is None:
        return f"Held-out NLL is not finite: {before} before, {after} after."
    if delta.lo <= 0 <= delta.hi:
        verb = f"did not clearly change: {before} before, {after} after, in nats per token"
    else:
        verb = f"{'fell' if delta.hi < 0 else 'rose'} from {before} to {after} nats per token"
    interval = f"{num(delta.lo)} to {num(delta.hi)}"
    return f"Held-out NLL {verb} (95 % interval of the difference {interval}, n = {delta.n})."


def _outcome(report: RunReport) -> str:
    if report.tuning is None:
        return "No round was run: the model is unchanged."
    if report.gate is None:
        return "The round was not judged: its adapter is not active."
    if report.gate.accepted:
        return "Accepted: the new adapter is active."
    return f"Rejected: the new adapter is not active, since {report.gate.reason.rstrip('. ')}."


def _state(report: RunReport) -> str:
    if report.tuning is None or report.gate is None:
        return "idle"
    return "accepted" if report.gate.accepted else "rejected"


def _drawings(report: RunReport, shown: Sequence[plots.Series]) -> dict[str, str]:
    drawn: dict[str, str] = {}
    if report.buffer.decisions:
        drawn["content"] = plots.content(report.buffer, shown)
        drawn.update(zip(("eoe_dss", "eoe_idd", "dss_idd"), plots.planes(report.buffer, shown), strict=True))
    if report.tuning and report.tuning.losses:
        drawn["loss"] = plots.loss(report.tuning.losses)
    if report.eval and report.eval.items:
        drawn.update(_delta_drawings(report.eval))
    return drawn


def _delta_drawings(result: EvalInfo) -> dict[str, str]:
    nll = [change for item in result.items if (change := _delta(item)) is not None]
    pairs = [(item.rouge1_before, item.rouge1_after) for item in result.items]
    rouge1 = [after - before for before, after in pairs if before is not None and after is not None]
    drawn: dict[str, str] = {}
    if nll:
        unit = ", nats per token"
        drawn["delta_nll"] = plots.differences("NLL", nll, result.delta_nll, unit, lower_is_better=True)
    if rouge1 and result.delta_rouge1:
        drawn["delta_rouge1"] = plots.differences("ROUGE-1", rouge1, result.delta_rouge1, "", lower_is_better=False)
    return drawn


def _groups(examples: Sequence[SynthesisExample]) -> list[tuple[SynthesisExample, list[SynthesisExample]]]:
    together = groupby(examples, key=lambda e: (e.prompt, e.response))
    groups = [list(group) for _, group in together]
    return [(group[0], group) for group in groups]
