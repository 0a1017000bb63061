"""How often the ABBA runner errs here: comparisons of equals, and of one with 10 % more work.

    python benchmarks/verdicts.py             100 of each, appended to the results
    python benchmarks/verdicts.py --quick     5 of each, nothing appended

The workload is a NumPy kernel of about a millisecond: tanh of a vector, 400 times, or 440 times, and
all on the same memory: two vectors that lie differently are no equals (a factor of 1.6 was seen here).
Both comparisons take turns, so that each meets whatever else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import results

from edge_sdss.profiling.versus import Versus, versus

BLOCKS, BLOCK_S = 30, 0.01
STEPS, PLANTED = 400, 1.10
VECTOR = np.linspace(-3, 3, 512)
OUT = np.empty_like(VECTOR)


def kernel(steps: int) -> Callable[[], None]:
    """A function whose work is in proportion to `steps`."""

    def work() -> None:
        for _ in range(steps):
            np.tanh(VECTOR, out=OUT)

    return work


def measure(repeats: int) -> dict[str, list[Versus]]:
    """The outcomes of the comparisons of equals and of those with a planted slow-down, in turns."""
    pairs = {"equal": STEPS, "slower": round(STEPS * PLANTED)}
    found: dict[str, list[Versus]] = {name: [] for name in pairs}
    for index in range(repeats):
        for name, steps in pairs.items():
            seed = 2 * index + (name == "slower")
            found[name].append(versus(kernel(steps), kernel(STEPS), blocks=BLOCKS, min_block_s=BLOCK_S, seed=seed))
    return found


def lines(found: dict[str, list[Versus]]) -> list[dict[str, Any]]:
    """Counts of each verdict, and the ratios that were found, as lines of results."""
    settings = {"blocks": BLOCKS, "min_block_s": BLOCK_S, "planted": PLANTED}
    made = []
    for name, outcomes in found.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        common = {"bench": "verdicts", "case": name, "n": len(outcomes), "settings": settings}
        for verdict in ("better", "worse", "inconclusive"):
            made.append({**common, "metric": verdict, "value": counts[verdict], "unit": "count"})
        ratios = [outcome.ratio for outcome in outcomes]
        truth = PLANTED if name == "slower" else 1.0
        covered = sum(outcome.lo <= truth <= outcome.hi for outcome in outcomes)
        made.append({**common, "metric": "interval holds the planted ratio", "value": covered, "unit": "count"})
        spread = {"lo": min(ratios), "hi": max(ratios), "settings": settings | {"lo_hi": "range"}}
        made.append({**common, **spread, "metric": "ratio", "value": statistics.median(ratios), "unit": "1"})
    return made


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 of each; append nothing")
    parser.add_argument("--no-append", action="store_true", help="print only")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = lines(measure(5 if arguments.quick else 100))
    for line in found:
        bounds = f"  ({line['lo']:.3f} to {line['hi']:.3f})" if "lo" in line else ""
        print(f"{line['case']:7} {line['metric']:34} {line['value']:6.4g} of {line['n']}{bounds}")
    print(f"{time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if not (arguments.quick or arguments.no_append):
        print(f"appended to {results.append(found)}")


if __name__ == "__main__":
    main()
