"""Times functions against each other in one run: blocks in a balanced random order, ratios by pairs of blocks.

A machine that gets slower or faster meanwhile changes both sides alike, so the ratio says more than two
measurements one after the other. Knows nothing of what the functions do.
"""

from __future__ import annotations

import gc
import math
import random
import statistics as exact
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

from edge_sdss.errors import InputError, message
from edge_sdss.profiling import statistics
from edge_sdss.profiling.schema import Summary

Function = Callable[[], Any]
Block = Callable[[], Sequence[float]]
Clock = Callable[[], float]

LEAST_BLOCKS = 7  # fewer pairs can never reach a verdict
SAMPLE_S = 5e-4  # well below a scheduler's time slice, so that the median sample saw no other process
_MOST_CALLS = 1 << 20
_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Versus:
    """One side against the other, in seconds a call; `ratio` is ours / peer with its 95 % interval.

    `verdict` is on ours: better where it takes surely less time than the peer.
    """

    ours: Summary
    peer: Summary
    ratio: float
    lo: float
    hi: float
    n: int
    verdict: statistics.Verdict


@dataclass(frozen=True, slots=True)
class _Plan:
    """How often a function is called: `calls` for each sample, `samples` for each block."""

    calls: int
    samples: int


def versus(
    ours: Function,
    peer: Function,
    *,
    blocks: int = 40,
    min_block_s: float = 0.05,
    clock: Clock = time.perf_counter,
    seed: int = 0,
) -> Versus:
    """Times two functions in blocks ABBA or BAAB, at random. See `versus_many`."""
    functions = {"ours": ours, "peer": peer}
    return versus_many(functions, blocks=blocks, min_block_s=min_block_s, clock=clock, seed=seed)["peer"]


def versus_many(
    functions: Mapping[str, Function],
    *,
    blocks: int = 40,
    min_block_s: float = 0.05,
    clock: Clock = time.perf_counter,
    seed: int = 0,
) -> dict[str, Versus]:
    """Times the first function, ours, against each of the others and returns the outcomes by their names.

    Each function gets `blocks` blocks of at least `min_block_s` seconds, after one to warm up. A round
    has one block of each, in random order; the next round has the order reversed, so that a steady
    drift cancels. A sample is the mean time of as many calls as take half a millisecond, or of one; a
    block's time is the median of its samples, so that interruptions do not count. Many short blocks
    stand a busy machine better than few long ones. Garbage is not collected while a block runs.
    Raises InputError for fewer than two functions or seven blocks, or where time does not pass.
    """
    if len(functions) < 2 or blocks < LEAST_BLOCKS or not min_block_s > 0:
        found = f"{len(functions)} functions, {blocks} blocks, {min_block_s} s a block"
        do = f"give two functions or more, {LEAST_BLOCKS} blocks or more and a time above 0"
        raise InputError(message("time functions against each other", found, do))
    plans = _plans(functions, min_block_s, clock)
    timed = {name: partial(_timed, functions[name], plans[name], clock) for name in functions}
    for block in timed.values():
        block()
    taken = in_turn(timed, blocks=blocks, seed=seed)
    ours, *peers = functions
    return {name: outcome(taken[ours], taken[name]) for name in peers}


def in_turn(functions: Mapping[str, Block], *, blocks: int, seed: int = 0) -> dict[str, list[list[float]]]:
    """Calls functions that time themselves, each `blocks` times in the order of `versus_many`; returns their blocks.

    For what runs in another process, which knows better than the caller how long it took.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in functions}
    draws, order = random.Random(seed), list(functions)
    for index in range(blocks):
        if index % 2:
            order.reverse()
        else:
            draws.shuffle(order)
        for name in order:
            taken[name].append(list(functions[name]()))
    return taken


def outcome(ours: list[list[float]], peer: list[list[float]]) -> Versus:
    """Returns ours against the peer, from at least seven blocks of each in seconds, taken next to each other."""
    found = statistics.paired_ratio([exact.median(block) for block in peer], [exact.median(block) for block in ours])
    assert found.lo is not None
    assert found.hi is not None
    return Versus(
        ours=statistics.summary(ours, "s", "lower"),
        peer=statistics.summary(peer, "s", "lower"),
        ratio=found.ratio,
        lo=found.lo,
        hi=found.hi,
        n=found.n_a,
        verdict=statistics.verdict(found, "lower"),
    )


def _plans(functions: Mapping[str, Function], min_block_s: float, clock: Clock) -> dict[str, _Plan]:
    """Samples of the same length for all; those of functions about as fast have as many calls, to be exact."""
    each = {name: _seconds(function, clock) for name, function in functions.items()}
    calls = {name: max(1, round(SAMPLE_S / seconds)) for name, seconds in each.items()}
    if max(calls.values()) <= 2 * min(calls.values()):
        calls = dict.fromkeys(calls, max(calls.values()))
    return {name: _Plan(calls[name], math.ceil(min_block_s / (calls[name] * each[name]))) for name in functions}


def _seconds(function: Function, clock: Clock) -> float:
    """The least time of a call, from enough calls to time them. The first one, which may prepare much, is not timed."""
    calls = 1
    function()
    while _timed(function, _Plan(calls, 1), clock)[0] * calls < SAMPLE_S and calls < _MOST_CALLS:
        calls *= 2
    best = min(_timed(function, _Plan(calls, _TRIALS), clock))
    if best <= 0:
        found = f"{calls} calls took no time"
        raise InputError(message("time functions against each other", found, "give a clock that runs"))
    return best


def _timed(function: Function, plan: _Plan, clock: Clock) -> list[float]:
    """A block: its samples, in seconds a call."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        samples = []
        for _ in range(plan.samples):
            start = clock()
            for _ in repeat(None, plan.calls):
                function()
            samples.append((clock() - start) / plan.calls)
        return samples
    finally:
        if collecting:
            gc.enable()
