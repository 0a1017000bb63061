"""The whole loop on real streams: what a round changes on held-out dialogues, and what it costs.

    python benchmarks/loop.py --data DIR              the demo, MemoryBank, ChatDoctor; one run each
    python benchmarks/loop.py --report OUT/report.json  append the figures of a run that was made by hand

Every figure comes from a run's own report.json; the table in the README holds the newest of each case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results

from edge_sdss import report
from edge_sdss.profiling import Meter
from edge_sdss.profiling.window import Measurement

STREAMS = {
    "memorybank": ("memorybank/memory_bank_en.json", []),
    "chatdoctor": ("chatdoctor/chatdoctor5k.json", ["--first", "400"]),
}


def lines(found: report.RunReport, case: str) -> Iterator[dict[str, Any]]:
    """The figures of a run as lines of results."""
    run = {
        "policy": found.buffer.policy,
        "bins": found.buffer.bins,
        "offers": found.buffer.offers,
        "synthesised": found.synthesis.kept if found.synthesis else 0,
        "steps": found.tuning.steps if found.tuning else 0,
        "accepted": bool(found.gate and found.gate.accepted),
        "model": found.model.name,
    }
    common = {"bench": "loop", "case": case, "settings": run}
    if found.eval is None or found.forgetting is None or found.tuning is None:
        sys.exit(f"loop: the report of {case} has no evaluation; was the run stopped? Run it again.")
    before, after, delta = found.eval.before, found.eval.after, found.eval.delta_nll
    yield {**common, "metric": "held-out NLL before", "value": before.nll, "unit": "nats/token", "n": delta.n}
    yield {**common, "metric": "held-out NLL after", "value": after.nll, "unit": "nats/token", "n": delta.n}
    interval = {"lo": delta.lo, "hi": delta.hi, "n": delta.n}
    yield {**common, "metric": "change of held-out NLL", "value": delta.mean, "unit": "nats/token", **interval}
    rouge = found.eval.delta_rouge1
    if rouge is not None and before.rouge1 is not None and after.rouge1 is not None:
        yield {**common, "metric": "ROUGE-1 before", "value": before.rouge1, "unit": "F1", "n": rouge.n}
        yield {**common, "metric": "ROUGE-1 after", "value": after.rouge1, "unit": "F1", "n": rouge.n}
        interval = {"lo": rouge.lo, "hi": rouge.hi, "n": rouge.n}
        yield {**common, "metric": "change of ROUGE-1", "value": rouge.mean, "unit": "F1", **interval}
    general = found.forgetting
    interval = {"lo": general.lo, "hi": general.hi, "n": general.n}
    yield {**common, "metric": "change of general NLL", "value": general.delta_nll, "unit": "nats/token", **interval}
    yield {**common, "metric": "whole run", "value": sum(found.stages.values()), "unit": "s"}
    if found.tuning.peak_tensor_bytes:
        mib = found.tuning.peak_tensor_bytes / 2**20
        yield {**common, "metric": "peak of live tensors while tuning", "value": mib, "unit": "MiB"}


def record(found: report.RunReport, case: str, measured: Measurement | None = None) -> None:
    """Appends a run's figures under the commit that it ran at, and its energy where a sensor told it."""
    told = list(lines(found, case))
    if measured is not None and measured.energy.total_j is not None:
        scope = {"total_scope": measured.energy.scope}
        energy = {"metric": "energy", "value": measured.energy.total_j, "unit": "J", "settings": scope}
        told.append({"bench": "loop", "case": case, **energy})
    results.append(told, made_at=found.environment.commit)


def measured(arguments: list[str], meter: Meter) -> tuple[report.RunReport, Measurement]:
    """Runs the command line in a folder of its own; stops where it fails (1: the gate said no, still a result)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edge_sdss", *arguments, "--out", folder + "/out"]
        with meter.window("run") as window:
            code = subprocess.run(command, check=False).returncode
        if code not in (0, 1):
            sys.exit(f"loop: {' '.join(arguments)} ended with code {code}")
        return report.load(Path(folder) / "out" / "report.json"), window.result


def main() -> None:
    """Runs, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--report", type=Path, action="append", default=[], help="report.json of a finished run")
    parser.add_argument("--case", action="append", default=[], help="name of the case of each --report")
    given = parser.parse_args()
    if given.data is None and not given.report:
        sys.exit("loop: no stream; give --data DIR with the data sets, or --report of a finished run")
    if len(given.case) != len(given.report):
        sys.exit("loop: give one --case for each --report")
    for file, case in zip(given.report, given.case, strict=True):
        record(report.load(file), case)
    if given.data is not None:
        runs = {"demo": ["demo"]}
        for case, (file, options) in STREAMS.items():
            stream = given.data / file
            if not stream.is_file():
                sys.exit(f"loop: {stream} is not there; --data names the folder of the data sets")
            runs[case] = ["run", "--stream", str(stream), *options]
        with Meter.auto() as meter:
            for case, arguments in runs.items():
                found, window = measured(arguments, meter)
                record(found, case, window)


if __name__ == "__main__":
    main()
