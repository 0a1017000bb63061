"""What the fast graph must know of a decoder, read from its config.json. Knows no weights and no graph.

Families: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3 (text) and Phi-3, and whatever calls itself so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdss.errors import ExportError, message

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclass(frozen=True, slots=True)
class Spec:
    """A decoder: sizes, and where its family departs from Llama.

    `windows` is per layer the number of tokens a token sees, itself included, or None; `frequencies` per layer the
    rotary angles of one position, float64 [head_dim / 2].
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    context: int
    epsilon: float
    tied: bool
    activation: str
    packed: bool
    qk_norm: bool
    sandwich_norms: bool
    norm_offset: float
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    final_softcap: float
    windows: tuple[int | None, ...]
    frequencies: tuple[npt.NDArray[np.float64], ...]


def read(folder: Path) -> Spec:
    """Reads folder/config.json. Raises ExportError for a family or a rotary scheme that the fast graph lacks."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config.get("model_type", "")
    if family not in FAMILIES:
        raise _refusal(f"its family is {family!r}")
    defaults = {"tie_word_embeddings": family in _GEMMAS, "head_dim": 256 if family in _GEMMAS else None}
    config = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    gemma = family in _GEMMAS
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if family == "gemma":  # its files say "gelu" and mean the approximation
        activation = "gelu_pytorch_tanh"
    if activation not in _ACTIVATIONS:
        raise _refusal(f"its activation is {activation!r}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config["head_dim"] or width // heads
    layers = config["num_hidden_layers"]
    windows = _windows(config, family, layers)
    return Spec(
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        epsilon=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        activation=_ACTIVATIONS[activation],
        packed=family == "phi3",
        qk_norm=family in ("qwen3", "gemma3_text"),
        sandwich_norms=family in ("gemma2", "gemma3_text"),
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=math.sqrt(width) if gemma else 1.0,
        attention_scale=config.get("query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping", 0.0) if family == "gemma2" else 0.0,
        final_softcap=config.get("final_logit_softcapping", 0.0) if gemma else 0.0,
        windows=windows,
        frequencies=_frequencies(config, family, head_dim, windows),
    )


def _refusal(found: str) -> ExportError:
    do = f"take a recipe of the portable route, or a model of {', '.join(FAMILIES)}"
    return ExportError(message("export the fast graph", found, do))


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if window is None or (family.startswith("qwen") and not config.get("use_sliding_window", False)):
        return (None,) * layers
    if "layer_types" in config:
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    elif family == "gemma2":
        sliding = [index % 2 == 0 for index in range(layers)]
    elif family == "gemma3_text":
        pattern = config.get("sliding_window_pattern", 6)
        sliding = [(index + 1) % pattern != 0 for index in range(layers)]
    elif family.startswith("qwen"):
        sliding = [index >= config.get("max_window_layers", layers) for index in range(layers)]
    else:
        sliding = [family != "gemma"] * layers
    return tuple(window if slides else None for slides in sliding)


def _frequencies(
    config: dict[str, Any], family: str, head_dim: int, windows: tuple[int | None, ...]
) -> tuple[npt.NDArray[np.float64], ...]:
    """transformers 4 keeps rope_theta and rope_scaling, transformers 5 both in rope_parameters."""
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal("only a part of each head is rotated")
    parameters = config.get("rope_parameters") or {}
    scaling = {**(config.get("rope_scaling") or {}), **parameters}
    if "full_attention" in parameters:
        full, local = parameters["full_attention"], parameters["sliding_attention"]
        bases = full["rope_theta"], local["rope_theta"]
        scaling = full
    else:
        base = scaling.get("rope_theta", config.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4))
        bases = base, config.get("rope_local_base_freq", 1e4) if family == "gemma3_text" else base
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    full_angles = _scaled(bases[0] ** -exponents, scaling)
    if family != "gemma3_text":
        return (full_angles,) * len(windows)
    local_angles = bases[1] ** -exponents
    return tuple(full_angles if window is None else local_angles for window in windows)


def _scaled(frequencies: npt.NDArray[np.float64], scaling: dict[str, Any]) -> npt.NDArray[np.float64]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind != "llama3":
        raise _refusal(f"its rotary scaling is {kind!r}")
    names = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    context, low, high, factor = (float(scaling[name]) for name in names)
    turns = context * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(frequencies * (kept + (1 - kept) / factor))
