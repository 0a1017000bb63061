"""Predicted against measured peaks of live tensors, over many configurations: see benchmarks/training.py."""

from __future__ import annotations

import copy
import tempfile
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training_candidates import MEASURED
from training_scale import Line, cut

from edge_sdss import config
from edge_sdss.lm import Encoded
from edge_sdss.tuning import planner, shapes
from edge_sdss.tuning.fit import Fit
from edge_sdss.tuning.predict import predict

KINDS = ("float32", "bfloat16", "int8", "nf4")
SHAPED: dict[str, dict[str, Any]] = {
    "qwen2": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 3, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 32_768, "sliding_window": 512, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
"""The widths of Qwen2.5-0.5B and Gemma3-270M with fewer layers and words, and random weights."""


@dataclass(frozen=True)
class Case:
    """One configuration; `micro_batch` of a step of `batch_size` go through the model at a time."""

    model: str
    weights: str = "float32"
    sequence: int = 256
    micro_batch: int = 1
    batch_size: int = 1
    loss_chunk: int = 64
    checkpointing: bool = True
    rank: int = 8
    top_layers: int | None = None
    targets: tuple[str, ...] | None = None


def cases(quick: bool) -> list[Case]:
    """All that are measured; one of a model where it is to be quick."""
    found = []
    for model in ("smollm2", *SHAPED):
        plain = Case(model)
        found += [replace(plain, weights=kind, checkpointing=on) for kind in KINDS for on in (True, False)]
        found += [
            replace(plain, sequence=512, loss_chunk=16, batch_size=2),
            replace(plain, sequence=128, micro_batch=4, batch_size=4, checkpointing=False),
            replace(plain, sequence=64, micro_batch=2, batch_size=4, loss_chunk=128, rank=32, weights="nf4"),
            replace(plain, top_layers=2, weights="bfloat16", batch_size=2),
            replace(plain, targets=("q_proj", "v_proj"), checkpointing=False),
        ]
    return found[::13] if quick else found


def prediction(quick: bool) -> Iterator[Line]:
    """A line for each configuration, and the largest errors."""
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        models = _Models(Path(folder))
        for case in cases(quick):
            foreseen, measured = _both(case, models.get(case.model))
            errors.append(100 * (foreseen / measured - 1))
            words = ", ".join(f"{name} {value}" for name, value in asdict(case).items() if value is not None)
            facts = {**asdict(case), "predicted_mib": foreseen / 2**20, "measured_mib": measured / 2**20}
            yield _line(words, "error of the predicted peak", errors[-1], settings=facts, bench="training-predictions")
    common = {"n": len(errors), "settings": {"models": ["smollm2", *SHAPED]}}
    case_name = "SmolLM2-135M (4 layers), Qwen2.5 and Gemma3 shaped"
    yield _line(case_name, "predicted peak, most above the measured", max(0.0, *errors), **common)
    yield _line(case_name, "predicted peak, most below the measured", max(0.0, *(-each for each in errors)), **common)


def _line(case: str, metric: str, value: float, bench: str = "training-prediction", **rest: Any) -> Line:
    return {"bench": bench, "case": case, "metric": metric, "value": value, "unit": "%", **rest}


class _Models:
    """The float32 models that are cut or made once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name, self._model = folder, "", None

    def get(self, name: str) -> tuple[dict[str, Any], Any]:
        """The stated configuration and a copy of the model."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if name != self._name:
            torch.manual_seed(0)
            if name in SHAPED:
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPED[name]))
            else:
                model = AutoModelForCausalLM.from_pretrained(cut(self._folder / name), dtype=torch.float32)
            self._name, self._model = name, model.eval()
        assert self._model is not None
        return self._model.config.to_dict(), copy.deepcopy(self._model)


def _both(case: Case, given: tuple[dict[str, Any], Any]) -> tuple[int, int]:
    """The predicted and the measured peak, in bytes."""
    from edge_sdss.tuning import adapter
    from edge_sdss.tuning.steps import Optimisation

    stated, model = given
    settings = config.Tuning(
        rank=case.rank,
        targets=case.targets or "all-linear",
        top_layers=case.top_layers,
        weights=case.weights,
        batch_size=case.batch_size,
        max_tokens=case.sequence,
        epochs=1,
    )
    fit = Fit(case.micro_batch * case.sequence, case.loss_chunk, case.checkpointing, case.sequence)
    architecture = shapes.architecture(stated)
    setup = planner.setup_of(architecture, settings, fit, case.sequence, case.weights, "float32")
    setup = replace(setup, labels=case.micro_batch * (case.sequence - 1))
    foreseen = predict(architecture, setup, checkpointing=case.checkpointing).peak_bytes
    lm: Any = types.SimpleNamespace(model=model, adapter=None, attach=lambda folder: None, fingerprint="")
    adapter.quantise(lm, settings)
    ids = [(17 * i) % stated["vocab_size"] for i in range(case.sequence)]
    with adapter.trainable(lm, settings, None) as adapted:
        run = Optimisation(adapted, [Encoded(ids, 1)] * (case.batch_size * (MEASURED + 1)), settings)
        while len(run.done) < run.steps:
            run.advance(fit)
    return foreseen, run.peak_tensor_bytes
