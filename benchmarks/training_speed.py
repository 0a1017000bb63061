"""Tokens/s of this package's trainer and of PEFT with the Trainer, in turn: see benchmarks/training.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from statistics import fmean

from training_candidates import OURS, PLAIN, Candidate, Failed, Job, measure
from training_scale import MIB, Line, Scale, dialogues, least_that_does

from edge_sdss.errors import BudgetExceeded
from edge_sdss.profiling.schema import Summary
from edge_sdss.profiling.versus import Versus, versus_many
from edge_sdss.tuning.budgeted import GLIBC

FREE, TIGHT = "without a budget", "tightest budget"
_BEFORE = 8  # calls that `versus_many` makes of each function to plan and warm up


def speed(scale: Scale) -> Iterator[Line]:
    """All three do the same batches in the same order; a call is a pass over the examples."""
    pairs, source = dialogues(scale.data, scale.batch_size * scale.batches)
    epochs = _BEFORE + scale.blocks
    free = Job(OURS, scale.model, "float32", pairs, scale.batch_size, scale.sequence, epochs, gated=True)
    plan = scale.plan(free.settings)
    tight = replace(free, fit=asdict(plan.least.fit))
    least = scale.least_bytes(free.settings)
    above, _ = least_that_does(lambda budget: _trial(replace(tight, budget_bytes=budget), scale.threads), least)
    tight = replace(tight, budget_bytes=round(above * least))
    jobs = {PLAIN: replace(free, trainer=PLAIN), FREE: free, TIGHT: tight}
    with ExitStack() as stack:
        running = {}
        for name, job in jobs.items():
            # The allocator's thresholds are those that the child of a budget gets.
            running[name] = Candidate(job, scale.threads, GLIBC if name == TIGHT else {})
            stack.callback(running[name].close)
        tokens = {each.ready["tokens"] for each in running.values()}
        if len(tokens) > 1:
            raise RuntimeError(f"not all got the same tokens: {tokens}")
        calls = {name: _call(each, scale.batches) for name, each in running.items()}
        found = versus_many(calls, blocks=scale.blocks, min_block_s=1e-3)
        ended = {name: each.end() for name, each in running.items()}
    one_pass = tokens.pop()
    facts = scale.facts | {
        "data": source, "batch": scale.batch_size, "weights": "float32", "tokens": one_pass,
        "longest": running[FREE].ready["longest"],
    }  # fmt: skip
    yield line(PLAIN, next(iter(found.values())).ours, one_pass) | {"settings": facts}
    for name, against in found.items():
        told = {"stepped_down": ended[name]["stepped_down"]}
        if name == TIGHT:
            told |= {"fit": plan.least.fit.words, "budget_mib": above * least / MIB, "above": above}
        known = facts | told | _interval(against)
        yield {**line(f"{OURS}, {name}", against.peer, one_pass), **ratio(against), "settings": known}


def line(case: str, found: Summary, tokens: int) -> Line:
    """Seconds a pass as tokens/s; what was the upper bound is the lower one."""
    bounds = {
        "lo": None if found.hi is None else tokens / found.hi,
        "hi": None if found.lo is None else tokens / found.lo,
    }
    common = {"bench": "training-speed", "case": case, "metric": "speed", "unit": "token/s", "n": found.n}
    return {**common, "value": tokens / found.median, **bounds}


def ratio(against: Versus) -> Line:
    """The peer's time over ours, which is our speed over the peer's."""
    return {"peer": PLAIN, "ratio": round(against.ratio, 4)}


def _trial(job: Job, threads: int) -> None:
    """Raises BudgetExceeded where an epoch does not come to its end as it began."""
    try:
        measure(replace(job, gated=False, epochs=1), threads, GLIBC)
    except Failed as failed:
        if "BudgetExceeded" in str(failed):
            raise BudgetExceeded(str(failed)) from failed
        raise


def _call(candidate: Candidate, steps: int) -> Callable[[], float]:
    return lambda: fmean(candidate.step()["seconds"] for _ in range(steps))


def _interval(against: Versus) -> Line:
    return {"ratio_lo": round(against.lo, 4), "ratio_hi": round(against.hi, 4), "blocks": against.n}
