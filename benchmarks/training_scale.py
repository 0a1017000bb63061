"""How much benchmarks/training.py does, and on which texts. Knows nothing of what is measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_sdss import config, default_model, demo, readers
from edge_sdss.errors import BudgetExceeded
from edge_sdss.lm import loading
from edge_sdss.tuning import libraries, planner, shapes
from edge_sdss.types import Dialogue, no_progress

STREAM = Path("memorybank") / "memory_bank_en.json"
LAYERS = 4
ABOVE = (1.0, 1.03, 1.06, 1.1, 1.2)
MIB = 1 << 20
Line = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """How much is done. `model` is a folder, None for the default model; `data` the folder of the data sets.

    `blocks` calls of `batches` batches for the speed. The sweep goes `passes` times through budgets of `factors`
    times the least, with `steps` steps, of which the first is not counted.
    """

    threads: int
    model: str | None = None
    data: Path | None = None
    sequence: int = 512
    batch_size: int = 8
    batches: int = 2
    blocks: int = 16
    factors: tuple[float, ...] = tuple(4 ** (i / 5) for i in range(6))
    passes: int = 2
    steps: int = 4
    sweep_sequence: int = 256
    sweep_batch: int = 4

    @property
    def facts(self) -> dict[str, Any]:
        """What the settings of every line say."""
        name = default_model.NAME + ("" if self.model is None else f", {LAYERS} layers")
        return {"model": name, "threads": self.threads}

    @property
    def architecture(self) -> shapes.Architecture:
        """The model's sizes."""
        stated = (loading.find(self.model, no_progress) / "config.json").read_text(encoding="utf-8")
        return shapes.architecture(json.loads(stated))

    def plan(self, settings: config.Tuning, budget_bytes: int = 1 << 50) -> planner.Plan:
        """The plan for a budget, of which the runtime takes what it was measured to take."""
        return planner.plan(self.architecture, budget_bytes, settings, runtime_bytes=libraries.runtime_bytes())

    def least_bytes(self, settings: config.Tuning) -> int:
        """The least budget that the planner accepts."""
        found = self.plan(settings)
        return found.least.needed_bytes + found.runtime_bytes


def least_that_does(attempt: Callable[[int], T], least: int) -> tuple[float, T]:
    """Tries budgets from the planner's least upwards; returns the first factor that does, and what came of it.

    Raises what `attempt` raised last, a BudgetExceeded, where none does.
    """
    for factor in ABOVE:
        try:
            return factor, attempt(round(factor * least))
        except BudgetExceeded as error:
            print(f"{factor:.2f} × the planner's least is too little: {error}", flush=True)
            last = error
    raise last


def quick(threads: int, folder: Path) -> Scale:
    """A smoke run: few layers, short sequences, few steps."""
    small: dict[str, Any] = {"sequence": 128, "batch_size": 2, "batches": 1, "blocks": 7, "factors": (1.0, 1.5, 4.0)}
    return Scale(threads, cut(folder / "cut"), passes=1, sweep_sequence=128, sweep_batch=2, **small)


def cut(folder: Path) -> str:
    """Writes the default model's first layers into a folder and returns its name."""
    from safetensors.torch import load_file, save_file

    whole = default_model.path(no_progress)
    shutil.copytree(whole, folder)
    weights = load_file(whole / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if _layer(name) < LAYERS}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**stated, "num_hidden_layers": LAYERS}), encoding="utf-8")
    return str(folder)


def _layer(name: str) -> int:
    _, inside, rest = name.partition("layers.")
    return int(rest.partition(".")[0]) if inside else 0


def long_texts(count: int) -> list[tuple[str, str]]:
    """Pairs of prompt and answer that are longer than any step takes: the demo's responses, joined."""
    answers = [dialogue.response for dialogue in demo.stream().offered]
    turned = [answers[7 * i :] + answers[: 7 * i] for i in range(count)]
    return [("Tell me all that you know of me.", " ".join(each)[:8000]) for each in turned]


def dialogues(data: Path | None, count: int) -> tuple[list[tuple[str, str]], str]:
    """The first `count` pairs of a real stream, or of the demo's without `data`, and the stream's name."""
    found: Iterable[Dialogue] = demo.stream().offered if data is None else readers.read(data / STREAM)
    pairs = [(each.prompt, each.preferred or each.response) for each in found if each.response]
    return pairs[:count], "demo" if data is None else STREAM.parent.name
