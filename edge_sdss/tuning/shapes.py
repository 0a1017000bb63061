"""The sizes of a language model, read from its `config.json` alone: no weights, no transformers, no torch.

Knows nothing of memory, precision or training. The dense decoders of the families in `_FAMILIES` are known,
alone or as the `text_config` of a multimodal model, whose other towers are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdss.errors import InputError, message


@dataclass(frozen=True)
class Linear:
    """A linear layer of every decoder layer: its weight is [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder of `layers` equal layers. Widths are numbers of features, `q` and `kv` those of the projections.

    `linears` are those of one layer, by the names that adapters use for them. `windows` says for each layer
    how many tokens back it attends, None being all of them. `sandwich` norms follow attention and MLP as well
    as precede them. A cap squashes attention scores or logits through tanh; None where there is none.
    """

    family: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    activation: str
    linears: tuple[Linear, ...]
    qk_norm: bool
    sandwich: bool
    windows: tuple[int | None, ...]
    score_cap: float | None
    logit_cap: float | None

    @property
    def q(self) -> int:
        """Width of the queries, and of what attention returns."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' linears, which are what is quantised; without biases."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """The input embedding, and the output head where it is a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        norms = (4 if self.sandwich else 2) * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.layers * (norms + biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them; what is tied counts once."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters


@dataclass(frozen=True)
class _Family:
    """What the code of a family fixes, and what its configs leave out."""

    biased: tuple[str, ...] = ()
    bias_keys: tuple[str, ...] = ()
    fused: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
_GEMMA2 = {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2}
_GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 6}
# The published configs of its multimodal models leave these out.
_GEMMA3 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}

_FAMILIES = {
    "llama": _Family(bias_keys=("attention_bias", "mlp_bias")),
    "mistral": _Family(defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": _Family(biased=("q_proj", "k_proj", "v_proj"), defaults=_QWEN),
    "qwen3": _Family(bias_keys=("attention_bias",), qk_norm=True, defaults={**_QWEN, "head_dim": 128}),
    "gemma": _Family(bias_keys=("attention_bias",), defaults=_GEMMA),
    "gemma2": _Family(bias_keys=("attention_bias",), sandwich=True, defaults=_GEMMA2),
    "gemma3_text": _Family(bias_keys=("attention_bias",), qk_norm=True, sandwich=True, defaults=_GEMMA3),
    "phi3": _Family(fused=True),
}
_NAMES = "Llama, Mistral, Qwen (2, 2.5, 3), Gemma (1, 2, 3), Phi (3, 4)"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def of(file: Path) -> Architecture:
    """Returns the sizes that a `config.json` states. Raises InputError for no such file, and as `architecture`."""
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(message(f"read {file}", f"no JSON, {error}", "give a model's config.json")) from error
    if not isinstance(stated, dict):
        raise InputError(message(f"read {file}", "it is no object", "give a model's config.json"))
    return architecture(stated)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Returns the sizes that a parsed `config.json` of transformers states.

    Raises InputError where the family is not known, or a size is missing, no whole number above 0, or
    contradicts another.
    """
    config = _text(config)
    name = config.get("model_type")
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        found = f"model_type is {name!r}" if name is not None else "no model_type"
        raise InputError(message("read the sizes of a model", found, f"the families known are {_NAMES}"))
    known = {**family.defaults, **config}  # a null is a choice and no default's place
    config = {key: value for key, value in known.items() if value is not None}
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    _divides(heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    if "head_dim" not in config:
        _divides(hidden, heads, "hidden_size", "num_attention_heads")
    head_dim, mlp = _size(config, "head_dim", hidden // heads), _size(config, "intermediate_size")
    layers = _size(config, "num_hidden_layers")
    biased = {*family.biased, *_biased(config, family)}
    return Architecture(
        family=name,
        layers=layers,
        hidden=hidden,
        mlp=mlp,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_size(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        activation=str(config.get("hidden_activation", config.get("hidden_act", "silu"))),
        linears=_linears(hidden, mlp, heads * head_dim, kv_heads * head_dim, family.fused, biased),
        qk_norm=family.qk_norm,
        sandwich=family.sandwich,
        windows=_windows(config, layers),
        score_cap=config.get("attn_logit_softcapping"),
        logit_cap=config.get("final_logit_softcapping"),
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config, which may state the tie outside of it."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outer, **inner}


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"{key} is {value!r}" if value is not None else f"no {key}"
        raise InputError(message("read the sizes of a model", found, "give the model's whole config.json"))
    return value


def _divides(whole: int, part: int, whole_key: str, part_key: str) -> None:
    if whole % part:
        found = f"{whole_key} {whole} is no multiple of {part_key} {part}"
        raise InputError(message("read the sizes of a model", found, "mend its config.json"))


def _biased(config: Mapping[str, Any], family: _Family) -> tuple[str, ...]:
    names = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
    return tuple(name for key in family.bias_keys if config.get(key) for name in names[key])


def _linears(hidden: int, mlp: int, q: int, kv: int, fused: bool, biased: set[str]) -> tuple[Linear, ...]:
    into = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    gated = [("gate_proj", mlp), ("up_proj", mlp)]
    if fused:
        into, gated = [("qkv_proj", q + 2 * kv)], [("gate_up_proj", 2 * mlp)]
    sizes = [
        *((name, hidden, outputs) for name, outputs in into),
        ("o_proj", q, hidden),
        *((name, hidden, outputs) for name, outputs in gated),
        ("down_proj", mlp, hidden),
    ]
    return tuple(Linear(name, inputs, outputs, name in biased) for name, inputs, outputs in sizes)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if "sliding_window" not in config or not config.get("use_sliding_window", True):
        return (None,) * layers
    window, types = _size(config, "sliding_window"), config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            found = f"layer_types that are not one for each of {layers} layers"
            raise InputError(message("read the sizes of a model", found, "mend its config.json"))
        slides = [kind == "sliding_attention" for kind in types]
    elif "sliding_window_pattern" in config:
        pattern = _size(config, "sliding_window_pattern")
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        slides = [layer >= config.get("max_window_layers", 0) for layer in range(layers)]
    return tuple(window if sliding else None for sliding in slides)
