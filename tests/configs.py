"""Configurations of models: the published ones among the fixtures, and small ones of any family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_sdss.tuning.shapes import Architecture, architecture

CONFIGS = Path(__file__).parent / "fixtures" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def stated(name: str) -> dict[str, Any]:
    """A published config.json."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def known(name: str) -> Architecture:
    """The sizes of a published model."""
    return architecture(stated(name))


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A model that is built in no time."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "pad_token_id": 0,
    }
    return {"model_type": family, **sizes, **changes}
