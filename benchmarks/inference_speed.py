"""Decode and prefill of a bundle, llama.cpp and transformers, block by block in turn: see benchmarks/inference.py.

The blocks are kept in a file after every two rounds, one block of each and the same in reverse, so that a run may come
in portions or be stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference_bundles import PRECISIONS, Subject
from inference_candidates import LlamaBench, Process

from edge_sdss.lm import loading
from edge_sdss.profiling.statistics import summary
from edge_sdss.profiling.versus import LEAST_BLOCKS, Versus, in_turn, outcome
from edge_sdss.types import no_progress

BENCH, RATIOS = "inference", "inference-ratios"
OURS, LLAMA, TORCH = "edge_sdss", "llama.cpp, Q4_1", "transformers"
PREFILL, CONTEXT, NEW, SLOW_NEW = 512, 128, 64, 16
DECODE, DECODE_R8, PROMPT = "decode", "decode, r = 8 active", f"prefill of {PREFILL}"
Line = dict[str, Any]
Blocks = dict[str, list[list[float]]]  # "case | metric" -> blocks


@dataclass(frozen=True)
class Peers:
    """Which programs run beside ours; `without` names those that are left out."""

    llama_bench: str | None = None
    gguf: Path | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    without: tuple[str, ...] = ()


def speed(subject: Subject, peers: Peers, rounds: int, portion: int) -> Iterator[Line]:
    """Goes on with the rounds, at most `portion` of them; yields the lines when there are `rounds`."""
    kept = subject.work / "blocks.json"
    known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    blocks: Blocks = known.get("blocks", {})
    count = len(next(iter(blocks.values()), []))
    with ExitStack() as stack:
        functions, facts = _candidates(subject, peers, stack) if count < rounds else ({}, {})
        if functions and blocks and set(blocks) != set(functions):
            raise SystemExit(f"inference: {kept} is of other candidates; remove it, or name the same")
        facts = {**known.get("facts", {}), **facts}
        end = min(rounds, count + portion)
        while count < end:  # two rounds mirror each other
            for name, more in in_turn(functions, blocks=min(2, end - count), seed=count).items():
                blocks.setdefault(name, []).extend(more)
            count = len(next(iter(blocks.values())))
            kept.write_text(json.dumps({"blocks": blocks, "facts": facts}), encoding="utf-8")
            print(f"speed: {count} of {rounds} rounds", flush=True)
    if count >= max(rounds, LEAST_BLOCKS):
        yield from lines(blocks, {**subject.facts, **facts})


def _candidates(
    subject: Subject, peers: Peers, stack: ExitStack
) -> tuple[dict[str, Callable[[], list[float]]], dict[str, Any]]:
    functions: dict[str, Callable[[], list[float]]] = {}
    facts: dict[str, Any] = {"decoded_behind": CONTEXT}

    def add(case: str, metric: str, block: Callable[..., float], **asked: Any) -> None:
        functions[f"{case} | {metric}"] = lambda: [block(**asked)]

    def opened(what: Mapping[str, Any]) -> Process:
        process = Process(what, subject.threads)
        stack.callback(process.close)
        facts.update(process.ready)
        return process

    for precision in PRECISIONS:
        process, adapted = (
            opened({"kind": "bundle", "folder": str(folder)})
            for folder in (subject.plain(precision), subject.bundle(precision))
        )
        new = NEW if precision != "float32" else SLOW_NEW
        add(f"{OURS}, {precision}", DECODE, process.block, prompt=CONTEXT, new=new)
        add(f"{OURS}, {precision}", DECODE_R8, adapted.block, prompt=CONTEXT, new=new, adapter="r8")
        add(f"{OURS}, {precision}", PROMPT, process.block, prompt=PREFILL, new=0)
    if "llama.cpp" not in peers.without:
        bench = LlamaBench(peers.llama_bench, peers.gguf, subject.threads)
        facts.update(bench.ready)
        add(LLAMA, DECODE, bench.block, prompt=CONTEXT, new=NEW)
        add(LLAMA, PROMPT, bench.block, prompt=PREFILL, new=0)
    for dtype in () if "transformers" in peers.without else peers.dtypes:
        folder = str(loading.find(subject.model, no_progress))
        process = opened({"kind": "transformers", "folder": folder, "dtype": dtype})
        add(f"{TORCH}, {dtype}", DECODE, process.block, prompt=CONTEXT, new=SLOW_NEW)
        add(f"{TORCH}, {dtype}", PROMPT, process.block, prompt=PREFILL, new=0)
    return functions, facts


def lines(blocks: Blocks, facts: Mapping[str, Any]) -> Iterator[Line]:
    """Tokens/s of each case; of ours with the ratio to llama.cpp, where it ran, and to transformers."""
    for name, own in blocks.items():
        case, metric = name.split(" | ")
        tokens, found = PREFILL if metric == PROMPT else 1, summary(own, "s", "lower")
        line: Line = {
            "bench": BENCH, "case": case, "metric": metric, "unit": "token/s", "value": tokens / found.median,
            "lo": tokens / found.hi if found.hi else None, "hi": tokens / found.lo if found.lo else None,
            "n": len(own), "settings": dict(facts),
        }  # fmt: skip
        if case.startswith(OURS):
            others = _others(blocks, metric)
            if LLAMA in others:
                ratio, lo, hi = faster(outcome(own, others.pop(LLAMA)))
                line |= {"peer": LLAMA, "ratio": ratio, "settings": {**facts, "ratio_lo": lo, "ratio_hi": hi}}
            for peer, theirs in others.items():
                ratio, lo, hi = faster(outcome(own, theirs))
                yield {
                    "bench": RATIOS, "case": f"{case}, {metric}", "metric": f"speed / {peer}", "unit": "1",
                    "value": ratio, "lo": lo, "hi": hi, "n": len(own), "settings": dict(facts),
                }  # fmt: skip
        yield line


def _others(blocks: Blocks, metric: str) -> Blocks:
    """What the peers took for the same work; none runs an adapter, so ours with one is held against their plain one."""
    wanted = DECODE if metric == DECODE_R8 else metric
    split = {name: name.split(" | ") for name in blocks}
    return {case: blocks[name] for name, (case, of) in split.items() if of == wanted and not case.startswith(OURS)}


def faster(found: Versus) -> tuple[float, float, float]:
    """Our speed over the peer's with its interval, from the ratio of times."""
    return round(1 / found.ratio, 4), round(1 / found.hi, 4), round(1 / found.lo, 4)
