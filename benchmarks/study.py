"""The paper's experiment: does the selection pay? Runs cell after cell, and writes what came out.

    python benchmarks/study.py run --quick                  three policies, one seed, on the packaged stream
    python benchmarks/study.py run --quick --data DIR       ... on alpaca
    python benchmarks/study.py run --data DIR               the whole grid; hours; goes on where it was stopped
    python benchmarks/study.py run --data DIR --grid main --set esconv --limit 3
    python benchmarks/study.py status                       what is done and what is left
    python benchmarks/study.py report                       tables and drawings from the results file alone

A cell appends one line to benchmarks/results/quality/<device>.jsonl (with --quick: to study-out/). Stop it when you
like: only the cell at work is lost. Several processes may run at once; each claims its cells. `run` ends with 1
where nothing was left to do. Embeddings, variants and trained outcomes are kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import results
from quality import protocol, report
from quality.cell import Bench
from quality.ledger import Ledger
from quality.protocol import Cell, Protocol
from quality.sets import DEMO

from edge_sdss import console, default_model, device
from edge_sdss.errors import EdgeSdssError, InputError, message

QUICK_OUT = Path("study-out")


def chosen(given: argparse.Namespace) -> list[Cell]:
    """The cells asked for. Raises InputError for none, and for one of a confirmation set without --confirm."""
    if given.quick:
        return protocol.quick((given.set or [DEMO if given.data is None else protocol.DEVELOPMENT[0]])[0])
    grids = protocol.grids()
    if not given.confirm and (kept := sorted(set(given.set or ()) & set(protocol.CONFIRMATION))):
        found = f"{', '.join(kept)} are for confirming a finished policy (ADR 18)"
        raise InputError(message("run the study", found, "name the policy: --confirm POLICY"))
    if given.confirm:
        cells = protocol.confirmation(given.confirm)
    else:
        cells = [cell for name in given.grid or grids for cell in grids[name]]
    cells = list(dict.fromkeys(cells))
    asked = {"set": given.set, "policy": given.policy, "order": given.order}
    found = [cell for cell in cells if all(not only or getattr(cell, name) in only for name, only in asked.items())]
    if not found:
        known = "; ".join(f"--{name} {', '.join(dict.fromkeys(getattr(c, name) for c in cells))}" for name in asked)
        raise InputError(message("run the study", "no cell is of all that was asked for", f"choose among {known}"))
    return found


def run(given: argparse.Namespace, ledger: Ledger, settings: Protocol) -> int:
    """Runs what is left, and returns how many cells this process has done."""
    cells, done = chosen(given), 0
    before = ledger.done(settings.digest)
    made_at = results.commit()
    with console.progress() as progress:
        bench = Bench(settings, given.data, given.cache, progress)
        for number, cell in enumerate(cells, start=1):
            if given.limit is not None and done >= given.limit:
                break
            if cell in before:
                continue
            with ledger.claim(cell, settings.digest) as mine:
                if not mine:
                    continue
                line = bench.run(cell) | _stamp(made_at)
                ledger.append(line)
            done += 1
            nll = sum(line["nll"]) / len(line["nll"])
            print(f"{number}/{len(cells)} {cell.name}: NLL {nll:.4f}, {line['wall_s']:.0f} s", flush=True)
    return done


def _stamp(made_at: str) -> dict[str, object]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "nice": os.nice(0),
        "commit": made_at,
        "device": device.slug(),
        "emulated": device.emulated() is not None,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def status(given: argparse.Namespace, ledger: Ledger, settings: Protocol) -> None:
    """Prints done / all of each part of the grid."""
    done = ledger.done(settings.digest)
    for name, cells in protocol.grids().items():
        print(f"{name:12} {len(done.intersection(cells)):4} of {len(cells):4}")
    print(
        f"{'other':12} {len(done.difference(*protocol.grids().values())):4}   {ledger.path}, protocol {settings.digest}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("run", "status", "report"):
        verb = verbs.add_parser(name)
        verb.add_argument("--quick", action="store_true", help="one set, three policies, one seed; 15 minutes at most")
        verb.add_argument("--results", type=Path, help="file of results, instead of the one of this device")
        verb.add_argument("--out", type=Path, help="folder of the report, instead of docs")
        verb.add_argument("--data", type=Path, help="folder of the data sets")
        verb.add_argument("--cache", type=Path, default=default_model.cache() / "study", help="what cells share")
        verb.add_argument("--grid", action="append", choices=list(protocol.grids()), help="a part of the grid")
        verb.add_argument("--set", action="append", help="these sets only")
        verb.add_argument("--policy", action="append", help="these policies only")
        verb.add_argument("--order", action="append", choices=protocol.ORDERS, help="these orders only")
        verb.add_argument("--confirm", action="append", metavar="POLICY", help="this policy on the confirmation sets")
        verb.add_argument("--limit", type=int, help="end after so many cells")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where nothing was left to run, 2 after an error."""
    given = _parser().parse_args(arguments)
    settings = protocol.QUICK if given.quick else Protocol()
    place = QUICK_OUT if given.quick else results.FOLDER / "quality"
    ledger = Ledger(given.results or place / f"{device.slug()}.jsonl", given.cache / "claims")
    try:
        if given.verb == "status":
            status(given, ledger, settings)
        elif given.verb == "run" and not run(given, ledger, settings):
            print("study: nothing is left to run, or other processes are at it")
            return 1
        if given.verb == "report" or (given.verb == "run" and given.quick):
            report.write(ledger.path, given.out or (QUICK_OUT if given.quick else report.DOCS))
    except EdgeSdssError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
