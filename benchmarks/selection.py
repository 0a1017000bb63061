"""What an offer costs beyond the embedding: each policy, each number of bins; and whether it stays flat.

    python benchmarks/selection.py            per policy, and a stream of 1,000,000 offers
    python benchmarks/selection.py --quick    the same with fewer offers, nothing appended

The dialogues are synthetic: token embeddings [64, 576] float32 and about 45 words each. The peer of every
figure is one NumPy pass over the same embeddings (the mean of the squares), which no selection can avoid.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import results

from edge_sdss import config, lexicon
from edge_sdss.profiling.schema import Summary
from edge_sdss.profiling.statistics import summary
from edge_sdss.profiling.versus import versus
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
    noise = draws.normal(size=(600, TOKENS, WIDTH)).astype(np.float32)
    terms = [t for d in lexicon.DOMAINS for t in d.split("_")] + "cat dog soup work money train doctor music".split()
    plain = "a the of to it was and for on with that this".split()
    tokens = [noise[i] * np.float32(draws.uniform(0.2, 2)) + subjects[i % len(subjects)] for i in range(len(noise))]
    for i in range(n):
        rows = tokens[i % len(tokens)]
        words = [*draws.choice(plain, WORDS - 5), *draws.choice(terms, draws.integers(0, 6))]
        text = " ".join(words)
        yield Dialogue(f"{i} {text[: len(text) // 2]}", text[len(text) // 2 :]), rows


class Offers:
    """Offers one dialogue after the other to a selector; the same dialogues for every policy."""

    def __init__(self, policy: str, bins: int, made: Sequence[tuple[Dialogue, Any]], store: Store | None) -> None:
        self._selector = Selector(
            config.Selection(policy=policy), Buffer(config.Buffer(bins=bins, max_bytes=1 << 30), WIDTH), lexicon.load()
        )
        self._made, self._store, self._position = made, store, 0
        for _ in range(WARM_UP * bins):
            self()

    def __call__(self) -> None:
        """Offers the next one."""
        dialogue, rows = self._made[self._position % len(self._made)]
        self._position += 1
        value = len(dialogue.prompt) % 97 / 97 if self._selector.asks else None  # its forward passes are not timed here
        decision = self._selector.decide(dialogue, rows, value)
        if self._store is not None:
            self._store.record(decision, source="bench", chain="", position=self._position)
        self._selector.apply(decision)


def one_pass(made: Sequence[tuple[Dialogue, Any]]) -> Callable[[], None]:
    """The least that any selection must do with the embeddings, of one dialogue after the other."""
    rows = cycle([rows for _, rows in made])

    def passing() -> None:
        one = next(rows)
        np.einsum("ij,ij->i", one, one).mean()

    return passing


def line(case: str, offers: Offers, made: Sequence[tuple[Dialogue, Any]], quick: bool, **settings: Any) -> Any:
    """The median of an offer against one pass over the same embeddings, ABBA."""
    found = versus(offers, one_pass(made), blocks=8 if quick else 40)
    bench = "selection" if case.startswith("sdss") else "selection-policies"
    facts = {"d": WIDTH, "tokens": TOKENS, **settings}
    return results.timed(bench, case, "offer, median", found, "one pass over the embeddings", **facts)


def long_stream(offers: int, bins: int = 512) -> list[dict[str, Any]]:
    """Time and resident memory of the last tenth of a long stream against its first full tenth."""
    buffer = Buffer(config.Buffer(bins=bins, max_bytes=1 << 30), WIDTH)
    selector = Selector(config.Selection(), buffer, lexicon.load())
    tenth = offers // 10
    passing = one_pass(list(stream(600)))
    taken: list[float] = []
    passes: list[float] = []
    tenths: list[tuple[Summary, float]] = []
    memory = []
    for i, (dialogue, rows) in enumerate(stream(offers)):
        start = time.perf_counter()
        selector.offer(dialogue, rows)
        middle = time.perf_counter()
        passing()
        taken.append((middle - start) * 1e6)
        passes.append((time.perf_counter() - middle) * 1e6)
        if i % tenth == tenth - 1:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            found = summary([taken], "µs", "lower")
            tenths.append((found, found.median / median(passes)))
            print(f"{i + 1:,} offers: {found.median:.0f} µs, {tenths[-1][1]:.2f} passes, {memory[-1] // 1024} MiB")
            taken, passes = [], []
    last, growth = tenths[-1], (memory[-1] - memory[1]) / 1024
    common = {
        "bench": "selection",
        "case": f"sdss, {bins} bins, {offers:,} offers",
        "n": tenth,
        "settings": {"d": WIDTH, "bins": bins, "offers": offers},
    }
    one = {"peer": "one pass over the embeddings", "ratio": round(last[1], 3)}
    bounds = {"value": last[0].median, "unit": "µs", "lo": last[0].lo, "hi": last[0].hi}
    flat = {"value": last[1] / tenths[1][1], "unit": "1"}
    return [
        {**common, "metric": "offer, median of the last tenth", **bounds, **one},
        {**common, "metric": "offer in passes, last tenth / second tenth", **flat},
        {**common, "metric": "growth of peak memory after the second tenth", "value": growth, "unit": "MiB"},
    ]


def buffers(quick: bool) -> Iterator[dict[str, Any]]:
    """Each policy and number of bins, and sdss with the store."""
    made = list(stream(4_000 if quick else 40_000))
    for policy in policies.names():
        for bins in BINS:
            yield line(f"{policy}, {bins} bins", Offers(policy, bins, made, None), made, quick, bins=bins)
    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder) / "bench.db", config.Store())) as store:
        yield line("sdss, 512 bins, with store", Offers("sdss", 512, made, store), made, quick, bins=512)


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only-long", action="store_true", help="the long stream alone")
    parser.add_argument("--offers", type=int, default=1_000_000, help="length of the long stream")
    given = parser.parse_args()
    lines = []
    for found in () if given.only_long else buffers(given.quick):
        print(f"{found['case']}: {found['value']:.0f} µs, {found['ratio']} passes", flush=True)
        lines.append(found)
    for found in long_stream(20_000 if given.quick else given.offers):
        print(f"{found['metric']}: {found['value']:.3g} {found['unit']}")
        lines.append(found)
    if not given.quick:
        print(f"appended to {results.append(lines).name}", file=sys.stderr)


if __name__ == "__main__":
    main()
