"""How long a fresh interpreter takes to `import edge_sdss`, or the command line, against one that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import results

from edge_sdss.profiling.versus import versus_many

CASES = ("import edge_sdss", "import edge_sdss.cli")


def run(program: str) -> None:
    """One fresh interpreter that runs the program."""
    subprocess.run([sys.executable, "-c", program], check=True)


def main() -> None:
    """Each against the bare interpreter, in turn, so that a slow spell of the machine falls on both."""
    lines = []
    for case in CASES:
        found = versus_many({case: partial(run, case), "bare": partial(run, "pass")})["bare"]
        line = results.timed(
            "import", case, "fresh interpreter", found, "bare interpreter", python=sys.version.split()[0]
        )
        print(f"{case}: {line['value']:.1f} {line['unit']}, {line['ratio']:.2f} times the bare interpreter's")
        lines.append(line)
    results.append(lines)


if __name__ == "__main__":
    main()
