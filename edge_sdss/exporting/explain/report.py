"""What was found, as Markdown for people and as one document for programs.

Knows nothing of how it was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from edge_sdss.exporting.explain.bisecting import Explanation, Finding, Line, Pair
from edge_sdss.exporting.explain.placement import Placement
from edge_sdss.exporting.explain.quantised import Quantisation

_WORST = 8


def verdict(found: Explanation, placed: Placement | None = None) -> str:
    """Returns in one or two sentences whether the graph is right, and if not, where it goes wrong first, and why."""
    fell = [] if placed is None else placed.fell_back
    lost = f" {len(fell)} of {len(placed.nodes)} nodes do not run on {placed.wanted}." if placed and fell else ""
    pair = found.first
    if pair is None or pair.finding is None:
        return f"Nothing goes wrong from {found.pairs[0].against} to {found.pairs[-1].stage}.{lost}"
    finding, line = pair.finding, pair.finding.line
    start = f"From {pair.against} to {pair.stage} the first tensor that goes wrong is `{line.tensor}` ({line.op})"
    if not finding.leaps:
        why = "but what it is made of is wrong nearly as much: the error grows bit by bit, and has no place of its own"
        return f"{start}, {why}.{lost}"
    cause = f"Cause: {finding.cause.name}." if finding.cause else "None of the causes that are known can be shown."
    effect = "" if pair.harmful else " The graph's outputs are within the limit all the same."
    return f"{start}, error {_error(line.difference.error)}. {cause}{effect}{lost}"


def markdown(title: str, found: Explanation, placed: Placement | None = None, notes: Sequence[str] = ()) -> str:
    """Returns the report: the verdict in words, the finding, a table by layer for each stage, the placement."""
    parts = [f"# {title}", verdict(found, placed), *notes]
    if any(pair.emulated for pair in found.pairs):
        parts.append("The NPU is emulated on this machine's processor: no device has run this graph.")
    for pair in found.pairs:
        parts += _pair(pair)
    if placed is not None:
        parts += _placed(placed)
    return "\n\n".join(parts) + "\n"


def document(found: Explanation, placed: Placement | None = None) -> dict[str, Any]:
    """Returns all of it for a JSON document; what is infinite or no number is null."""
    return {
        "verdict": verdict(found, placed),
        "stages": [_pair_document(pair) for pair in found.pairs],
        "placement": None
        if placed is None
        else {
            "wanted": placed.wanted,
            "nodes": [{"node": n.node, "op": n.op, "provider": n.provider, "reason": n.reason} for n in placed.nodes],
            "gone": list(placed.gone),
        },
    }


def _pair(pair: Pair) -> list[str]:
    parts = [f"## {pair.against} → {pair.stage}"]
    outputs = ", ".join(f"`{name}` {_error(error)}" for name, error in list(pair.outputs.items())[:4])
    parts.append(f"Relative error of the outputs: {outputs or 'not known'}; limit {pair.limit:g}.")
    if pair.finding is not None:
        parts += _finding(pair.finding)
    parts.append(
        _table(("layer", "tensors", "median error", "worst", "of", "saturated"), [_row(*one) for one in _layers(pair)])
    )
    own = sorted(pair.lines, key=lambda line: -_own(line))[:_WORST]
    rows = [
        (f"`{line.tensor}`", line.op, _error(line.difference.error), _error(line.inherited), *_quantised(line))
        for line in own
        if line.difference.error > 0
    ]
    if rows:
        parts.append("Where most error is added:")
        parts.append(_table(("tensor", "made by", "error", "of its inputs", "scale", "zero point", "saturated"), rows))
    return parts


def _finding(finding: Finding) -> list[str]:
    line, found = finding.line, finding.line.difference
    facts = [
        f"- first wrong tensor: `{line.tensor}`, made by {line.op} `{line.node}`",
        f"- error {_error(found.error)}; of what it is made of {_error(line.inherited)}"
        + (f"; {found.note}" if found.note else ""),
        f"- range {_range(found.reference_range)} at the stage before, {_range(found.candidate_range)} here",
    ]
    if line.quantisation is not None:
        scale, zero, saturated = _quantised(line)
        facts.append(
            f"- quantised to {line.quantisation.dtype}, scale {scale}, zero point {zero}, range "
            f"{_range(line.quantisation.range)}, saturated {saturated}"
        )
    if finding.persists is False:
        facts.append(
            "- **the outputs come out right while this tensor is looked at**: the provider fuses what is around it"
        )
    if finding.cause is None:
        return ["\n".join(facts), "**Cause: not known.** No known fault leaves what is seen here."]
    evidence = "\n".join(f"- {one}" for one in finding.cause.evidence)
    return [
        "\n".join(facts),
        f"**Cause: {finding.cause.name}.** What shows it:",
        evidence,
        f"What to do: {finding.cause.remedy}.",
    ]


def _placed(placed: Placement) -> list[str]:
    count: dict[str, int] = {}
    for node in placed.nodes:
        count[node.provider] = count.get(node.provider, 0) + 1
    where = ", ".join(f"{number} on {name}" for name, number in sorted(count.items(), key=lambda one: -one[1]))
    parts = ["## Placement", f"{len(placed.nodes)} nodes: {where or 'none'}. {len(placed.gone)} were folded before."]
    if placed.fell_back:
        fallen = [(f"`{one.node}`", one.op, one.provider, one.reason or "not said") for one in placed.fell_back]
        parts.append(_table(("fell back", "op", "to", "because"), fallen))
    rows = [(f"`{one.node}`", one.op, one.provider) for one in placed.nodes]
    if rows:
        parts.append(
            f"<details><summary>Every node</summary>\n\n{_table(('node', 'op', 'provider'), rows)}\n\n</details>"
        )
    return parts


def _layers(pair: Pair) -> Iterable[tuple[int | None, list[Line]]]:
    found: dict[int | None, list[Line]] = {}
    for line in pair.lines:
        found.setdefault(line.layer, []).append(line)
    return found.items()


def _row(number: int | None, lines: list[Line]) -> tuple[str, ...]:
    worst = max(lines, key=lambda line: line.difference.error)
    errors = sorted(line.difference.error for line in lines)
    saturated = max((line.saturated for line in lines if line.saturated is not None), default=None)
    share = "" if saturated is None else f"{saturated:.2%}"
    layer = "–" if number is None else str(number)
    middle = errors[len(errors) // 2]
    return layer, str(len(lines)), _error(middle), _error(worst.difference.error), f"`{worst.tensor}`", share


def _own(line: Line) -> float:
    error = line.difference.error
    return (
        error if math.isinf(error) and not math.isinf(line.inherited) else max(0.0, error - min(line.inherited, error))
    )


def _quantised(line: Line) -> tuple[str, str, str]:
    if line.quantisation is None:
        return "", "", ""
    share = "" if line.saturated is None else f"{line.saturated:.2%}"
    return _parameter(line.quantisation.scale), _parameter(line.quantisation.zero_point), share


def _parameter(values: Any) -> str:
    least, most = float(values.min()), float(values.max())
    return f"{least:.4g}" if least == most else f"{least:.4g} … {most:.4g} by channel"


def _pair_document(pair: Pair) -> dict[str, Any]:
    finding = pair.finding
    return {
        "stage": pair.stage,
        "against": pair.against,
        "emulated": pair.emulated,
        "limit": pair.limit,
        "outputs": {name: _number(error) for name, error in pair.outputs.items()},
        "finding": None
        if finding is None
        else {
            **_line_document(finding.line),
            "leaps": finding.leaps,
            "persists": finding.persists,
            "cause": None if finding.cause is None else finding.cause.name,
            "evidence": [] if finding.cause is None else list(finding.cause.evidence),
            "remedy": None if finding.cause is None else finding.cause.remedy,
        },
        "tensors": [_line_document(line) for line in pair.lines],
    }


def _line_document(line: Line) -> dict[str, Any]:
    found = line.difference
    return {
        "tensor": line.tensor,
        "node": line.node,
        "op": line.op,
        "layer": line.layer,
        "error": _number(found.error),
        "inherited": _number(line.inherited),
        "range": [_number(one) for one in found.candidate_range],
        "reference_range": [_number(one) for one in found.reference_range],
        "nonfinite": found.nonfinite,
        "quantisation": None if line.quantisation is None else _quantisation(line.quantisation),
        "saturated": line.saturated,
    }


def _quantisation(one: Quantisation) -> dict[str, Any]:
    return {
        "dtype": one.dtype,
        "axis": one.axis,
        "block": one.block,
        "scale": [_number(float(value)) for value in one.scale.ravel()],
        "zero_point": [int(value) for value in one.zero_point.ravel()],
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _error(error: float) -> str:
    return "not a number" if not math.isfinite(error) else f"{error:.2g}"


def _range(ends: tuple[float, float]) -> str:
    return " … ".join(f"{end:.4g}" for end in ends)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
