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
        decision = self._selector.decide(dialogue, rows)
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
    taken: list[float] = []
    tenths: list[Summary] = []
    memory = []
    for i, (dialogue, rows) in enumerate(stream(offers)):
        start = time.perf_counter()
        selector.offer(dialogue, rows)
        taken.append((time.perf_counter() - start) * 1e6)
        if i % tenth == tenth - 1:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            tenths.append(summary([taken], "µs", "lower"))
            print(f"{i + 1:,} offers: {tenths[-1].median:.0f} µs, peak {memory[-1] // 1024} MiB", flush=True)
            taken = []
    last, growth = tenths[-1], (memory[-1] - memory[1]) / 1024
    common = {
        "bench": "selection",
        "case": f"sdss, {bins} bins, {offers:,} offers",
        "n": tenth,
        "settings": {"d": WIDTH, "bins": bins, "offers": offers},
    }
    flat = {"peer": "second tenth", "ratio": round(last.median / tenths[1].median, 3)}
    bounds = {"value": last.median, "unit": "µs", "lo": last.lo, "hi": last.hi}
    return [
        {**common, "metric": "offer, median of the last tenth", **bounds, **flat},
        {**common, "metric": "growth of peak memory after the second tenth", "value": growth, "unit": "MiB"},
    ]


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--offers", type=int, default=1_000_000, help="length of the long stream")
    given = parser.parse_args()
    lines = []
    made = list(stream(4_000 if given.quick else 40_000))
    for policy in policies.names():
        for bins in BINS:
            lines.append(line(f"{policy}, {bins} bins", Offers(policy, bins, made, None), made, given.quick, bins=bins))
            print(f"{lines[-1]['case']}: {lines[-1]['value']:.0f} µs, {lines[-1]['ratio']} passes", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Store(Path(folder) / "edge_sdss.db", config.Store())) as store,
    ):
        stored = Offers("sdss", 512, made, store)
        lines.append(line("sdss, 512 bins, with store", stored, made, given.quick, bins=512))
    print(f"{lines[-1]['case']}: {lines[-1]['value']:.0f} µs")
    lines += long_stream(20_000 if given.quick else given.offers)
    for found in lines[-2:]:
        print(f"{found['metric']}: {found['value']:.1f} {found['unit']}")
    if not given.quick:
        print(f"appended to {results.append(lines).name}", file=sys.stderr)


if __name__ == "__main__":
    main()
