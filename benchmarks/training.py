"""What training costs in memory and time, beside what people use: PEFT with the Trainer, and TRL's SFTTrainer.

    python benchmarks/training.py                           all of it with the default model; about an hour
    python benchmarks/training.py --only ratios,prediction  some of it
    python benchmarks/training.py --data DIR                speed on MemoryBank's dialogues instead of the demo's
    python benchmarks/training.py --quick                   four layers, few steps; appends only where --out says
    python benchmarks/training.py --plot                    draws docs/training-budget.svg anew from the results

    ratios      peak of live tensors / M*, at the tightest plan, and of the peers for the same step
    process     peak RSS / (M* + the runtime), which is a process with the same libraries and no model
    speed       tokens/s at the same batches and precision, step by step in turn
    sweep       budgets from the least to four times that: speed, peaks, what the planner chose
    prediction  predicted against measured peaks of at least 30 configurations

Each part appends its lines when it is done. Each trainer runs in a process of its own. Needs peft, trl, accelerate
and, for the peers' NF4, bitsandbytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import results
import training_memory
import training_prediction
import training_speed
import training_sweep
from training_scale import STREAM, Line, Scale, quick

PLOT = Path(__file__).resolve().parent.parent / "docs" / "training-budget.svg"
TARGETS = {
    "peak of live tensors / M*": (0.0, 1.15),
    "peak RSS / (M* + runtime), since loaded": (0.0, 1.3),
    "predicted peak, most above the measured": (0.0, 5.0),
    "predicted peak, most below the measured": (0.0, 2.0),
    "larger budget surely slower": (0.0, 0.0),
}
SPEEDS = {training_speed.FREE: 1.0, training_speed.TIGHT: 0.7}


def parts(scale: Scale, short: bool) -> dict[str, Callable[[], Iterator[Line]]]:
    """The parts by name, in the order in which they run."""
    return {
        "ratios": lambda: training_memory.ratios(scale),
        "process": lambda: training_memory.process(scale),
        "speed": lambda: training_speed.speed(scale),
        "sweep": lambda: training_sweep.sweep(scale),
        "prediction": lambda: training_prediction.prediction(short),
    }


def judged(line: Line) -> str:
    """Says whether a line is what was aimed at; empty where nothing was, as for the peers."""
    if line["bench"] == "training-speed" and "ratio" in line:
        least = next(least for name, least in SPEEDS.items() if line["case"].endswith(name))
        return f"ratio >= {least}: {'met' if line['ratio'] >= least else 'MISSED'}"
    if line["bench"] == "training" and not line["case"].startswith(training_memory.OURS):
        return ""
    if line["metric"] not in TARGETS:
        return ""
    most = TARGETS[line["metric"]][1]
    return f"<= {most:g}: {'met' if line['value'] <= most else 'MISSED'}"


def run(name: str, part: Callable[[], Iterator[Line]], folder: Path | None) -> None:
    """Measures a part, prints and appends it."""
    began, found = time.perf_counter(), []
    for line in part():
        found.append(line)
        against = f"  {line['ratio']} × {line['peer']}" if "ratio" in line else ""
        print(
            f"{line['case']}: {line['metric']} {line['value']:.4g} {line['unit']}{against}  {judged(line)}", flush=True
        )
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if folder is not None:
        print(f"appended to {results.append(found, folder).name}", flush=True)


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of parts, with commas between")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of benchmarks/results")
    parser.add_argument("--plot", action="store_true", help="draw only")
    given = parser.parse_args()
    folder = given.out or (None if given.quick else results.FOLDER)
    if given.plot:
        training_sweep.draw(given.out or results.FOLDER, PLOT if given.out is None else given.out / PLOT.name)
        return
    if given.data is not None and not (given.data / STREAM).is_file():
        sys.exit(f"training: {given.data / STREAM} is not there; --data names the folder of the data sets")
    with tempfile.TemporaryDirectory() as scratch:
        scale = quick(given.threads, Path(scratch)) if given.quick else Scale(given.threads, data=given.data)
        every = parts(scale, given.quick)
        names = list(every) if given.only is None else given.only.split(",")
        if unknown := sorted(set(names) - set(every)):
            sys.exit(f"training: no part {', '.join(unknown)}; choose from {', '.join(every)}")
        for name in names:
            run(name, every[name], folder)
    if folder is not None and "sweep" in names:
        training_sweep.draw(folder, PLOT if given.out is None else given.out / PLOT.name)


if __name__ == "__main__":
    main()
