"""What an offer costs beyond the embedding: each policy, each number of bins; and whether it stays flat.

    python benchmarks/selection.py            per policy, and a stream of 1,000,000 offers
    python benchmarks/selection.py --quick    the same with fewer offers, nothing appended

The dialogues are synthetic: token embeddings [64, 576] float32 and about 45 words each. The peer of every
figure is one NumPy pass over the same embeddings (the mean of the squares), which no selection can avoid.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import results

from edge_sdss import config, lexicon
from edge_sdss.selection import Buffer, Selector, policies
from edge_sdss.store import Store
from edge_sdss.types import Dialogue

WIDTH, TOKENS, WORDS = 576, 64, 45
BINS = (32, 128, 512)
WARM_UP = 8


def stream(n: int, seed: int = 0) -> Iterator[tuple[Dialogue, Any]]:
    """n dialogues with embeddings that drift around a few directions, as a user's subjects do."""
    draws = np.random.default_rng(seed)
    subjects = draws.normal(size=(12, WIDTH)).astype(np.float32)
    noise = draws.normal(size=(64, TOKENS, WIDTH)).astype(np.float32)
    terms = [t for d in lexicon.DOMAINS for t in d.split("_")] + "cat dog soup work money train doctor music".split()
    plain = "a the of to it was and for on with that this".split()
    for i in range(n):
        rows = noise[i % len(noise)] * np.float32(draws.uniform(0.2, 2)) + subjects[i % len(subjects)]
        words = [*draws.choice(plain, WORDS - 5), *draws.choice(terms, draws.integers(0, 6))]
        text = " ".join(words)
        yield Dialogue(f"{i} {text[: len(text) // 2]}", text[len(text) // 2 :]), rows


def one_pass(rows: Any) -> float:
    """Seconds of the least that any selection must do with the embeddings."""
    start = time.perf_counter()
    np.einsum("ij,ij->i", rows, rows).mean()
    return time.perf_counter() - start


def measure(policy: str, bins: int, offers: int, with_store: bool) -> tuple[list[float], list[float]]:
    """Seconds of each offer, and of one pass over the same embeddings, once 8 x bins offers have gone by."""
    buffer = Buffer(config.Buffer(bins=bins, max_bytes=1 << 30), WIDTH)
    selector = Selector(config.Selection(policy=policy), buffer, lexicon.load())
    taken, passes = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "edge_sdss.db", config.Store())
        for i, (dialogue, rows) in enumerate(stream(WARM_UP * bins + offers)):
            passes.append(one_pass(rows))
            start = time.perf_counter()
            decision = selector.decide(dialogue, rows)
            if with_store:
                store.record(decision, source="bench", chain="", position=i)
            selector.apply(decision)
            taken.append(time.perf_counter() - start)
        store.close()
    return taken[WARM_UP * bins :], passes[WARM_UP * bins :]


def line(case: str, taken: list[float], passes: list[float], **settings: Any) -> dict[str, Any]:
    """The median as a line of results, with the quartiles in place of an interval."""
    low, median, high = statistics.quantiles(taken, n=4)
    ratio = median / statistics.median(passes)
    facts = {
        "lo": low * 1e6,
        "hi": high * 1e6,
        "n": len(taken),
        "settings": {"d": WIDTH, "tokens": TOKENS, **settings},
    }
    peer = {"peer": "one pass over the embeddings", "ratio": round(ratio, 2)}
    return {
        "bench": "selection" if case.startswith("sdss") else "selection-policies",
        "case": case,
        "metric": "offer, median",
        "value": median * 1e6,
        "unit": "µs",
        **facts,
        **peer,
    }


def long_stream(offers: int, bins: int = 512) -> list[dict[str, Any]]:
    """Time and resident memory of the last tenth of a long stream against its first full tenth."""
    buffer = Buffer(config.Buffer(bins=bins, max_bytes=1 << 30), WIDTH)
    selector = Selector(config.Selection(), buffer, lexicon.load())
    tenth = offers // 10
    taken, medians, memory = [], [], []
    for i, (dialogue, rows) in enumerate(stream(offers)):
        start = time.perf_counter()
        selector.offer(dialogue, rows)
        taken.append(time.perf_counter() - start)
        if i % tenth == tenth - 1:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            print(
                f"{i + 1:,} offers: {statistics.median(taken) * 1e6:.0f} µs, peak {memory[-1] // 1024} MiB",
                flush=True,
            )
            medians.append(statistics.median(taken) * 1e6)
            taken = []
    growth = (memory[-1] - memory[1]) / 1024
    median, before = medians[-1], medians[1]
    case = f"sdss, {bins} bins, {offers:,} offers"
    common = {
        "bench": "selection",
        "case": case,
        "n": tenth,
        "settings": {"d": WIDTH, "bins": bins, "offers": offers},
    }
    return [
        {
            **common,
            "metric": "offer, median of the last tenth",
            "value": median,
            "unit": "µs",
            "peer": "second tenth",
            "ratio": round(median / before, 3),
        },
        {**common, "metric": "growth of peak memory after the second tenth", "value": growth, "unit": "MiB"},
    ]


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--offers", type=int, default=1_000_000, help="length of the long stream")
    given = parser.parse_args()
    offers = 200 if given.quick else 2_000
    lines = []
    for policy in policies.names():
        for bins in BINS:
            lines.append(line(f"{policy}, {bins} bins", *measure(policy, bins, offers, False), bins=bins))
            print(f"{lines[-1]['case']}: {lines[-1]['value']:.0f} µs, {lines[-1]['ratio']} passes", flush=True)
    lines.append(line("sdss, 512 bins, with store", *measure("sdss", 512, offers, True), bins=512))
    print(f"{lines[-1]['case']}: {lines[-1]['value']:.0f} µs")
    lines += long_stream(20_000 if given.quick else given.offers)
    for found in lines[-2:]:
        print(f"{found['metric']}: {found['value']:.1f} {found['unit']}")
    if not given.quick:
        print(f"appended to {results.append(lines).name}", file=sys.stderr)


if __name__ == "__main__":
    main()
