"""PEFT folders on a base model. Knows nothing of how an adapter was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_sdss.errors import InputError, message

CARD = "edge_sdss.json"
"""A file beside the adapter's weights; its `base_fingerprint` names the base model it was trained on."""


def attach(base: Any, adapter: Path, fingerprint: str) -> Any:
    """Returns `base` in a `peft.PeftModel` with the adapter active and frozen, in the base's type.

    PEFT would compute float32 weights in float32 and round the result: a quarter of a bfloat16 model's time.
    Raises InputError where the folder holds no adapter in safetensors or one of another base model;
    `base` is then as it was.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    asked = f"attach adapter {adapter}"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise InputError(message(asked, f"there is no {file} in it", "give a PEFT folder"))
    _check_card(asked, adapter / CARD, fingerprint)
    do = "give an adapter that was trained on this model"
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        settings.inference_mode = True
        model = PeftModel(base, settings, autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(message(asked, _line(error), do)) from error
    try:
        result = model.load_adapter(str(adapter), "default", is_trainable=False, autocast_adapter_dtype=False)
        strange = [key for key in (*result.missing_keys, *result.unexpected_keys) if "lora_" in key]
        if strange:
            raise InputError(message(asked, f"{len(strange)} tensors have no counterpart in the model", do))
    except BaseException as error:
        detach(model)
        if isinstance(error, (RuntimeError, ValueError, OSError, SafetensorError)):
            raise InputError(message(asked, _line(error), do)) from error
        raise
    return model.eval().requires_grad_(False)


def detach(model: Any) -> Any:
    """Returns the base model of a `peft.PeftModel`, its own layers back in place."""
    base = model.unload()
    base.__dict__.pop("peft_config", None)
    return base


def _check_card(asked: str, card: Path, fingerprint: str) -> None:
    if not card.is_file():
        return
    try:
        base = json.loads(card.read_text(encoding="utf-8")).get("base_fingerprint", fingerprint)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(message(asked, f"{card.name} cannot be read, {_line(error)}", "delete it")) from error
    if base != fingerprint:
        found = f"it was trained on the model {str(base)[:12]}, this one is {fingerprint[:12]}"
        raise InputError(message(asked, found, "load the model it was trained on"))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".")
