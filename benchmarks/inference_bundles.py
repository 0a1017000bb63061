"""What benchmarks/inference.py measures: bundles of the default model, adapters, and texts. Made once in a folder.

Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from edge_sdss import bundles, bundling, config, general, readers
from edge_sdss.bundles import recipes
from edge_sdss.lm import CARD, loading
from edge_sdss.types import Example, Turn, no_progress

RECIPES = {"int4": "onnxruntime-cpu", "int8": "onnxruntime-cpu-int8"}
PRECISIONS = ("int4", "int8", "float32")
RANK, ADAPTERS = 8, 11
TALK = Path("memorybank") / "memory_bank_en.json"


@dataclass(frozen=True)
class Subject:
    """Where all of it lies. `model` is a folder, None for the default model; `data` the folder of the data sets."""

    work: Path
    threads: int
    model: str | None = None
    data: Path | None = None

    @property
    def settings(self) -> config.Model:
        """Of the model in torch: float32 on the CPU."""
        return config.Model(name=self.model, device="cpu", dtype="float32")

    @property
    def facts(self) -> dict[str, object]:
        """What the settings of every line say."""
        return {"model": self.model or "SmolLM2-135M-Instruct", "threads": self.threads}

    def bundle(self, precision: str) -> Path:
        """Exports the model with one adapter, if it was not exported before: the recipe's graph, in a precision."""
        out = self.work / precision
        if not (out / bundles.MANIFEST).is_file():
            recipe = recipes.load(RECIPES.get(precision, RECIPES["int4"]))
            if precision not in RECIPES:  # no recipe asks for it: the same graph, before it is quantised
                changes = {"precision": precision, "block_size": None, "limits": {"kl_nats": 1e-3}}
                recipe = recipes.Recipe.model_validate({**recipe.model_dump(), **changes})
            print(f"exporting {precision} ...", flush=True)
            bundling.bundle(self.settings, recipe, out, adapters={"r8": self.adapter(0)}, overwrite=True)
        return out

    def plain(self, precision: str) -> Path:
        """The same bundle, of which no adapter is active: what a device has before its first round."""
        whole, out = self.bundle(precision), self.work / f"{precision}-plain"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out, copy_function=os.link)
        bundles.write(out, bundles.load(whole).model_copy(update={"active": None}))
        return out

    def adapter(self, number: int) -> Path:
        """Writes a PEFT folder of rank 8 at every linear, of random weights that move the logits by some units."""
        folder = self.work / f"adapter-{number:02}"
        if not (folder / CARD).is_file():
            _write_adapter(folder, loading.find(self.model, no_progress), number)
        return folder

    def texts(self, count: int) -> tuple[list[Example], str]:
        """Dialogues that no adapter has seen, and their source: MemoryBank's with `data`, else the general set."""
        if self.data is None:
            return list(general.examples())[:count], "general"
        found = (d for d in readers.read(self.data / TALK) if d.prompt and d.response)
        return [Example((Turn("user", d.prompt),), d.response) for d, _ in zip(found, range(count), strict=False)], (
            TALK.parent.name
        )


def _write_adapter(folder: Path, model: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tuned.save_pretrained(folder)
    card = {"base_fingerprint": loading.fingerprint(model)}
    (folder / CARD).write_text(json.dumps(card), encoding="utf-8")
