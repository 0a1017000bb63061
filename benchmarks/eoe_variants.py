"""How well each EOE variant spreads real dialogues: the evidence behind its default (ADR 0004).

    python benchmarks/eoe_variants.py --data DIR [--dialogues 60]

For each data set: the standard deviation of EOE and its rank correlation with the number of tokens. A good
variant tells dialogues apart (spread) by something else than their length (correlation near 0).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import results
from scipy.stats import spearmanr

from edge_sdss import backends, config, readers
from edge_sdss.lm import LanguageModel
from edge_sdss.profiling.versus import versus

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


class Scored:
    """The entropy of one dialogue after the other."""

    def __init__(self, core: Any, embedded: Sequence[tuple[Any, Any]], variant: str) -> None:
        self._entropy, self._next, self._variant = core.entropy, cycle(embedded), variant

    def __call__(self) -> None:
        """Scores the next one."""
        self._entropy(*next(self._next), self._variant)


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
        embedded = []
        lengths = []
        for dialogue in drawn:
            rows = lm.token_embeddings(dialogue.text, config.Model().max_tokens).cpu().numpy()
            lengths.append(len(rows))
            embedded.append((rows, np.array([0, len(rows)])))
            for variant in VARIANTS:
                values[variant].append(core.entropy(*embedded[-1], variant)[0])
        timed = {
            variant: versus(Scored(core, embedded, variant), Scored(core, embedded, "token")) for variant in VARIANTS
        }
        for variant in VARIANTS:
            rho = float(spearmanr(values[variant], lengths).statistic)
            facts = {
                "standard deviation of EOE": (float(np.std(values[variant])), "1"),
                "rank correlation with length": (rho, "1"),
                "mean EOE": (float(np.mean(values[variant])), "1"),
            }
            print(
                f"{name:22}{variant:10}",
                *(f"{k} {v:.4g}" for k, (v, _) in facts.items()),
                sep="  ",
                flush=True,
            )
            common = {"bench": "eoe-variants", "case": f"{name}, {variant}", "n": len(drawn)}
            lines += [{**common, "metric": k, "value": v, "unit": u} for k, (v, u) in facts.items()]
            case = common["case"]
            lines.append(results.timed("eoe-variants", case, "time", timed[variant], "token", dialogues=len(drawn)))
    if not given.no_append:
        results.append(lines)


if __name__ == "__main__":
    main()
