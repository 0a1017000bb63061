"""From one stage to the next, the first tensor that goes wrong.

Every tensor is compared, in topological order, in parts where a stage can give only some at a time. The first one that
is wrong while what it is made of is right is where the fault is. Knows nothing of providers; the causes are told by
`causes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_sdss.errors import InputError, message
from edge_sdss.exporting.explain import measure
from edge_sdss.exporting.explain.causes import name_cause
from edge_sdss.exporting.explain.graph import Array, Topology, layer
from edge_sdss.exporting.explain.quantised import Quantisation
from edge_sdss.exporting.explain.stages import Feeds, Stage
from edge_sdss.exporting.explain.suspects import Cause, Suspect

Tick = Callable[[str], None]

_LEAP = 3.0
"""An error is a tensor's own where it is so many times that of what it is made of."""

LIMITS: Mapping[tuple[str, bool], float] = {
    ("float32", False): 1e-3,
    ("float16", False): 0.03,
    ("float32", True): 0.10,
    ("float16", True): 0.10,
}
"""By the arithmetic of the later stage, and whether it is quantised where the earlier one is not: relative error."""


@dataclass(frozen=True)
class Line:
    """One tensor at two stages; `inherited`: the greatest error of the nearest tensors that it is made of."""

    tensor: str
    node: str
    op: str
    layer: int | None
    difference: measure.Difference
    inherited: float
    quantisation: Quantisation | None = None
    saturated: float | None = None


@dataclass(frozen=True)
class Finding:
    """The first tensor that is wrong. `leaps`: what it is made of is right, so the fault is here; else the error has
    grown bit by bit. `persists`: whether the graph's outputs are as wrong while this tensor is looked at, which can
    change what a provider does; None where it was not asked."""

    line: Line
    leaps: bool
    persists: bool | None
    cause: Cause | None


@dataclass(frozen=True)
class Pair:
    """A stage against the one before. `finding` is None where nothing is wrong."""

    stage: str
    against: str
    emulated: bool
    limit: float
    lines: tuple[Line, ...]
    outputs: Mapping[str, float]
    finding: Finding | None = None

    @property
    def harmful(self) -> bool:
        """Whether an output of the graph is wrong, not only a tensor on the way."""
        return any(error > self.limit for error in self.outputs.values())


@dataclass(frozen=True)
class Explanation:
    """All pairs of stages, in order; after one that is wrong the next are compared all the same."""

    pairs: tuple[Pair, ...]

    @property
    def first(self) -> Pair | None:
        """The first pair of stages between which something goes wrong."""
        return next((pair for pair in self.pairs if pair.finding), None)


@dataclass
class _Run:
    """One pair of stages while it is looked into."""

    topology: Topology
    reference: Stage
    candidate: Stage
    feeds: Sequence[Feeds]
    limit: float
    adapters: tuple[str, ...]
    asked: set[str] = field(default_factory=set)
    differences: dict[str, measure.Difference] = field(default_factory=dict)
    quantised: dict[str, tuple[Quantisation, float]] = field(default_factory=dict)

    def values(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        """Both stages' values of those tensors that both have, all feeds one after the other along the first axis."""
        parts = [(self.reference.run(feed, names), self.candidate.run(feed, names)) for feed in self.feeds]
        both = [name for name in names if all(name in a and name in b for a, b in parts)]
        return {name: (_joined([a[name] for a, _ in parts]), _joined([b[name] for _, b in parts])) for name in both}


def explain(
    stages: Sequence[Stage],
    topology: Topology,
    feeds: Sequence[Feeds],
    *,
    limits: Mapping[str, float] | None = None,
    adapters: Sequence[str] = (),
    tick: Tick = lambda text: None,
) -> Explanation:
    """Compares each stage with the one before it.

    `topology` is the float graph's, whose names of tensors all stages use. `limits`: the relative error a stage may
    have, by its name; by default `LIMITS`. `adapters`: the graph's inputs that are LoRA matrices. `tick` is told what
    is done.
    Raises InputError for fewer than two stages or no feeds.
    """
    if len(stages) < 2 or not feeds:
        found = f"{len(stages)} stages and {len(feeds)} feeds"
        raise InputError(message("explain a graph", found, "give two stages or more, and feeds"))
    pairs = []
    for reference, candidate in itertools.pairwise(stages):
        limit = (limits or {}).get(candidate.name) or _limit(topology, reference, candidate)
        run = _Run(topology, reference, candidate, feeds, limit, tuple(adapters))
        tick(f"{reference.name} → {candidate.name}")
        pairs.append(_pair(run, tick))
    return Explanation(tuple(pairs))


def _limit(topology: Topology, reference: Stage, candidate: Stage) -> float:
    before, now = (any(map(stage.quantisation, topology.tensors)) for stage in (reference, candidate))
    return LIMITS[candidate.arithmetic, now and not before]


def _pair(run: _Run, tick: Tick) -> Pair:
    _compare(run, run.topology.outputs)
    outputs = [name for name in run.topology.outputs if name in run.differences]
    errors = {name: run.differences[name].error for name in outputs}
    name, leaps = _scan(run, tick)
    lines = tuple(_lines(run))
    finding = None
    if name is not None:
        line = next(line for line in lines if line.tensor == name)
        finding = Finding(line, leaps, _persists(run, name, errors), _cause(run, name))
    return Pair(run.candidate.name, run.reference.name, run.candidate.emulated, run.limit, lines, errors, finding)


def _scan(run: _Run, tick: Tick) -> tuple[str | None, bool]:
    """Compares tensors until the first wrong one is known.

    Where all at once is too much, as many as can be are looked at first, evenly through the graph. Then those that lead
    to the first wrong one, back to those that are known, until it is one of which all that it is made of is known. An
    error can be hidden by what is added to it and come out later, so where it has no place of its own all that is
    before is looked at.
    """
    names, size = run.topology.tensors, _at_once(run)
    _compare(run, names if size >= len(names) else names[:: -(-len(names) // size)])
    while True:
        name, leaps = _first(run)
        if name is None:
            return None, False
        unknown = run.topology.unknown(name, run.asked)
        if not unknown and not leaps:
            unknown = tuple(one for one in names[: names.index(name)] if one not in run.asked)
        if not unknown:
            return name, leaps
        tick(f"{run.candidate.name}: before {name}")
        _compare(run, unknown[:size])


def _at_once(run: _Run) -> int:
    sizes = [stage.at_once for stage in (run.reference, run.candidate) if stage.at_once]
    return min(sizes, default=len(run.topology.tensors))


def _compare(run: _Run, names: Sequence[str]) -> None:
    run.asked.update(names)
    for name, values in run.values(names).items():
        run.differences[name] = _difference(run, name, values)
        quantisation = run.candidate.quantisation(name)
        if quantisation is not None:
            run.quantised[name] = quantisation, float(quantisation.saturated(values[1]).mean())


def _inherited(run: _Run, name: str) -> float:
    nearest = run.topology.nearest(name, run.differences)
    return max((run.differences[one].error for one in nearest), default=0.0)


def _first(run: _Run) -> tuple[str | None, bool]:
    """The first tensor whose error is its own; else the first whose error is too great, if there is one."""
    wrong = [one for one in run.topology.tensors if one in run.differences and run.differences[one].error > run.limit]
    for name in wrong:
        if run.differences[name].error >= _LEAP * _inherited(run, name):
            return name, True
    return (wrong[0], False) if wrong else (None, False)


def _lines(run: _Run) -> Iterator[Line]:
    for name in run.topology.tensors:
        if name in run.differences:
            node, quantised = run.topology.producers[name], run.quantised.get(name, (None, None))
            found = run.differences[name], _inherited(run, name)
            yield Line(name, node.name, node.op, layer(name), *found, *quantised)


def _persists(run: _Run, name: str, before: Mapping[str, float]) -> bool | None:
    """Whether an output that was wrong is wrong still while `name` alone is looked at."""
    wrong = [one for one, error in before.items() if error > run.limit]
    if not wrong or run.candidate.at_once is None:
        return None
    values = run.values([name, *run.topology.outputs])
    return any(_difference(run, one, values[one]).error > run.limit for one in wrong)


def _cause(run: _Run, name: str) -> Cause | None:
    near = [one for one in _around(run, name) if one in run.differences or one == name]
    return name_cause(
        Suspect(
            tensor=name,
            topology=run.topology,
            reference=run.reference,
            candidate=run.candidate,
            feeds=run.feeds,
            values=run.values(near),
            errors={one: found.error for one, found in run.differences.items()},
            limit=run.limit,
            adapters=run.adapters,
        )
    )


def _around(run: _Run, name: str) -> list[str]:
    """What is made by the nodes that lead to a tensor, and by those that follow it, some levels up and down."""
    above = [one for node in run.topology.above(name, 6) for one in node.outputs]
    return list(dict.fromkeys((*above, name, *run.topology.below(name, 3))))


def _difference(run: _Run, name: str, values: tuple[Array, Array]) -> measure.Difference:
    return measure.difference(*values, logits=run.topology.feeds_softmax(name))


def _joined(arrays: Sequence[Array]) -> Array:
    if len(arrays) == 1 or arrays[0].ndim == 0:
        return arrays[0]
    return np.concatenate(arrays, 0)
