"""Puts LoRA layers into a model for the time of a round, and writes them as a PEFT folder.

Knows nothing of data, losses or optimizers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdss import config
from edge_sdss.errors import InputError, message

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edge_sdss.lm import LanguageModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@contextmanager
def trainable(lm: LanguageModel, settings: config.Tuning, start: Path | None) -> Iterator[Any]:
    """Yields `lm`'s model with a trainable adapter, new or a copy of the one at `start`, as a PeftModel.

    On leaving, however that comes about, `lm` is as it was: its own adapter attached, base weights, modes
    and `requires_grad` untouched. The initial weights come from torch's generator, which the caller seeds.
    Raises InputError where `start` is no adapter of this model.
    """
    attached = lm.adapter
    try:
        lm.attach(start)  # says whether it fits
        lm.attach(None)
        with _restored(lm.model) as base:
            yield _inject(base, settings, start)
    finally:
        lm.attach(attached)


@contextmanager
def _restored(base: Any) -> Iterator[Any]:
    training = base.training
    wanted = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield base
    finally:
        _strip(base)
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        base.train(training)


def write(model: Any, folder: Path, base_name: str) -> None:
    """Writes the adapter of a PeftModel into `folder`, as plain PEFT reads it. Equal weights, equal bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    settings = model.peft_config["default"].to_dict()
    settings.update(base_model_name_or_path=base_name, inference_mode=True)
    text = json.dumps(settings, indent=2, sort_keys=True, default=_json)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def head(base: Any) -> Tensor:
    """Returns the output head's weight [V, H] of a causal language model.

    Raises InputError where the logits are not simply hidden @ weight.T.
    """
    layer = base.get_output_embeddings()
    odd = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if _set(base.config, name)]
    if layer is None or getattr(layer, "bias", None) is not None:
        odd.append("a head with a bias" if layer is not None else "no head")
    if odd:
        raise InputError(message(f"tune {type(base).__name__}", f"it has {odd[0]}", "choose a Llama-like model"))
    weight: Tensor = layer.weight
    return weight


def _inject(base: nn.Module, settings: config.Tuning, start: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    if start is not None:
        return PeftModel.from_pretrained(base, start, is_trainable=True)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def _strip(base: nn.Module) -> None:
    # Not PeftModel.unload: an interrupt may have come while the layers were being put in.
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def _json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _set(settings: Any, name: str) -> bool:
    return getattr(settings, name, None) not in (None, 1, 1.0)
