"""How long `import edge_sdss` and the command line's `--help` take, beyond the bare interpreter."""

from __future__ import annotations

import subprocess
import sys
import time

import results

REPEATS = 15
BARE = "pass"
CASES = {"import edge_sdss": "import edge_sdss", "import edge_sdss.cli": "import edge_sdss.cli"}


def seconds(program: str) -> float:
    """Wall time of one fresh interpreter that runs the program."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Takes the cases in turn, so that a slow spell of the machine falls on all of them."""
    programs = {"bare": BARE, **CASES}
    for program in programs.values():
        seconds(program)  # the first run compiles and fills the file cache
    times: dict[str, list[float]] = {case: [] for case in programs}
    for _ in range(REPEATS):
        for case, program in programs.items():
            times[case].append(seconds(program))
    lines = []
    for case in CASES:
        beyond = sorted(a - b for a, b in zip(times[case], times["bare"], strict=True))
        # The 4th and 12th of 15 ordered values enclose the median with 96.5 % probability (binomial).
        middle, lo, hi = beyond[REPEATS // 2], beyond[3], beyond[-4]
        lines.append(
            {
                "bench": "import", "case": case, "metric": "median time", "value": 1e3 * middle, "unit": "ms",
                "lo": 1e3 * lo, "hi": 1e3 * hi, "n": REPEATS,
                "settings": {"python": sys.version.split()[0]},
            }
        )  # fmt: skip
        print(f"{case}: {1e3 * middle:.1f} ms ({1e3 * lo:.1f} to {1e3 * hi:.1f}, n = {REPEATS})")
    results.append(lines)


if __name__ == "__main__":
    main()
