"""What the sampling costs: the thread's share of a core at 10 Hz, and how much a workload slows down by it.

    python benchmarks/sampler.py [--seconds 60] [--dry-run]

The share is taken with this machine's sensors and with the written tree of a Jetson AGX Orin, whose files
are ordinary ones: it says what our code costs there, not what the driver of a real board does. The slow-down
is the ratio of workloads in windows of a running meter to the same ones without it, by pairs of blocks in
random order.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import results

from edge_sdss import config
from edge_sdss.lm import LanguageModel
from edge_sdss.profiling import Meter
from edge_sdss.profiling.statistics import paired_ratio
from edge_sdss.tree import Tree

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import boards

BOARD = "agx-orin-64gb-jp5"
PAIRS = 40
ORIN_SENSORS = ("ina3221", "process", "thermal")


def orin(root: Path) -> Path:
    """The written board with as many zones and clocks as the real one shows."""
    boards.write(root, boards.BOARDS[BOARD])
    for number in range(9):
        zone = f"sys/class/thermal/thermal_zone{number}"
        boards.put(root, f"{zone}/type", f"zone{number}-thermal")
        boards.put(root, f"{zone}/temp", 45000 + 500 * number)
    for number in (0, 4, 8):
        boards.put(root, f"sys/devices/system/cpu/cpufreq/policy{number}/scaling_cur_freq", 1510400)
    boards.put(root, "sys/class/devfreq/17000000.gpu/cur_freq", 306000000)
    for path in ("proc/self/status", "proc/self/stat", "proc/meminfo"):  # the kernel's own: dearer than files
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).unlink(missing_ok=True)
        (root / path).symlink_to(f"/{path}")
    return root


def share(meter: Meter, seconds: float) -> dict[str, Any]:
    """The thread's processor time while nothing else happens."""
    with meter:
        time.sleep(seconds)
    info = meter.sampler_info()
    sensors = {sensor.name: len(sensor.channels) for sensor in meter.sensors if sensor.channels}
    settings = {"interval_s": info.interval_s, "jitter": info.jitter, "channels": sensors, "seconds": seconds}
    return {
        "bench": "sampler", "metric": "share of a core", "value": 100 * info.share, "unit": "%", "n": info.passes,
        "settings": settings,
    }  # fmt: skip


def arrays() -> None:
    """NumPy: products of matrices and a sort."""
    square = np.random.default_rng(0).standard_normal((160, 160), np.float32)
    for _ in range(10):
        square = np.tanh(square @ square)
    np.sort(square, axis=None)


def objects() -> None:
    """Plain Python, which holds the interpreter's lock throughout."""
    sum(len(str(number)) for number in range(8000))


def decoding() -> Callable[[], None]:
    """The next token of the default model, by a cache of 16 to 80 tokens."""
    lm = LanguageModel.load(config.Model())
    prompt = lm.tokenizer("The doctor asked me how I sleep, and I said that I sleep well.")["input_ids"][:16]
    answers = (islice(lm.follow(prompt), 64) for _ in count())
    tokens = chain.from_iterable(answers)

    def decode() -> None:
        next(tokens)

    return decode


def block(work: Callable[[], None], meter: Meter | None, calls: int) -> float:
    """The median second of so many calls, all in one window where there is a meter."""
    times = []
    with meter.window(work.__name__) if meter else nullcontext():
        for _ in range(calls):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def slowdown(work: Callable[[], None], open_meter: Callable[[], Meter], seconds: float) -> dict[str, Any]:
    """The ratio with and without a running meter."""
    work()
    calls = max(1, round(seconds / 2 / PAIRS / block(work, None, 5)))
    order = random.Random(0)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(PAIRS):
        for metered in order.sample([False, True], 2):
            if metered:
                with open_meter() as meter:
                    times[True].append(block(work, meter, calls))
            else:
                times[False].append(block(work, None, calls))
    found = paired_ratio(times[False], times[True])
    return {
        "bench": "sampler", "case": f"slow-down, {work.__name__}", "metric": "time with / without the meter",
        "value": found.ratio, "lo": found.lo, "hi": found.hi, "unit": "1", "n": PAIRS,
        "settings": {"calls": calls, "ms per call": round(1e3 * min(times[False]), 3)},
    }  # fmt: skip


def main() -> None:
    """Prints the figures and appends them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each case")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(orin(Path(folder)))
        lines = [
            {**share(Meter.auto(), given.seconds), "case": "share, this machine"},
            {**share(Meter.auto(tree, ORIN_SENSORS), given.seconds), "case": f"share, written {BOARD}"},
            slowdown(arrays, lambda: Meter.auto(tree, ORIN_SENSORS), given.seconds),
            slowdown(objects, lambda: Meter.auto(tree, ORIN_SENSORS), given.seconds),
            slowdown(decoding(), lambda: Meter.auto(tree, ORIN_SENSORS), 2 * given.seconds),
        ]
    for line in lines:
        interval = f" ({line['lo']:.4f} to {line['hi']:.4f})" if line.get("lo") else ""
        print(f"{line['case']}: {line['value']:.4f}{interval} {line['unit']}, {line['settings']}")
    if not given.dry_run:
        results.append(lines)


if __name__ == "__main__":
    main()
