"""How well each EOE variant spreads real dialogues: the evidence behind its default (ADR 0004).

    python benchmarks/eoe_variants.py --data DIR [--dialogues 60]

For each data set: the standard deviation of EOE and its rank correlation with the number of tokens. A good
variant tells dialogues apart (spread) by something else than their length (correlation near 0).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import results
from scipy.stats import spearmanr

from edge_sdss import backends, config, readers
from edge_sdss.lm import LanguageModel

VARIANTS = ("token", "centered", "spectral", "histogram")
SETS = {
    "alpaca": "alpaca/alpaca_5000.json",
    "dolly": "dolly/dolly_3k.json",
    "empathetic_dialogues": "empathetic_dialogues/ed_test_pairs.jsonl",
    "esconv": "esconv/devWithStrategy_short.tsv",
    "chatdoctor": "chatdoctor/chatdoctor5k.json",
    "mts_dialog": "mts_dialog/MTS-Dialog-ValidationSet.csv",
    "self_instruct": "self_instruct/seed_tasks.jsonl",
    "memorybank": "memorybank/memory_bank_en.json",
}


def main() -> None:
    """Measures, prints and appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--dialogues", type=int, default=60, help="of each set, drawn with seed 0")
    parser.add_argument("--no-append", action="store_true")
    given = parser.parse_args()
    missing = [file for file in SETS.values() if not (given.data / file).is_file()]
    if missing:
        sys.exit(f"eoe_variants: --data {given.data} lacks {', '.join(missing)}; give the folder of the data sets.")
    lm = LanguageModel.load(config.Model())
    core = backends.load("numpy")
    lines = []
    for name, file in SETS.items():
        dialogues = list(readers.read(given.data / file))
        drawn = random.Random(0).sample(dialogues, min(given.dialogues, len(dialogues)))
        values: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        seconds = dict.fromkeys(VARIANTS, 0.0)
        lengths = []
        for dialogue in drawn:
            rows = lm.token_embeddings(dialogue.text, config.Model().max_tokens).cpu().numpy()
            lengths.append(len(rows))
            for variant in VARIANTS:
                start = time.perf_counter()
                values[variant].append(core.entropy(rows, np.array([0, len(rows)]), variant)[0])
                seconds[variant] += time.perf_counter() - start
        for variant in VARIANTS:
            rho = float(spearmanr(values[variant], lengths).statistic)
            facts = {
                "standard deviation of EOE": (float(np.std(values[variant])), "1"),
                "rank correlation with length": (rho, "1"),
                "mean EOE": (float(np.mean(values[variant])), "1"),
                "time": (seconds[variant] / len(drawn) * 1e6, "µs"),
            }
            print(
                f"{name:22}{variant:10}",
                *(f"{k} {v:.4g}" for k, (v, _) in facts.items()),
                sep="  ",
                flush=True,
            )
            common = {"bench": "eoe-variants", "case": f"{name}, {variant}", "n": len(drawn)}
            lines += [{**common, "metric": k, "value": v, "unit": u} for k, (v, u) in facts.items()]
    if not given.no_append:
        results.append(lines)


if __name__ == "__main__":
    main()
